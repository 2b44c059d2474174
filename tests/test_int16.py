"""Products in 16-bit integers: right, without overflow, the same however they are shared out."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_convert import SPEC, TOKENS, make
from test_runtime import needs_avx2
from torch import Tensor

from qquant import CalibrationSpec, QuantSpec, host, int16, int16_ir, llvm_code, place, quantize
from qquant.cli import cli
from qquant.devices import Compute, choose_compute
from qquant.errors import RunError, SpecError
from qquant.hessian import Hessian
from qquant.int16 import Columns, Weight, takes
from qquant.int16_ir import CHUNK, NORM, TOP
from qquant.manifest import NAME
from qquant.place import Place, find_place
from qquant.products import linear, packed
from qquant.reproduce import reproduce
from qquant.scratch import scratch

CPU = torch.device("cpu")
pytestmark = needs_avx2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, K] as integers (float64) and their steps [n, chunks], by the rule of `int16_ir`."""
    numbers, steps = [], []
    for part in x.split(CHUNK, dim=1):
        wide = part.double()
        by_most = wide.abs().amax(1) * (1 + 2e-7) / TOP
        step = torch.maximum(wide.norm(dim=1) / NORM, by_most)[:, None]
        numbers.append((wide / step).round())
        steps.append(step)
    return torch.cat(numbers, 1), torch.cat(steps, 1)


