"""Original Qwen said in `qwen2`'s words: which tensor goes where, and what config.json says.

The two networks are one, under other names:

    transformer.wte                  model.embed_tokens
    transformer.h.{i}.ln_1, ln_2     model.layers.{i}.input_layernorm, post_attention_layernorm
    attn.c_attn  (rows q | k | v)    self_attn.q_proj, k_proj, v_proj: a third of the rows each
    attn.c_proj                      self_attn.o_proj
    mlp.w2, mlp.w1, mlp.c_proj       mlp.gate_proj, up_proj, down_proj
    transformer.ln_f, lm_head        model.norm, lm_head

Nothing is computed: every tensor of the result is a tensor of the source, or a third of one. In a
GPTQ directory a third of the outputs is a third of the columns of `qweight`, `qzeros` and `scales`
(`pack.py`), and `g_idx` is the same for all three. `qzeros` packs outputs into words; since all
outputs together fill whole words and three has no factor in common with 32, so does a third.

qwen2 has no bias outside q, k and v. GPTQ directories of original Qwen carry zeros there, which are
left out; anything else in their place is refused, as is any setting that qwen2 cannot say. So is a
source that lacks a tensor which config.json asks for, or has it in another shape.

Two of the original's are not carried over, since qwen2 has nothing that equals them: dynamic NTK
(RoPE's base jumps with each doubling of the prompt and then stays; transformers' `dynamic` grows
with every token) and logn. Both do nothing up to `seq_length`, so that is the
`max_position_embeddings` where either is on, and `notes` say it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import compressed
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .layout import KINDS, Layout, within_block
from .models.declared import tensors_of
from .models.families import FAMILIES, Family, check_config, family_of
from .models.shapes import missing_tensor, wrong_shape

TARGET = "qwen2"
_OUTSIDE = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
_INSIDE = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_FUSED = "attn.c_attn"
_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")
# What early checkpoints stored beside the weights: computed, not learned.
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_bias|bias)|logn_tensor)")
_SPLIT_COLUMNS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Part:
    """A tensor of the result, and the part of the source's tensor that it is.

    Attributes:
        name: in the result.
        source: name in the source.
        shape: of the result.
        rows, columns: half-open spans of the source's first and second dimension; `columns` is None
            where all of a row is taken.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """What a conversion does, settled from headers and config.json alone.

    Attributes:
        parts: every tensor of the result.
        zeros: biases of the source that have to be zero and are left out.
        config: config.json of the result.
        quantization: its `quantization_config`; None for a float source.
        notes: what the result does otherwise than the original, in words.
        longest: tokens up to which it does the same.
    """

    parts: tuple[Part, ...]
    zeros: tuple[str, ...]
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    notes: tuple[str, ...]
    longest: int


def native_plan(source: Checkpoint) -> Plan:
    """The whole of a conversion to `qwen2`.

    Raises:
        CheckpointError: the source is no original Qwen, is quantized by another method than GPTQ,
            has a tensor or setting that qwen2 has no place for, or lacks a tensor of those that
            config.json asks for, or has it in another shape; it is named.
    """
    family = family_of(source.config)
    if not family.remote_code:
        raise CheckpointError(
            "config.json: model_type",
            expected="'qwen', the original that transformers has no class for",
            got=repr(family.model_type),
            cure="Nothing to convert: readers know this one",
        )
    check_config(source.config, family, source.tensors)
    layout = _layout(source)
    theirs = _their_config(source)
    parts, zeros = _parts(source, theirs)
    _need_whole(source, family, theirs)
    modules = {name.rpartition(".")[0] for name in source.tensors}
    config, notes, longest = _config(source, theirs)
    quantization = None if layout is None else _quantization(source, layout, modules)
    return Plan(parts, zeros, config, quantization, notes, longest)


def names_of(module: str) -> tuple[str, ...]:
    """What a module is called in the result: one name, three for `c_attn`, none for a stranger."""
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    match = _BLOCK.fullmatch(module)
    if match is None:
        return ()
    within = _THIRDS if match[2] == _FUSED else tuple(filter(None, [_INSIDE.get(match[2])]))
    return tuple(f"model.layers.{match[1]}.{name}" for name in within)


