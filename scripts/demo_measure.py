"""How good the demo checkpoint is, and how much coarse rounding hurts it.

Owns the perplexity on the held-out text and the round-to-nearest baseline that shows whether the
checkpoint is worth quantizing well: a network whose loss does not move when its weights are rounded
to 3 bits cannot tell a good method from a bad one.  Kept apart from `qquant` so that the bundle can
be judged without the code it is meant to test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Next-token loss: tokens seen, `nats` per token, its standard error, perplexity."""

    tokens: int
    nats: float
    standard_error: float
    perplexity: float

    def rounded(self) -> dict[str, float]:
        """The fields as plain numbers for JSON, to four decimals."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


@torch.no_grad()
def held_out_loss(
    logits: Callable[[Tensor], Tensor], ids: list[int], length: int, windows: int | None = None
) -> Loss:
    """Loss of a model on `ids`, in windows of `length` predictions that share no prediction.

    `logits` maps ids `[1, length]` int64 to `[1, length, rows]`; `windows` keeps the first so many.
    """
    starts = range(0, len(ids) - length, length)[:windows]
    rows = [torch.tensor(ids[start : start + length + 1]) for start in starts]
    each = torch.stack(
        [F.cross_entropy(logits(row[None, :-1])[0].float(), row[1:]).double() for row in rows]
    )
    nats = each.mean().item()
    error = (each.std() / math.sqrt(len(rows))).item()
    return Loss(len(rows) * length, nats, error, math.exp(nats))


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric round-to-nearest of `weight` `[out, in]` in groups along `in`, dequantized.

    The grid is GPTQ's: 2**bits levels, zero at level 2**(bits-1), scale 2 * max|w| / (2**bits - 1).
    """
    top = 2**bits - 1
    grouped = weight.float().reshape(len(weight), -1, group)
    scale = (2 * grouped.abs().amax(-1, keepdim=True) / top).clamp(min=1e-12)
    zero = (top + 1) // 2
    codes = (torch.round(grouped / scale) + zero).clamp(0, top)
    rounded: Tensor = (codes - zero) * scale
    return rounded.flatten(1)


def rounded_blocks(
    tensors: dict[str, Tensor], bits: int = 3, group: int = 128, blocks: str = "transformer.h."
) -> dict[str, Tensor]:
    """The same tensors with the blocks' matrices rounded and all others as they are."""
    return {
        name: round_to_nearest(value, bits, group)
        if name.startswith(blocks) and value.dim() == 2
        else value
        for name, value in tensors.items()
    }
