"""Sums in 8-bit integers: those of the rounded numbers exactly, and near enough to a Hessian's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import make
from torch import Tensor

from qquant import (
    CalibrationSpec,
    OutputSpec,
    QuantSpec,
    engine,
    int8,
    int8_weight,
    int16,
    int16_attention,
    llvm_code,
    products,
    spec_from_recipe,
)
from qquant.checkpoint import Checkpoint
from qquant.errors import RunError
from qquant.hessian import Hessian
from qquant.identity import run_identity
from qquant.int8 import Columns
from qquant.int8_ir import CHUNK, TOP, WIDE
from qquant.world import ALONE

runs = pytest.mark.skipif(llvm_code.against_vnni() is not None, reason="AVX-512 with VNNI")
CPU = torch.device("cpu")


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rounded(x: Tensor) -> Tensor:
    """Numbers [rows, width] as the integers say they are, by the rule of `int8_ir`, in float64."""
    parts = []
    for part in x.float().split(CHUNK):
        most = part.abs().amax(0)
        step = most * torch.tensor(1 / TOP)
        whole = (part.double() * torch.where(most > 0, 1 / step, 0).double()).round()
        parts.append(whole * step.double())
    return torch.cat(parts)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@runs
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 255, CHUNK, CHUNK + 1, 4 * CHUNK + 13])
@pytest.mark.parametrize(("lefts", "rights"), [(32, 32), (64, 96), (288, 32), (32, 352)])
def test_a_sum_is_that_of_the_rounded_numbers(rows: int, lefts: int, rights: int) -> None:
    a, b = drawn(rows, lefts), 3 * drawn(rows, rights, 1)
    out = torch.full((lefts, rights), 2.0)
    left, right = Columns.of(a), Columns.of(b)
    left.add_products(right, out)
    want = rounded(a).T @ rounded(b)
    assert (out - 2 - want).abs().max() < 2e-6 * want.abs().max() * (1 + rows / CHUNK) + 1e-6
    assert left.shape == (lefts, rows) and not left.rough


@runs
@pytest.mark.parametrize("width", [32, 64, 96, 352])
def test_of_a_square_what_is_on_the_diagonal_and_above_is_added(width: int) -> None:
    x = drawn(600, width)
    whole, square = torch.zeros(width, width), torch.zeros(width, width)
    columns, others = Columns.of(x), Columns.of(x)
    columns.add_products(others, whole)
    columns.add_products(columns, square)
    assert torch.equal(square.triu(), whole.triu())
    panel = torch.arange(width) // WIDE
    assert not square[panel[:, None] > panel].any()


@runs
def test_the_largest_sums_are_exact() -> None:
    """All at the ends of the range, of either sign: 256 x 127 x 127, and what begins a sum."""
    x = torch.ones(CHUNK, WIDE)
    x[:, 1::2] = -1
    out = torch.zeros(WIDE, WIDE)
    Columns.of(x.bfloat16()).add_products(Columns.of(-x.bfloat16()), out)
    assert (out + x.T @ x).abs().max() < 1e-3


@runs
def test_zeros_small_numbers_and_what_is_not_finite() -> None:
    x = drawn(300, 64)
    x[:, 3], x[:, 4] = 0, x[:, 4] * 1e-37
    x[5, 10], x[290, 11] = float("nan"), float("inf")
    out = torch.zeros(64, 64)
    columns = Columns.of(x)
    columns.add_products(columns, out)
    spoilt = torch.zeros(64, dtype=torch.bool)
    spoilt[10:12] = True
    assert out[spoilt].triu(10).isnan().any()
    both = spoilt[:, None] | spoilt
    assert torch.equal(out.triu().isfinite(), ~(both.triu()))
    assert not out[3, 3:10].any() and not out[3, 12:].any() and not out[4, 4:10].any()


@runs
def test_neither_threads_nor_memory_that_served_before_count(threads: None) -> None:
    x, old = drawn(700, 320), Columns.of(1e3 * drawn(700, 320, 1))
    made = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        own = Columns.of(x, old)
        assert own.numbers is old.numbers
        out = torch.zeros(320, 320)
        own.add_products(own, out)
        made.append(out)
    assert all(torch.equal(made[0], out) for out in made)
    assert Columns.of(drawn(699, 320), old).numbers is not old.numbers


@runs
def test_strided_inputs_are_read_as_they_are() -> None:
    wide = drawn(300, 128)
    a, b = torch.zeros(64, 64), torch.zeros(64, 64)
    for x, out in ((wide[:, ::2], a), (wide[:, ::2].contiguous(), b)):
        columns = Columns.of(x)
        columns.add_products(columns, out)
    assert torch.equal(a, b)


@runs
def test_one_number_above_all_others_is_said() -> None:
    x = drawn(2 * CHUNK, 64)
    x[300, 40] = 100.0  # the others are still 0.8 / (100 / 127) = 1 on average
    assert not Columns.of(x).rough
    for row in range(300, 305):  # five of 256, and 1000 is as one
        x[row, 40] = 1000.0
        assert Columns.of(x).rough
    x = torch.zeros_like(x)
    x[300, 40] = 1000.0  # nothing else there is lost
    assert not Columns.of(x).rough


@runs
def test_a_columns_rounding_is_a_small_part_of_its_square() -> None:
    """Also where all others are as badly rounded as they can be: half a step, to nothing."""
    x = torch.full((CHUNK, WIDE), 0.499 / TOP).bfloat16()
    x[0] = 1
    for given, most in ((x, 4e-3), (drawn(CHUNK, WIDE), 3e-3), (drawn(CHUNK, WIDE) ** 5, 2e-2)):
        out = torch.zeros(WIDE, WIDE)
        Columns.of(given).add_products(Columns.of(given), out)
        exact = given.double().square().sum(0)
        assert ((out.diag() - exact).abs() / exact).max() < most


def hessians(given: list[Tensor], weight: Tensor, residual: bool) -> list[Hessian]:
    """By integers, and of float32."""
    both = [
        Hessian(weight.shape[1], weights=[w], residual=residual, integers=kind)
        for w, kind in ((weight.bfloat16(), Columns), (weight.bfloat16().float(), None))
    ]
    for i, x in enumerate(given):
        full = (x.float() * 1.05).bfloat16()
        h = drawn(len(x), len(weight), 50 + i)
        rows = torch.arange(100) if i == 1 else None
        full, h = (full, h) if rows is None else (full[rows], h[rows])
        for stats, wide in zip(both, (False, True), strict=True):
            own = [t.float() if wide else t for t in (x, full, h)]
            stats.add(own[0], own[1], own[2] if residual else None, paired=rows)
    return both


@runs
@pytest.mark.parametrize(("n", "residual"), [(640, False), (160, True), (320, True)])
def test_a_hessian_is_that_of_float32(n: int, residual: bool) -> None:
    mix = torch.randn(320, 320, generator=torch.Generator().manual_seed(7)) / 320**0.5
    given = [
        (drawn(rows, 320, i).float() @ mix + 0.5).bfloat16() for i, rows in enumerate([512] * 8)
    ]
    weight = torch.randn(n, 320, generator=torch.Generator().manual_seed(2)) / 320**0.5
    narrow, wide = hessians(given, weight, residual)
    assert narrow.tokens == wide.tokens and narrow.paired_tokens == wide.paired_tokens
    for a, b, most in zip(narrow.result(), wide.result(), (1e-3, 2e-2, 2e-2), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert error(a, b.double()) < most


@runs
def test_its_error_falls_with_tokens_and_it_is_positive() -> None:
    found = []
    for batches in (2, 32):
        stats, exact = Hessian(256, integers=Columns), torch.zeros(256, 256).double()
        for i in range(batches):
            x = drawn(512, 256, i)
            stats.add(x)
            exact += x.double().T @ x.double()
        h = stats.result()[0]
        assert torch.equal(h, h.T) and torch.linalg.eigvalsh(h.double()).min() > -1e-4
        found.append(error(h, 2 / (512 * batches) * exact))
    assert found[1] < found[0] / 2


@runs
def test_rough_columns_are_summed_of_what_they_were_made_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "native_bfloat16", lambda device: False)
    given = [drawn(512, 320, i) for i in range(3)]
    given[1][7, 100] = 3000.0
    weight = torch.randn(160, 320, generator=torch.Generator().manual_seed(2)) / 320**0.5
    narrow, wide = hessians(given, weight, True)
    h, want = narrow.result()[0], wide.result()[0]
    # A row that integers would have lost.
    lost = given[1][:, 100].clone()
    lost[7] = 0
    assert lost.abs().mean() < 0.25 * 3000 / TOP
    row = torch.arange(320) != 100
    assert error(h[100, row], want[100, row].double()) < 1e-3
    assert torch.equal(h, h.T) and error(h, want.double()) < 1e-3


@runs
@pytest.mark.skipif(not products._rounds_last(), reason="torch rounds before adding, here")
def test_rough_batches_between_others_are_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier batches foretell is of all that are in the sum, however they came there."""
    monkeypatch.setattr(products, "native_bfloat16", lambda device: True)
    stats, exact = Hessian(320, integers=Columns), torch.zeros(320, 320).double()
    for i in range(24):
        x = (drawn(512, 320, i).float() + 2).bfloat16()
        if i > 7 and i % 2:
            x[3] = 0
            x[3, 5] = 3000.0
            assert Columns.of(x).rough
        stats.add(x)
        exact += x.double().T @ x.double()
    rest = torch.arange(320) != 5
    h, want = stats.result()[0][rest][:, rest], (2 / (24 * 512) * exact)[rest][:, rest]
    assert error(h, want) < 2e-4


