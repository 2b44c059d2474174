"""A sum of products aᵀb over many batches, in float32, even where products come back rounded.

A CPU with instructions for bfloat16 multiplies it at twice the rate of float32 or more, and sums
inside a product in float32; but torch gives that sum back rounded to bfloat16, a relative 2e-3,
which is too much for what a solver divides by. Batches of one input are alike, though: what the
earlier ones say a batch should give can be taken off inside the product, before it is rounded. Then
only what the batch differs by is rounded, and the expected part is added again in float32. On 16
batches of inputs with a large mean, the sum's error falls from 4.1e-4 to 1.3e-5 of its norm, and
further with every batch, since the roundings are independent. A first one has no earlier ones
and is multiplied in float32. What is expected changes when the rows have doubled.

Left out on purpose: who decides what is bfloat16 (`products.laid_out`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import add_product


class RunningSum:
    """Adds to `out` [A, B] float32, zero at first; complete after `settle`."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self._rows = self._rows_then = 0  # added so far, and when `_expected` was made
        self._batch = 0  # rows that `_expected` is for
        self._expected: Tensor | None = None  # [A, B] bfloat16
        self._owed = 0  # times that it was taken off

    def add(self, a: Tensor, b: Tensor) -> None:
        """out += a bᵀ: a [A, n], b [B, n], both as `products.laid_out` gives them."""
        rows = a.shape[1]
        if not rows:
            return
        narrow = a.dtype == b.dtype == torch.bfloat16
        if a.is_cuda or not narrow or not self._rows:
            add_product(self.out, a, b)
        else:
            if rows != self._batch or self._rows >= 2 * self._rows_then:
                self._expect(rows)
            assert self._expected is not None
            self.out += torch.addmm(self._expected, a, b.T, beta=-1)
            self._owed += 1
        self._rows += rows

    def saw(self, rows: int) -> None:
        """So many more rows' products are in `out`, otherwise added."""
        self._rows += rows

    def settle(self) -> None:
        """Adds what was taken off."""
        if self._expected is not None:
            self.out.add_(self._expected, alpha=self._owed)
        self._expected, self._owed, self._batch = None, 0, 0

    def _expect(self, rows: int) -> None:
        self.settle()
        self._expected = (self.out * (rows / self._rows)).bfloat16()
        self._batch, self._rows_then = rows, self._rows
