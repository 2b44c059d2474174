"""A group's grid: its scale and zero, the nearest codes, and the weights that codes stand for.

A scale is always a number that float16 holds, since that is what is stored: what is optimised is
what is read back. Plain rounding is here too, because it needs nothing but the grid.

Left out on purpose: which code each weight gets when others are to make good its error (`gptq.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import columns
from .config import QuantSpec
from .errors import NumericsError

# The share of the group's range that a scale may be shrunk to, by bits: a little below the
# mean-squared-error optimum of a Gaussian (step 1.00, 0.59, 0.34 sigma for 2, 3, 4 bits; Max 1960).
_SHRINK = {2: 0.35, 3: 0.5, 4: 0.65, 8: 0.9}
_FP16_TINY = 2.0**-24
_FP16_MAX = 65504.0
_SLICE = 2**21  # weights that are copied at a time


class Quantized(NamedTuple):
    """A matrix as it is stored: `scales * (codes - zeros)`.

    Attributes:
        codes: [N, K] uint8 in 0..2^bits-1. scales: [N, G] float32. zeros: [N, G] uint8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix, [N, K]."""
        out = self.codes.new_empty(self.codes.shape, dtype=dtype)
        step = max(1, _SLICE // self.codes.shape[1])
        for parts in zip(*(torch.split(t, step) for t in (out, *self)), strict=True):
            parts[0].copy_(dequantize(*parts[1:]))
        return out


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`scales * (codes - zeros)` by group: [N, K] in the dtype of `scales`."""
    n, k = codes.shape
    grouped = codes.reshape(n, scales.shape[1], -1).to(scales.dtype)
    return ((grouped - zeros.to(scales.dtype)[..., None]) * scales[..., None]).reshape(n, k)


