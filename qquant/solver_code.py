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

Held = dict[str, Tensor]


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
    """As `columns.gptq_block`, of float32."""
    moved = torch.empty_like(wanted)
    factors, columns = coupling.T.contiguous(), len(wanted)

    def run(writer: Writer, code: Program, held: Held, room: Tensor, outputs: int) -> None:
        before = held["wanted"], factors, held["weights"], held["scales"], held["zeros"], group
        after = held["codes"], held["moved"], room
        stride = held["wanted"].shape[1]
        code.run("gptq", *_addresses(*before, *after), columns, outputs, stride, maxq)

    held = {"wanted": wanted, "weights": weights, "scales": scales, "zeros": zeros}
    changed = {"wanted": wanted, "codes": codes, "moved": moved}
    _by_tiles(columns, {**held, **changed}, changed, run)
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
    """As `columns.descent_block`, of float32; factors: [B], 1 / h's diagonal; inverse: [N]."""
    moved = torch.empty_like(pull)
    coupling, columns = h.T.contiguous(), len(pull)

    def run(writer: Writer, code: Program, held: Held, room: Tensor, outputs: int) -> None:
        own = [held[name] for name in ("codes", "scale", "inverse", "low", "high", "moved")]
        given = _addresses(held["pull"], coupling, factors, *own, room)
        code.run("descent", *given, columns, outputs, held["pull"].shape[1])

    bounds = {
        name: (b if isinstance(b, Tensor) else torch.full_like(scale, b)).expand_as(scale)[None]
        for name, b in (("low", low), ("high", high))
    }
    changed = {"pull": pull, "codes": codes, "moved": moved}
    held = {"scale": scale[None], "inverse": inverse[None], **bounds, **changed}
    _by_tiles(columns, held, changed, run)
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

    Args:
        weights: [C, N] float32. roots: [G, g] float32, of the importance. low, high: [G, N], each
            group's range. ratios: [any, 3] float32, what a range times which is the part of it,
            its step, and its step where there is one less.
        first: ratios that are tried with both signs; the others with the sign found by then.
        maxq: the largest code. sym: zero in the middle. signs: scales of both signs.

    Returns:
        scales, zeros: [G, N] float32.
    """
    groups, inputs = roots.shape
    name = ("search_signs" if signs else "search") if sym else "search_zeros"

    def run(writer: Writer, code: Program, held: Held, room: Tensor, outputs: int) -> None:
        before = held["weights"], roots, held["low"], held["high"], ratios
        given = _addresses(*before, held["scales"], held["zeros"], room)
        stride = held["weights"].shape[1]
        code.run(name, *given, inputs, groups, outputs, stride, maxq, first, len(ratios))

    changed = {"scales": torch.empty_like(low), "zeros": torch.empty_like(low)}
    held = {"weights": weights, "low": low, "high": high, **changed}
    _by_tiles(inputs, held, changed, run)
    return changed["scales"], changed["zeros"]


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


def _by_tiles(
    columns: int,
    held: Held,
    changed: Held,
    run: Callable[[Writer, Program, Held, Tensor, int], None],
) -> None:
    """Runs the code on whole tiles of outputs where they lie, on those left over in copies.

    Args:
        columns: of a tile.
        held: matrices [any, N], every row in one piece and as far from the last as the others'.
        changed: those of them that are written to.
    """
    writer, code = compiled()
    held = {name: t if name in changed else t.contiguous() for name, t in held.items()}
    _check(held)
    outputs = next(iter(held.values())).shape[1]
    whole = outputs - outputs % writer.tile
    room = torch.empty(
        torch.get_num_threads() * columns * writer.tile, dtype=torch.float32, device="cpu"
    )
    if whole:
        run(writer, code, held, room, whole)
    if whole < outputs:
        # Beside them ones: they are computed like the others, and nobody looks.
        missing = writer.tile - (outputs - whole)
        edge = {name: F.pad(t[:, whole:], (0, missing), value=1) for name, t in held.items()}
        run(writer, code, edge, room, writer.tile)
        for name, tensor in changed.items():
            tensor[:, whole:] = edge[name][:, :-missing]


def _check(held: Held) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    for name, t in held.items():
        dtype = torch.uint8 if name == "codes" and t.dtype == torch.uint8 else torch.float32
        if t.device.type != "cpu" or t.dtype != dtype or not t.is_contiguous():
            raise RunError(
                f"the solver's machine code ({name})",
                expected=f"{dtype} on the CPU, row after row",
                got=f"{t.dtype} on {t.device} in strides of {t.stride()}",
                cure="Use another form of the column loop (`columns.choose`)",
            )


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
