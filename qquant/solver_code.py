"""The solver's loops in machine code, for matrices in float32 on an x86-64 CPU.

A visit to a column is a handful of operations on one row of a block, a candidate for a group's
scale eight or thirteen on each of its weights: as calls of a library they wait for memory, and for
being called. Here a tile of a block's outputs stays in the cache from its first column to its last,
and a group's weights from the first candidate to the last. Measured on two cores of an AMD EPYC
with AVX2, against numpy and torch: docs/EXPERIMENTS.md.

What the functions do is in `solver_ir.py`, how they are compiled and run in `llvm_code.py`.

Left out on purpose: which form runs (`columns.choose`); matrix products, which are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import RunError
from .llvm_code import FEATURES, Program, widest
from .solver_ir import Writer

Matrices = dict[str, Tensor]
Run = Callable[[Matrices, Tensor, int, int], None]
_NEAR = 1e-5  # of a group's error, how much larger than the least it may be by rounding


def gptq_block(
    wanted: Tensor,
    weights: Tensor,
    coupling: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    maxq: int,
    codes: Tensor,
) -> Tensor:
    """As `columns.gptq_block`, of float32.

    Raises:
        RunError: a tensor is not what it is taken for.
    """
    columns, outputs = wanted.shape
    factors, moved = coupling.T.contiguous(), torch.empty_like(wanted)
    _check("coupling", factors, columns, columns)
    _check("group", group, columns, dtype=torch.int64)
    if columns and not 0 <= int(group.min()) <= int(group.max()) < len(scales):
        raise _misfit("group", f"rows of {len(scales)} scales", group)
    _check("codes", codes, columns, outputs, dtype=torch.uint8)
    for name, tensor in (("wanted", wanted), ("weights", weights)):
        _check(name, tensor, columns, outputs)
    given = {"scales": scales.contiguous(), "zeros": zeros.contiguous()}
    for name, tensor in given.items():
        _check(name, tensor, len(scales), outputs)

    def run(held: Matrices, room: Tensor, whole: int, threads: int) -> None:
        before = held["wanted"], factors, held["weights"], held["scales"], held["zeros"], group
        after = held["codes"], held["moved"], room
        sizes = columns, whole, held["wanted"].shape[1], maxq
        _code().run("gptq", *_addresses(*before, *after), *sizes, count=threads)

    changed = {"wanted": wanted, "codes": codes, "moved": moved}
    _by_tiles(columns, {"weights": weights, **given}, changed, run)
    return moved


def descent_block(
    pull: Tensor,
    h: Tensor,
    factors: Tensor,
    codes: Tensor,
    scale: Tensor,
    inverse: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """As `columns.descent_block`, of float32; factors: [B], 1 / h's diagonal; inverse: [N].

    Raises:
        RunError: a tensor is not what it is taken for.
    """
    columns, outputs = pull.shape
    coupling, moved = h.T.contiguous(), torch.empty_like(pull)
    _check("h", coupling, columns, columns)
    _check("factors", factors, columns)
    for name, tensor in (("pull", pull), ("codes", codes)):
        _check(name, tensor, columns, outputs)
    given = {
        name: (t if isinstance(t, Tensor) else torch.full_like(scale, t)).expand(1, outputs)
        for name, t in (("scale", scale), ("inverse", inverse), ("low", low), ("high", high))
    }
    for name, tensor in given.items():
        given[name] = tensor.contiguous()
        _check(name, given[name], 1, outputs)

    def run(held: Matrices, room: Tensor, whole: int, threads: int) -> None:
        own = [held[name] for name in ("codes", "scale", "inverse", "low", "high", "moved")]
        sizes = columns, whole, held["pull"].shape[1]
        addresses = _addresses(held["pull"], coupling, factors, *own, room)
        _code().run("descent", *addresses, *sizes, count=threads)

    _by_tiles(columns, given, {"pull": pull, "codes": codes, "moved": moved}, run)
    return moved


def search(
    weights: Tensor,
    roots: Tensor,
    low: Tensor,
    high: Tensor,
    ratios: Tensor,
    first: int,
    *,
    maxq: int,
    sym: bool,
    signs: bool,
) -> tuple[Tensor, Tensor]:
    """The grid of each group with the least weighted squared error (`grid.find_scales`).

    Where no error is a finite number, that of the first ratio.

    Args:
        weights: [C, N] float32. roots: [G, g] float32, of the importance. low, high: [G, N], each
            group's range. ratios: [any, 3] float32, what a range times which is the part of it,
            its step, and its step where there is one less.
        first: ratios that are tried with both signs; the others with the sign found by then.
        maxq: the largest code. sym: zero in the middle. signs: scales of both signs.

    Returns:
        scales, zeros: [G, N] float32.

    Raises:
        RunError: a tensor is not what it is taken for.
    """
    (groups, inputs), outputs = roots.shape, weights.shape[1]
    name = ("search_signs" if signs else "search") if sym else "search_zeros"
    _check("weights", weights, groups * inputs, outputs)
    _check("roots", roots, groups, inputs)
    _check("low", low, groups, outputs)
    _check("high", high, groups, outputs)
    _check("ratios", ratios, len(ratios), 3)

    def run(held: Matrices, room: Tensor, whole: int, threads: int) -> None:
        before = held["weights"], roots, held["low"], held["high"], ratios
        sizes = inputs, groups, whole, held["weights"].shape[1], maxq, first, len(ratios)
        addresses = _addresses(*before, held["scales"], held["zeros"], room)
        _code().run(name, *addresses, *sizes, count=threads)

    found = {"scales": torch.empty_like(low), "zeros": torch.empty_like(low)}
    _by_tiles(inputs, {"weights": weights, "low": low, "high": high}, found, run)
    return found["scales"], found["zeros"]


def searches_right() -> bool:
    """Whether `search` finds the best of some grids, by trial, in each of its forms."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    w = torch.randn(64, 37, generator=draw, device="cpu", dtype=torch.float32)
    roots = torch.rand(2, 32, generator=draw, device="cpu", dtype=torch.float32)
    shares = [(r, r / 15, r / 14) for r in (1.0, 0.9, 0.8)]
    ratios = torch.tensor(shares, device="cpu", dtype=torch.float32)
    groups = w.view(2, 32, 37)
    most = groups.abs().amax(1)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        wide, scale, zero = groups.double(), scale.double()[:, None], zero.double()[:, None]
        codes = (wide / scale).round().add(zero).clamp(0, 15)
        missed = (wide - (codes - zero) * scale) * roots.double()[:, :, None]
        return missed.square().sum(1)

    for sym, signs in ((True, False), (True, True), (False, False)):
        high = most if sym else 1.3 * most  # whose zero is between two codes, not halfway
        got = error(*search(w, roots, -most, high, ratios, 3, maxq=15, sym=sym, signs=signs))
        for ratio, step, _ in shares:
            scale = ((high + most) * step).half().float()
            zero = torch.full_like(scale, 8.0) if sym else (most * ratio / scale).round()
            for sign in (1, -1) if signs else (1,):
                if not bool((got <= error(sign * scale, zero) * (1 + _NEAR)).all()):
                    return False
    return True