@runs
def test_streams_that_are_equal_do_not_differ() -> None:
    weight = drawn(64, 320, 9)
    stats = Hessian(320, weights=[weight, weight], residual=True, integers=Columns)
    x = drawn(512, 320)
    stats.add(x, x.clone(), torch.zeros(512, 128, dtype=torch.bfloat16))
    _, cross, pull = stats.result()
    assert all(t is None or not t.any() for t in (cross, pull)) and pull is not None


@runs
def test_other_sizes_are_summed_without() -> None:
    for k, weights in ((288, [drawn(40, 288)]), (300, []), (224, [])):
        plain, asked = (Hessian(k, weights=weights, integers=kind) for kind in (None, Columns))
        x = drawn(300, k)
        for stats in (plain, asked):
            stats.add(x, x * 2)
        for a, b in zip(plain.result(), asked.result(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


@runs
def test_no_rows_add_nothing() -> None:
    empty = Columns.of(drawn(0, 64))
    out = torch.zeros(64, 64)
    empty.add_products(empty, out)
    assert empty.shape == (64, 0) and not empty.rough and not out.any()
    stats = Hessian(256, weights=[drawn(64, 256)], residual=True, integers=Columns)
    for rows in (0, 300, 0):
        x = drawn(rows, 256)
        stats.add(x, x * 2, drawn(rows, 64))
    assert stats.tokens == stats.paired_tokens == 300 and stats.result()[0].isfinite().all()


@runs
def test_refusals() -> None:
    x, out = drawn(300, 64), torch.zeros(64, 64)
    for wrong in (x.float(), x[:, :40], x[0], x.to("meta")):
        with pytest.raises(RunError, match="8-bit integers"):
            Columns.of(wrong)
    columns = Columns.of(x)
    for others, place in (
        (Columns.of(x[:200]), out),
        (Columns.of(x[:, :32]), out),
        (columns, out.double()),
        (columns, out.T[::1].expand(64, 64)[:, :32]),
        (columns, torch.zeros(64, 128)[:, ::2]),
    ):
        with pytest.raises(RunError, match="8-bit integers"):
            columns.add_products(others, place)


@pytest.mark.parametrize(
    ("lacking", "has", "why"),
    [("avx512vnni", "", "VNNI"), ("", "amx-bf16", "AMX"), ("avx512bw", "", "VNNI")],
)
def test_where_it_is_not_taken(
    lacking: str, has: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llvm_code, "unavailable", lambda: None)
    there = {*llvm_code.VNNI, has} - {lacking}
    monkeypatch.setattr(llvm_code, "has", lambda *names: there.issuperset(names))
    said = int8.unavailable.__wrapped__()
    assert said is not None and why in said
    monkeypatch.setattr(int8, "unavailable", lambda: said)
    assert products.integers(CPU, torch.bfloat16) is None


def test_who_sums_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "unavailable", lambda: None)
    assert products.integers(CPU, torch.bfloat16) is Columns
    assert products.integers(CPU, torch.float32) is None
    assert products.integers(CPU, torch.float32, in_int16=True) is int16.Columns
    assert products.integers(torch.device("cuda"), torch.bfloat16) is None


def test_the_manifest_and_a_runs_identity_tell_how_sums_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[str | None] = [None, None]
    for module in (int8, int8_weight):
        monkeypatch.setattr(module, "unavailable", lambda: there[0])
    monkeypatch.setattr(int16_attention, "unavailable", lambda dtype: there[1])
    monkeypatch.setattr(engine, "native_bfloat16", lambda device: True)
    found = engine.in_integers("cpu", "bfloat16", QuantSpec())
    assert found == {"hessians": "int8", "quantized_weights": "int8", "attention": "int16"}
    assert found.items() <= engine.forms("cpu", "bfloat16", QuantSpec()).items()
    source = Checkpoint.open(make("qwen", tmp_path / "src"))

    def identity(recipe: str) -> dict[str, Any]:
        quant = spec_from_recipe(recipe)
        given: Any = {"device": CPU, "compute": "bfloat16", "tokens": None, "seat": ALONE.seat}
        return run_identity(source, quant, CalibrationSpec(), OutputSpec(), **given)

    one, two = identity("fast"), identity("default")
    assert found.items() <= one.items()
    apart = "tokens whose products are made apart"
    assert (one[apart], two[apart]) == (2048, 1024)
    there[:] = "left out", "left out"
    assert identity("fast") != one
    assert set(engine.in_integers("cpu", "bfloat16", QuantSpec()).values()) == {"bfloat16"}
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32"), ("cpu", "int16")):
        assert engine.in_integers(device, dtype, QuantSpec()) == {}