def _layout(source: Checkpoint) -> Layout | None:
    quant = source.quantization_config
    if quant is None:
        return None
    if quant.get("quant_method", "gptq") != "gptq":
        raise CheckpointError(
            f"{source.path.name}: quant_method",
            expected="none, or 'gptq'",
            got=repr(quant.get("quant_method")),
            cure="Convert the checkpoint that it was made from, and quantize the result",
        )
    return Layout.parse(quant)


def _their_config(source: Checkpoint) -> Any:
    """The original's settings, whichever generation of names config.json uses.

    Raises:
        CheckpointError: they make no original Qwen, or one that qwen2 cannot say.
    """
    from .models.qwen.configuration_qwen import QWenConfig

    values = {k: v for k, v in source.config.items() if k not in ("auto_map", "model_type")}
    try:
        config = QWenConfig(**values)
        whole = bool(config.rotary_dim == config.kv_channels)
    except Exception as error:  # whatever a config class raises over values not made for it
        raise CheckpointError(
            "config.json", expected="an original Qwen's", got=f"{type(error).__name__}: {error}"
        ) from error
    for key, ok, expected in (
        ("rotary_pct", whole, "1, since qwen2 turns all of a head"),
        ("scale_attn_weights", config.scale_attn_weights, "true, as qwen2 always scales"),
    ):
        if not ok:
            raise CheckpointError(
                f"config.json: {key}",
                expected=expected,
                got=getattr(config, key),
                cure="This model needs the original's code: it cannot be converted",
            )
    return config


def _parts(source: Checkpoint, theirs: Any) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    width = theirs.kv_channels * theirs.num_attention_heads
    parts: list[Part] = []
    zeros: list[str] = []
    for name, info in source.tensors.items():
        module, _, kind = name.rpartition(".")
        names = names_of(module)
        if not names or kind not in ("weight", "bias", *KINDS):
            if _COMPUTED.fullmatch(name):
                continue
            raise CheckpointError(
                f"tensor {name}",
                expected="one of original Qwen's",
                got="another",
                cure="qwen2 has no place for it: keep the original directory and its code",
            )
        if not info.shape:
            raise CheckpointError(
                f"shape of {name}",
                expected="at least one dimension",
                got="none",
                cure="The checkpoint is damaged: download or save it again",
            )
        if kind == "bias" and len(names) == 1:  # of all but `c_attn`
            zeros.append(name)
            continue
        for index, native in enumerate(names):
            shape, rows, columns = list(info.shape), (0, info.shape[0]), None
            if len(names) > 1 and kind != "g_idx":
                axis = 1 if kind in _SPLIT_COLUMNS else 0
                if len(shape) <= axis or shape[axis] % 3:
                    raise _no_thirds(name, info.shape)
                third = shape[axis] // 3
                if kind != "qzeros" and third != width:
                    raise _no_thirds(name, info.shape, f"3 times {width} outputs, by config.json")
                shape[axis] = third
                span = (index * third, (index + 1) * third)
                rows, columns = (rows, span) if axis else (span, None)
            parts.append(Part(f"{native}.{kind}", name, tuple(shape), rows, columns))
    return tuple(parts), tuple(zeros)


def _need_whole(source: Checkpoint, family: Family, theirs: Any) -> None:
    """Every tensor of the model that config.json describes is there, plain or packed.

    Raises:
        CheckpointError: one is missing, or has another shape; it is named.
    """
    matrix = theirs.vocab_size, theirs.hidden_size
    wanted = {family.embedding: matrix, family.norm: (theirs.hidden_size,)}
    if not theirs.tie_word_embeddings:
        wanted[family.head] = matrix
    block = tensors_of(source.config, family, ())
    for index in range(family.layers(source.config)):
        wanted |= {f"{family.blocks}.{index}.{name}": shape for name, shape in block.items()}
    for name, shape in wanted.items():
        module = name.removesuffix(".weight")
        if name in source.tensors:
            got = source.tensors[name].shape
        elif f"{module}.qweight" in source.tensors:
            got = compressed.sizes_of(source, module)[:2]
        else:
            raise missing_tensor(name, source.tensors)
        if got != shape:
            raise wrong_shape(name, shape, got)


