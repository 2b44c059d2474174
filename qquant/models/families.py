"""Which checkpoints are Qwen, and where their parts live. Differences are data, not classes.

One row per `model_type`: where the blocks are, which linears a block may have in the order they
run, and which of them write to the residual stream (the walk takes the stream's own error back
there). Which of them a block does have (experts or not, one kind of attention or another) is not
written here: the checkpoint's tensors say it, and the model built from config.json must agree.
Whether linears share an input is not written either: the walk sees it, because they are handed the
same tensor. Which of them other readers load as one is, because they look up settings by their own
name for it (`mixed`).

Routers (`mlp.gate`), the gate of the shared expert and the small projections of linear attention
are in no row: they stay in 16 bits, where GPTQModel's definitions of these families leave them too
(7.6, `models/definitions/qwen2_moe.py`, `qwen3_moe.py`, `qwen3_next.py`) and vLLM expects them.

What is not supported is refused by name, each with its reason (`_REFUSED`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import CheckpointError

_EVERY = "*"  # in the name of a linear: the number of an expert


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as in config.json.
        blocks: dotted name of the list of blocks.
        linears: names inside a block, in the order they run; `*` is the number of an expert. A
            block has those of them that the checkpoint has.
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

    @property
    def varied(self) -> bool:
        """Whether blocks differ in the linears they have: by experts, or by kinds of attention."""
        return len({name.partition(".")[0] for name in self.linears}) > 2 or bool(self.experts)

    @property
    def ends(self) -> list[str]:
        """Each linear's name inside a block, an expert's only where it is the same for all."""
        return [name.rpartition(f".{_EVERY}.")[2] for name in self.linears]

    @property
    def experts(self) -> str | None:
        """Name of the experts inside a block; None where the family has none."""
        names = (n.partition(f".{_EVERY}.")[0] for n in self.linears if _EVERY in n)
        return next(names, None)

    def kind_of(self, name: str) -> str:
        """The row's name for a linear's name inside a block: `*` for an expert's number."""
        return name if name in self.linears else re.sub(r"\.\d+\.", f".{_EVERY}.", name, count=1)

    def by_block(self, tensors: Iterable[str]) -> Mapping[int, tuple[str, ...]]:
        """The linears of each block, by their names inside it, in the order they run.

        Args:
            tensors: names of a float checkpoint's tensors.
        """
        return _by_block(self, tuple(tensors))

    def linear_names(self, tensors: Iterable[str]) -> list[str]:
        """Full module names of every linear to quantize, in the order they are solved."""
        blocks = self.by_block(tensors)
        return [f"{self.blocks}.{i}.{name}" for i, names in blocks.items() for name in names]

    def parameters(self, config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
        """The model's tensors among a float checkpoint's, as far as names tell.

        Rotary tables, heads for several tokens at once and a tied head are none of the model's
        (`Skeleton.parameters` is exact, and needs the model's class).
        """
        tied = config.get("tie_word_embeddings") is True
        outside = {self.embedding, self.norm, *(() if tied else (self.head,))}
        inside = re.compile(rf"{re.escape(self.blocks)}\.(?!.*\.rotary_emb\.)")
        return [name for name in tensors if name in outside or inside.match(name)]

    def first_linear(self, tensors: Iterable[str]) -> str:
        """The first of `linear_names`.

        Raises:
            CheckpointError: there is none.
        """
        if names := self.linear_names(tensors):
            return names[0]
        raise CheckpointError(
            "weights",
            expected=f"linears named {self.blocks}.0.{self.linears[0]}.weight and so on",
            got="none",
            cure="config.json and the weights are not of the same model",
        )


@lru_cache(maxsize=2)  # asked for again and again, and a mixture has tens of thousands
def _by_block(family: Family, tensors: tuple[str, ...]) -> Mapping[int, tuple[str, ...]]:
    experts = next((i for i, name in enumerate(family.linears) if _EVERY in name), 0)
    place = {name: i for i, name in enumerate(family.linears)}
    kinds = "|".join(re.escape(n).replace(r"\*", r"\d{1,9}") for n in family.linears)
    pattern = re.compile(rf"{re.escape(family.blocks)}\.(\d{{1,9}})\.({kinds})\.weight")
    found: dict[int, list[tuple[int, int, int, str]]] = {}
    for tensor in tensors:
        if match := pattern.fullmatch(tensor):
            name = match[2]
            key = place.get(name, experts), 0, 0, name
            if name not in place:  # one expert after another, each with all its linears
                number = next(part for part in name.split(".") if part.isdigit())
                key = experts, int(number), place[family.kind_of(name)], name
            found.setdefault(int(match[1]), []).append(key)
    return {i: tuple(name for *_, name in sorted(found[i])) for i in sorted(found)}


_QWEN2_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


_FUSED = (
    ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
)
_SHARED = tuple(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down"))
_EXPERTS = tuple(f"mlp.experts.{_EVERY}.{part}_proj" for part in ("gate", "up", "down"))
_LINEAR = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")
_LINEAR_NEXT = ("linear_attn.in_proj_qkvz", "linear_attn.out_proj")
_FUSED_LINEAR = ("linear_attn.in_proj_qkvz", _LINEAR[:2])
_FUSED_SHARED = ("mlp.shared_expert.gate_up_proj", _SHARED[:2])
_FUSED_EXPERT = (f"mlp.experts.{_EVERY}.gate_up_proj", _EXPERTS[:2])
_FUSED_MOE = (_FUSED_SHARED, _FUSED_EXPERT)


def _native(
    model_type: str,
    *more: str,
    fused: tuple[tuple[str, tuple[str, ...]], ...] = (),
) -> Family:
    """A row of transformers' own classes; `more` linears beside those of Qwen2."""
    return Family(
        model_type=model_type,
        blocks="model.layers",
        linears=(*_QWEN2_LINEARS, *more),
        residual=frozenset({"self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"}),
        embedding="model.embed_tokens.weight",
        norm="model.norm.weight",
        head="lm_head.weight",
        fused=(*_FUSED, *fused),
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
    "qwen2_moe": _native("qwen2_moe", *_SHARED, *_EXPERTS, fused=_FUSED_MOE),
    "qwen3_moe": _native("qwen3_moe", *_EXPERTS, fused=(_FUSED_EXPERT,)),
    "qwen3_next": _native("qwen3_next", *_LINEAR_NEXT, *_SHARED, *_EXPERTS, fused=_FUSED_MOE),
    "qwen3_5_text": _native("qwen3_5_text", *_LINEAR, fused=(_FUSED_LINEAR,)),
    "qwen3_5_moe_text": _native(
        "qwen3_5_moe_text", *_LINEAR, *_SHARED, *_EXPERTS, fused=(_FUSED_LINEAR, *_FUSED_MOE)
    ),
}

# Mixtures whose experts the package Defuser (0.0.28, comes with gptqmodel) takes apart in
# transformers' classes, so that plain transformers reads a directory that has them apart.
APART = ("qwen2_moe", "qwen3_moe", "qwen3_next")

_VISION = (
    "it also sees: its vision tower and its positions in pictures need calibration of pictures"
)
_SPEECH = "it also hears or speaks: its audio parts need calibration of sound"
_PART = "it is a part of a model that also sees or hears, and comes in no checkpoint of its own"
_REFUSED = {
    **dict.fromkeys(("colqwen2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _VISION),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp"), _VISION),
    **dict.fromkeys(("qwen2_audio", "qwen2_5_omni", "qwen3_omni_moe", "qwen3_asr"), _SPEECH),
    "qwen4_exp_text": "its hyper-connections carry several residual streams and its n-gram "
    "embeddings need the token ids in every block, which the walk has not",
}


def refusal(model_type: str) -> str | None:
    """Why that Qwen is not supported; None where it is, or where nothing is known of it."""
    if model_type in FAMILIES or model_type in _REFUSED:
        return _REFUSED.get(model_type)
    return _PART if any(model_type.startswith(f"{whole}_") for whole in _REFUSED) else None


# Lists of this length are made from the number, for a head that is not used here.
_LABELS = 100_000


def check_config(config: Mapping[str, Any], family: Family, names: Collection[str]) -> None:
    """Refuses, before a model is built from it, a config.json that would not end well.

    Building makes a module for each block that is asked for, so a number too large takes all
    memory, and one too small gives a model without its last blocks.

    Args:
        names: of the checkpoint's tensors.

    Raises:
        CheckpointError: there are more or fewer blocks than said, or a value asks transformers for
            code of a hub repository or for endless lists.
    """
    layers, prefix = family.layers(config), f"{family.blocks}."
    found = {n[len(prefix) :].partition(".")[0] for n in names if n.startswith(prefix)}
    if found != set(map(str, range(min(layers, len(found) + 1)))):
        raise CheckpointError(
            "config.json: num_hidden_layers",
            expected=f"as many as the weights have, {len(found)}",
            got=layers,
            cure="config.json and the weights are not of the same model, or the copy is incomplete",
        )
    _check_experts(config, family, names)
    labels = config.get("num_labels")
    if labels is not None and not (isinstance(labels, int) and 0 <= labels <= _LABELS):
        raise CheckpointError("config.json: num_labels", expected="a small number", got=labels)
    for key, value in config.items():
        # Anything else may be a name on the hub: transformers would fetch that code and run it.
        if key.endswith("_implementation") and value not in (None, "eager", "sdpa"):
            raise CheckpointError(
                f"config.json: {key}",
                expected="eager or sdpa, which bring no code of others",
                got=repr(value),
                cure="Remove the key; the choice is the reader's",
            )


def _check_experts(config: Mapping[str, Any], family: Family, names: Collection[str]) -> None:
    """As for the blocks: a module is made for each expert."""
    if family.experts is None:
        return
    numbered = re.compile(rf"\.{re.escape(family.experts)}\.(\d{{1,9}})\.")
    found = {match[1] for name in names if (match := numbered.search(name))}
    for key in ("num_experts", "num_local_experts"):
        count = config.get(key)
        # Experts in one piece are refused later, with the way out.
        if count is not None and count != len(found) and (found or count not in range(1024)):
            raise CheckpointError(
                f"config.json: {key}",
                expected=f"as many as the weights have, {len(found)}",
                got=repr(count),
                cure="config.json and the weights are not of the same model",
            )


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
    reason = refusal(model_type) if isinstance(model_type, str) else None
    raise CheckpointError(
        "config.json: model_type",
        expected=f"one of {', '.join(FAMILIES)}",
        got=f"{model_type!r}" + (f" ({reason})" if reason else ""),
        cure="qquant quantizes text Qwen checkpoints: original Qwen, Qwen1.5, Qwen2, Qwen2.5, "
        "Qwen3, and the mixtures of experts among them",
    )
