# SPDX-License-Identifier: Apache-2.0 (part of qquant)
"""The original Qwen network (`QWenLMHeadModel`) for today's transformers.

Owns the module tree and its arithmetic: RMSNorm and RoPE in float32, one fused `c_attn` for query,
key and value, a feed-forward layer gated by `w2`, and the two tricks for prompts longer than the
training length (`seq_length`), both in inference only:

- dynamic NTK: a prompt of L tokens widens the RoPE base by alpha^(d/(d-2)), alpha = 2^(k+1) - 1
  with k the doublings of `seq_length` needed to reach L. Keys already in the cache were turned with
  that base, so k is fixed when the prompt is read and stays on the cache object for the decode.
  `generate` fixes it from the whole prompt, also where that is read in parts or with candidates
  behind it; who calls the model part by part says the length first (`expect_prompt`).
- logn: the query at 0-based position p is scaled by log(p + 1) / log(seq_length) once p + 1
  exceeds `seq_length`.

In a padded batch both use each row's own length and positions, so a row gives what it gives alone.
Continuous batching, which packs all requests into one row without a cache of ours, is refused where
either is on.

Module names are the tensor names of the published checkpoints. Attention back-ends, caches, masks,
generation, checkpointing and device placement are transformers' own; `chat` and `chat_stream` come
from `qwen_generation_utils.py`.

Left out on purpose: the int8 key/value cache with its own kernels (use transformers'
`QuantizedCache`) and window attention, which the published code never had.

This file travels with exported checkpoints: it imports only torch, transformers and its siblings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_qwen import QWenConfig
from .qwen_generation_utils import FIXED_ATTRIBUTE, QWenChatMixin, refuse_packing

MAX_DOUBLINGS = 24  # of seq_length; 2^24 times 2048 tokens is past any use
NTK_ATTRIBUTE = "qwen_ntk_doublings"  # where the cache remembers k


class QWenRMSNorm(nn.Module):
    """Divide by the root mean square in float32, cast back, then scale: `[..., hidden]` -> same."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


class QWenRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE, in float32, for given positions.

    Nothing is stored, so there is nothing to initialize when the model was built on the meta
    device; `device` is accepted for symmetry with other transformers models and decides nothing:
    the result lives where `position_ids` lives.
    """

    def __init__(self, config: QWenConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dim = config.rotary_dim
        stretch = self.dim / max(self.dim - 2, 1)
        self.bases = [
            config.rotary_emb_base * (2 ** (k + 1) - 1) ** stretch for k in range(MAX_DOUBLINGS + 1)
        ]

    def forward(
        self, position_ids: Tensor, doublings: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Angles for every position.

        Args:
            position_ids: `[batch or 1, length]` int64, 0-based.
            doublings: `[batch]` int64, the NTK k of each row; `None` where k is 0 everywhere.

        Returns:
            `(cos, sin)`, each `[batch or 1, length, rotary_dim]` float32.
        """
        device = position_ids.device
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        if doublings is None:
            inv_freq = (1.0 / (self.bases[0] ** exponents))[None]
        else:
            bases = torch.tensor(self.bases, device=device, dtype=torch.float32)
            inv_freq = 1.0 / (bases[doublings.to(device)][:, None] ** exponents)
        angles = position_ids[..., None].float() * inv_freq[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None = None) -> Tensor:
    """Turn the first `cos.shape[-1]` channels of each head, half against half, in float32.

    Args:
        x: `[batch, heads, length, head]`, any float dtype.
        cos, sin: `[batch or 1, length, rotary]` float32.
        scale: `[batch or 1, 1, length, 1]` float32, applied to all channels (logn), or `None`.

    Returns:
        As `x`, shape and dtype.
    """
    cos, sin = cos[:, None], sin[:, None]
    wide = x.float()
    turned, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
    (first, second), (sin_first, sin_second) = turned.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = turned * cos
    turned[..., : first.shape[-1]].addcmul_(second, sin_first, value=-1)
    turned[..., first.shape[-1] :].addcmul_(first, sin_second)
    wide = torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
    return (wide if scale is None else wide * scale).type_as(x)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; the reference for the faster back-ends.

    Args:
        query, key, value: `[batch, heads, length, head]`.
        attention_mask: additive, broadcastable to `[batch, heads, queries, keys]`, or `None`.

    Returns:
        Output `[batch, queries, heads, head]` and probabilities `[batch, heads, queries, keys]`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2).contiguous(), probs


