"""GPTQ and what refines it: tensors in, tensors out.

Owns the mathematics of turning one weight matrix (or several that read the same input, stacked by
rows) into integer codes: the column loop, the refinement and the correction from a second stream.
It knows no model, file, hook or progress bar, so each piece can be checked against the paper
(Frantar et al., "GPTQ", arXiv 2210.17323) and against a slow reference.

Notation follows the paper: `W` [N, K] holds one output per row and one input per column, `X` [n, K]
the inputs, `H = 2/n XᵀX` [K, K], `D = W - Q` the error, and the loss is tr(D H Dᵀ). Inside the
loops matrices are held transposed, [K, N], so that "a column of W" is contiguous memory. "Damped"
is said of H + λI and of the loss with it.

Three things differ from the usual implementations, each for a reason:

- One factorization instead of three, and no inverse of H. The paper carries errors through the
  upper U with UᵀU = H⁻¹. U⁻¹ = R is upper too and R Rᵀ = H, so a Cholesky factor of H itself
  serves: the errors are E = D R, and each code makes the next entry of E as small as it can be
  (Babai's nearest plane, arXiv 2507.18553).
- Groups are fixed before the loop when columns are visited by falling diagonal (`act_order`), and
  codes are put back in natural order afterwards: `g_idx` stays trivial and no reader slows down.
- GPTQ's answer is the start, not the end: `refine` alternates exact least squares on the stored
  fp16 scales with coordinate descent on the codes, both of which can only lower the loss.

Left out on purpose: factors and triangles (`factor.py`), a group's grid (`grid.py`), gathering H
(`hessian.py`), packing into words (`pack.py`) and everything about where X comes from
(`calibration/walk.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import columns
from .config import QuantSpec
from .devices import native_bfloat16
from .errors import NumericsError
from .factor import (
    divide_by_h,
    divide_by_lower,
    factorize,
    permuted,
    quadratic,
    rough_quadratic,
    upper_product,
)
from .finite import all_finite
from .grid import Quantized, dequantize, find_scales, round_to_nearest, to_fp16
from .products import in_float32

_STRIP = 256  # rows that are transposed at a time: a cache holds them
_SPAN = 512  # inputs whose changes are carried beyond them together
_SLICE = 2**21  # weights that are measured at a time
_MOST_RIDGE = 0.99  # of a damped loss, what the ridge may be for the difference to be exact enough


@dataclass(frozen=True)
class Solution:
    """One solved matrix.

    Attributes:
        codes: [N, K] uint8 in 0..2^bits-1. scales: [N, G] float32, each exactly a float16. zeros:
        [N, G] uint8; the weight is `scales * (codes - zeros)`. row_loss: [N] float64, d H dᵀ of
        each row with the undamped H. row_norm: [N] float64, w H wᵀ of each row of the target, to
        make losses relative, to three digits where a CPU multiplies bfloat16 faster; both without
        the entries that dead columns are given. damp: what was added to the diagonal, as a share of
        its mean. flags: what a reader of the log should know (`damp-raised`, `rtn-fallback`,
        `dead-columns:3`, `correction-skipped`, `correct-damp-raised:0.5`, the damping that it came
        to).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    row_loss: Tensor
    row_norm: Tensor
    damp: float
    flags: tuple[str, ...] = ()

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix, [N, K]."""
        return Quantized(self.codes, self.scales, self.zeros).weight(dtype)

    def split(self, rows: Sequence[int]) -> list[Quantized]:
        """The matrices of so many rows each that were solved as this one."""
        parts = (torch.split(t, list(rows)) for t in (self.codes, self.scales, self.zeros))
        return [Quantized(*part) for part in zip(*parts, strict=True)]


class Passed(NamedTuple):
    """What GPTQ's column loop leaves.

    Attributes:
        codes: [N, K] uint8 in visiting order. scales, zeros: [N, G]. errors: [K, N], (D R)ᵀ of the
            factor R; a row's squares add up to its damped d H dᵀ, and D H = D R Rᵀ.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    errors: Tensor


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights [N_i, K] as one matrix [N, K] float32, in the layout that `solve` need not change."""
    out = weights[0].new_empty(
        weights[0].shape[1], sum(w.shape[0] for w in weights), dtype=torch.float32
    )
    strips = [strip for w in weights for strip in torch.split(w, _STRIP)]
    places = torch.split(out, [len(strip) for strip in strips], 1)
    for place, strip in zip(places, strips, strict=True):
        place.copy_(strip.T)
    return out.T


def gptq_pass(
    w: Tensor,
    r: Tensor,
    spec: QuantSpec,
    scales: Tensor | None,
    zeros: Tensor | None,
    group: Tensor,
    form: columns.Form | None = None,
) -> Passed:
    """GPTQ's column loop (arXiv 2210.17323, Algorithm 1) on columns already in visiting order.

    Args:
        w: [N, K], in visiting order; not changed. A transposed matrix is not copied.
        r: [K, K] upper, R Rᵀ = H in the same order.
        spec: bits, symmetry, group size, block size.
        scales, zeros: [N, G] fixed beforehand ("static groups"), or None to find each group's grid
            from the weights as they are when the loop reaches the group (needs natural order).
        group: [K] int64, the group of each visited column.
        form: of the loop, see `columns`; None for the device's.
    """
    n, k = w.shape
    maxq = 2**spec.bits - 1
    g = spec.group_of(k)
    form = form or columns.choose(w.device, w.dtype).form
    weights = w.T.contiguous()
    wanted = weights.clone()
    diagonal = r.diagonal()
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    found: list[tuple[Tensor, Tensor]] = []
    static = scales is not None and zeros is not None
    step = min(spec.block_size, columns.WIDEST) if form == "triton" else spec.block_size
    edges = sorted({*range(0, k, step), *(() if static else range(0, k, g)), k})
    # Changes reach the columns of their own span at once, those beyond it from the whole span.
    span = _span(step if static else g)
    moves = torch.empty(min(span, k), n, dtype=w.dtype, device=w.device)
    s_t = scales.T.contiguous() if scales is not None else None
    z_t = zeros.T.contiguous() if zeros is not None else None
    for a, b in itertools.pairwise(edges):
        own = group[a:b]
        if not static:
            if a % g == 0:
                at = slice(a, a + g)
                updated = _given_earlier(wanted[at], weights[at], r[at, at])
                found.append(find_scales(updated.T, spec))
            s_t, z_t = (t.T.contiguous() for t in found[-1])
            own = torch.zeros_like(own)
        assert s_t is not None and z_t is not None
        start = a - a % span
        end = min(start + span, k)
        coupling = (r[a:b, a:end] / diagonal[a:end]).contiguous()
        moved = columns.gptq_block(
            wanted[a:b],
            weights[a:b],
            coupling[:, : b - a],
            s_t,
            z_t,
            own,
            maxq,
            codes[a:b],
            form,
        )
        moves[a - start : b - start] = moved
        if b < end:
            wanted[b:end].addmm_(coupling[:, b - a :].T, moved, alpha=-1)
        elif b < k:
            beyond = r[start:b, b:] / diagonal[b:]
            wanted[b:].addmm_(beyond.T, moves[: b - start], alpha=-1)
        # What was wanted becomes what is missing of it, times r_ii: the block's errors.
        wanted[a:b].sub_(moved.add_(weights[a:b])).mul_(diagonal[a:b, None])
    if not static:
        scales = torch.cat([s for s, _ in found], 1)
        zeros = torch.cat([z for _, z in found], 1)
    assert scales is not None and zeros is not None
    return Passed(codes.T, scales, zeros, wanted)


def _span(step: int) -> int:
    """Inputs whose changes go on to all others together: whole steps.

    A product of few columns takes as long as reading and writing what it changes.
    """
    return max(1, _SPAN // step) * step


def _given_earlier(wanted: Tensor, weights: Tensor, r: Tensor) -> Tensor:
    """The best weights of a group given all earlier codes and nothing yet of its own, [g, N].

    That is what the paper's loop holds when it reaches the group; this one's `wanted` of a column
    presumes that the columns before it, the group's own too, are exact. r: [g, g], the group's.
    """
    errors = (wanted - weights) * r.diagonal()[:, None]
    divide_by_lower(r.T, errors)
    return errors.add_(weights)


def refine(
    w: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    spec: QuantSpec,
    sweeps: int | None = None,
    form: columns.Form | None = None,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale refit and coordinate descent: minimises tr(D H Dᵀ) from where GPTQ stopped.

    Group by group: (a) the least-squares change of the group's scale given every code, rounded to
    float16 and taken only where it lowers the loss; (b) each column's best code given all others,
    in turn. Either step is exact in its own variables, so a sweep cannot raise the loss.

    Args:
        w: [N, K] target, h: [K, K] (damped), codes [N, K] uint8, scales and zeros [N, G]; none are
            changed.
        sweeps: how many, at least one (default the spec's). form: of the loop, see `columns`; None
            for the device's.
        gradient: [K, N], (D H)ᵀ where the pass has left off, changed; computed if None.

    Returns:
        codes [N, K] uint8, scales [N, G], and d H dᵀ of each row, [N] float64.
    """
    sweeps = spec.sweeps if sweeps is None else sweeps
    assert sweeps > 0
    n, k = w.shape
    g = spec.group_of(k)
    maxq = 2**spec.bits - 1
    z_t = zeros.T.contiguous()
    s_t = scales.T.clone()
    q_t = codes.T.to(w.dtype, memory_format=torch.contiguous_format)
    for zero, rows in zip(z_t, torch.split(q_t, g), strict=True):
        rows.sub_(zero)  # codes about their zero, [K, N]
    row_loss = torch.zeros(n, dtype=torch.float64, device=w.device)

    def differ(group: int) -> Tensor:
        at = slice(group * g, (group + 1) * g)
        return torch.addcmul(w.T[at], q_t[at], s_t[group], value=-1)

    # (D H)ᵀ: minus half the gradient
    g_t = h @ torch.cat([differ(i) for i in range(k // g)]) if gradient is None else gradient
    form = form or columns.choose(w.device, w.dtype).form
    width = min(spec.block_size, columns.WIDEST) if form == "triton" else spec.block_size
    span = _span(g)
    changes = w.new_empty(min(span, k), n)
    # A group's rows, in memory of their own: what is new each time has to be cleared each time.
    pull, product, before, scratch = (w.new_empty(g, n) for _ in range(4))
    # One zero for all (a symmetric grid) makes the bounds two numbers.
    fixed = float(z_t[0, 0]) if spec.sym else None
    for sweep in range(1, sweeps + 1):
        last = sweep == sweeps
        for i in range(k // g if last else 0):
            row_loss += torch.linalg.vecdot(differ(i), g_t[i * g : (i + 1) * g], dim=0)
        for a in range(0, k, g):
            b = a + g
            group = a // g
            start = a - a % span
            end = min(start + span, k)
            h_kk = h[a:b, a:b]
            q, old = q_t[a:b], s_t[group].clone()
            torch.mul(q, old, out=before)
            pull.copy_(g_t[a:b])
            torch.mm(h_kk, q, out=product)
            curve = torch.mul(product, q, out=scratch).sum(0)
            slope = torch.mul(pull, q, out=scratch).sum(0)
            new = to_fp16(torch.where(curve > 0, old + slope / curve, old))
            step = new - old
            keep = (step * (2 * slope - step * curve) > 0) & (new * old > 0)
            step = torch.where(keep, step, torch.zeros_like(step))
            scale = old + step
            s_t[group] = scale
            pull.addcmul_(product, step, value=-1)
            zero = z_t[group] if fixed is None else fixed
            for c in range(a, b, width):
                e = min(c + width, b)
                at = slice(c - a, e - a)
                moved = columns.descent_block(
                    pull[at], h[c:e, c:e], q[at], scale, -zero, maxq - zero, form
                )
                if e < b:
                    pull[e - a :].addmm_(h[e:b, c:e], moved, alpha=-1)
            change = torch.mul(q, scale, out=changes[a - start : b - start]).sub_(before)
            if last:
                torch.mm(h_kk, change, out=product).sub_(g_t[a:b], alpha=2)
                row_loss += torch.linalg.vecdot(product, change, dim=0)
            # Rows that are looked at again: of the span at once, the others after it.
            near = b if last else start
            g_t[near:end].addmm_(h[near:end, a:b], change, alpha=-1)
            if b == end:
                whole = changes[: end - start]
                g_t[end:].addmm_(h[end:, start:end], whole, alpha=-1)
                if not last:
                    g_t[:start].addmm_(h[:start, start:end], whole, alpha=-1)
    for zero, rows in zip(z_t, torch.split(q_t, g), strict=True):
        rows.add_(zero)
    return q_t.to(torch.uint8).T.contiguous(), s_t.T.contiguous(), row_loss


def corrected_target(
    w: Tensor, r: Tensor, spec: QuantSpec, cross: Tensor | None, pull: Tensor | None
) -> Tensor:
    """The weights that best give the full-precision output from the quantized stream's input.

    W* = W + α [W 2/n(X_f - X_q)ᵀX_q + 2/n ρ(h_f - h_q)ᵀX_q] (H + λI)⁻¹ (related to GPTAQ,
    arXiv 2504.02692, and QEP, arXiv 2504.09629).

    Args:
        w: [N, K]. r: [K, K], of `factorize`. cross: [K, K] or None, of the inputs. pull: [N, K] or
            None, of the outputs: the second summand, or both (see `hessian.Hessian`).
    """
    if cross is None and pull is None:
        return w
    w_t = w.T
    if pull is None and cross is not None and w.shape[0] > w.shape[1]:
        change = cross.T.clone(memory_format=torch.contiguous_format)
        divide_by_h(r, change)
        return torch.addmm(w_t, change, w_t, alpha=spec.correct).T
    total = torch.zeros_like(w_t) if cross is None else cross.T @ w_t
    if pull is not None:
        total += pull.T
    divide_by_h(r, total)
    return total.mul_(spec.correct).add_(w_t).T


@in_float32()
def solve(
    w: Tensor,
    h: Tensor | None,
    spec: QuantSpec,
    *,
    cross: Tensor | None = None,
    pull: Tensor | None = None,
    name: str = "the matrix",
) -> Solution:
    """Quantizes one matrix.

    Args:
        w: [N, K] float32 or float64, not changed; linears that share an input may be stacked by
            rows (`stacked`).
        h: [K, K] in the same dtype, or None to round to nearest. Not changed.
        spec: what to do. `method: rtn` ignores h except for reporting the loss.
        cross, pull: see `hessian.Hessian`; None where there is one stream.
        name: for messages.

    Raises:
        NumericsError: w or h is not finite.
    """
    _need_finite(w, name, "weight")
    k = w.shape[1]
    if h is None or spec.method == "rtn":
        scales, zeros = find_scales(w, spec, name=name)
        codes = round_to_nearest(w, scales, zeros, spec.bits)
        return _solution(w, h, codes, scales, zeros, 0.0, ())
    _need_finite(h, name, "Hessian")
    flags: list[str] = []
    dead = h.diagonal() <= 0
    fill: Tensor | None = None
    if count := int(dead.sum()):
        # An input that is always zero says nothing: its weights are rounded to nearest by a
        # diagonal entry of their own that no other column sees.
        h = h.clone()
        h[dead, :] = 0
        h[:, dead] = 0
        h.diagonal()[dead] = h.diagonal().sum() / max(1, k - count) if count < k else 1.0
        fill = torch.where(dead, h.diagonal(), 0)
        flags.append(f"dead-columns:{count}")
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if spec.act_order else None
    r, damp = factorize(h, spec.damp, order)
    if r is None:
        scales, zeros = find_scales(w, spec, name=name)
        codes = round_to_nearest(w, scales, zeros, spec.bits)
        return _solution(w, h, codes, scales, zeros, damp, (*flags, "rtn-fallback"), fill=fill)
    if damp > spec.damp:
        flags.append("damp-raised")
    # From here on it is [K, N]: an input's weights lie in one piece, and are one row to be visited.
    target = w.T.contiguous()
    visited = target if order is None else target[order]
    if cross is not None or pull is not None:
        for extra in (cross, pull):
            if extra is not None:
                _need_finite(extra, name, "correction")
        again = spec.correct_damp != damp
        own, used = factorize(h, spec.correct_damp, order) if again else (r, damp)
        if own is None:
            flags.append("correction-skipped")
        else:
            if used > spec.correct_damp:
                flags.append(f"correct-damp-raised:{used:.3g}")
            if order is not None:
                cross = None if cross is None else permuted(cross, order)
                pull = None if pull is None else pull[:, order]
            visited = corrected_target(visited.T, own, spec, cross, pull).T
            target = _put_back(visited, order)
        del own, cross, pull

    group = (torch.arange(k, device=w.device) if order is None else order) // spec.group_of(k)
    grid: tuple[Tensor | None, Tensor | None] = (None, None)
    if spec.act_order or spec.scale_search:
        grid = find_scales(target.T, spec, h.diagonal(), name)
    codes, scales, zeros, errors = gptq_pass(visited.T, r, spec, *grid, group)
    codes = _put_back(codes.T, order).T
    ridge = damp * float(h.diagonal().mean())
    if spec.sweeps:
        gradient = upper_product(r, errors)
        del errors, r
        if order is not None:
            visited[order] = gradient  # their memory serves again
            gradient = visited
        del visited
        h_damped = h.clone()
        h_damped.diagonal().add_(ridge)
        codes, scales, row_loss = refine(
            target.T, h_damped, codes, scales, zeros, spec, gradient=gradient
        )
    else:
        row_loss = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        for strip in torch.split(errors, _STRIP):
            row_loss += torch.linalg.vecdot(strip, strip, dim=0)
    return _solution(target.T, h, codes, scales, zeros, damp, tuple(flags), row_loss, ridge, fill)


def _put_back(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in visiting order, in their own; themselves where that is the same."""
    if order is None:
        return rows
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def _solution(
    w: Tensor,
    h: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    damp: float,
    flags: tuple[str, ...],
    damped_loss: Tensor | None = None,
    ridge: float = 0.0,
    fill: Tensor | None = None,
) -> Solution:
    """Measures what was found; `damped_loss` [N] is that with H + `ridge` I, where known.

    `fill` [K] is what h has on its diagonal for dead columns and the undamped H has not. What it
    and the ridge add is taken off again, unless that is nearly all of the loss: then rounding would
    be what is left, and the loss is measured.
    """
    codes = codes.contiguous()
    rough = w.dtype == torch.float32 and w.device.type == "cpu" and native_bfloat16(w.device)
    # Made beforehand: what is kept of a slice would lie between what is freed, and keep it from
    # being used again.
    losses, norms = w.new_empty(2, w.shape[0], dtype=torch.float64)
    for at in _slices(*w.shape):
        own = w[at].contiguous()
        d = own - dequantize(codes[at], scales[at], zeros[at])
        if h is None:
            losses[at] = d.double().square().sum(1)
            norms[at] = own.double().square().sum(1)
            continue
        added = ridge * torch.linalg.vecdot(d, d).double()
        if fill is not None:
            added += torch.linalg.vecdot(d * fill, d).double()
            d, own = (t.masked_fill(fill > 0, 0) for t in (d, own))
        if damped_loss is None or bool((added > _MOST_RIDGE * damped_loss[at]).any()):
            losses[at] = quadratic(d, h)
        else:
            losses[at] = damped_loss[at] - added
        norms[at] = _rough_norms(w[at], h, fill) if rough else quadratic(own, h)
    return Solution(
        codes,
        scales.to(torch.float32),
        zeros.to(torch.uint8),
        losses.clamp_(min=0),
        norms.clamp_(min=0),
        damp,
        flags,
    )


def _rough_norms(w: Tensor, h: Tensor, fill: Tensor | None) -> Tensor:
    columns = w.T.bfloat16()  # as they lie
    if fill is not None:
        columns[fill > 0] = 0
    return rough_quadratic(columns, h)


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Of a matrix's rows, so many at a time that what is made of them stays small."""
    step = max(256, _SLICE // columns)
    return (slice(a, min(a + step, rows)) for a in range(0, rows, step))


def _need_finite(t: Tensor, name: str, what: str) -> None:
    if not all_finite(t):
        bad = int((~torch.isfinite(t)).sum())
        raise NumericsError(
            f"{name} ({what})",
            expected="finite numbers",
            got=f"{bad} of {t.numel()} not finite",
            cure="Check the source checkpoint, or run the forward in float32 (--compute-dtype)",
        )
