"""The solver's linear algebra: a Hessian's factor, products of triangles and symmetric matrices.

LAPACK and BLAS leave time on the table here, in two ways. Their triangular routines run at a
fraction of the rate of a matrix product; so triangles are taken by halves, and products of the
halves do most of the work. And a symmetric or triangular matrix multiplied as if it were full does
twice the work; so of those only what is not known or zero is multiplied.

Where it is enough to know a number to three digits, `rough_quadratic` has it sooner.

Left out on purpose: what is factored, and why (`gptq.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 512  # inputs up to which half a matrix (a triangle, a symmetric one) is multiplied whole
_INVERTED = 128  # inputs up to which a triangle is inverted, where that is allowed
_STRIP = 256  # rows that are reordered at a time: a cache holds them


def factorize(
    h: Tensor, damp: float, order: Tensor | None = None, tries: int = 6
) -> tuple[Tensor | None, float]:
    """The upper R [K, K] with R Rᵀ = H + λI, λ = damp times the mean of the diagonal.

    Args:
        h: [K, K], symmetric positive semidefinite up to rounding.
        damp: share of the mean diagonal.
        order: [K] int64, that of H's rows and columns in the product; None for H's own.
        tries: how often the damping is raised tenfold (from at least 1e-4) before giving up.

    Returns:
        (None where every try failed, the damping that worked or was tried last).
    """
    mean = float(h.diagonal().mean())
    used = damp
    for attempt in range(tries + 1):
        used = damp if attempt == 0 else max(used * 10.0, 1e-4)
        r = h.clone() if order is None else permuted(h, order)
        r.diagonal().add_(used * mean)
        if _factor(r) and bool(torch.isfinite(r.diagonal()).all()):
            return r, used
        del r
    return None, used


def permuted(h: Tensor, order: Tensor) -> Tensor:
    """h[order][:, order], in one piece."""
    out = torch.empty_like(h)
    for rows, place in zip(torch.split(order, _STRIP), torch.split(out, _STRIP), strict=True):
        torch.gather(h[rows], 1, order.expand(len(rows), -1), out=place)
    return out


def _factor(h: Tensor) -> bool:
    """h <- the upper R with R Rᵀ = h, by halves; whether h is positive definite."""
    k = h.shape[0]
    if k <= _LEAF:
        # Lower, of the reversed order: reversed once more it is upper.
        m, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        h.copy_(m.flip(0, 1))
        return int(info) == 0
    first, second = slice(k // 2), slice(k // 2, k)
    if not _factor(h[second, second]):
        return False
    beside = h[first, second]
    _divide(h[second, second], beside.T, upper=True)
    h[first, first].addmm_(beside, beside.T, alpha=-1)
    h[second, first] = 0
    return _factor(h[first, first])


def upper_product(r: Tensor, errors: Tensor) -> Tensor:
    """R E [K, N] for an upper R [K, K], in strips that leave out most of what is zero."""
    out = torch.empty_like(errors)
    k = r.shape[0]
    step = max(_LEAF, k // 8)
    for a in range(0, k, step):
        torch.mm(r[a : a + step, a:], errors[a:], out=out[a : a + step])
    return out


def divide_by_h(r: Tensor, columns: Tensor) -> None:
    """columns [K, n] <- H⁻¹ columns, for R Rᵀ = H."""
    _divide(r, columns, upper=True, invert=True)
    divide_by_lower(r.T, columns)


def divide_by_lower(r: Tensor, columns: Tensor) -> None:
    """columns [K, n] <- the inverse of a lower triangle [K, K] times them; H is damped well."""
    _divide(r, columns, upper=False, invert=True)


def _divide(by: Tensor, columns: Tensor, *, upper: bool, invert: bool = False) -> None:
    """columns [K, n] <- the inverse of a triangular matrix [K, K] times them, by its halves.

    invert: multiply by the inverses of small triangles, in two thirds of the time that solving
    takes. It is as exact where H is damped well.
    """
    k = by.shape[0]
    if k <= (_INVERTED if invert else _LEAF):
        if invert:
            one = torch.eye(k, dtype=by.dtype, device=by.device)
            columns.copy_(torch.linalg.solve_triangular(by, one, upper=upper) @ columns)
        else:
            columns.copy_(torch.linalg.solve_triangular(by, columns, upper=upper))
        return
    first, second = slice(k // 2), slice(k // 2, k)
    if upper:
        first, second = second, first
    _divide(by[first, first], columns[first], upper=upper, invert=invert)
    columns[second].addmm_(by[second, first], columns[first], alpha=-1)
    _divide(by[second, second], columns[second], upper=upper, invert=invert)


def quadratic(d: Tensor, h: Tensor) -> Tensor:
    """d H dᵀ of each row, [N], from the blocks on and above the diagonal of H."""
    k = h.shape[0]
    if k <= _LEAF:
        whole: Tensor = torch.linalg.vecdot(d @ h, d)
        return whole
    left, right = d[:, : k // 2], d[:, k // 2 :]
    beside: Tensor = torch.linalg.vecdot(left @ h[: k // 2, k // 2 :], right)
    return (
        quadratic(left, h[: k // 2, : k // 2])
        + quadratic(right, h[k // 2 :, k // 2 :])
        + 2 * beside
    )


def rough_quadratic(d: Tensor, h: Tensor) -> Tensor:
    """As `quadratic`, of columns d [K, N], in bfloat16: a row's is good to three digits."""
    k = h.shape[0]
    if k <= _LEAF:
        whole: Tensor = torch.linalg.vecdot((h.bfloat16() @ d).float(), d.float(), dim=0)
        return whole
    first, second = slice(k // 2), slice(k // 2, k)
    product = h[second, first].bfloat16() @ d[first]
    beside: Tensor = torch.linalg.vecdot(product.float(), d[second].float(), dim=0)
    return (
        rough_quadratic(d[first], h[first, first])
        + rough_quadratic(d[second], h[second, second])
        + 2 * beside
    )
