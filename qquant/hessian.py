"""The sums that GPTQ needs of a linear's input, gathered batch by batch without keeping any batch.

H = 2/n XᵀX is symmetric, so only blocks on and above its diagonal are multiplied (its upper right
quarter, then each diagonal half the same way: few products, most of them large). It must not be
rounded on the way, since the solver inverts it: products are summed in float32 whatever the inputs
are. The two further sums serve the corrections from a full-precision stream. Tensors in, tensors
out: who gathers, and when, is `calibration/walk.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Adds to each tensor, in place, what others of the same shapes have elsewhere.
AddUp = Callable[[Sequence[Tensor]], None]

_LEAF = 256  # widest block on the diagonal that is multiplied whole


class Hessian:
    """Accumulates what the solver needs to know about one input, in float32.

    `H = 2/n X_qᵀX_q` always. With a full-precision stream beside it also `2/n (X_f - X_q)ᵀX_q`,
    and, for linears that write to the residual stream, `2/n (h_f - h_q)ᵀX_q` (see
    `gptq.corrected_target`).

    Args:
        k: input features.
        device: where the sums live.
        cross: also sum the difference of the streams.
        residual: output features, to also sum the residual's difference; 0 for none.

    Attributes:
        tokens, paired_tokens: rows added, and those of them with both streams.
        flops: operations of the products so far.
    """

    def __init__(
        self, k: int, device: torch.device | str = "cpu", cross: bool = False, residual: int = 0
    ) -> None:
        self.k, self.tokens, self.paired_tokens, self.flops = k, 0, 0, 0
        self._h = torch.zeros(k, k, dtype=torch.float32, device=device)
        self._cross = torch.zeros_like(self._h) if cross else None
        self._res = (
            torch.zeros(residual, k, dtype=torch.float32, device=device) if residual else None
        )
        self._blocks = _upper_blocks(0, k, max(_LEAF, k // 16))

    def add(
        self,
        x: Tensor,
        x_full: Tensor | None = None,
        residual: Tensor | None = None,
        paired: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            x: [..., K], the quantized stream's input.
            x_full: [..., K], the full-precision stream's, where `cross` was asked for; None where
                that stream leaves this batch out.
            residual: [..., N], h_f - h_q, likewise.
            paired: [n] int64, the rows of x that `x_full` has; all of them, in order, if None.
        """
        x = x.reshape(-1, self.k)
        self.tokens += x.shape[0]
        for a, b, c, d in self._blocks:
            self._add(self._h[a:b, c:d], x[:, a:b], x[:, c:d])
        if self._cross is not None and x_full is not None:
            x = x if paired is None else x[paired]
            self.paired_tokens += x.shape[0]
            diff = x_full.reshape(-1, self.k) - x
            self._add(self._cross, diff, x)
        if self._res is not None and residual is not None:
            self._add(self._res, residual.reshape(-1, residual.shape[-1]).to(x.dtype), x)

    def _add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        _add_product(out, a, b)

    def add_up(self, with_others: AddUp) -> None:
        """Adds sums and counts of the same input that others have gathered."""
        sums = [self._h[a:b, c:d] for a, b, c, d in self._blocks]
        sums += [t for t in (self._cross, self._res) if t is not None]
        counts = torch.tensor([self.tokens, self.paired_tokens])
        with_others([*sums, counts])
        self.tokens, self.paired_tokens = counts.tolist()

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(H, cross, residual), scaled by 2/n; the sums are given away, so call it once."""
        scale = 2.0 / max(1, self.tokens)
        h = self._h
        for a, b, c, d in self._blocks:
            if a != c:
                h[c:d, a:b] = h[a:b, c:d].T
        h.mul_(scale)
        paired = 2.0 / max(1, self.paired_tokens)
        cross = self._cross.mul_(paired) if self._cross is not None else None
        res = self._res.mul_(paired) if self._res is not None else None
        return h, cross, res


def _upper_blocks(a: int, b: int, leaf: int) -> list[tuple[int, int, int, int]]:
    """Rows a:b and columns c:d of the blocks that cover a square on and above its diagonal."""
    if b - a <= leaf:
        return [(a, b, a, b)]
    middle = (a + b) // 2
    upper = (a, middle, middle, b)
    return [upper, *_upper_blocks(a, middle, leaf), *_upper_blocks(middle, b, leaf)]


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += aᵀ b with a float32 result that is not rounded on the way.

    Products of bfloat16 values are exact in float32; a plain bfloat16 matmul would round its
    output (relative error 1.8e-3), so 16-bit inputs on CUDA ask for a float32 output and go through
    float32 elsewhere.
    """
    if a.dtype == torch.float32:
        out.addmm_(a.T, b)
    elif a.is_cuda:
        out += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        out.addmm_(a.T.float(), b.float())
