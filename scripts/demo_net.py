"""The network of the demo checkpoint, in plain torch and float32.

The module tree carries the original Qwen names, so its `state_dict` *is* the checkpoint.  It is a
second, small writing of the same network as `qquant.models.qwen` on purpose: training needs neither
a cache nor generation, and a test compares the two, so that each checks the other.  Dynamic NTK and
logn are left out because they act beyond the training length only.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import initialise


@dataclass(frozen=True)
class Shape:
    """The sizes of the network; `ffn` is the real width, half of `intermediate_size`."""

    hidden: int = 256
    ffn: int = 512
    layers: int = 4
    head_dim: int = 64
    ranks: int = 2816
    rows: int = 3072
    seq_length: int = 512

    @property
    def heads(self) -> int:
        """Attention heads: hidden size over head dimension."""
        return self.hidden // self.head_dim


class RMSNorm(nn.Module):
    """Root mean square norm with a gain, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; the rows of `c_attn` are q, then k, then v."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.c_attn = nn.Linear(shape.hidden, 3 * shape.hidden, bias=True)
        self.c_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.c_attn(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        mixed: Tensor = self.c_proj(out.transpose(1, 2).reshape(batch, length, width))
        return mixed


class MLP(nn.Module):
    """SwiGLU as Qwen names it: `w2` is the gate, `w1` the up projection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.c_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.w1(x) * F.silu(self.w2(x)))
        return out


class Block(nn.Module):
    """One pre-norm block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(shape.hidden)
        self.attn = Attention(shape)
        self.ln_2 = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.rows, shape.hidden)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = RMSNorm(shape.hidden)


class DemoNet(nn.Module):
    """The language model: ids `[batch, length]` int64 in, logits `[batch, length, rows]` out."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = Transformer(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.rows, bias=False)
        initialise(self, seed, shape.layers, ("c_proj.weight",))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.hidden(ids))
        return logits

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output matrix is applied to, `[batch, length, hidden]`."""
        cos, sin = rotary(ids.shape[1], self.shape.head_dim)
        x = self.transformer.wte(ids)
        for block in self.transformer.h:
            x = block(x, cos, sin)
        out: Tensor = self.transformer.ln_f(x)
        return out

    # What `qquant.profile` needs to measure a model, under transformers' names.

    def base_model(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The last hidden states; there is no cache."""
        return SimpleNamespace(last_hidden_state=self.hidden(input_ids))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def loss(self, ids: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats over `ids` `[batch, length + 1]`."""
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def rotary(length: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, dim]` of the rotary positions, half-split."""
    steps = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), base**-steps)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys `[batch, heads, length, dim]` to their positions."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