def find_scales(
    w: Tensor, spec: QuantSpec, importance: Tensor | None = None, name: str = "the matrix"
) -> tuple[Tensor, Tensor]:
    """The grid of each group of columns.

    Plain range (`scale_search` 0) is what GPTQ's own code does: 2·max|w|/(2^bits-1), or the range
    from minimum to maximum with a rounded zero when asymmetric. A zero is at least 1, which is what
    a v1 file can store: a group (nearly) without negative weights has one step less to its maximum.
    The search shrinks that range in steps and keeps, per group, the step with the least squared
    rounding error weighted by `importance`.

    Args:
        w: [N, C], columns a whole number of groups.
        spec: bits, symmetry, group size, `scale_search`.
        importance: [C], weight of a column's squared error (the Hessian's diagonal).
        name: for messages.

    Returns:
        scales [N, G] in w's dtype, each exactly a float16; zeros [N, G] in w's dtype.

    Raises:
        NumericsError: a scale would not fit a float16.
    """
    n, inputs = w.shape
    g = spec.group_of(inputs)
    groups = w.reshape(n, inputs // g, g)
    maxq = 2**spec.bits - 1
    least, largest = _ranges(groups)
    lo, hi = least.clamp(max=0), largest.clamp(min=0)
    if spec.sym:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    flat = (hi - lo) == 0
    lo, hi = torch.where(flat, -1.0, lo), torch.where(flat, 1.0, hi)
    most = (hi - lo) / maxq
    if not spec.sym:
        most = torch.maximum(most, hi / (maxq - 1))
    if not bool((most <= _FP16_MAX).all()):
        raise NumericsError(
            f"{name} (scale)",
            expected=f"group scales that fit a float16, up to {_FP16_MAX:.0f}",
            got=f"one of {float(most.max()):.3g}",
            cure="The checkpoint looks damaged: the layer's weights are far too large",
        )

    span = _Range(lo, hi, maxq, spec.sym)
    if spec.scale_search == 0:
        return span.grid(1.0)
    low = _SHRINK[spec.bits]
    ratios = [1.0 - (1.0 - low) * i / spec.scale_search for i in range(spec.scale_search + 1)]
    if importance is None:
        root = torch.ones_like(groups[0])
    else:
        root = importance.sqrt().reshape(-1, g)
    # With both signs, every third ratio decides a group's sign and the rest keep to it.
    both = spec.sym and spec.negative_scales
    first = ratios[::3] if both else ratios
    rest = [r for i, r in enumerate(ratios) if i % 3] if both else []
    in_code = w.device.type == "cpu" and columns.choose(w.device, w.dtype).form == "llvm"
    return (_by_code if in_code else _by_torch)(groups, root, span, first, rest, spec)


class _Range(NamedTuple):
    """What a group's grid has to reach: lo and hi [N, G], with what step and zero."""

    lo: Tensor
    hi: Tensor
    maxq: int
    sym: bool

    def grid(self, ratio: float) -> tuple[Tensor, Tensor]:
        """Scales and zeros, [N, G], of the range shrunk to this share."""
        scales = to_fp16((self.hi - self.lo) * (ratio / self.maxq))
        if self.sym:
            return scales, torch.full_like(scales, (self.maxq + 1) / 2)
        zeros = (-(self.lo * ratio) / scales).round_()
        shorter = to_fp16(self.hi * (ratio / (self.maxq - 1)))
        return torch.where(zeros < 1, shorter, scales), zeros.clamp_(1, self.maxq)


def _by_torch(
    groups: Tensor,
    root: Tensor,
    span: _Range,
    first: list[float],
    rest: list[float],
    spec: QuantSpec,
) -> tuple[Tensor, Tensor]:
    """The search. groups: [N, G, g]; root: [G, g]; first, rest: ratios, as `find_scales` says."""
    n, count, g = groups.shape
    both = spec.sym and spec.negative_scales
    best_scale, best_zero = span.grid(1.0)
    # Rows in slices that stay in the cache: the search is elementwise, else bound by memory.
    rows = max(1, 65536 // (count * g)) if groups.device.type == "cpu" else n
    grids = {r: span.grid(r) for r in (*first, *rest)}
    for a in range(0, n, rows):
        at = slice(a, a + rows)
        attempt = _Attempt(groups[at].contiguous(), root, best_scale[at], best_zero[at], spec)
        for r in first:
            scales, zeros = (t[at] for t in grids[r])
            attempt(scales, zeros)
            if both:
                attempt(-scales, zeros)
        for r in rest:
            scales, zeros = (t[at] for t in grids[r])
            attempt(torch.copysign(scales, best_scale[at]), zeros)
    return best_scale, best_zero


def _by_code(
    groups: Tensor,
    root: Tensor,
    span: _Range,
    first: list[float],
    rest: list[float],
    spec: QuantSpec,
) -> tuple[Tensor, Tensor]:
    """The same in machine code: errors are added up in another order, so where two grids are nearly
    as good the other one may be taken."""
    from .solver_code import search

    maxq = span.maxq
    shares = [(r, r / maxq, r / (maxq - 1)) for r in (*first, *rest)]
    ratios = torch.tensor(shares, dtype=torch.float32, device="cpu")
    scales, zeros = torch.empty_like(span.lo), torch.empty_like(span.lo)
    weights = groups.flatten(1).T
    # As they lie if they are transposed already, else in copies of a few rows.
    rows = len(groups) if weights.is_contiguous() else max(1, _SLICE // len(weights))
    for a in range(0, len(groups), rows):
        at = slice(a, a + rows)
        found = search(
            weights[:, at].contiguous(),
            root.contiguous(),
            span.lo[at].T.contiguous(),
            span.hi[at].T.contiguous(),
            ratios,
            len(first),
            maxq=maxq,
            sym=spec.sym,
            signs=spec.sym and spec.negative_scales,
        )
        scales[at], zeros[at] = (t.T for t in found)
    return scales, zeros


def _ranges(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of each group: [n, G, g] -> [n, G] twice."""
    whole = groups.permute(1, 2, 0)
    if whole.is_contiguous():  # a transposed matrix: along its rows, as it lies
        return whole.amin(1).T, whole.amax(1).T
    return groups.amin(-1), groups.amax(-1)


class _Attempt:
    """Grids tried on some rows, one after the other; the best of each group is kept.

    Args:
        groups: [n, G, g] the weights. root: [G, g], of the importance. scale, zero: [n, G], changed
            to the best. spec: bits and symmetry.
    """

    def __init__(
        self, groups: Tensor, root: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec
    ) -> None:
        self.groups, self.root, self.scale, self.zero = groups, root, scale, zero
        self.maxq = 2**spec.bits - 1
        self.fixed = (self.maxq + 1) / 2 if spec.sym else None
        self.weighted = groups * root
        self.codes, self.error = torch.empty_like(groups), torch.empty_like(groups)
        self.least = torch.full_like(scale, float("inf"))

    def __call__(self, scales: Tensor, zeros: Tensor) -> None:
        """Rounds to this grid; takes it where the weighted error is less."""
        codes, zero = self.codes, zeros[..., None]
        torch.mul(self.groups, scales.reciprocal()[..., None], out=codes).round_()
        if self.fixed is None:
            codes.add_(zero).clamp_(0, self.maxq).sub_(zero)
        else:
            codes.clamp_(-self.fixed, self.maxq - self.fixed)
        codes.mul_(self.root)
        torch.addcmul(self.weighted, self.codes, scales[..., None], value=-1, out=self.error)
        total = torch.linalg.vector_norm(self.error, dim=-1)
        better = total < self.least
        torch.minimum(total, self.least, out=self.least)
        torch.where(better, scales, self.scale, out=self.scale)
        torch.where(better, zeros, self.zero, out=self.zero)


def to_fp16(scales: Tensor) -> Tensor:
    """Rounds to what a float16 can hold, never to zero or infinity; keeps sign and dtype."""
    size = scales.abs().clamp(_FP16_TINY, _FP16_MAX).to(torch.float16).to(scales.dtype)
    return torch.copysign(size.clamp(min=_FP16_TINY), scales)


def round_to_nearest(w: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Each weight's nearest code on its group's grid: [N, K] uint8."""
    groups = w.reshape(w.shape[0], scales.shape[1], -1)
    codes = (groups / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, 2**bits - 1)
    return codes.reshape(w.shape).to(torch.uint8)
