"""The column loops of `columns.py` for a CPU: form `stretches`.

A visit is a handful of operations on one row of a block, too few numbers to be worth a torch call:
numpy takes a fraction of torch's time for them. What can be done for the whole block at once is
done before or after. Changes go rank one inside a stretch of sixteen columns, and by a matrix
product (torch's, with all its threads) beyond it: those of one stretch to the next, of two to the
next two, and so on, so that each row is touched a few times and products have few shapes.

Left out on purpose: the definition of a visit, which is `columns.py`'s form `steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SUB = 16  # columns per rank-one stretch before a matmul carries the changes on: a power of two

Row = NDArray[Any]


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
    """As `columns.gptq_block`."""
    about = torch.empty_like(wanted)  # the codes about their zero
    rows, about_rows, own = list(wanted.numpy()), list(about.numpy()), list(weights.numpy())
    scale_of, zero_of, group_of = list(scales.numpy()), list(zeros.numpy()), group.tolist()
    low_of, high_of = [-z for z in zero_of], [maxq - z for z in zero_of]

    def visit(i: int, out: Row) -> None:
        g, q = group_of[i], about_rows[i]
        np.divide(rows[i], scale_of[g], out=q)
        np.rint(q, out=q)
        np.maximum(q, low_of[g], out=q)
        np.minimum(q, high_of[g], out=q)
        np.multiply(q, scale_of[g], out=out)
        np.subtract(out, own[i], out=out)

    moved = _loop(wanted, coupling, visit)
    codes.copy_(about.add_(zeros[group]))
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
    """As `columns.descent_block`; factors: [B], 1 / h's diagonal; inverse: [N], 1 / scale.

    Works in codes instead of weights: a row is the code that its gradient asks for.
    """
    asked = (pull * inverse).mul_(factors[:, None]).add_(codes)
    rows, code_rows = list(asked.numpy()), list(codes.numpy())
    least, most = (b.numpy() if isinstance(b, Tensor) else b for b in (low, high))

    def visit(i: int, out: Row) -> None:
        wanted, code = rows[i], code_rows[i]
        np.rint(wanted, out=wanted)
        np.maximum(wanted, least, out=wanted)
        np.minimum(wanted, most, out=wanted)
        np.subtract(wanted, code, out=out)
        np.copyto(code, wanted)

    return _loop(asked, h * factors, visit).mul_(scale)


def _loop(values: Tensor, coupling: Tensor, visit: Callable[[int, Row], None]) -> Tensor:
    """Visits rows in order, carrying each row's change on to the later ones.

    `visit(i, out)` writes d_i [N] to `out`; then values[j] -= coupling[i, j] d_i for all j > i.
    Returns all d_i, [B, N].
    """
    size = values.shape[0]
    out = torch.empty_like(values)
    # One stride, wherever it is a part of: oneDNN keeps half a megabyte for each way to multiply.
    coupling = coupling.contiguous()
    here, there, factors = values.numpy(), list(out.numpy()), coupling.numpy()[:, :, None]
    rank_one = np.empty_like(here[:_SUB])
    for a in range(0, size, _SUB):
        b = min(a + _SUB, size)
        for i in range(a, b):
            visit(i, there[i])
            if i + 1 < b:
                change, later = rank_one[: b - i - 1], here[i + 1 : b]
                np.multiply(factors[i, i + 1 : b], there[i], out=change)
                np.subtract(later, change, out=later)
        if b < size:
            # The last 1, 2, 4, ... stretches to as many that follow: the largest power of two that
            # divides how many are done, so that each row has met all before it when its turn comes.
            width = b & -b
            done, after = slice(b - width, b), slice(b, min(b + width, size))
            values[after].addmm_(coupling[done, after].T, out[done], alpha=-1)
    return out
