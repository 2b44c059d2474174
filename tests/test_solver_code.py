"""The solver's machine code: loops bit for bit as in plain torch, and the search for scales."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_runtime import needs_avx2
from torch import Tensor

from qquant import columns, gptq, grid, llvm_code, solver_code, solver_ir
from qquant.columns import Choice
from qquant.config import QuantSpec
from qquant.errors import RunError

CPU = torch.device("cpu")
pytestmark = needs_avx2


@pytest.fixture(params=[(8, 4), (16, 8), (8, 3)], ids=lambda p: f"{p[0]} lanes, {p[1]} columns")
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for processors of both kinds (LLVM splits vectors that are too wide), and oddly."""
    monkeypatch.setattr(solver_code, "compiled", lambda: program(*request.param))


PROGRAMS: dict[tuple[int, int], tuple[solver_ir.Writer, llvm_code.Program]] = {}


def program(lanes: int, stretch: int) -> tuple[solver_ir.Writer, llvm_code.Program]:
    key = lanes, stretch
    if key not in PROGRAMS:
        writer = solver_ir.Writer(lanes, stretch)
        PROGRAMS[key] = writer, llvm_code.Program(writer.text())
    return PROGRAMS[key]


def block(size: int, outputs: int, bits: int, sym: bool, form: columns.Form) -> list[Tensor]:
    """What both loops leave of a block that is a part of larger matrices."""
    draw = torch.Generator().manual_seed(size * outputs + bits)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    maxq = 2**bits - 1
    wanted, weights = made(size + 2, outputs), made(size + 2, outputs)
    coupling = (0.2 * made(size, size + 5))[:, :size]  # longer rows, as the solver hands them over
    h = made(2 * size, size)
    h = h.T @ h / size + torch.eye(size)
    scales = made(3, outputs).div_(maxq / 4)
    zeros = torch.full_like(scales, (maxq + 1) / 2)
    if not sym:
        zeros = torch.randint(1, maxq + 1, zeros.shape, generator=draw).float()
    group = torch.randint(0, 3, (size,), generator=draw)
    codes = torch.zeros(size + 2, outputs, dtype=torch.uint8)
    at = slice(1, size + 1)
    moved = columns.gptq_block(
        wanted[at], weights[at], coupling, scales, zeros, group, maxq, codes[at], form
    )
    about = codes[at].float() - zeros[0]
    low, high = (float(b[0]) if sym else b for b in (-zeros[0], maxq - zeros[0]))
    change = columns.descent_block(weights[at].clone(), h, about, scales[0], low, high, form)
    return [wanted, codes, moved, about, change]


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_both_loops_are_plain_torch_bit_for_bit(bits: int, sym: bool) -> None:
    for size, outputs in ((1, 1), (5, 16), (64, 33), (128, 70), (192, 8)):
        want, got = (block(size, outputs, bits, sym, form) for form in ("steps", "llvm"))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), (size, outputs)
        if outputs > 8:
            assert want[1].unique().numel() > min(3, size) and want[4].any()


def test_numbers_at_the_edges_of_the_grid_are_rounded_alike() -> None:
    """Halves between codes, what lies beyond the grid, and negative scales."""
    size, outputs = 8, 16
    halves = torch.arange(-12, 12).repeat(16)[: size * outputs].view(size, outputs) + 0.5
    found = []
    for form in ("steps", "llvm"):
        codes = torch.empty(size, outputs, dtype=torch.uint8)
        scales = torch.tensor([1.0, -0.5])[:, None].repeat(1, outputs)
        zeros = torch.full_like(scales, 8.0)
        group, values = torch.arange(size) % 2, halves.clone()
        none = torch.zeros(size, size)
        args = values, torch.zeros_like(values), none, scales, zeros, group, 15, codes
        found.append((columns.gptq_block(*args, form), codes, values))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {0, 15} <= set(found[0][1].unique().tolist())


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    own = llvm_code.threads()

    def watched(function: int, given: int, count: int, flags: int) -> None:
        asked.append(count)
        own.run(function, given, count, flags)

    want = block(70, 330, 4, False, "llvm")
    weights = torch.randn(256, 330, generator=torch.Generator().manual_seed(0)).T
    spec = QuantSpec(group_size=64, scale_search=8)
    grids = grid.find_scales(weights, spec)
    monkeypatch.setattr(llvm_code, "threads", lambda: own._replace(run=watched))
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        got = block(70, 330, 4, False, "llvm")
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        again = grid.find_scales(weights, spec)
        assert all(torch.equal(a, b) for a, b in zip(grids, again, strict=True))
        assert set(asked) == {count}
        asked.clear()


