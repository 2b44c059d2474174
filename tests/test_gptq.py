"""The solver against the paper's definitions: rounding, losses, a slow reference, refinement."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qquant import factor, gptq, report
from qquant.config import QuantSpec, spec_from_recipe
from qquant.errors import NumericsError
from qquant.events import LinearDone
from qquant.factor import factorize
from qquant.gptq import corrected_target, gptq_pass, refine, solve, stacked
from qquant.grid import dequantize, find_scales, round_to_nearest
from qquant.hessian import Hessian

N, K = 24, 128


def problem(seed: int = 0, n: int = N, k: int = K, rows: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and a correlated Hessian in float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64) * 0.2
    x = torch.randn(rows, k, generator=g, dtype=torch.float64)
    x = x + x @ mix
    x *= torch.rand(k, generator=g, dtype=torch.float64) * 2 + 0.1
    return torch.randn(n, k, generator=g, dtype=torch.float64) * 0.05, 2 / rows * x.T @ x


def loss(w: Tensor, q: Tensor, h: Tensor) -> float:
    d = w - q
    return float(((d @ h) * d).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_identity_hessian_equals_rounding(bits: int, sym: bool) -> None:
    w, _ = problem()
    spec = QuantSpec(bits=bits, sym=sym, group_size=32, correct=0, sweeps=0, scale_search=0)
    solution = solve(w, torch.eye(K, dtype=torch.float64), spec)
    scales, zeros = find_scales(w, spec)
    assert torch.equal(solution.codes, round_to_nearest(w, scales, zeros, bits))
    assert float((w - solution.weight()).abs().max()) <= float(scales.max()) * (
        0.5 if sym or bits > 2 else 1.01
    ) * (1.01 if sym else 2)


def reference(w: Tensor, h: Tensor, spec: QuantSpec, order: list[int]) -> Tensor:
    """Optimal Brain Quantization's column step written directly from the paper's equation 2.

    Each step solves with the inverse of the *remaining* Hessian, computed anew: no Cholesky, no
    blocks. Static grids.
    """
    scales, zeros = find_scales(w, spec, h.diagonal())
    g = w.shape[1] if spec.group_size == -1 else spec.group_size
    h = h + spec.damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    w, codes, left = w.clone(), torch.zeros_like(w), list(order)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        s, z = scales[:, j // g], zeros[:, j // g]
        codes[:, j] = ((w[:, j] / s).round() + z).clamp(0, 2**spec.bits - 1)
        step = (w[:, j] - s * (codes[:, j] - z)) / inverse[0, 0]
        w[:, left] -= step[:, None] * inverse[0][None]
        left = left[1:]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "sym", "group"), [(4, True, 32), (3, False, 64), (2, True, -1)])
def test_equals_a_float64_reference(act_order: bool, bits: int, sym: bool, group: int) -> None:
    w, h = problem()
    spec = QuantSpec(bits=bits, sym=sym, group_size=group, act_order=act_order, correct=0, sweeps=0)
    diagonal = h.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(K)
    assert torch.equal(solve(w, h, spec).codes, reference(w, h, spec, order.tolist()))


@pytest.mark.parametrize("recipe", ["default", "best", "fast", "qwen"])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_same_codes_for_any_block_size(recipe: str, group: int) -> None:
    w, h = problem(k=256)
    first = None
    for block in (1, 7, 32, 128, 300):
        spec = spec_from_recipe(recipe, group_size=group, block_size=block)
        solution = solve(w, h, spec)
        if first is None:
            first = solution
        assert torch.equal(solution.codes, first.codes), block
        assert torch.equal(solution.scales, first.scales), block


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_the_errors_are_the_weights_through_the_factor(
    static: bool, sym: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, h = problem()
    spec = QuantSpec(group_size=32, scale_search=0, sym=sym)
    r, damp = factorize(h, 0.01)
    assert r is not None
    grids = find_scales(w, spec) if static else (None, None)
    codes, scales, zeros, errors = gptq_pass(w, r, spec, *grids, torch.arange(K) // 32)
    damped = h + damp * h.diagonal().mean() * torch.eye(K, dtype=h.dtype)
    d = w - dequantize(codes, scales, zeros)
    torch.testing.assert_close(errors.T, d @ r)
    torch.testing.assert_close(errors.square().sum(0), ((d @ damped) * d).sum(1))
    torch.testing.assert_close(factor.upper_product(r, errors).T, d @ damped)
    monkeypatch.setattr(factor, "_LEAF", 20)  # strips, the last one narrower
    torch.testing.assert_close(factor.upper_product(r, errors).T, d @ damped)


@pytest.mark.parametrize("sym", [True, False])
def test_grids_found_on_the_way_are_of_the_weights_given_the_earlier_codes(sym: bool) -> None:
    """Each group's grid is that of the best weights with all earlier codes fixed."""
    w, h = problem()
    spec = QuantSpec(group_size=32, scale_search=0, sym=sym)
    r, damp = factorize(h, 0.01)
    assert r is not None
    codes, scales, zeros, _ = gptq_pass(w, r, spec, None, None, torch.arange(K) // 32)
    damped = h + damp * h.diagonal().mean() * torch.eye(K, dtype=h.dtype)
    d = w - dequantize(codes, scales, zeros)
    for a in range(0, K, 32):
        # min tr(D H Dᵀ) over the columns from a on, the earlier ones' errors given
        later = -torch.linalg.solve(damped[a:, a:], damped[a:, :a] @ d[:, :a].T).T
        updated = (w[:, a:] - later)[:, :32]
        wanted, zero = find_scales(updated, spec)
        torch.testing.assert_close(scales[:, a // 32], wanted[:, 0])
        assert torch.equal(zeros[:, a // 32], zero[:, 0])
    assert not torch.equal(scales, find_scales(w, spec)[0]), "not those of the weights themselves"


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("on_the_way", [True, False])
@pytest.mark.parametrize("sweeps", [0, 1, 3])
def test_reported_loss_is_the_undamped_trace(
    sweeps: int, on_the_way: bool, sym: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each row, whatever the way to it; measured in slices, the last of them smaller."""
    w, h = problem(n=300)
    monkeypatch.setattr(gptq, "_SLICE", 1)
    spec = QuantSpec(group_size=group, sym=sym, sweeps=sweeps)
    if on_the_way:
        spec = replace(spec, act_order=False, scale_search=0)
    solution = solve(w, h, spec)
    d = w - dequantize(solution.codes, solution.scales.double(), solution.zeros)
    torch.testing.assert_close(solution.row_loss, ((d @ h) * d).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.row_norm, ((w @ h) * w).sum(1))
    single = solve(w.float(), h.float(), spec)
    d = w - dequantize(single.codes, single.scales.double(), single.zeros)
    torch.testing.assert_close(single.row_loss, ((d @ h) * d).sum(1), rtol=1e-3, atol=0)


def test_the_loss_is_measured_where_the_ridge_hides_it() -> None:
    """One input far larger than the rest, without a weight: the ridge is all that one sees."""
    w, h = problem()
    w[:, 0] = 0
    h[0, 0] *= 1e9
    solution = solve(w.float(), h.float(), QuantSpec(group_size=32, damp=0.9))
    d = w - dequantize(solution.codes, solution.scales.double(), solution.zeros)
    assert float(d.square().sum() * h.diagonal().mean()) > 1e4 * float(solution.row_loss.sum())
    torch.testing.assert_close(solution.row_loss, ((d @ h) * d).sum(1), rtol=1e-3, atol=0)


def test_losses_without_a_hessian_are_of_the_weights() -> None:
    w, _ = problem(n=300)
    solution = solve(w, None, QuantSpec(group_size=32, method="rtn"))
    d = w - dequantize(solution.codes, solution.scales.double(), solution.zeros)
    torch.testing.assert_close(solution.row_loss, d.square().sum(1))
    torch.testing.assert_close(solution.row_norm, w.square().sum(1))


def test_a_quadratic_form_is_that_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """By halves down to the smallest leaf, also of odd sizes."""
    g = torch.Generator().manual_seed(0)
    d = torch.randn(5, 107, generator=g, dtype=torch.float64)
    half = torch.randn(107, 107, generator=g, dtype=torch.float64)
    h = half + half.T
    monkeypatch.setattr(factor, "_LEAF", 16)
    torch.testing.assert_close(factor.quadratic(d, h), ((d @ h) * d).sum(1))


def test_the_factor_is_upper_and_its_inverse_is_the_papers() -> None:
    _, h = problem()
    r, _ = factorize(h, 0.05)
    assert r is not None
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(K, dtype=h.dtype)
    torch.testing.assert_close(r @ r.T, damped)
    assert torch.equal(r, r.triu())
    u = torch.linalg.inv(r)
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(damped))


def test_a_factor_in_another_order_is_that_of_the_ordered_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factor, "_STRIP", 50)
    _, h = problem()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    before = h.clone()
    r, damp = factorize(h, 0.05, order)
    own, same = factorize(h[order][:, order], 0.05)
    assert r is not None and own is not None
    torch.testing.assert_close(r, own)
    assert damp == same
    assert torch.equal(h, before)


def test_weights_are_stacked_for_the_solver_without_a_copy_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gptq, "_STRIP", 7)
    parts = [torch.randn(n, 24).bfloat16() for n in (20, 7, 5)]
    w = stacked(parts)
    assert w.dtype == torch.float32 and w.T.is_contiguous()
    assert torch.equal(w, torch.cat(parts).float())


@pytest.mark.parametrize("recipe", ["default", "fast", "qwen"])
@pytest.mark.parametrize("corrected", ["", "pull", "cross"])
@pytest.mark.parametrize("inputs", [K, 32])  # and fewer of them than outputs
def test_a_layout_in_memory_changes_nothing(recipe: str, corrected: str, inputs: int) -> None:
    w, h = (t[:, :inputs].float() for t in problem())
    w, h = torch.cat([w, 2 * w]), h[:inputs].contiguous()
    spec = replace(spec_from_recipe(recipe, bits=3), group_size=32)
    given = {"pull": 0.1 * w @ h, "cross": (0.1 * h + 0.01 * h.triu()).T.contiguous().T}
    given = {key: t for key, t in given.items() if key == corrected}
    flipped = w.T.contiguous().T
    before = [t.clone() for t in (w, h, *given.values())]
    one, two = (solve(t, h, spec, **given) for t in (w, flipped))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)
    assert torch.equal(one.row_loss, two.row_loss) and torch.equal(one.zeros, two.zeros)
    assert two.codes.is_contiguous()
    for t, was in zip((w, h, *given.values()), before, strict=True):
        assert torch.equal(t, was), "what was given is left as it was"
    assert torch.equal(flipped, w)
    whole = dequantize(one.codes, one.scales, one.zeros)
    assert torch.equal(one.weight(torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 128), (4, -1), (8, 64)])
def test_no_sweep_raises_the_loss(sym: bool, bits: int, group: int) -> None:
    w, h = problem(3)
    spec = QuantSpec(bits=bits, sym=sym, group_size=group, correct=0, sweeps=0)
    start = solve(w, h, spec)
    codes, scales, zeros = start.codes, start.scales.double(), start.zeros.double()
    before = loss(w, dequantize(codes, scales, zeros), h)
    first = before
    for _ in range(4):
        codes, scales, row_loss = refine(w, h, codes, scales, zeros, spec, sweeps=1)
        after = loss(w, dequantize(codes, scales, zeros), h)
        assert float(row_loss.sum()) == pytest.approx(after, rel=1e-9)
        assert after <= before * (1 + 1e-12)
        before = after
        assert int(codes.max()) <= 2**bits - 1
        assert torch.equal(scales, scales.half().double()), "scales stay what float16 can store"
    assert before < first, "and it does lower it"


def test_refinement_reaches_the_optimum_of_a_tiny_problem() -> None:
    """Three weights, 2 bits, one fixed scale: all 64 choices tried."""
    gaps = []
    for seed in range(20):
        w, h = problem(seed, n=1, k=3, rows=20)
        spec = QuantSpec(bits=2, group_size=-1, correct=0, damp=0.0, scale_search=0, sweeps=0)
        scales, zeros = find_scales(w, spec)
        found = solve(w, h, spec)
        codes, new_scales, _ = refine(w, h, found.codes, scales, zeros, spec, sweeps=5)
        choices = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.float64)
        d = w - (choices - zeros) * scales
        best = float(((d @ h) * d).sum(1).min())
        got = loss(w, dequantize(codes, new_scales, zeros), h)
        gaps.append(got / best)  # below 1 where the scale was refitted too
    assert sorted(gaps)[len(gaps) // 2] <= 1.0
    assert max(gaps) < 3


def test_the_recipes_are_ordered_by_loss() -> None:
    w, h = problem(k=256)
    qwen, fast = (solve(w, h, spec_from_recipe(r, bits=3)) for r in ("qwen", "fast"))
    rtn = solve(w, h, spec_from_recipe("qwen", bits=3, method="rtn"))
    losses = [float(s.row_loss.sum()) for s in (fast, qwen, rtn)]
    assert losses[0] < losses[1] < losses[2]


def test_scale_search_lowers_the_weighted_error() -> None:
    w, h = problem()
    errors = []
    for search in (0, 20):
        spec = QuantSpec(bits=3, group_size=32, scale_search=search)
        scales, zeros = find_scales(w, spec, h.diagonal())
        q = dequantize(round_to_nearest(w, scales, zeros, 3), scales, zeros)
        errors.append(float(((w - q).square() * h.diagonal()).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_a_negative_scale_turns_the_grid_round() -> None:
    """-8 to 7 steps: the side with eight goes where the group's largest weights are."""
    w, h = problem()
    g = w.reshape(N, -1, 32)
    w = (g + 2 * g.abs().amax(-1, keepdim=True) * (torch.arange(32) == 3)).reshape(N, K)
    with_sign, without = (
        solve(w, h, QuantSpec(bits=3, group_size=32, correct=0, negative_scales=n))
        for n in (True, False)
    )
    assert bool((with_sign.scales < 0).any())
    assert not bool((without.scales < 0).any())
    assert float(with_sign.row_loss.sum()) < 0.9 * float(without.row_loss.sum())
    asym = solve(w, h, QuantSpec(bits=3, group_size=32, correct=0, sym=False))
    assert not bool((asym.scales < 0).any())


@pytest.mark.parametrize("inverted", [factor._INVERTED, 16])
def test_corrected_weights_are_the_least_squares_solution(
    inverted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fit to the full stream's output (plus its residual) from the quantized stream's input."""
    monkeypatch.setattr(factor, "_INVERTED", inverted)
    g = torch.Generator().manual_seed(0)
    full = torch.randn(300, K, generator=g, dtype=torch.float64)
    seen = full + 0.1 * torch.randn(300, K, generator=g, dtype=torch.float64)
    behind = 0.1 * torch.randn(300, N, generator=g, dtype=torch.float64)
    w = torch.randn(N, K, generator=g, dtype=torch.float64)
    h = 2 / 300 * seen.T @ seen
    ridge = 0.1 * float(h.diagonal().mean())
    r, _ = factorize(h, 0.1)
    assert r is not None
    got = corrected_target(
        w, r, QuantSpec(), 2 / 300 * (full - seen).T @ seen, 2 / 300 * behind.T @ seen
    )
    # ridge regression towards w: min |seen v - (full w + behind)|² 2/n + ridge |v - w|²
    wanted = full @ w.T + behind - seen @ w.T
    direct = (
        w + torch.linalg.solve(h + ridge * torch.eye(K, dtype=h.dtype), 2 / 300 * seen.T @ wanted).T
    )
    torch.testing.assert_close(got, direct)
    many = torch.cat([w] * (K // N + 1))  # more outputs than inputs, without a residual
    alone = corrected_target(many, r, QuantSpec(), 2 / 300 * (full - seen).T @ seen, None)
    summed = corrected_target(w, r, QuantSpec(), None, 2 / 300 * w @ (full - seen).T @ seen)
    torch.testing.assert_close(alone[:N], summed)
    half = corrected_target(w, r, QuantSpec(correct=0.5), None, 2 / 300 * wanted.T @ seen)
    torch.testing.assert_close(half, (got + w) / 2)
    nothing = corrected_target(w, r, QuantSpec(), torch.zeros_like(h), torch.zeros_like(w))
    assert torch.equal(nothing, w), "no difference: nothing changes"


def test_correction_brings_the_output_closer() -> None:
    g = torch.Generator().manual_seed(2)
    full = torch.randn(600, K, generator=g)
    seen = full @ (torch.eye(K) + 0.03 * torch.randn(K, K, generator=g))
    w = torch.randn(N, K, generator=g) * 0.05
    stats = Hessian(K, weights=[w])
    stats.add(seen, full)
    h, _, pull = stats.result()
    spec = QuantSpec(bits=4, group_size=32, damp=0.01, correct_damp=0.01)
    errors = [
        float((seen @ solve(w, h, spec, pull=p).weight().T - full @ w.T).square().sum())
        for p in (None, pull)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(("n", "residual"), [(16, False), (48, True), (64, False), (200, True)])
def test_streams_differ_by_the_same_however_it_is_summed(n: int, residual: bool) -> None:
    """By inputs or by outputs, whichever is less; rows that one stream lacks are left out."""
    g = torch.Generator().manual_seed(3)
    seen, w = torch.randn(40, 64, generator=g), torch.randn(n, 64, generator=g)
    full = seen + torch.randn(40, 64, generator=g)
    behind = torch.randn(40, n, generator=g)
    stats = Hessian(64, weights=[w[: n // 2], w[n // 2 :]], residual=residual)
    stats.add(seen[:30], full[:30], behind[:30] if residual else None)
    stats.add(seen[30:], full[35:], behind[35:] if residual else None, paired=torch.arange(5, 10))
    _, cross, pull = stats.result()
    assert (cross is None) == (n < 64)
    at = [*range(30), *range(35, 40)]
    apart = (full - seen) @ w.T + (behind if residual else 0)
    total = torch.zeros(n, 64) if pull is None else pull
    if cross is not None:
        total = total + w @ cross
    torch.testing.assert_close(total, 2 / 35 * apart[at].T @ seen[at], atol=1e-4, rtol=1e-4)


def test_streams_differ_by_the_same_where_the_outputs_are_known() -> None:
    """Of almost equal streams, against float64; and of equal ones nothing is left of rounding."""
    g = torch.Generator().manual_seed(3)
    seen, w = torch.randn(400, 64, generator=g), torch.randn(16, 64, generator=g)
    full = seen + 0.02 * torch.randn(400, 64, generator=g)
    behind = 0.02 * torch.randn(400, 16, generator=g)

    def summed(full: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        stats = Hessian(64, weights=[w], residual=True, outputs=True)
        for at in (slice(300), slice(300, 400)):
            stats.add(seen[at], full[at], behind[at], full[at] @ w.T)
        h, cross, pull = stats.result()
        assert cross is None and pull is not None
        torch.testing.assert_close(h, 2 / 400 * seen.T @ seen, atol=1e-5, rtol=1e-4)
        return h, pull

    exact = (full - seen).double() @ w.double().T + behind.double()
    want = 2 / 400 * exact.T @ seen.double()
    error = (summed(full, behind)[1].double() - want).norm() / want.norm()
    assert error < 1e-4
    assert not summed(seen, torch.zeros_like(behind))[1].any()
    only_behind = summed(seen, behind)[1]
    torch.testing.assert_close(only_behind, 2 / 400 * behind.T @ seen, atol=1e-5, rtol=1e-3)
    mixed = Hessian(64, weights=[w], residual=True, outputs=True)
    mixed.add(seen[:100], full[:100], behind[:100], full[:100] @ w.T)
    mixed.add(seen[100:200])
    mixed.add(seen[200:], full[200:], behind[200:], full[200:] @ w.T)
    paired = [*range(100), *range(200, 400)]
    h, _, pull = mixed.result()
    torch.testing.assert_close(h, 2 / 400 * seen.T @ seen, atol=1e-5, rtol=1e-4)
    part = 2 / 300 * exact[paired].T @ seen[paired].double()
    assert pull is not None and (pull.double() - part).norm() < 1e-4 * part.norm()
    last_row = full.clone()
    last_row[:-1] = seen[:-1]
    assert summed(last_row, torch.zeros_like(behind))[1].any(), "one token is a difference"


def test_hessian_is_the_same_however_it_is_cut() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 1024, generator=g)
    whole = Hessian(1024)
    whole.add(x)
    parts = Hessian(1024)
    for part in x.reshape(4, 24, 1024):
        parts.add(part)
    h = whole.result()[0]
    torch.testing.assert_close(h, 2 / 96 * x.T @ x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.result()[0], h, rtol=1e-4, atol=1e-5)
    assert torch.equal(h, h.T), "mirrored exactly"


def test_bfloat16_inputs_are_summed_without_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=g).bfloat16()
    stats = Hessian(64)
    stats.add(x)
    want = 2 / 512 * x.double().T @ x.double()
    error = (stats.result()[0].double() - want).norm() / want.norm()
    assert error < 1e-6


def test_dead_columns_are_named_and_harmless() -> None:
    w, h = problem()
    h[5, :] = h[:, 5] = 0
    h[77, :] = h[:, 77] = 0
    spec = QuantSpec(group_size=32, correct=0)
    solution = solve(w, h, spec)
    assert "dead-columns:2" in solution.flags
    nearest = round_to_nearest(w, solution.scales.double(), solution.zeros.double(), 4)
    assert torch.equal(solution.codes[:, [5, 77]], nearest[:, [5, 77]])
    # Harmless to the others, which are solved as well as ever.
    assert float(solution.row_loss.sum()) < 0.5 * rtn_loss(w, h, spec)


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("dead", [2, 120, K])
def test_the_loss_has_nothing_of_dead_columns(dead: int, sweeps: int) -> None:
    """However many they are: what they were given to be solved by is not of the inputs."""
    w, h = problem()
    at = torch.randperm(K, generator=torch.Generator().manual_seed(1))[:dead]
    h[at, :] = h[:, at] = 0
    solution = solve(w, h, QuantSpec(group_size=32, correct=0, sweeps=sweeps))
    d = w - solution.weight().double()
    torch.testing.assert_close(solution.row_loss, ((d @ h) * d).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(solution.row_norm, ((w @ h) * w).sum(1))


def indefinite(least: float) -> Tensor:
    """One direction comes to that many times the mean diagonal below zero."""
    h = torch.eye(K, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 1 + least
    return h


def test_damping_that_is_raised_for_the_correction_is_named() -> None:
    w, _ = problem()
    spec = QuantSpec(group_size=32, damp=0.9, correct_damp=0.005)
    h = indefinite(0.04)
    solution = solve(w, h, spec, pull=0.01 * w)
    assert (solution.flags, solution.damp) == (("correct-damp-raised:0.05",), 0.9)
    layer = LinearDone(0, "h.0.mlp.w1", 1.0, 0.01, solution.damp, solution.flags, 0.1)
    said = "the input correction needed more damping (0.05 of the mean diagonal)"
    assert report.flag_text(layer) == said
    assert solve(w, h, spec).flags == (), "there is no correction"
    assert solve(w, h, replace(spec, correct_damp=0.05), pull=0.01 * w).flags == ()


def test_a_correction_that_no_damping_allows_is_left_out_by_name() -> None:
    w, _ = problem()
    spec = QuantSpec(group_size=32, damp=0.9, correct_damp=1e-7)
    h = indefinite(50)  # 90 times the mean diagonal does, 10 times does not
    solution, plain = solve(w, h, spec, pull=0.01 * w), solve(w, h, spec)
    assert solution.flags == ("damp-raised", "correction-skipped")
    assert solution.damp == plain.damp == pytest.approx(90)
    assert torch.equal(solution.codes, plain.codes) and torch.equal(solution.scales, plain.scales)


def rtn_loss(w: Tensor, h: Tensor, spec: QuantSpec) -> float:
    scales, zeros = find_scales(w, spec)
    return loss(w, dequantize(round_to_nearest(w, scales, zeros, spec.bits), scales, zeros), h)


def singular(rank: int = 4) -> Tensor:
    x = torch.randn(rank, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 2 / rank * x.T @ x


def test_singular_hessian_raises_the_damping_as_far_as_it_must() -> None:
    """Up the ladder 1e-4, 1e-3, ... of the mean diagonal, to the first step that factors."""
    w, _ = problem()
    h = singular()
    ladder = [0.0, *(1e-4 * 10.0**i for i in range(6))]
    mean = float(h.diagonal().mean())

    def factors(damp: float) -> bool:
        damped = (h + damp * mean * torch.eye(K, dtype=h.dtype)).flip(0, 1)
        return int(torch.linalg.cholesky_ex(damped).info) == 0

    assert not factors(0.0)
    first = next(damp for damp in ladder if factors(damp))
    solution = solve(w, h, QuantSpec(group_size=32, damp=0.0, correct=0))
    assert solution.flags == ("damp-raised",)
    assert solution.damp == pytest.approx(first)
    enough = solve(w, h, QuantSpec(group_size=32, damp=0.01, correct=0))
    assert (enough.flags, enough.damp) == ((), 0.01), "nothing is raised that factors"


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("bits", [2, 4])
def test_singular_hessian_is_used_for_what_it_says(damp: float, bits: int) -> None:
    """Four directions matter of 128: the error is moved out of them, and the weights stay sane."""
    w, _ = problem()
    h = singular()
    spec = QuantSpec(bits=bits, group_size=32, damp=damp, correct=0)
    solution = solve(w, h, spec)
    weight = solution.weight().double()
    assert float(solution.row_loss.sum()) == pytest.approx(loss(w, weight, h), rel=1e-4)
    assert float(solution.row_loss.sum()) < 0.05 * rtn_loss(w, h, spec)
    assert int(solution.codes.max()) < 2**bits
    # Along the 124 directions that were not seen only the grid keeps the weights in place.
    assert float((w - weight).abs().max()) < 2 * float(w.abs().max())


def test_a_hessian_that_says_nothing_is_rounding() -> None:
    """No positive entry on the diagonal: every column is dead, and each weight is rounded alone."""
    w, h = problem()
    spec = QuantSpec(group_size=32, correct=0, scale_search=0, sweeps=0)
    scales, zeros = find_scales(w, spec)
    nearest = round_to_nearest(w, scales, zeros, 4)
    for nothing in (-h, torch.zeros_like(h)):
        solution = solve(w, nothing, spec)
        assert solution.flags == (f"dead-columns:{K}",)
        assert torch.equal(solution.codes, nearest)
        assert torch.equal(solution.scales.double(), scales)


def test_indefinite_hessian_falls_back_to_rounding_by_name() -> None:
    w, h = problem()
    h = h.clone()
    h[0, 1] = h[1, 0] = 1e12
    spec = QuantSpec(group_size=32, correct=0)
    r, tried = factorize(h, spec.damp)
    assert r is None and tried == pytest.approx(spec.damp * 10**6), "six raises, then no more"
    solution = solve(w, h, spec)
    assert solution.flags == ("rtn-fallback",)
    scales, zeros = find_scales(w, spec)
    assert torch.equal(solution.codes, round_to_nearest(w, scales, zeros, 4))
    assert torch.equal(solution.scales.double(), scales)
    assert solution.damp == pytest.approx(tried)


@pytest.mark.parametrize("which", ["weight", "Hessian"])
def test_not_finite_is_refused_by_name(which: str) -> None:
    w, h = problem()
    (w if which == "weight" else h)[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=rf"layer\.7 \({which}\).*1 of"):
        solve(w, h, QuantSpec(group_size=32), name="layer.7")


@pytest.mark.parametrize("sym", [True, False])
def test_extreme_groups(sym: bool) -> None:
    """All-zero rows, tiny and large weights: finite, close, and scales a float16 can hold."""
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    w[0] = 0
    w[1] *= 1e-7
    w[2] *= 1e4
    w[3] = w[3].abs() + 1
    solution = solve(w, torch.eye(64), QuantSpec(group_size=32, sym=sym, correct=0))
    assert bool(torch.isfinite(solution.weight()).all())
    assert float(solution.weight()[0].abs().max()) == 0
    error = (solution.weight()[2:] - w[2:]).norm() / w[2:].norm()
    assert error < 0.1
    assert int(solution.zeros.min()) >= 1, "a v1 file cannot store a zero point of 0"
    with pytest.raises(NumericsError, match="scale"):
        find_scales(w * 1e6, QuantSpec(group_size=32, sym=sym))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("least", [0.0, 0.3, -0.1])
def test_an_asymmetric_grid_reaches_the_largest_weight(bits: int, least: float) -> None:
    """Also of groups whose zero would be 0; a least weight of `least` steps."""
    maxq = 2**bits - 1
    w = torch.linspace(0, 1, 64, dtype=torch.float64).repeat(3, 1)
    w[0, 0] = least / maxq
    w[2] -= 0.4
    spec = QuantSpec(bits=bits, group_size=64, sym=False, scale_search=0)
    scales, zeros = find_scales(w, spec)
    weight = dequantize(round_to_nearest(w, scales, zeros, bits), scales, zeros)
    assert float((w - weight).abs().max()) <= 0.501 * float(scales.max())
    assert zeros[:2].tolist() == [[1], [1]]
    torch.testing.assert_close(
        scales[:2], torch.full_like(scales[:2], 1 / (maxq - 1)).half().double()
    )
    assert float(scales[2]) == pytest.approx(1 / maxq, rel=1e-3), "as ever"


def test_stacking_linears_changes_nothing() -> None:
    w, h = problem(n=48)
    spec = QuantSpec(group_size=32, correct=0)
    both = solve(w, h, spec)
    parts = [solve(w[:16], h, spec), solve(w[16:], h, spec)]
    assert torch.equal(both.codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(both.scales, torch.cat([p.scales for p in parts]))
    torch.testing.assert_close(both.row_loss, torch.cat([p.row_loss for p in parts]))