def by_rule(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ of rounded rows, in float64."""
    (a, steps), (b, of_b) = rounded(x), rounded(w)
    parts = zip(a.split(CHUNK, 1), b.split(CHUNK, 1), steps.unbind(1), of_b.unbind(1), strict=True)
    return sum(p @ q.T * s[:, None] * t for p, q, s, t in parts)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 200])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 240), (32, 256), (80, 272), (16, 1408)])
def test_a_linear_is_that_of_the_rounded_numbers(rows: int, n: int, k: int) -> None:
    x, w, bias = drawn(rows, k), drawn(n, k, seed=1), drawn(n, seed=2)
    got = Weight(w).multiply(x, bias)
    assert got.shape == (rows, n) and got.dtype == torch.float32
    # A few integers fall the other way, by float32's steps.
    assert error(got - bias, by_rule(x, w)) < 3e-5
    exact = x.double() @ w.double().T + bias.double()
    assert 1e-6 < error(got, exact) < 4e-4
    assert torch.equal(linear(x.view(1, rows, k), packed(w, in_int16=True), bias)[0], got)


@pytest.mark.parametrize("k", [CHUNK, 3 * CHUNK + 16])
def test_the_largest_sums_fit(k: int) -> None:
    ones = torch.ones(8, k)
    signs = torch.where(drawn(8, k) > 0, 1.0, -1.0)
    spike = 1e-3 * drawn(8, k)
    spike[:, 7] = 1e4
    for x in (ones, signs, spike, 1e15 * ones, 1e-12 * signs):
        w = x[:1].expand(16, k)  # in the same direction: the sum is the product of the norms
        assert error(Weight(w).multiply(x), x.double() @ w.double().T) < 3e-4
        square = torch.zeros(k - k % 16, k - k % 16)
        columns = Columns.of(x.T[: k - k % 16].T.contiguous())
        columns.add_products(columns, square)
        assert error(square.triu(), (x.double().T @ x.double()).triu()) < 3e-4
    assert int(NORM + CHUNK**0.5 / 2 + 1) ** 2 < 2**31


def test_integers_that_could_overflow_are_seen_by_the_test_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int16_ir, "NORM", 1.02 * NORM)
    program = llvm_code.Program(int16.Writer().text())
    monkeypatch.setattr(int16, "_compiled", lambda: program)
    ones = torch.ones(8, CHUNK)
    assert error(Weight(ones.repeat(2, 1)).multiply(ones), CHUNK * torch.ones(8, 16)) > 0.5


def test_rows_do_not_depend_on_each_other_nor_on_threads(threads: None) -> None:
    x, weight = drawn(403, 528), Weight(drawn(96, 528, seed=1))
    whole = weight.multiply(x)
    for first, last in ((0, 1), (5, 12), (397, 403)):
        assert torch.equal(weight.multiply(x[first:last]), whole[first:last])
    columns, other = Columns.of(x), Columns.of(drawn(403, 32, seed=2))
    square, cross = torch.zeros(528, 528), torch.zeros(528, 32)
    columns.add_products(columns, square)
    columns.add_products(other, cross)
    for count in (1, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(weight.multiply(x), whole)
        columns = Columns.of(x)
        again, again_cross = torch.zeros(528, 528), torch.zeros(528, 32)
        columns.add_products(columns, again)
        columns.add_products(Columns.of(drawn(403, 32, seed=2)), again_cross)
        assert torch.equal(again, square) and torch.equal(again_cross, cross)


@pytest.mark.parametrize("rows", [1, 2, 3, 255, 256, 257, 515])
@pytest.mark.parametrize("k", [16, 48, 272])
def test_products_of_columns_are_added(rows: int, k: int) -> None:
    x, y = drawn(rows, k), drawn(rows, 32, seed=1)
    out, before = drawn(k, 32, seed=2), drawn(k, 32, seed=2)
    Columns.of(x).add_products(Columns.of(y), out)
    want = x.double().T @ y.double()
    assert error(out - before, want) < 4e-4
    assert error(out - before, by_rule(x.T.contiguous(), y.T.contiguous())) < 5e-5
    square = torch.zeros(k, k)
    columns = Columns.of(x)
    columns.add_products(columns, square)
    assert error(square.triu(), (x.double().T @ x.double()).triu()) < 4e-4
    # Of a second batch in the first one's memory.
    again = Columns.of(2 * y, columns)
    assert again.numbers is not columns.numbers
    again = Columns.of(2 * x, columns)
    assert again.numbers is columns.numbers
    again.add_products(again, square)
    assert error(square.triu(), 5 * (x.double().T @ x.double()).triu()) < 4e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x, weight = drawn(9, 528), Weight(drawn(32, 528, seed=1))
    x[4, 300] = bad
    got = weight.multiply(x)
    assert got[4].isnan().all() and got[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    square = torch.zeros(528, 528)
    columns = Columns.of(x)
    columns.add_products(columns, square)
    wrong = square.triu().isnan()
    assert wrong[300, 300:].all() and wrong[:301, 300].all()
    wrong[300], wrong[:, 300] = False, False
    assert not wrong.any()


def test_nothing_gives_nothing() -> None:
    weight = Weight(drawn(32, 64))
    for x in (torch.zeros(3, 64), 1e-20 * drawn(3, 64), torch.zeros(0, 64)):
        assert not weight.multiply(x).any()
    assert weight.multiply(torch.zeros(2, 0, 64)).shape == (2, 0, 32)
    assert not Weight(torch.zeros(16, 64)).multiply(drawn(3, 64)).any()


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (0, 16), (1, 16)])
def test_other_sizes_are_multiplied_in_float32(size: tuple[int, int]) -> None:
    w = drawn(*size)
    assert not takes(w) and packed(w, in_int16=True) is w


def test_refusals() -> None:
    weight, x = Weight(drawn(32, 64)), drawn(4, 64)
    for wrong in (x.double(), x[:, :32], x.bfloat16(), x.to(torch.int16), x.to("meta")):
        with pytest.raises(RunError, match="16-bit integers"):
            weight.multiply(wrong)
    with pytest.raises(RunError, match="16-bit integers"):
        weight.multiply(x, drawn(16))
    for wrong in (drawn(4, 24), x.to(torch.int16), x.bfloat16(), x[0]):
        with pytest.raises(RunError, match="16-bit integers"):
            Columns.of(wrong)
    for wrong in (drawn(16, 24), drawn(24, 16), drawn(0, 16), drawn(16)):
        with pytest.raises(RunError, match="16-bit integers"):
            Weight(wrong)
    with pytest.raises(RunError, match="16-bit integers"):
        Columns.of(x).add_products(Columns.of(x), torch.zeros(64, 64, dtype=torch.int16))
    with pytest.raises(RunError, match="16-bit integers"):
        Columns.of(x).add_products(Columns.of(x[:3]), torch.zeros(64, 64))
    with pytest.raises(RunError, match="16-bit integers"):
        Columns.of(x).add_products(Columns.of(x), torch.zeros(64, 32))
    # Turned round in memory, it is the same.
    turned = x.T.contiguous().T
    assert torch.equal(weight.multiply(turned), weight.multiply(x))


@pytest.mark.parametrize("scale", [30.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_numbers_far_above_the_others_cost_nothing(scale: float, count: int) -> None:
    """As in the rows of a model's massive activations: what each adds to the result is alike."""
    x, w, bias = drawn(65, 528), drawn(48, 528, seed=1), drawn(48, seed=2)
    x[:, 5 : 5 + count] *= scale
    w[:, 5 : 5 + count] /= scale
    plain = drawn(65, 528, seed=3)
    x[::2] = plain[::2]
    weight, want = Weight(w), x.double() @ w.double().T + bias
    off = (weight.multiply(x, bias) - want).norm(dim=1) / want.norm(dim=1)
    rounded = x.bfloat16().double() @ w.bfloat16().double().T + bias
    assert off.max() < 3e-3 and off.mean() < 8e-4 < (rounded - want).norm() / want.norm() / 2
    # Rows without them are those of a product without such rows.
    assert torch.equal(weight.multiply(x, bias)[::2], weight.multiply(plain, bias)[::2])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("n", [32, 96])
@pytest.mark.parametrize("apart", [2e-2, 2e-3])
def test_a_hessian_is_float32s(n: int, residual: bool, outputs: bool, apart: float) -> None:
    k = 320
    w, mean = drawn(n, k), drawn(1, k, seed=9)
    batches = [mean + drawn(300 + i, k, seed=i) for i in range(3)]
    full = [x + apart * drawn(*x.shape, seed=10 + i) for i, x in enumerate(batches)]
    behind = [
        apart * drawn(len(x), n, seed=20 + i) if residual else None for i, x in enumerate(batches)
    ]
    sums = Hessian(k, weights=[w], residual=residual, outputs=outputs, integers=int16.Columns)
    for x, y, z in zip(batches, full, behind, strict=True):
        # As the walk has them.
        sums.add(x, y, z, Weight(w).multiply(y) if outputs else None)
    h, cross, pull = sums.result()
    x, y = (torch.cat(parts).double() for parts in (batches, full))
    assert h.equal(h.T) and error(h, 2 / len(x) * x.T @ x) < 2e-5
    differ = y - x
    assert cross is not None or pull is not None
    if cross is not None:
        assert error(cross, 2 / len(x) * differ.T @ x) < 1e-3
    if pull is not None:
        through = differ @ w.double().T if cross is None else 0
        both = through + (torch.cat(behind).double() if residual else 0)
        assert error(pull, 2 / len(x) * both.T @ x) < 1e-3
    assert sums.flops > 0


def test_equal_streams_differ_by_nothing() -> None:
    x, w = drawn(300, 64), drawn(32, 64)
    for outputs in (False, True):
        own = Hessian(64, weights=[w], residual=True, outputs=outputs, integers=int16.Columns)
        own.add(x, x.clone(), torch.zeros(300, 32), Weight(w).multiply(x) if outputs else None)
        _, cross, pull = own.result()
        assert (cross is None or not cross.any()) and pull is not None and not pull.any()


def test_some_rows_with_both_streams() -> None:
    x, w, rows = drawn(300, 64), drawn(64, 64), torch.tensor([3, 7, 100, 299])
    found = []
    for narrow in (False, True):
        own = Hessian(64, weights=[w, w], integers=int16.Columns if narrow else None)
        own.add(x, x[rows] + 0.1 * drawn(4, 64, seed=1), paired=rows)
        found.append(own.result())
    assert error(found[1][0], found[0][0]) < 1e-4 and error(found[1][1], found[0][1]) < 1e-3
    assert own.paired_tokens == 4


def test_quantizing_so_gives_what_float32_gives(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    spec = QuantSpec(bits=4, group_size=32)
    made = {
        dtype: quantize(
            src, tmp_path / dtype, spec, tokens=TOKENS, device="cpu", compute_dtype=dtype
        )
        for dtype in ("float32", "int16")
    }
    assert made["int16"].compute_dtype == "int16"
    for plain, narrow in zip(made["float32"].layers, made["int16"].layers, strict=True):
        assert plain.name == narrow.name and plain.damp == narrow.damp
        assert narrow.rel_error == pytest.approx(plain.rel_error, rel=0.1)
    manifest = json.loads((tmp_path / "int16" / NAME).read_text())
    assert manifest["machine"]["compute_dtype"] == "int16"
    assert "16-bit integers" in (tmp_path / "int16/README.md").read_text()
    again = reproduce(
        quantize(
            src, tmp_path / "b", SPEC, CalibrationSpec(("builtin",), 4, 32), compute_dtype="int16"
        ).path,
        src,
    )
    assert again.ok and not again.circumstances


def test_the_command(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    words = [
        "quantize",
        str(src),
        "-o",
        str(tmp_path / "dst"),
        "--group-size",
        "32",
        "--samples",
        "4",
    ]
    words += ["--seqlen", "32", "--device", "cpu", "--compute-dtype", "int16", "--timings"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "GFLOP/s" in done.output
    asked = CliRunner().invoke(cli, [*words[:3], str(tmp_path / "x"), *words[4:-1], "--dry-run"])
    assert asked.exit_code == 0, asked.output
    refused = CliRunner().invoke(
        cli, ["quantize", str(src), "-o", str(tmp_path / "y"), "--method", "nf4", *words[10:14]]
    )
    assert refused.exit_code != 0 and "compute_dtype" in refused.output
    assert "Traceback" not in refused.output


def test_auto_takes_it_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_compute("float32", CPU) == Compute(torch.float32)
    assert choose_compute("bfloat16", CPU).name == "bfloat16"
    assert choose_compute("int16", CPU) == Compute(torch.float32, True)
    assert choose_compute("int16", CPU).name == "int16"
    monkeypatch.setattr("qquant.devices._native_on_cpu", lambda: False)
    for fastest in (True, False):
        monkeypatch.setattr("qquant.devices.int16_is_fastest", lambda found=fastest: found)
        assert choose_compute("auto", CPU) == Compute(torch.float32, fastest)
        monkeypatch.setattr(place, "int16_is_fastest", lambda found=fastest: found)
        monkeypatch.setattr(place, "cpu_multiplies_bfloat16", lambda: False)
        found = find_place("cpu", "auto")
        assert found == Place("cpu", "float32", fastest) and found.plain
    assert find_place("cpu", "int16").int16
    with pytest.raises(SpecError, match=r"int16.*for CPUs"):
        choose_compute("int16", torch.device("cuda", 0))
    with pytest.raises(SpecError, match="int8"):
        choose_compute("int8", CPU)
    monkeypatch.setattr(int16, "unavailable", lambda: "there is no llvmlite")
    assert choose_compute("auto", CPU) == Compute(torch.float32)
    with pytest.raises(SpecError, match="no llvmlite"):
        choose_compute("int16", CPU)


@pytest.mark.parametrize(
    ("flags", "fastest"),
    [
        ("fpu avx2 fma f16c", True),
        ("fpu avx2 fma", False),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", False),
        ("avx2 fma f16c avx512f", True),
        ("avx2 fma f16c avx512_bf16", False),
        ("asimd", False),
    ],
)
def test_the_processor_decides(tmp_path: Path, flags: str, fastest: bool) -> None:
    said = tmp_path / "cpuinfo"
    assert not host.int16_is_fastest(said)
    said.write_text(f"processor : 0\nflags : {flags}\n")
    assert host.int16_is_fastest(said) is fastest


def test_scratch_memory_is_kept_by_thread_and_kind() -> None:
    first = scratch("a", torch.int16, 100)
    assert first.shape == (100,) and first.dtype == torch.int16
    assert scratch("a", torch.float32, 50).data_ptr() == first.data_ptr()
    assert scratch("b", torch.int16, 100).data_ptr() != first.data_ptr()
    assert scratch("a", torch.int16, 1 << 16).shape == (1 << 16,)
    elsewhere: list[int] = []
    kept = scratch("a", torch.int16, 10)
    other = threading.Thread(
        target=lambda: elsewhere.append(scratch("a", torch.int16, 10).data_ptr())
    )
    other.start()
    other.join()
    assert elsewhere != [kept.data_ptr()]
    large = scratch("a", torch.int16, 1 << 25)
    assert scratch("a", torch.int16, 1 << 25).data_ptr() != large.data_ptr()
