"""How good the demo checkpoint is, and how much coarse rounding hurts it.

Owns the perplexity on the held-out text and the round-to-nearest baseline that shows whether the
checkpoint is worth quantizing well: a network whose loss does not move when its weights are rounded
to 3 bits cannot tell a good method from a bad one.  The loss is `qquant.profile`'s; the rounding is
written out here, so that the bundle is not judged by the code it is meant to test.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qquant import profile


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


def held_out_loss(model: Any, ids: list[int], length: int, windows: int | None = None) -> Loss:
    """Loss of a model on `ids`, in windows of `length` predictions that share no prediction.

    `model` is one that `qquant.profile` can measure; `windows` keeps the first so many.
    """
    rows = torch.tensor(ids).unfold(0, length + 1, length)[:windows]
    nats = profile.loss(model, rows)
    return Loss(len(rows) * length, nats.value, nats.stderr, math.exp(nats.value))


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