@cache
def compiled() -> tuple[Writer, Program]:
    """The functions, and what wrote them.

    Raises:
        ImportError, OSError, AttributeError, RuntimeError: as of a `Program`.
    """
    features = widest()
    # What a stretch changes stays in registers: of these there are 16, or 32 twice as wide.
    writer = Writer(8, 4) if features == FEATURES else Writer(16, 8)
    return writer, Program(writer.text(), features)


def _code() -> Program:
    return compiled()[1]


def _by_tiles(columns: int, given: Matrices, changed: Matrices, run: Run) -> None:
    """Runs the code on whole tiles of outputs where they lie, on those left over in copies.

    Args:
        columns: of a tile.
        given, changed: matrices [any, N], row after row; the latter are written to.
        run: gets the matrices, room for a tile of each thread, outputs, and how many threads.
    """
    tile, threads = compiled()[0].tile, torch.get_num_threads()
    held = {**given, **changed}
    outputs = next(iter(changed.values())).shape[1]
    whole = outputs - outputs % tile
    room = torch.empty(threads * columns * tile, dtype=torch.float32, device="cpu")
    if whole:
        run(held, room, whole, threads)
    if whole < outputs:
        # Beside them ones: they are computed like the others, and nobody looks.
        missing = tile - (outputs - whole)
        edge = {name: F.pad(t[:, whole:], (0, missing), value=1) for name, t in held.items()}
        run(edge, room, tile, threads)
        for name, tensor in changed.items():
            tensor[:, whole:] = edge[name][:, :-missing]


def _check(name: str, t: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    if t.device.type != "cpu" or t.dtype != dtype or t.shape != shape or not t.is_contiguous():
        raise _misfit(name, f"{dtype} {list(shape)} on the CPU, row after row", t)


def _misfit(name: str, expected: str, t: Tensor) -> RunError:
    return RunError(
        f"the solver's machine code ({name})",
        expected=expected,
        got=f"{t.dtype} {list(t.shape)} on {t.device}, strides {list(t.stride())}",
        cure="Use another form of the column loop (`columns.choose`)",
    )


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
