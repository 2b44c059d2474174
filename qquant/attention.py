"""Causal attention of whole samples on a CPU that multiplies bfloat16, or 16-bit integers.

Torch's own kernel for the CPU takes bfloat16 products in small pieces, at a tenth of the rate that
such a processor has: of a block of hidden 512 it was two fifths of the forward. Here queries go in
blocks of 128 with the keys up to their own, several heads at a time: scores and softmax in float32,
as in torch's kernel, the product with the values in bfloat16. Measured on two cores of an AMD EPYC
(Zen 5), bfloat16, torch's kernel and this: 7.5 and 3.5 ms (2 samples of 512 tokens, 8 heads of 64),
31 and 19 ms (2048 tokens). What a product of several heads is handed lies in few long pieces: the
library copies it first, and one transposed copy for each block of queries took twice the time.

The softmax is one pass in machine code (`fused.py`) where that runs. Where a run's products are of
16-bit integers, and of bfloat16 on processors that multiply such integers as fast, attention is
`int16_attention.py`'s.

transformers asks for an attention by the name in a model's config, so this one is registered under
a name of its own, when a model is to use it. Whatever it is not made for (a mask, a cache) it
leaves to transformers' call of torch's kernel.

Left out on purpose: decoding, training, other devices.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from . import fused, int16_attention
from .devices import native_bfloat16
from .fused_ir import LANES
from .products import in_float32

NAME, NAME_INT16 = "qquant_cpu", "qquant_int16"
_BLOCK = 128  # queries that are multiplied together
_TOGETHER = 4096  # keys of all heads that are: scores of 2 MB, which stay in the caches


def use(config: Any, device: torch.device, dtype: torch.dtype, int16: bool = False) -> None:
    """Lets a model of this config attend by this module, where that is faster than its `sdpa`.

    Args:
        int16: in 16-bit integers.
    """
    narrow = dtype == torch.bfloat16 and native_bfloat16(device)
    fast = device.type == "cpu" and (int16 or narrow)
    if not fast or config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = NAME_INT16 if int16 else NAME
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    config._attn_implementation = name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' blocks call it.

    Args:
        query: [batch, heads, queries, head]. key, value: [batch, heads of theirs, keys, head].
        attention_mask: None where attention is causal and nothing else.

    Returns:
        [batch, queries, heads, head], and None for the probabilities.
    """
    config = getattr(module, "config", None)
    int16 = getattr(config, "_attn_implementation", None) == NAME_INT16
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    ours = (
        attention_mask is None
        and causal
        and query.device.type == "cpu"
        and _takes(int16, query, key, value)
        and 1 < query.shape[2] == key.shape[2]
        and not dropout
        and not (torch.is_grad_enabled() and query.requires_grad)
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
    )
    if not ours:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return, unused-ignore]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return causal_attention(query, key, value, scaling), None


def _takes(int16: bool, *given: Tensor) -> bool:
    if int16:
        return int16_attention.takes(*given) and not int16_attention.unavailable(torch.float32)
    return all(t.dtype == torch.bfloat16 for t in given)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None
) -> Tensor:
    """Each query with the keys up to its own, in 16-bit integers where that runs.

    Args:
        query: [batch, heads, n, head] bfloat16, or float32 where integers take that. key, value:
            [batch, heads or a divisor, n, head].
        scaling: of the scores; 1/sqrt(head) if None.

    Returns:
        [batch, n, heads, head], of their dtype.
    """
    batch, heads, n, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    if int16_attention.takes(query, key, value) and not int16_attention.unavailable(query.dtype):
        return int16_attention.causal_attention(query, key, value, scaling)
    if (shared := heads // key.shape[1]) > 1:  # query heads to a head of keys and values
        key, value = (t.repeat_interleave(shared, 1) for t in (key, value))
    # All samples' heads in a row, each in one piece.
    q, k, v = (t.reshape(batch * heads, n, -1) for t in (query, key, value))
    q, k = q.float().mul_(scaling), k.float().transpose(1, 2).contiguous()
    out = v.new_empty(v.shape)
    step = min(max(8, _TOGETHER // n), batch * heads)
    room = k.new_empty(step * min(n, _BLOCK) * n)
    shares = torch.empty_like(room, dtype=v.dtype)
    in_code = v.dtype == torch.bfloat16 and n % LANES == 0 and not fused.unavailable()
    later = None if in_code else k.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1)
    for own in (slice(h, h + step) for h in range(0, batch * heads, step)):
        for a in range(0, n, _BLOCK):
            b = min(a + _BLOCK, n)
            shape = len(q[own]), b - a, b
            scores = room[: prod(shape)].view(shape)
            with in_float32():
                torch.bmm(q[own, a:b], k[own, :, :b], out=scores)
            probabilities = shares[: prod(shape)].view(shape)
            if later is None:
                fused.probabilities(scores, probabilities)
            else:
                scores[:, :, a:] += later[: b - a, : b - a]
                probabilities.copy_(torch.softmax(scores, -1, out=scores))
            torch.bmm(probabilities, v[own, :b], out=out[own, a:b])
    return out.view(batch, heads, n, -1).transpose(1, 2).contiguous()