SEARCHES = [
    QuantSpec(bits=4, group_size=32, scale_search=20, negative_scales=True),
    QuantSpec(bits=3, group_size=64, scale_search=7, negative_scales=False),
    QuantSpec(bits=2, group_size=-1, scale_search=10, negative_scales=True),
    QuantSpec(bits=8, group_size=32, scale_search=5, sym=False),
    QuantSpec(bits=2, group_size=64, scale_search=20, sym=False),
]


@pytest.fixture(params=SEARCHES, ids=lambda s: f"{s.bits} bits, {s.group_size}, {s.sym}")
def searched(request: pytest.FixtureRequest) -> tuple[QuantSpec, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(request.param.bits)
    w = torch.randn(41, 192, generator=draw) * torch.rand(41, 1, generator=draw)
    w[:4] = w[:4].abs()  # nothing negative
    w[4, :96] = 0
    w[5] = -1e-9  # below what a float16 holds
    return request.param, w, torch.rand(192, generator=draw) ** 4


def errors(w: Tensor, scales: Tensor, zeros: Tensor, weight: Tensor, spec: QuantSpec) -> Tensor:
    """Of each group, in float64, weighted: [N, G]."""
    rounded = grid.dequantize(
        grid.round_to_nearest(w.double(), scales.double(), zeros.double(), spec.bits),
        scales.double(),
        zeros.double(),
    )
    own = (w.double() - rounded).square() * weight
    return own.reshape(len(w), scales.shape[1], -1).sum(-1)


@pytest.mark.usefixtures("code")
def test_no_grid_that_was_to_be_tried_is_better(
    searched: tuple[QuantSpec, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, w, weight = searched
    assert columns.choose(CPU).form == "llvm"
    scales, zeros = grid.find_scales(w, spec, weight)
    turned = grid.find_scales(w.T.contiguous().T, spec, weight)
    assert torch.equal(scales, turned[0]) and torch.equal(zeros, turned[1])
    assert torch.equal(scales.half().float(), scales) and scales.ne(0).all()
    monkeypatch.setattr(columns, "choose", lambda *_: Choice("stretches"))
    want = errors(w, *grid.find_scales(w, spec, weight), weight, spec)
    got = errors(w, scales, zeros, weight, spec)
    assert (got <= want * (1 + 1e-5)).all() and (want <= got * (1 + 1e-5)).all()
    # Each grid by itself: with both signs the first third, of which one is taken or a better one.
    ratios = [1 - (1 - grid._SHRINK[spec.bits]) * i / spec.scale_search for i in range(99)]
    both = spec.sym and spec.negative_scales
    groups = w.reshape(len(w), scales.shape[1], -1)
    lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if spec.sym:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    some = (hi - lo) > 0
    for ratio in ratios[: spec.scale_search + 1 : 3 if both else 1]:
        tried, own_zeros = grid._Range(lo, hi, 2**spec.bits - 1, spec.sym).grid(ratio)
        for sign in (1, -1) if both else (1,):
            other = errors(w, sign * tried, own_zeros, weight, spec)
            assert (got <= other * (1 + 1e-5))[some].all()


def test_the_search_does_not_depend_on_the_width_of_vectors(
    searched: tuple[QuantSpec, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, w, weight = searched
    want = grid.find_scales(w, spec, weight)
    for lanes in (4, 8, 16):
        monkeypatch.setattr(solver_code, "compiled", lambda lanes=lanes: program(lanes, 4))
        got = grid.find_scales(w, spec, weight)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("value", [1e38, float("inf"), float("nan")])
def test_errors_that_are_no_numbers_leave_a_grid(
    value: float, searched: tuple[QuantSpec, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, w, weight = searched
    w, weight = (1e20 * w).clamp(-1e4, 1e4), torch.full_like(weight, value)
    got = grid.find_scales(w, spec, weight)
    assert got[0].ne(0).all() and got[1].ge(1).all()
    monkeypatch.setattr(columns, "choose", lambda *_: Choice("stretches"))
    if value != 1e38:  # errors that overflow may do so in one order of a sum and not in another
        want = grid.find_scales(w, spec, weight)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_the_search_is_worth_something(searched: tuple[QuantSpec, Tensor, Tensor]) -> None:
    spec, w, weight = searched
    plain = errors(
        w, *grid.find_scales(w, QuantSpec(**{**vars(spec), "scale_search": 0})), weight, spec
    )
    got = errors(w, *grid.find_scales(w, spec, weight), weight, spec)
    assert (got <= plain * (1 + 1e-5)).all() and got.sum() < 0.99 * plain.sum()


def test_many_rows_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(group_size=32, scale_search=6)
    want = grid.find_scales(w, spec)
    monkeypatch.setattr(grid, "_SLICE", 64 * 7)
    assert all(torch.equal(a, b) for a, b in zip(want, grid.find_scales(w, spec), strict=True))


@pytest.mark.parametrize("sym", [True, False])
def test_a_whole_solve_is_that_of_plain_torch(sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(40, 192, generator=draw), torch.randn(400, 192, generator=draw)
    h = x.T @ x / 200
    spec = QuantSpec(bits=4, sym=sym, group_size=32, sweeps=2)
    got = gptq.solve(w, h, spec)
    # The search by torch: no two grids here are so near that the order of sums decides.
    monkeypatch.setattr(columns, "choose", lambda *_: Choice("steps"))
    want = gptq.solve(w, h, spec)
    for name in ("codes", "scales", "zeros", "row_loss"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_float64_and_other_devices_get_another_form() -> None:
    assert columns.choose(CPU) == Choice("llvm")
    assert columns.choose(CPU, torch.float64) == Choice("stretches")
    assert columns.choose(torch.device("meta")) == Choice("stretches")


def test_where_it_cannot_run_or_is_wrong_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose() -> Choice:
        return columns._choose.__wrapped__(CPU, torch.float32)

    search, descent = solver_code.search, solver_code.descent_block
    wrong = Choice("stretches", "its results are not those of plain torch")
    monkeypatch.setattr(solver_code, "search", lambda *a, **k: (search(*a, **k)[0] / 2, a[2] + 8))
    assert choose() == wrong
    monkeypatch.setattr(solver_code, "search", search)
    assert choose() == Choice("llvm")
    monkeypatch.setattr(solver_code, "descent_block", lambda *a: descent(*a) * 1.0000001)
    assert choose() == wrong

    def fail(*_: object) -> None:
        raise RuntimeError("LLVM ERROR\nmore")

    monkeypatch.setattr(solver_code, "gptq_block", fail)
    assert choose() == Choice("stretches", "RuntimeError: LLVM ERROR")
    monkeypatch.setattr(llvm_code, "unavailable", lambda: "llvmlite is not installed")
    assert choose() == Choice("stretches", "llvmlite is not installed")
    # What nobody can mend is not told with every run.
    monkeypatch.setattr(llvm_code, "unavailable", lambda: "a processor of kind aarch64")
    monkeypatch.setattr(llvm_code.platform, "machine", lambda: "aarch64")
    assert choose() == Choice("stretches")


GOOD = {
    "wanted": torch.zeros(4, 16),
    "weights": torch.zeros(4, 16),
    "coupling": torch.eye(4),
    "scales": torch.ones(2, 16),
    "zeros": torch.ones(2, 16),
    "group": torch.tensor([0, 0, 1, 1]),
    "codes": torch.zeros(4, 16, dtype=torch.uint8),
}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wanted", torch.zeros(4, 16).double(), "float64"),
        ("wanted", torch.zeros(16, 4).T, "strides"),
        ("wanted", torch.empty(4, 16, device="meta"), "on meta"),
        ("weights", torch.zeros(4, 15), r"\[4, 15\]"),
        ("coupling", torch.eye(4).double(), "float64"),
        ("coupling", torch.eye(3), r"\[3, 3\]"),
        ("scales", torch.ones(2, 17), r"\[2, 17\]"),
        ("zeros", torch.ones(1, 16), r"\[1, 16\]"),
        ("group", torch.tensor([0, 0, 1, 2]), "rows of 2 scales"),
        ("group", torch.tensor([0, -1, 1, 1]), "rows of 2 scales"),
        ("group", torch.tensor([0, 0, 1, 1], dtype=torch.int32), "int32"),
        ("codes", torch.zeros(4, 16), "float32"),
    ],
)
def test_no_address_of_anything_else_is_taken(name: str, value: Tensor, said: str) -> None:
    given = {**GOOD, name: value}
    if name == "wanted":
        given["codes"] = torch.zeros(4, 16, dtype=torch.uint8)
    solver_code.gptq_block(**{k: v.clone() for k, v in GOOD.items()}, maxq=15)
    with pytest.raises(RunError, match=said):
        solver_code.gptq_block(**given, maxq=15)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", torch.zeros(4, 16, dtype=torch.uint8)),
        ("h", torch.eye(5)),
        ("factors", torch.ones(4).double()),
        ("scale", torch.ones(3)),
        ("low", torch.zeros(15)),
    ],
)
def test_nor_in_the_descent(name: str, value: Tensor) -> None:
    ones, zeros = torch.ones(16), torch.zeros(4, 16)
    good = {"pull": zeros, "h": torch.eye(4), "factors": torch.ones(4), "codes": zeros.clone()}
    good |= {"scale": ones, "inverse": ones, "low": -8 * ones, "high": 7 * ones}
    solver_code.descent_block(**good)
    with pytest.raises((RunError, RuntimeError)):
        solver_code.descent_block(**{**good, name: value})


def test_nor_in_the_search() -> None:
    w, roots, most = torch.zeros(64, 16), torch.ones(2, 32), torch.ones(2, 16)
    ratios = torch.ones(3, 3)
    more = {"maxq": 15, "sym": True, "signs": True}
    good = [w, roots, -most, most, ratios]
    solver_code.search(*good, 1, **more)
    for place, value in enumerate((w.T, roots.double(), most[:1], most.bfloat16(), ratios[:, :2])):
        with pytest.raises(RunError, match="machine code"):
            solver_code.search(*good[:place], value, *good[place + 1 :], 1, **more)


DEFAULTS = """
import sys, torch
from qquant import QuantSpec, columns, fused, gptq
given = sys.argv[1]
if given == "meta":
    torch.set_default_device("meta")
else:
    torch.set_default_dtype(getattr(torch, given))
how = {"generator": torch.Generator(device="cpu").manual_seed(0), "device": "cpu"}
how["dtype"] = torch.float32
w, x = torch.randn(40, 96, **how), torch.randn(200, 96, **how)
assert columns.choose(w.device).form == "llvm", columns.choose(w.device)
assert fused.unavailable() is None, fused.unavailable()
made = gptq.solve(w, x.T @ x, QuantSpec(group_size=32))
print(int(made.codes.long().sum()), float(made.row_loss.sum()))
"""


def test_the_first_use_whatever_torchs_defaults_are() -> None:
    said = set()
    for given in ("float32", "float64", "bfloat16", "meta"):
        words = [sys.executable, "-c", DEFAULTS, given]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.add(done.stdout)
    assert len(said) == 1