def _no_thirds(name: str, shape: tuple[int, ...], expected: str = "three parts") -> CheckpointError:
    return CheckpointError(
        f"shape of {name}",
        expected=expected,
        got=list(shape),
        cure="config.json and the weights are not of the same model, or the copy is incomplete",
    )


def _config(source: Checkpoint, theirs: Any) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """(config.json without quantization and token ids, notes, tokens without a difference)."""
    tricks = [
        text
        for on, text in (
            (theirs.use_dynamic_ntk, "widens RoPE's base (dynamic NTK)"),
            (theirs.use_logn_attn, "scales queries by log(position) (logn)"),
        )
        if on
    ]
    longest = max(int(theirs.max_position_embeddings), int(theirs.seq_length))
    notes = ["In 16 bits RoPE is rounded as qwen2's code does it, which is not the original's way"]
    if tricks:
        longest = int(theirs.seq_length)
        notes.insert(
            0,
            f"Beyond {longest} tokens (seq_length) the original {' and '.join(tricks)}; qwen2 has "
            f"neither, so max_position_embeddings is {longest} here and longer text is not the "
            "original's any more",
        )
    dropout = float(theirs.attn_dropout_prob)
    if theirs.emb_dropout_prob:
        notes.append("In training the original drops out embeddings; qwen2 does not")
    embedding = source.info("transformer.wte.weight")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": TARGET,
        "vocab_size": embedding.shape[0],
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.ffn_size,
        "num_hidden_layers": theirs.num_hidden_layers,
        "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_attention_heads,
        "head_dim": theirs.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": theirs.layer_norm_epsilon,
        "rope_theta": theirs.rotary_emb_base,
        "max_position_embeddings": longest,
        "use_sliding_window": False,
        "attention_dropout": dropout,
        "initializer_range": theirs.initializer_range,
        "tie_word_embeddings": bool(theirs.tie_word_embeddings),
        "use_cache": theirs.use_cache,
        "torch_dtype": str(embedding.torch_dtype).removeprefix("torch."),
    }
    return config, tuple(notes), longest


def _quantization(source: Checkpoint, layout: Layout, modules: set[str]) -> dict[str, Any]:
    """`quantization_config` with the names in it changed.

    `dynamic` has regular expressions, which cannot be renamed: what they decide for each module is
    written anew, a rule for each setting and set of linears within a block.
    """
    quant = dict(source.quantization_config or {})
    quant.setdefault("quant_method", "gptq")
    key = "modules_in_block_to_quantize"
    if (listed := quant.pop(key, None)) is not None:
        try:
            quant[key] = [[_within(new) for old in g for new in _in_block(old)] for g in listed]
        except TypeError as error:
            raise CheckpointError(
                f"quantization_config: {key}", expected="lists of names", got=repr(listed)
            ) from error
    changes: Mapping[str, Any] = quant.pop("dynamic", None) or {}
    if not changes:
        return quant
    chosen: dict[str, dict[str, set[str]]] = {}  # by rule and block: linears within it
    for module in sorted(modules):
        if (rule := layout.rule_of(module)) is None:
            continue
        for name in names_of(module):
            block, within = _split(name)
            chosen.setdefault(rule, {}).setdefault(block, set()).add(within)
    rules: dict[str, Any] = {}
    for rule, blocks in chosen.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for block, names in blocks.items():
            alike.setdefault(tuple(sorted(names | _fused(names))), []).append(block)
        for linears, where in alike.items():
            start = f"(?:{'|'.join(re.escape(w) for w in where)})"
            which = f"(?:{'|'.join(re.escape(name) for name in linears)})"
            rules[f"{'-:' if rule.startswith('-:') else '+:'}{start}{which}$"] = changes[rule]
    quant["dynamic"] = rules
    return quant


def _in_block(old: str) -> tuple[str, ...]:
    return names_of(f"transformer.h.0.{old}")


def _split(name: str) -> tuple[str, str]:
    """(`model.layers.3.`, `mlp.up_proj`); nothing before what is in no block."""
    within = within_block(name)
    return name.removesuffix(within), within


def _within(name: str) -> str:
    return _split(name)[1]


def _fused(names: set[str]) -> set[str]:
    """Names under which vLLM and SGLang look up linears of a block that they load as one."""
    return {whole for whole, members in FAMILIES[TARGET].fused if set(members) <= names}
