"""Products with quantized weights: of the codes exactly, and near enough to every row's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import make
from test_walk import BATCHES, MAKERS, _narrow, batches
from torch import Tensor, nn

from qquant import (
    QuantSpec,
    engine,
    gptq,
    int8_weight,
    llvm_code,
    measured,
    products,
    quantize,
)
from qquant.calibration import walk as calibration_walk
from qquant.calibration.probe import shared_inputs
from qquant.calibration.walk import Arrival, BlockWalk
from qquant.errors import RunError
from qquant.grid import Quantized, dequantize
from qquant.int8_weight import Weight, takes
from qquant.int8_weight_ir import CHUNKS, ROUGH, ROWS, SMALL, TOP, WIDE

runs = pytest.mark.skipif(llvm_code.against_vnni() is not None, reason="AVX-512 with VNNI")
ULP = 2.0**-8  # of a bfloat16, at the most


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def made(n: int, k: int, group: int, bits: int = 4, sym: bool = True) -> Quantized:
    draw = torch.Generator().manual_seed(n + k + bits)
    count, top = k // group, 2**bits
    codes = torch.randint(0, top, (n, k), generator=draw).to(torch.uint8)
    scales = (0.5 + torch.rand(n, count, generator=draw)) / top
    scales = torch.where(torch.rand(n, count, generator=draw) < 0.5, scales, -scales)
    zeros = torch.full((n, count), top // 2)
    if not sym:
        zeros = torch.randint(1, top + 1, (n, count), generator=draw)
    return Quantized(codes, scales, zeros.to(torch.uint8))


def exact(part: Quantized) -> Tensor:
    return dequantize(part.codes, part.scales.double(), part.zeros)


def rounded(x: Tensor, chunk: int) -> Tensor:
    """Rows as the integers say they are, by the rule of `int8_weight_ir`, in float64."""
    parts = x.float().view(len(x), -1, chunk)
    step = parts.abs().amax(-1, keepdim=True) * torch.tensor(1 / TOP)
    whole = (parts.double() * torch.where(step > 0, 1 / step, 0).double()).round()
    return (whole * step.double()).view(len(x), -1)


def off(got: Tensor, want: Tensor) -> Tensor:
    """By row, of its norm."""
    return (got.double() - want).norm(dim=-1) / want.norm(dim=-1)


@runs
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS + 7])
@pytest.mark.parametrize("n", [WIDE, 3 * WIDE, 11 * WIDE])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_product_is_that_of_the_rounded_rows(rows: int, n: int, chunk: int) -> None:
    part, x, bias = made(n, 3 * chunk, chunk), drawn(rows, 3 * chunk), drawn(1, n, 1)[0]
    want = rounded(x, chunk) @ exact(part).T
    for got, more in ((Weight(*part).multiply(x), 0), (Weight(*part).multiply(x, bias), bias)):
        bound = ULP * (want + more).abs() + 1e-5 * want.abs().max()
        assert got.dtype == torch.bfloat16 and ((got.double() - want - more).abs() <= bound).all()


@runs
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_every_width_are_exact(bits: int, sym: bool) -> None:
    """Each input alone, at the end of the range, so that nothing of it is rounded."""
    part = made(WIDE, 64, 32, bits, sym)
    got = Weight(*part).multiply(torch.eye(64).bfloat16())
    assert torch.equal(got, exact(part).T.bfloat16())


@runs
@pytest.mark.parametrize("group", [512, 1024])
def test_of_a_large_group_parts_have_steps(group: int) -> None:
    part, x = made(WIDE, 1024, group), drawn(20, 1024)
    x[:, :128] *= 30  # would take all of the range from the others
    want = rounded(x, 128) @ exact(part).T
    assert off(Weight(*part).multiply(x), want).max() < ULP


def small_of(x: Tensor, chunk: int) -> Tensor:
    """Rows of float64 without what is more than half their chunk's largest."""
    parts = x.double().view(len(x), -1, chunk)
    return parts.where(parts.abs() <= SMALL * parts.abs().amax(-1, keepdim=True), 0).view(x.shape)


@runs
@pytest.mark.parametrize(("power", "rough"), [(1, False), (3, False), (5, True), (9, True)])
def test_of_every_row_small_numbers_are_kept(power: int, rough: bool) -> None:
    """However they are distributed. The weight is the identity, so that each comes out alone."""
    one = torch.eye(256, dtype=torch.uint8)
    part = Quantized(8 + one, torch.ones(256, 2), torch.full((256, 2), 8, dtype=torch.uint8))
    x = (drawn(2000, 256).double() ** power).bfloat16()
    small = small_of(x, 128)

    def worst(made: Tensor) -> float:
        off = (made.double() - x.double()).where(small != 0, 0).norm(dim=1)
        return float((off / small.norm(dim=1)).max())

    assert worst(Weight(*part).multiply(x)) < 1.2 * ROUGH
    assert (worst(rounded(x, 128)) > 1.2 * ROUGH) == rough, "integers of 8 bits alone would not do"


