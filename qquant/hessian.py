"""The sums that GPTQ needs of a linear's input, gathered batch by batch without keeping any batch.

H = 2/n XᵀX is symmetric, so it is multiplied in strips of rows, each from the diagonal on (few
products, most of them large). It must not be rounded on the way, since the solver divides by it:
products are summed in float32 whatever the inputs are, or in whole numbers of inputs that are
rounded to 16 or 8 bits (`int16.py`, `int8.py`), each by itself, so that what it is off by falls
with their number.
The two further sums serve the corrections
from a full-precision stream. Tensors in, tensors out: who gathers, and when, is
`calibration/walk.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import int16
from .pool import less
from .products import Integers, laid_out, linear, packed
from .running_sum import RunningSum

# Adds to each tensor, in place, what others of the same shapes have elsewhere.
AddUp = Callable[[Sequence[Tensor]], None]

_STRIP = 256  # rows of the Hessian that are multiplied together, at the least


@dataclass
class _Operand:
    """One side of a product, and once for all products how it is taken.

    Attributes:
        x: [n, K].
        columns: its integers, unless they are rough.
    """

    x: Tensor
    columns: Any = None  # int8.Columns | int16.Columns
    _transposed: Tensor | None = None

    @property
    def transposed(self) -> Tensor:
        """As `RunningSum` takes it."""
        if self._transposed is None:
            self._transposed = laid_out(self.x)
        return self._transposed


class Hessian:
    """Accumulates what the solver needs to know about one input, in float32.

    `H = 2/n X_qᵀX_q` always. With a full-precision stream beside it also what the streams differ
    by, for `gptq.corrected_target`. The inputs' difference is one sum for all linears that share
    the input, `cross = 2/n (X_f - X_q)ᵀX_q` [K, K]. The outputs' is `pull = 2/n (W (X_f - X_q) +
    h_f - h_q)ᵀX_q` [N, K], the last two where the output is added to the residual stream h. Where
    there are few outputs everything goes into `pull`: for the last linear of a block of Qwen-7B
    that is half of the operations and a quarter of the memory. Else only the residual's does.

    Where the full-precision stream's outputs Y = W X_f are at hand anyway, W times the difference
    need not be multiplied out: it is summed as Yᵀ X_q - W X_qᵀX_q, the latter at once for all
    batches with Y, if these come first. In float32 that loses a few of the difference's last digits
    to the sums' rounding; with integers it is not done.

    Args:
        k: input features.
        device: where the sums live.
        weights: [N_i, K] of the linears that share the input, to sum the streams' difference too.
        residual: these linears write to the residual stream.
        outputs: batches come with Y. The first one without makes later ones be summed without.
        integers: what inputs are rounded to before they are summed, on a CPU; None for nothing.
            Left aside where the sizes are not made for it.

    Attributes:
        tokens, paired_tokens: rows added, and those of them with both streams.
        flops: operations of the products so far.
    """

    def __init__(
        self,
        k: int,
        device: torch.device | str = "cpu",
        *,
        weights: Sequence[Tensor] = (),
        residual: bool = False,
        outputs: bool = False,
        integers: Integers | None = None,
    ) -> None:
        self.k, self.tokens, self.paired_tokens, self.flops = k, 0, 0, 0
        self._h = torch.zeros(k, k, dtype=torch.float32, device=device)
        sizes = (k, *(size for w in weights for size in w.shape))
        self._integers: Integers | None = None
        if integers is not None and k >= integers.LEAST:
            fits = all(size and size % integers.WIDE == 0 for size in sizes)
            self._integers = integers if fits else None
        n = sum(int(w.shape[0]) for w in weights)
        self._weight: Tensor | None = None
        self._cross: Tensor | None = None
        self._pull: Tensor | None = None
        outputs = outputs and self._integers is None
        self._by_outputs, self._differ = outputs and n > 0, False
        if n and (outputs or through_outputs(n, k, residual)):
            self._weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        elif n:
            self._cross = torch.zeros_like(self._h)
        if self._weight is not None or (n and residual):
            self._pull = torch.zeros(n, k, dtype=torch.float32, device=device)
        step = max(_STRIP, k // 16)
        self._strips = [(a, min(a + step, k)) for a in range(0, k, step)]
        self._squares = [RunningSum(self._h[a:b, a:]) for a, b in self._strips]
        self._cross_sum = RunningSum(self._cross) if self._cross is not None else None
        self._pull_sum = RunningSum(self._pull) if self._pull is not None else None
        self._packed: Any = None  # the weight, as `linear` takes it
        self._columns: list[Any] = [None, None, None]  # for `_operand`

    def add(
        self,
        x: Tensor,
        x_full: Tensor | None = None,
        residual: Tensor | None = None,
        outputs: Tensor | None = None,
        paired: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            x: [..., K], the quantized stream's input.
            x_full: [..., K], the full-precision stream's, where the difference is summed; None
                where that stream leaves this batch out.
            residual: [..., N], h_f - h_q, where asked for, likewise.
            outputs: [..., N], Y, where that was said.
            paired: [n] int64, the rows of x that `x_full` has; all of them, in order, if None.
        """
        if outputs is None and self._by_outputs:
            self.settle()
        x = x.reshape(-1, self.k)
        self.tokens += x.shape[0]
        xt = self._operand(x, 0)
        self._add_square(xt)
        if x_full is None or (self._cross is None and self._pull is None):
            return
        if paired is not None:
            x = x[paired]
            xt = self._operand(x, 0)
        self.paired_tokens += x.shape[0]
        if self._by_outputs and outputs is not None:
            assert paired is None, "H is of all rows"
            self._add_outputs(x, xt, x_full, residual, outputs)
            return
        # Experts' rows are of any number, which `pool.py` is not for.
        full = x_full.reshape(-1, self.k)
        inputs = less(full, x) if paired is None else full - x
        behind = None if residual is None else residual.reshape(-1, residual.shape[-1]).to(x.dtype)
        if self._cross_sum is not None:
            self._add(self._cross_sum, self._operand(inputs, 1), xt)
        if self._weight is not None:
            self.flops += 2 * inputs.numel() * self._weight.shape[0]
            if self._packed is None:
                whole = self._integers is int16.Columns
                self._packed = packed(self._weight, True) if whole else self._weight
            differ = linear(inputs, self._packed)
            behind = differ if behind is None else differ.add_(behind)
        if self._pull_sum is not None and behind is not None:
            self._add(self._pull_sum, self._operand(behind, 2), xt)

    def _add_outputs(
        self, x: Tensor, xt: Any, x_full: Tensor, residual: Tensor | None, outputs: Tensor
    ) -> None:
        assert self._pull_sum is not None
        # Rounding must not pass for a difference where there is none.
        self._differ = (
            self._differ
            or not torch.equal(x_full.reshape(x.shape), x)
            or (residual is not None and bool(residual.any()))
        )
        total = outputs if residual is None else outputs + residual
        self._add(self._pull_sum, self._operand(total.reshape(-1, total.shape[-1]), 2), xt)

    def settle(self) -> None:
        """Makes the sums complete: takes what the quantized stream's inputs give from the outputs'.

        That once; later batches are summed without.
        """
        for sums in (*self._squares, self._cross_sum, self._pull_sum):
            if sums is not None:
                sums.settle()
        if not self._by_outputs:
            return
        self._by_outputs = False
        self._mirror()
        assert self._pull is not None and self._weight is not None
        if self._differ:
            self.flops += 2 * self._pull.numel() * self.k
            self._pull.addmm_(self._weight, self._h, alpha=-1)
        else:
            self._pull.zero_()

    def _operand(self, x: Tensor, which: int) -> _Operand:
        """x [n, K] as the sums take it.

        Args:
            which: the last one's memory is taken: 0 for inputs, 1 for their difference, 2 for the
                outputs'.
        """
        if self._integers is None:
            return _Operand(x)
        made: Any = self._integers.of(x, self._columns[which])
        self._columns[which] = made
        return _Operand(x, None if made.rough else made)

    def _add_square(self, x: _Operand) -> None:
        if x.columns is not None:  # leaves out what is below the diagonal by itself
            self.flops += self.k * (self.k + x.columns.WIDE) * x.columns.rows
            x.columns.add_products(x.columns, self._h)
            for square in self._squares:
                square.saw(x.columns.rows)
            return
        xt = x.transposed
        for (a, b), square in zip(self._strips, self._squares, strict=True):
            self.flops += 2 * xt[a:b].numel() * (self.k - a)
            square.add(xt[a:b], xt[a:])

    def _add(self, sums: RunningSum, a: _Operand, b: _Operand) -> None:
        self.flops += 2 * a.x.numel() * b.x.shape[1]
        if a.columns is not None and b.columns is not None:
            a.columns.add_products(b.columns, sums.out)
            sums.saw(a.columns.rows)
        else:
            sums.add(a.transposed, b.transposed)

    def _mirror(self) -> None:
        for a, b in self._strips:
            self._h[b:, a:b] = self._h[a:b, b:].T
            own = self._h[a:b, a:b]  # what integers leave there below the diagonal is no sum
            own.copy_(own.triu() + own.triu(1).T)

    def add_up(self, with_others: AddUp) -> None:
        """Adds sums and counts of the same input that others have gathered."""
        self.settle()
        sums = [self._h[a:b, a:] for a, b in self._strips]
        sums += [t for t in (self._cross, self._pull) if t is not None]
        counts = torch.tensor([self.tokens, self.paired_tokens])
        with_others([*sums, counts])
        self.tokens, self.paired_tokens = counts.tolist()

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(H, cross, pull), scaled by 2/n; the sums are given away, so call it once."""
        self.settle()
        self._columns, self._packed = [None, None, None], None
        self._mirror()
        h = self._h.mul_(2.0 / max(1, self.tokens))
        paired = 2.0 / max(1, self.paired_tokens)
        cross = self._cross.mul_(paired) if self._cross is not None else None
        pull = self._pull.mul_(paired) if self._pull is not None else None
        return h, cross, pull


def through_outputs(n: int, k: int, residual: bool) -> bool:
    """Whether N outputs' difference takes fewer operations per token than the K inputs'."""
    return 2 * n * k <= k * k + (n * k if residual else 0)
