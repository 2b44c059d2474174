"""What a family's class makes of config.json, as data: its numbers, and a block's tensors.

Held against headers (`shapes.py`) this tells before torch is loaded what the model built from
config.json would find wrong. The values of keys that are absent are those of the classes in
transformers (5.23, `models/*/configuration_*.py`) and of `qwen/configuration_qwen.py`, the shapes
those that `modeling_*.py` beside them give; a test holds both against the classes.

Left out on purpose: which blocks have experts and which kind of attention. The weights say it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .families import Family

Shape = tuple[int, ...]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")


@dataclass(frozen=True)
class _Class:
    """A family's class.

    Attributes:
        absent: the values of numbers that config.json does not have.
        biased: linears that have a bias, if
        bias_key: is true in config.json; None: they always have.
        bias: its value where config.json does not have it.
        normed: queries and keys are normalized per head.
        gated: queries come with a gate as wide as they are.
        null_heads: whether a null `num_key_value_heads` means as many as there are heads.
    """

    absent: Mapping[str, int]
    biased: tuple[str, ...] = _QKVO
    bias_key: str | None = "attention_bias"
    bias: bool = False
    normed: bool = True
    gated: bool = False
    null_heads: bool = False


def _absent(vocab: int, hidden: int, heads: int, kv: int, **more: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


def _experts(number: int, chosen: int, width: int, shared: int = 0) -> dict[str, int]:
    more = {"shared_expert_intermediate_size": shared} if shared else {}
    return {
        "num_experts": number,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        **more,
    }


_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_DENSE = _absent(151936, 4096, 32, 32, intermediate_size=22016)

_CLASSES: dict[str, _Class] = {
    "qwen": _Class(
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "kv_channels": 128,
            "intermediate_size": 22016,
        },
        biased=("attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"),
        normed=False,
    ),
    "qwen2": _Class(_DENSE, biased=_QKV, bias_key=None, normed=False, null_heads=True),
    "qwen3": _Class({**_DENSE, "head_dim": 128}, null_heads=True),
    "qwen2_moe": _Class(
        {**_absent(151936, 2048, 16, 16, intermediate_size=5632), **_experts(60, 4, 1408, 5632)},
        biased=_QKV,
        bias_key="qkv_bias",
        bias=True,
        normed=False,
    ),
    "qwen3_moe": _Class(
        {**_absent(151936, 2048, 32, 4, intermediate_size=6144), **_experts(128, 8, 768)}
    ),
    "qwen3_next": _Class(
        {
            **_absent(151936, 2048, 16, 2, intermediate_size=5632, head_dim=256),
            **_experts(512, 10, 512, 512),
            **_LINEAR,
        },
        gated=True,
    ),
    "qwen3_5_text": _Class(
        {**_absent(248320, 4096, 16, 4, intermediate_size=12288, head_dim=256), **_LINEAR},
        gated=True,
    ),
    "qwen3_5_moe_text": _Class(
        {
            **_absent(248320, 2048, 16, 2, head_dim=256),
            **_experts(256, 8, 512, 512),
            **_LINEAR,
        },
        gated=True,
    ),
}

# Other spellings of original Qwen's keys; its class takes them before today's.
_OTHER_NAMES = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "kv_channels": "head_dim",
}


def key_of(config: Mapping[str, Any], family: Family, key: str) -> str:
    """The spelling of `key` that the class reads."""
    other = _OTHER_NAMES.get(key) if family.remote_code else None
    return other if other and config.get(other) is not None else key


def number(config: Mapping[str, Any], family: Family, key: str) -> int | None:
    """What the class takes for `key`; None where it has no such number.

    Raises:
        CheckpointError: config.json has it, and it is no positive whole number.
    """
    key = key_of(config, family, key)
    if key not in config:
        return _CLASSES[family.model_type].absent.get(key)
    value = config[key]
    if value is None and key == "num_key_value_heads" and _CLASSES[family.model_type].null_heads:
        return number(config, family, "num_attention_heads")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(
            f"config.json: {key}",
            expected="a positive integer",
            got="null" if value is None else repr(value),
            cure="Restore config.json from the model this checkpoint was made from",
        )
    return value


def head_size(config: Mapping[str, Any], family: Family) -> int:
    """Width of one head of attention.

    Raises:
        CheckpointError: as `number`.
    """
    size = number(config, family, "kv_channels" if family.remote_code else "head_dim")
    return size or _need(config, family, "hidden_size") // _need(
        config, family, "num_attention_heads"
    )


def tensors_of(
    config: Mapping[str, Any], family: Family, parts: Collection[str]
) -> dict[str, Shape]:
    """A block's tensors by their names inside it, with their shapes.

    Args:
        parts: first parts of names (`self_attn`, `linear_attn`, `mlp.experts`) that a family has
            in some blocks only and this block has.

    Raises:
        CheckpointError: as `number`.
    """
    row = _CLASSES[family.model_type]
    hidden = _need(config, family, "hidden_size")
    found = {}
    if family.remote_code:
        heads = _need(config, family, "num_attention_heads") * head_size(config, family)
        inner = _need(config, family, "intermediate_size") // 2
        found = {
            "ln_1.weight": (hidden,),
            "ln_2.weight": (hidden,),
            "attn.c_attn.weight": (3 * heads, hidden),
            "attn.c_attn.bias": (3 * heads,),
            "attn.c_proj.weight": (hidden, heads),
            "mlp.w1.weight": (inner, hidden),
            "mlp.w2.weight": (inner, hidden),
            "mlp.c_proj.weight": (hidden, inner),
        }
        biased = not config.get("no_bias", True)
    else:
        found = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if "self_attn" in parts:
            found |= _attention(config, family, row, hidden)
        if "linear_attn" in parts:
            found |= _linear_attention(config, family, hidden)
        if family.experts and family.experts in parts:
            found |= _mixture(config, family, hidden)
        else:
            found |= _network("mlp", _need(config, family, "intermediate_size"), hidden)
        biased = row.bias_key is None or bool(config.get(row.bias_key, row.bias))
    if biased:
        for name in row.biased:
            if f"{name}.weight" in found:
                found[f"{name}.bias"] = found[f"{name}.weight"][:1]
    return found


def _need(config: Mapping[str, Any], family: Family, key: str) -> int:
    if (value := number(config, family, key)) is None:
        raise CheckpointError(
            f"config.json: {key}",
            expected=f"a number that a {family.model_type} with such tensors has",
            got="none",
            cure="config.json and the weights are not of the same model",
        )
    return value


def _attention(
    config: Mapping[str, Any], family: Family, row: _Class, hidden: int
) -> dict[str, Shape]:
    size = head_size(config, family)
    heads = _need(config, family, "num_attention_heads") * size
    kv = _need(config, family, "num_key_value_heads") * size
    found: dict[str, Shape] = {
        "self_attn.q_proj.weight": (heads * (2 if row.gated else 1), hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
    }
    if row.normed:
        found |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    return found


def _linear_attention(config: Mapping[str, Any], family: Family, hidden: int) -> dict[str, Shape]:
    v_heads = _need(config, family, "linear_num_value_heads")
    v_size = _need(config, family, "linear_value_head_dim")
    values = v_heads * v_size
    keys = _need(config, family, "linear_num_key_heads") * _need(
        config, family, "linear_key_head_dim"
    )
    qkv = 2 * keys + values
    inputs = (
        {"in_proj_qkvz": qkv + values, "in_proj_ba": 2 * v_heads}
        if "linear_attn.in_proj_qkvz" in family.linears
        else {"in_proj_qkv": qkv, "in_proj_z": values, "in_proj_b": v_heads, "in_proj_a": v_heads}
    )
    return {
        **{f"linear_attn.{name}.weight": (rows, hidden) for name, rows in inputs.items()},
        "linear_attn.conv1d.weight": (qkv, 1, _need(config, family, "linear_conv_kernel_dim")),
        "linear_attn.dt_bias": (v_heads,),
        "linear_attn.A_log": (v_heads,),
        "linear_attn.norm.weight": (v_size,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _mixture(config: Mapping[str, Any], family: Family, hidden: int) -> dict[str, Shape]:
    count = _need(config, family, "num_experts")
    if config.get("num_local_experts"):
        count = _need(config, family, "num_local_experts")
    width = _need(config, family, "moe_intermediate_size")
    found: dict[str, Shape] = {"mlp.gate.weight": (count, hidden)}
    for expert in range(count):
        found |= _network(f"{family.experts}.{expert}", width, hidden)
    if "mlp.shared_expert.down_proj" in family.linears:
        shared = _need(config, family, "shared_expert_intermediate_size")
        found |= _network("mlp.shared_expert", shared, hidden)
        found["mlp.shared_expert_gate.weight"] = (1, hidden)
    return found


def _network(name: str, width: int, hidden: int) -> dict[str, Shape]:
    return {
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
        f"{name}.down_proj.weight": (hidden, width),
    }