class QWenAttention(nn.Module):
    """Multi-head attention; the rows of `c_attn` are query, key, value, in that order."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_key_value_groups = 1
        self.is_causal = True
        self.scaling = config.kv_channels**-0.5 if config.scale_attn_weights else 1.0
        width = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=config.linear_bias)
        self.c_proj.writes_residual = True  # type: ignore[assignment]  # read at initialization

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        logn: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        query, key, value = (
            part.view(*shape, -1, self.head_dim).transpose(1, 2)
            for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        query = rotate(query, *position_embeddings, scale=logn)
        key = rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, probs = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.c_proj(output.reshape(*shape, -1)), probs


class QWenMLP(nn.Module):
    """`c_proj(w1(x) * silu(w2(x)))`: `w2` is the gate. Both linears get the same tensor object."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        bias = config.linear_bias
        self.w1 = nn.Linear(config.hidden_size, config.ffn_size, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, config.ffn_size, bias=bias)
        self.c_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=bias)
        self.c_proj.writes_residual = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        up = self.w1(x)
        gate = self.w2(x)
        out: Tensor = self.c_proj(up * nn.functional.silu(gate))
        return out


class QWenBlock(GradientCheckpointingLayer):  # type: ignore[misc,unused-ignore]
    """One layer: `[batch, length, hidden]` -> same. The keywords are what `QWenModel` passes."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        out: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return out


class QWenPreTrainedModel(PreTrainedModel):  # type: ignore[misc,unused-ignore]
    """What transformers needs to know about the family: placement, back-ends, initialization."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["QWenBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": QWenBlock,
        "attentions": QWenAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal, of `initializer_range`; over sqrt(2 * layers) into the residual stream."""
        super()._init_weights(module)
        if getattr(module, "writes_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; then the config's precision flags say what was really loaded."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.set_precision(model.dtype)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with precision flags that agree with the weights written."""
        self.config.set_precision(self.dtype)
        super().save_pretrained(*args, **kwargs)


