"""The two matrices of the vocabulary, held in bfloat16 where a model computes in float32.

Where the linears have four bits, the embedding and the head are most of what a small model holds,
and the head is the largest single thing that is read for a token. Both were trained in bfloat16
(a float16 directory of such a model holds the same numbers, which is looked at); a CPU without
instructions for bfloat16 computes in float32, and widening them doubles both memory and reading. So
they stay as narrow as they are:

- An embedding's row is widened when it is looked up: exact.
- At the head, decoding (one position of few sequences, a prompt's last one too) goes through
  torch's bfloat16 product, which widens as it reads: 151,936 x 1,024 on AVX2 takes 20 ms where a
  float32 product takes 54. It rounds its input to bfloat16, as the int4 product does, and the
  logits to 8 bits, by which the likeliest tokens would often be equal. So those that are the
  largest then, 64 of each row, are computed again in float32 from the exact input.
- Everything else (a text's perplexity) goes through tiles that are widened one at a time: exact,
  and no slower (16 rows: 136 ms against 221). Whoever measures by decoding asks for that with
  `exact_logits`.

Left out on purpose: matrices that need float16's finer steps, which no such product takes; GPUs,
where the model computes in 16 bits anyway; models that are not quantized, which are what others are
measured against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import Checkpoint
from .models.families import Family
from .timings import fastest_of

EXACT = 64  # logits of a row that are computed again
FEW = 4  # sequences up to which the bfloat16 product is faster than tiles: they meet near six
STORED_NOTE = (
    f"embedding and head in bfloat16, and so are decoded logits of up to {FEW} sequences, "
    f"but for the largest {EXACT}"
)
_TILE = 1024  # rows of the matrix widened at a time: a few MB, of the order of a cache
WORTH = 1 << 24  # weights below which nothing is gained
SAMPLE = 8192  # rows that are timed


class StoredEmbedding(nn.Module):
    """Rows of a bfloat16 table [V, K], given out in float32.

    Args:
        weight: bfloat16 [V, K]. A buffer: a model's dtype is that of its parameters.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., K] float32."""
        return F.embedding(ids, self.weight).float()


class StoredHead(nn.Module):
    """`x @ W.T` with `W` bfloat16 [V, K], for float32 `x`.

    Args:
        weight: as `StoredEmbedding`'s, which may be the same one.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] float32 -> [..., V] float32."""
        if x.requires_grad or x.dtype != torch.float32:  # a model that was made something else of
            return F.linear(x, self.weight.to(x.dtype))
        rows = x.reshape(-1, x.shape[-1])
        decoding = x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= FEW and not self.exact
        logits = self._decoded(rows) if decoding else self._tiles(rows)
        return logits.view(*x.shape[:-1], logits.shape[1])

    def _decoded(self, x: Tensor) -> Tensor:
        logits = F.linear(x.to(self.weight.dtype), self.weight).float()
        top = logits.topk(min(EXACT, logits.shape[1])).indices  # [rows, EXACT]
        exact = torch.einsum("rk,rek->re", x, self.weight[top].float())
        return logits.scatter_(1, top, exact)

    def _tiles(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], self.weight.shape[0])
        for start in range(0, out.shape[1], _TILE):
            tile = self.weight[start : start + _TILE].float()
            torch.mm(x, tile.t(), out=out[:, start : start + _TILE])
        return out


@contextmanager
def exact_logits(model: nn.Module) -> Iterator[None]:
    """While it lasts, decoding with `model` gives exact logits, too, in the time that takes."""
    heads = [m for m in model.modules() if isinstance(m, StoredHead)]
    for head in heads:
        head.exact = True
    try:
        yield
    finally:
        for head in heads:
            head.exact = False


def keep_stored(model: nn.Module, family: Family, checkpoint: Checkpoint) -> set[str]:
    """Puts the two matrices into a model on the CPU as they are stored, where that is faster.

    Args:
        model: that computes in float32; its embedding and head still on meta.

    Returns:
        Names of the checkpoint's tensors that were used; none where the model was left as it is:
        they do not fit bfloat16, or the model's shape, the head is quantized, or there is nothing
        to gain.
    """
    names = [family.embedding]
    if not isinstance(model.get_submodule(family.head.removesuffix(".weight")), nn.Linear):
        return set()
    if not getattr(model.config, "tie_word_embeddings", False):
        names.append(family.head)
    if not all(fits(model, checkpoint, name) for name in names):
        return set()
    weights = [w for name in names if (w := as_bfloat16(checkpoint.read(name))) is not None]
    if len(weights) < len(names) or not worth_it(weights[-1]):
        return set()
    for name, made in (
        (family.embedding, StoredEmbedding(weights[0])),
        (family.head, StoredHead(weights[-1])),
    ):
        model.set_submodule(name.removesuffix(".weight"), made)
    return {family.embedding, family.head}


def fits(model: nn.Module, checkpoint: Checkpoint, name: str) -> bool:
    """Whether the checkpoint has this parameter of the model in 16 bits and in its shape."""
    info = checkpoint.tensors.get(name)
    parameter = getattr(model.get_submodule(name.removesuffix(".weight")), "weight", None)
    if info is None or not isinstance(parameter, nn.Parameter):  # as of a quantized head
        return False
    return info.dtype in ("BF16", "F16") and info.shape == tuple(parameter.shape)


def as_bfloat16(weight: Tensor) -> Tensor | None:
    """The matrix in bfloat16 where that loses nothing, as with one that was bfloat16 before."""
    held = weight.to(torch.bfloat16)
    for start in range(0, weight.shape[0], SAMPLE):
        part = weight[start : start + SAMPLE]
        if not torch.equal(held[start : start + SAMPLE].to(part.dtype), part):
            return None
    return held


def stored_weights(module: nn.Module) -> list[Tensor]:
    """The matrix that a module here holds; nothing of others."""
    return [module.weight] if isinstance(module, StoredEmbedding | StoredHead) else []


def worth_it(weight: Tensor) -> bool:
    """Whether one row is faster through a bfloat16 head on this CPU, by timing a part of it.

    Args:
        weight: bfloat16 [V, K].
    """
    if weight.numel() < WORTH:
        return False
    part = weight[:SAMPLE]
    wide, x = part.float(), torch.ones(1, weight.shape[1])
    with torch.inference_mode():
        narrow = fastest_of(lambda: F.linear(x.to(part.dtype), part), 5)
        return narrow < fastest_of(lambda: F.linear(x, wide), 5)