@runs
@pytest.mark.parametrize(
    "others", [(), (-1.0,), (0.9, -0.6), (0.45, 0.49), (1, 0.7, 0.4, 0.3, 0.2)]
)
def test_what_is_beside_massive_numbers_is_kept(others: tuple[float, ...]) -> None:
    """What those meet is 0, so that the rest is all that comes out."""
    part, x = made(256, 384, 128), drawn(40, 384)
    for row, first, size in ((5, 100, 3000.0), (17, 200, -3000.0), (39, 300, 1000.0)):
        for i, share in enumerate((1.0, *others)):
            x[row, first + i] = share * size
            part.codes[:, first + i] = part.zeros[:, 0]
    want, few = x.double() @ exact(part).T, torch.tensor([5, 17, 39])
    lost = off(rounded(x, 128) @ exact(part).T, want)
    assert lost[few].min() > 0.3, "integers of 8 bits alone would not do"
    assert off(Weight(*part).multiply(x), want).max() < 0.05


@runs
def test_zeros_small_numbers_and_what_is_not_finite() -> None:
    part, x = made(WIDE, 128, 32), drawn(6, 128)
    x[1], x[2, :32], x[3] = 0, x[2, :32] * 1e-37, 1e-38
    x[4, 7], x[5, 90] = float("nan"), float("inf")
    got = Weight(*part).multiply(x, torch.ones(WIDE, dtype=torch.bfloat16))
    assert got[:4].isfinite().all() and got[4:].isnan().all()
    assert (got[1] == 1).all() and (got[3] == 1).all()
    assert Weight(*part).multiply(x[:0]).shape == (0, WIDE)


@runs
def test_neither_threads_nor_other_rows_count(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, x = made(96, 256, 64), drawn(131, 256) ** 3
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(Weight(*part).multiply(x))
    assert all(torch.equal(found[0], other) for other in found)
    alone = torch.cat([Weight(*part).multiply(row) for row in x.split(1)])
    assert torch.equal(found[0], alone)
    monkeypatch.setattr(int8_weight, "_STRIP", 2 * ROWS)
    assert torch.equal(found[0], Weight(*part).multiply(x))


@runs
def test_any_shape_and_strides_of_rows() -> None:
    part, wide = made(WIDE, 64, 32), drawn(30, 128)
    x = wide[:, ::2]
    got = Weight(*part).multiply(x.view(2, 15, 64))
    assert got.shape == (2, 15, WIDE)
    assert torch.equal(got.view(30, WIDE), Weight(*part).multiply(x.contiguous()))


@runs
def test_a_large_weight_is_laid_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = made(160, 256, 64), drawn(30, 256)
    whole = Weight(*part).multiply(x)
    monkeypatch.setattr(int8_weight, "_SLICE", 2 * WIDE * 256)
    assert torch.equal(whole, Weight(*part).multiply(x))


@runs
def test_what_it_takes() -> None:
    for n, k, group in ((WIDE, 96, 32), (WIDE, 256, 256), (WIDE, 384, 384), (64, 1024, 512)):
        assert takes(*made(n, k, group))
    for n, k, group in ((40, 96, 32), (WIDE, 96, 48), (WIDE, 96, 96), (WIDE, 48, 16)):
        assert not takes(*made(n, k, group))
        with pytest.raises(RunError, match="8-bit integers"):
            Weight(*made(n, k, group))
    assert not takes(*made(WIDE, 96, 32, 8))
    codes, scales, zeros = made(WIDE, 96, 32)
    for wrong in (
        (codes.T.contiguous().T, scales, zeros),
        (codes.int(), scales, zeros),
        (codes, scales.double(), zeros),
        (codes, torch.ones(WIDE, 1000), torch.ones(WIDE, 1000, dtype=torch.uint8)),
        (codes, scales, zeros[:, :1]),
    ):
        assert not takes(*wrong)
    assert not takes(*(t.to("meta") for t in made(WIDE, 96, 32)))
    assert not takes(*(t[:0] for t in made(WIDE, 96, 32)))


@runs
def test_refusals() -> None:
    weight, x = Weight(*made(WIDE, 64, 32)), drawn(3, 64)
    for given, bias in (
        (x.float(), None),
        (x[:, :32], None),
        (x.to("meta"), None),
        (x, torch.zeros(WIDE + 1)),
    ):
        with pytest.raises(RunError, match="8-bit integers"):
            weight.multiply(given, bias)


def test_who_multiplies_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_weight, "_compiled", lambda chunk: None)
    part = made(WIDE, 64, 32)
    for why in (None, "left out"):
        monkeypatch.setattr(int8_weight, "unavailable", lambda why=why: why)
        packed = products.packed_codes(*part, torch.bfloat16)
        assert isinstance(packed, Weight) is (why is None)
        assert products.packed_codes(*part, torch.float32) is None
        for quant, narrow in (
            (QuantSpec(bits=3), True),
            (QuantSpec(bits=8), False),
            (QuantSpec(target_bpw=4.5, bits=8), True),
        ):
            found = engine.in_integers("cpu", "bfloat16", quant)["quantized_weights"]
            assert found == ("int8" if narrow and not why else "bfloat16")