class QWenModel(QWenPreTrainedModel):
    """Embedding, blocks and final norm: token ids -> `[batch, length, hidden]`."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = QWenRotaryEmbedding(config)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def ntk_doublings(self, position_ids: Tensor, cache: Any = None) -> Tensor | None:
        """How often `seq_length` must double to hold each row's prompt, fixed at prefill.

        Args:
            position_ids: `[batch or 1, length]`; a row's largest plus one is its prompt length.
            cache: where the number is kept from the prompt on; `None` for a single forward.

        Returns:
            `[batch or 1]` int64, or `None` where no row needs any.

        Raises:
            ValueError: the cache was filled with a batch that does not fit this one.
        """
        if self.training or not self.config.use_dynamic_ntk:
            return None
        rows, length = position_ids.shape
        seen = cache.get_seq_length() if cache is not None else 0
        # Of a tensor the value may not be asked then; else it says whether there was a reset.
        blind = torch.compiler.is_compiling() and not isinstance(seen, int)
        begun = length == 1 if blind else bool(seen > 0)
        if hasattr(cache, NTK_ATTRIBUTE) and (begun or getattr(cache, FIXED_ATTRIBUTE, False)):
            if begun and not torch.compiler.is_compiling():
                setattr(cache, FIXED_ATTRIBUTE, False)
            kept: Tensor | None = getattr(cache, NTK_ATTRIBUTE)
            if kept is None or kept.shape[0] in (1, rows) or rows == 1:
                return kept
            if rows % kept.shape[0]:
                raise ValueError(
                    f"the cache holds {kept.shape[0]} rows, this batch has {rows}: "
                    "start again with an empty cache"
                )
            return kept.repeat_interleave(rows // kept.shape[0])
        found = None
        if length > self.config.seq_length or begun or blind:
            found = self._doublings(position_ids.amax(dim=-1) + 1)
        if cache is not None:
            setattr(cache, NTK_ATTRIBUTE, found)
        return found

    def expect_prompt(self, cache: Any, lengths: int | Tensor) -> None:
        """Fix the NTK factor for a prompt that is about to be read, the first part or all of it.

        `generate` calls this. Who reads a prompt in parts by hand, or a shared beginning first,
        calls it on the empty cache.

        Args:
            lengths: tokens of the whole prompt, or `[batch or 1]` int64 of each row's.
        """
        if not self.config.use_dynamic_ntk:
            return
        if isinstance(lengths, int):
            lengths = torch.tensor([lengths], device=self.device)
        found = self._doublings(lengths)
        if not bool(cache.get_seq_length() > 0):
            setattr(cache, NTK_ATTRIBUTE, found if bool(found.any()) else None)
            setattr(cache, FIXED_ATTRIBUTE, True)
        elif hasattr(cache, NTK_ATTRIBUTE):
            kept = getattr(cache, NTK_ATTRIBUTE)
            if int(found.max()) > (0 if kept is None else int(kept.max())):
                warnings.warn(
                    f"the cache was begun for a shorter prompt than this one of "
                    f"{int(lengths.max())} tokens, and its keys stay turned as for that: dynamic "
                    "NTK is less than where all is read at once. Start with an empty cache, or "
                    "call model.transformer.expect_prompt(cache, tokens) before it is begun",
                    stacklevel=2,
                )

    def _doublings(self, lengths: Tensor) -> Tensor:
        limits = [self.config.seq_length * 2**k for k in range(MAX_DOUBLINGS)]
        return (lengths[:, None] > torch.tensor(limits, device=lengths.device)).sum(dim=-1)

    def logn_scale(self, position_ids: Tensor, cache: Any = None) -> Tensor | None:
        """Factor on queries beyond `seq_length`: `[batch or 1, 1, length, 1]` float32 or `None`."""
        if self.training or not self.config.use_logn_attn:
            return None
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(seen, int) and seen + position_ids.shape[1] <= self.config.seq_length:
            return None
        ratio = (position_ids + 1).float().log() / math.log(self.config.seq_length)
        return ratio.clamp(min=1.0)[:, None, :, None]

    @merge_with_config_defaults  # type: ignore[untyped-decorator,unused-ignore]
    @capture_outputs  # type: ignore[untyped-decorator,unused-ignore]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the network.

        Args:
            input_ids: `[batch, length]` int64 (or give `inputs_embeds` `[batch, length, hidden]`).
            attention_mask: `[batch, past + length]`, 0 at padding; `None` for no padding.
            position_ids: `[batch or 1, length]`; by default counted over unmasked tokens.
            past_key_values: any transformers Cache.
            use_cache: make a `DynamicCache` when none is given, and return it.

        Returns:
            `BaseModelOutputWithPast`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` were given, or see
                `refuse_packing`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        paged = str(self.config._attn_implementation).startswith("paged|")
        if paged or kwargs.get("cache") is not None:
            refuse_packing(self.config)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = inputs_embeds.shape[1]
        padded = attention_mask is not None and attention_mask.dim() == 2
        if position_ids is None:
            if padded:
                assert attention_mask is not None
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                seen = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = (torch.arange(length, device=inputs_embeds.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        doublings = self.ntk_doublings(position_ids, past_key_values)
        shared = {
            "position_embeddings": self.rotary_emb(position_ids, doublings),
            "logn": self.logn_scale(position_ids, past_key_values),
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        hidden_states = self.drop(inputs_embeds)
        for block in self.h:
            hidden_states = block(hidden_states, **shared, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class QWenLMHeadModel(QWenPreTrainedModel, QWenChatMixin, GenerationMixin):  # type: ignore[misc,unused-ignore]
    """The language model: `transformer`, `lm_head`, generation, `chat` and `chat_stream`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # which loss transformers computes from `labels`
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple  # type: ignore[untyped-decorator,unused-ignore]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Next-token logits `[batch, length, vocab]` in the model's dtype; the loss with `labels`.

        Args:
            labels: `[batch, length]`, -100 where no loss is wanted; shifted inside.
            logits_to_keep: only the last so many positions (0 for all), or their indices.

        The other arguments are those of `QWenModel.forward`.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep, :]
        elif logits_to_keep > 0:
            hidden_states = hidden_states[:, -logits_to_keep:, :]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
