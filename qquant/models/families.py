"""Which checkpoints are Qwen, and where their parts live. Differences are data, not classes.

One row per `model_type`: where the blocks are, which linears a block has in the order they run, and
which of them write to the residual stream (the walk takes the stream's own error back there).
Whether linears share an input is not written here: the walk sees it, because they are handed the
same tensor. Which of them other readers load as one is, because they look up settings by their own
name for it (`mixed`).

Mixture-of-experts Qwen and the hybrid Qwen3-Next/3.5 are refused by name: their experts (or linear
attention) need Hessians of their own, which the walk does not gather yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as in config.json.
        blocks: dotted name of the list of blocks.
        linears: names inside a block, in the order they run.
        residual: those whose output is added to the residual stream.
        embedding, norm, head: names of the weights outside the blocks.
        remote_code: the directory needs code files of its own (no class in transformers).
        fused: by the name that vLLM and SGLang give it, the linears that they load as one.
        all_biases: quantized directories carry a bias for every linear, zero where the float model
            has none (the published Qwen-*-Int4 files do; vLLM and auto-gptq expect it).
    """

    model_type: str
    blocks: str
    linears: tuple[str, ...]
    residual: frozenset[str]
    embedding: str
    norm: str
    head: str
    fused: tuple[tuple[str, tuple[str, ...]], ...]
    remote_code: bool = False
    all_biases: bool = False

    def layers(self, config: Mapping[str, Any]) -> int:
        """Number of blocks, from either generation of config names."""
        for key in ("num_hidden_layers", "n_layer"):
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        raise CheckpointError(
            "config.json: num_hidden_layers",
            expected="a positive integer",
            got=repr(config.get("num_hidden_layers")),
            cure="Restore config.json from the model this checkpoint was made from",
        )

    def linear_names(self, layers: int) -> list[str]:
        """Full module names of every quantized linear, in the order they are solved."""
        return [f"{self.blocks}.{i}.{name}" for i in range(layers) for name in self.linears]


_QWEN2_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def _native(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        blocks="model.layers",
        linears=_QWEN2_LINEARS,
        residual=frozenset({"self_attn.o_proj", "mlp.down_proj"}),
        embedding="model.embed_tokens.weight",
        norm="model.norm.weight",
        head="lm_head.weight",
        fused=(
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ),
    )


FAMILIES: dict[str, Family] = {
    "qwen": Family(
        model_type="qwen",
        blocks="transformer.h",
        linears=("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"),
        residual=frozenset({"attn.c_proj", "mlp.c_proj"}),
        embedding="transformer.wte.weight",
        norm="transformer.ln_f.weight",
        head="lm_head.weight",
        fused=(("mlp.gate_up_proj", ("mlp.w2", "mlp.w1")),),
        remote_code=True,
        all_biases=True,
    ),
    "qwen2": _native("qwen2"),
    "qwen3": _native("qwen3"),
}

_REFUSED = {
    "qwen2_moe": "its experts need a Hessian each",
    "qwen3_moe": "its experts need a Hessian each",
    "qwen3_next": "its linear attention and experts are not supported yet",
    "qwen3_5": "its linear attention is not supported yet",
    "qwen3_5_moe": "its linear attention and experts are not supported yet",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a config.json.

    Raises:
        CheckpointError: not a Qwen, or a Qwen that is not supported yet (the reason is given).
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        if model_type == "qwen" and "visual" in config:
            raise CheckpointError(
                "config.json: visual",
                expected="a text-only Qwen",
                got="Qwen-VL",
                cure="Vision-language checkpoints are not supported",
            )
        return FAMILIES[model_type]
    reason = _REFUSED.get(model_type) if isinstance(model_type, str) else None
    raise CheckpointError(
        "config.json: model_type",
        expected=f"one of {', '.join(FAMILIES)}",
        got=f"{model_type!r}" + (f" ({reason})" if reason else ""),
        cure="qquant quantizes dense text Qwen checkpoints: original Qwen, Qwen1.5, Qwen2, "
        "Qwen2.5, Qwen3",
    )
