"""`columns.py`'s two loops as Triton kernels: a block of columns per launch, rows in parallel.

A program holds a block of up to 128 columns for 32 rows in registers. A column is taken out of the
tile by a masked sum (which adds zeros, so it is exact) and its change goes to the rest of the tile
as one outer product. Every float operation is one of `columns`' form `steps`, in the same order and
rounded the same way: products are not contracted into fused multiply-adds
(`enable_fp_fusion=False`), float32 divisions are rounded to nearest, and rounding to whole numbers
adds and subtracts 1.5 * 2^23 (2^52), which rounds half to even as `torch.round` does. Codes are
clamped before they are rounded and not after, which is the same for whole bounds and keeps that sum
in range.

Run under Triton's interpreter on a CPU by the tests; not yet run on a GPU. Imports Triton, so it is
imported only where that is there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_its_device

_ROWS = 32  # of the matrix, per program
_LEAST = 16  # columns of a tile
_WHOLE: dict[torch.dtype, float] = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _carry(v, coupling, stride, i, d, idx, size):  # type: ignore[no-untyped-def]
    later = (idx > i) & (idx < size)
    c = tl.load(coupling + i * stride + idx, mask=later, other=0.0)
    return tl.where(later[:, None], v - c[:, None] * d[None, :], v)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gptq(  # type: ignore[no-untyped-def]
    wanted, weights, coupling, scales, zeros, group, codes, moved, rows, size, stride, maxq,
    WHOLE: tl.constexpr, SINGLE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    idx = tl.arange(0, WIDE)
    live = n < rows
    inside = (idx < size)[:, None] & live[None, :]
    v = tl.load(wanted + idx[:, None] * rows + n[None, :], mask=inside, other=0.0)
    for i in range(size):
        col = tl.sum(tl.where(idx[:, None] == i, v, 0.0), axis=0)
        tl.store(wanted + i * rows + n, col, mask=live)
        at = tl.load(group + i) * rows
        scale = tl.load(scales + at + n, mask=live, other=1.0)
        zero = tl.load(zeros + at + n, mask=live, other=0.0)
        if SINGLE:
            x = tl.div_rn(col, scale)
        else:
            x = col / scale
        x = tl.minimum(tl.maximum(x, -zero), maxq - zero)
        q = (x + WHOLE) - WHOLE
        tl.store(codes + i * rows + n, (q + zero).to(tl.uint8), mask=live)
        d = q * scale - tl.load(weights + i * rows + n, mask=live, other=0.0)
        tl.store(moved + i * rows + n, d, mask=live)
        v = _carry(v, coupling, stride, i, d, idx, size)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _descent(  # type: ignore[no-untyped-def]
    pull, h, factors, codes, scales, inverses, lows, highs, moved, rows, size, stride,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    idx = tl.arange(0, WIDE)
    live = n < rows
    inside = (idx < size)[:, None] & live[None, :]
    v = tl.load(pull + idx[:, None] * rows + n[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + n, mask=live, other=1.0)
    inverse = tl.load(inverses + n, mask=live, other=1.0)
    low = tl.load(lows + n, mask=live, other=0.0)
    high = tl.load(highs + n, mask=live, other=0.0)
    for i in range(size):
        gradient = tl.sum(tl.where(idx[:, None] == i, v, 0.0), axis=0)
        code = tl.load(codes + i * rows + n, mask=live, other=0.0)
        x = (gradient * tl.load(factors + i)) * inverse + code
        x = tl.minimum(tl.maximum(x, low), high)
        wanted = (x + WHOLE) - WHOLE
        d = (wanted - code) * scale
        # Several warps may hold the same rows: none may write what another has yet to read.
        tl.debug_barrier()
        tl.store(codes + i * rows + n, wanted, mask=live)
        tl.store(moved + i * rows + n, d, mask=live)
        v = _carry(v, h, stride, i, d, idx, size)


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
    """`columns.gptq_block`."""
    assert weights.is_contiguous()
    size, rows = wanted.shape
    moved = torch.empty_like(wanted)
    grids = scales.contiguous(), zeros.contiguous(), group.to(torch.int32)
    with on_its_device(wanted):
        _gptq[_programs(rows)](
            wanted, weights, _rows(coupling), *grids, codes, moved, rows, size,
            coupling.stride(0), maxq, SINGLE=wanted.dtype == torch.float32, **_settings(wanted),
        )  # fmt: skip
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
    """`columns.descent_block`; `factors` [B] is 1 / h_ii, `inverse` [N] 1 / scale."""
    size, rows = pull.shape
    moved = torch.empty_like(pull)
    bounds = [t if isinstance(t, Tensor) else torch.full_like(scale, t) for t in (low, high)]
    lines = [t.contiguous() for t in (scale, inverse, *bounds)]
    with on_its_device(pull):
        _descent[_programs(rows)](
            pull, _rows(h), factors, codes, *lines, moved, rows, size, h.stride(0),
            **_settings(pull),
        )  # fmt: skip
    return moved


def _programs(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, _ROWS),)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix, of which a row must be contiguous (a view into a larger one is)."""
    assert matrix.stride(1) == 1
    return matrix


def _settings(values: Tensor) -> dict[str, Any]:
    """What both kernels are compiled with."""
    size = values.shape[0]
    assert values.is_contiguous()
    return {
        "WHOLE": _WHOLE[values.dtype],
        "WIDE": max(_LEAST, triton.next_power_of_2(size)),
        "ROWS": _ROWS,
        "num_warps": 8,
        "enable_fp_fusion": False,
    }
