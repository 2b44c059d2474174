# SPDX-License-Identifier: Apache-2.0 (part of qquant)
"""Configuration of the original Qwen models (`model_type: qwen`; 1.8B, 7B, 14B and 72B, 2023).

Owns the hyper-parameters and every spelling of them that published checkpoints use: the first
release (August 2023) said `n_embd`, `ffn_hidden_size`, `padded_vocab_size` and so on, later ones
say `hidden_size`, `intermediate_size`, `vocab_size`. Both are read, only the later names are
written. Also owns the precision flags `bf16` / `fp16` / `fp32`, an original Qwen habit that sits
beside the `dtype` of today's transformers and has to agree with it.

Leaves out attention back-ends and cache kinds: those are chosen with transformers' own arguments
(`attn_implementation=`, `cache_implementation=`). The old keys for them (`use_flash_attn`,
`use_cache_quantization`, `use_cache_kernel`) are kept in the file as they came and decide nothing.

This file travels with exported checkpoints, so it imports nothing but torch and transformers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# First-release key -> today's key. `padded_vocab_size` is not here: such files may carry
# `vocab_size` too (the number of tokens), and the padded one is the number of embedding rows.
FIRST_RELEASE_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "attn_pdrop": "attn_dropout_prob",
    "embd_pdrop": "emb_dropout_prob",
}


class QWenConfig(PretrainedConfig):  # type: ignore[misc,unused-ignore]
    """Hyper-parameters of an original Qwen model.

    Args:
        vocab_size: rows of the embedding and of `lm_head` (more than the tokenizer has ids).
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads; queries, keys and values all have as many.
        kv_channels: width of one head.
        intermediate_size: twice the width of the feed-forward layer (`w1` and `w2` together).
        layer_norm_epsilon: added to the mean square in RMSNorm.
        initializer_range: standard deviation of fresh weights.
        emb_dropout_prob: dropout after the embedding, in training.
        attn_dropout_prob: dropout on attention probabilities, in training.
        scale_attn_weights: divide attention scores by sqrt(kv_channels).
        seq_length: length seen in pre-training; dynamic NTK and logn start beyond it.
        max_position_embeddings: longest sequence the model is meant for.
        rotary_pct: share of each head that is rotated, (0, 1].
        rotary_emb_base: RoPE base.
        use_dynamic_ntk: widen the RoPE base for prompts longer than `seq_length`.
        use_logn_attn: scale queries at positions beyond `seq_length` by log_seq_length(position).
        no_bias: no bias in any linear except `c_attn`.
        use_cache: keep keys and values for decoding.
        bf16, fp16, fp32: at most one; the precision to load in when no `dtype=` is given.
        kwargs: anything else, first-release names included.

    Raises:
        ValueError: more than one precision flag, an odd `intermediate_size`, or a head that cannot
            be rotated.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        **FIRST_RELEASE_NAMES,
        "padded_vocab_size": "vocab_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "num_attention_heads",
        "rms_norm_eps": "layer_norm_epsilon",
    }

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        kv_channels: int = 128,
        intermediate_size: int = 22016,
        layer_norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        emb_dropout_prob: float = 0.0,
        attn_dropout_prob: float = 0.0,
        scale_attn_weights: bool = True,
        seq_length: int = 8192,
        max_position_embeddings: int = 8192,
        rotary_pct: float = 1.0,
        rotary_emb_base: float = 10000,
        use_dynamic_ntk: bool = True,
        use_logn_attn: bool = True,
        no_bias: bool = True,
        use_cache: bool = True,
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.kv_channels = kv_channels
        self.intermediate_size = intermediate_size
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.emb_dropout_prob = emb_dropout_prob
        self.attn_dropout_prob = attn_dropout_prob
        self.scale_attn_weights = scale_attn_weights
        self.seq_length = seq_length
        self.max_position_embeddings = max_position_embeddings
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.no_bias = no_bias
        self.use_cache = use_cache
        self.bf16, self.fp16, self.fp32 = bf16, fp16, fp32
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        for name in [*FIRST_RELEASE_NAMES, "padded_vocab_size"]:
            value = kwargs.pop(name, None)
            if value is not None:
                setattr(self, name, value)

        params_dtype = kwargs.pop("params_dtype", None)  # first release: "torch.bfloat16"
        if params_dtype and not (kwargs.get("dtype") or kwargs.get("torch_dtype")):
            kwargs["dtype"] = str(params_dtype).removeprefix("torch.")
        flags = [name for name in PRECISIONS if getattr(self, name)]
        if len(flags) > 1:
            raise ValueError(f"at most one of bf16, fp16, fp32 may be true, got {flags}")
        if flags:
            kwargs["dtype"] = PRECISIONS[flags[0]]
            kwargs.pop("torch_dtype", None)
        if self.intermediate_size % 2:
            raise ValueError(
                "intermediate_size counts w1 and w2 together and must be even, "
                f"got {self.intermediate_size}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"kv_channels * rotary_pct must be an even number of at least 2, "
                f"got {self.kv_channels} * {self.rotary_pct}"
            )
        super().__init__(**kwargs)

    @property
    def linear_bias(self) -> bool:
        """Whether linears other than `c_attn` have a bias.

        GPTQ directories of original Qwen carry one for every quantized linear, zero where the float
        model has none; without a place for them a loader would report and drop them.
        """
        quant = getattr(self, "quantization_config", None) or {}
        method = quant.get("quant_method") if isinstance(quant, dict) else quant.quant_method
        return not self.no_bias or method == "gptq"

    @property
    def ffn_size(self) -> int:
        """Rows of `w1` and of `w2`: half of `intermediate_size`."""
        return int(self.intermediate_size) // 2

    @property
    def rotary_dim(self) -> int:
        """How many channels of each head RoPE turns."""
        return int(self.kv_channels * self.rotary_pct)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of `config.json` and the caller's overrides.

        Precision in order: the caller's `dtype=`, the caller's flag (`bf16=True`), the file's flag,
        the file's `torch_dtype` / `dtype`. The flags that lose are cleared, so that the two ways of
        saying it never disagree.
        """
        config_dict = dict(config_dict)
        asked = {name: kwargs.pop(name) for name in PRECISIONS if name in kwargs}
        if any(asked.values()):
            config_dict.update({name: False for name in PRECISIONS} | asked)
        else:
            config_dict.update(asked)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if dtype is not None and dtype != "auto":
            if any(asked.values()):
                raise ValueError(
                    f"give either dtype= or one of bf16=, fp16=, fp32=, not both "
                    f"(got dtype={dtype} and {[n for n, on in asked.items() if on]})"
                )
            config_dict.update({name: False for name in PRECISIONS})
        return super().from_dict(config_dict, **kwargs)

    def set_precision(self, dtype: torch.dtype) -> None:
        """Make `dtype` and the flags say that the weights are in `dtype`."""
        self.dtype = dtype
        for name, value in PRECISIONS.items():
            setattr(self, name, value is dtype)