@runs
def test_an_estimate_is_measured_through_codes() -> None:
    linear = nn.Linear(64, WIDE, dtype=torch.bfloat16).requires_grad_(False)
    x = drawn(40, 64)
    plain = linear(x)
    assert not measured._through_codes(linear, QuantSpec(bits=8, group_size=32))
    assert torch.equal(linear(x), plain)
    assert measured._through_codes(linear, QuantSpec(bits=4, group_size=32))
    want = (15 - 8) * x.double().sum(1, keepdim=True) + linear.bias.double()
    assert (linear(x) - want).norm() < 2e-2 * want.norm()


@runs
@pytest.mark.parametrize("model_type", MAKERS)
def test_the_walk_goes_on_through_codes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the quantized stream: what later linears see is near what it is in bfloat16."""
    found: list[tuple[list[Arrival], list[Tensor]]] = []
    laid: list[tuple[int, ...]] = []

    def none(*_: Any) -> None:
        return None

    def some(*given: Any) -> Any:
        got = products.packed_codes(*given)
        laid.append(tuple(got.shape) if got else ())
        return got

    for lays in (none, some):
        monkeypatch.setattr(calibration_walk, "packed_codes", lays)
        block, kwargs, linears, residual = MAKERS[model_type](model_type)
        block = block.bfloat16()
        own = {k: _narrow(v) for k, v in kwargs.items()}
        streams = [[(h + d).bfloat16() for h in batches()] for d in (0.0, 0.01)]
        groups = shared_inputs(block, linears, streams[0][0][:1], own)
        weights = {n: block.get_submodule(n).weight.detach().clone() for n in linears}
        arrivals: list[Arrival] = []

        def solve(a: Arrival, to: Any = arrivals, of: Any = weights) -> dict[str, Quantized]:
            to.append(a)
            spec = QuantSpec(group_size=32)
            return {n: gptq.solve(of[n].float(), a.h, spec).split([len(of[n])])[0] for n in a.names}

        walk = BlockWalk(block, groups, residual=residual, hold_dtype=torch.bfloat16)
        walk.run(streams, [own] * BATCHES, solve)
        found.append((arrivals, streams[0]))
    assert sorted(laid) == sorted(tuple(w.shape) for w in weights.values())
    (one, first), (two, second) = found
    assert any(not torch.equal(a.h, b.h) for a, b in zip(one, two, strict=True))
    for a, b in zip(one, two, strict=True):
        assert (a.h - b.h).norm() < 2e-2 * a.h.norm()
    for h, g in zip(first, second, strict=True):
        assert (h.float() - g.float()).norm() < 1e-2 * h.float().norm()


@runs
def test_a_run_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear's loss, measured by its own Hessian, beside that of a run in bfloat16."""
    source = make("qwen2", tmp_path / "src")
    tokens = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0))
    spec, losses = QuantSpec(group_size=32), []
    for name in ("whole", "narrow"):
        if name == "narrow":
            monkeypatch.setattr(calibration_walk, "packed_codes", lambda *_: None)
        result = quantize(
            source, tmp_path / name, spec, tokens=tokens, device="cpu", compute_dtype="bfloat16"
        )
        losses.append([layer.rel_error for layer in result.layers])
    assert losses[0] != losses[1]
    one, two = map(torch.tensor, losses)
    assert ((one - two).abs() < 0.1 * two).all()
    assert (one.sum() - two.sum()).abs() < 0.02 * two.sum()
