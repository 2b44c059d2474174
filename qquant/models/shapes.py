"""A model's shapes, from headers and config.json alone: what memory and time follow from.

The weights say nearly everything about a network: how wide it is, which linears a block has and how
large, how many experts. So nothing here needs torch or the model's class, and what a run will take
(`budget.py`, `pace.py`) is known in a moment.

`check_shapes` holds config.json against the headers as far as that goes without the class: the
numbers that name a width are the weights' own, and every block has the tensors that the class makes
of them (`declared.py`). Left out on purpose: everything else that a class makes of config.json
(positions, activations, which blocks have experts, keys it does not know). That is found when the
model is built (`skeleton.py`), at the beginning of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from .declared import Shape, head_size, key_of, number, tensors_of
from .families import Family

_OTHER = "config.json and the weights are not of the same model"
# Last part of the names of linears that write as many numbers as a token has; others read them.
_WRITES = ("o_proj", "c_proj", "down_proj", "out_proj")
_ATTENTION_OUT = ("self_attn.o_proj", "attn.c_proj")
_LINEAR_OUT = "linear_attn.out_proj"


@dataclass(frozen=True)
class Group:
    """Linears that are solved as one, and how often there are such.

    Attributes:
        outputs: of each.
        inputs: which they share.
        share: of the tokens that reach them; below 1 for experts.
        times: in the whole model.
    """

    outputs: tuple[int, ...]
    inputs: int
    share: float = 1.0
    times: int = 1

    @property
    def rows(self) -> int:
        """Outputs of all of them."""
        return sum(self.outputs)

    @property
    def difference(self) -> int:
        """Multiply-adds per token of what two streams differ by (see `hessian.Hessian`)."""
        alone = len(self.outputs) == 1  # as those are that write to the residual stream
        n, k = self.rows, self.inputs
        if alone and n < k:
            # A block's last, nearly always: its outputs the full-precision stream has anyway. An
            # attention wider than the hidden size counts as one here, and is told as too cheap.
            return n * k
        return min(2 * n * k, k * k + (n * k if alone else 0))


@dataclass(frozen=True)
class Shapes:
    """What a run's cost follows from.

    Attributes:
        blocks: how many.
        hidden: numbers per token between blocks.
        weights: numbers in the largest block.
        stored: dtype of the linears, as safetensors spells it.
        groups: what is solved, those alike counted together.
        attended: width of all heads together, summed over the blocks that attend.
        heads: the same of the widest block, linear attention's included.
        expert_share: the part of the tokens that one expert gets on the average; 1 without experts.
        shared_expert: whether an expert that takes every token stands beside the others.
    """

    blocks: int
    hidden: int
    weights: int
    stored: str
    groups: tuple[Group, ...]
    attended: int
    heads: int
    expert_share: float
    shared_expert: bool

    @classmethod
    def of(cls, source: Checkpoint, family: Family) -> Shapes:
        """Of a checkpoint that `plan.check_source` and `check_shapes` found right."""
        linears = family.by_block(source.tensors)
        share = _expert_share(source, family)
        weights: Counter[str] = Counter()
        for name in parameters(source, family):
            if name.startswith(f"{family.blocks}."):
                index = name.removeprefix(f"{family.blocks}.").partition(".")[0]
                weights[index] += source.info(name).numel
        attention = (
            f"{family.blocks}.{i}.{name}.weight"
            for i, names in linears.items()
            for name in names
            if name in _ATTENTION_OUT
        )
        ends = (
            source.info(f"{family.blocks}.{i}.{name}.weight").shape[1]
            for i, names in linears.items()
            for name in names
            if name in (*_ATTENTION_OUT, _LINEAR_OUT)
        )
        return cls(
            blocks=family.layers(source.config),
            hidden=source.info(family.embedding).shape[1],
            weights=max(weights.values()),
            stored=source.info(f"{family.first_linear(source.tensors)}.weight").dtype,
            groups=_groups(source, family, linears, share),
            attended=sum(source.info(name).shape[1] for name in attention),
            heads=max(ends, default=0),
            expert_share=share,
            shared_expert=any("shared" in name for names in linears.values() for name in names),
        )

    @property
    def widest(self) -> int:
        """Inputs of the widest linear."""
        return max(group.inputs for group in self.groups)


def held_dtype(compute: str, stored: str) -> str | None:
    """What activations are rounded to while they wait; None keeps them as they are.

    Args:
        compute, stored: the dtypes computed in (`float32`) and stored (`BF16`).
    """
    return "bfloat16" if compute == "float32" and stored == "BF16" else None


def missing_tensor(name: str, have: Collection[str]) -> CheckpointError:
    """The refusal of a checkpoint without a tensor that the model has.

    Args:
        have: names of the checkpoint's tensors.
    """
    fused = name.rpartition(".experts.")[0] + ".experts.gate_up_proj"
    return CheckpointError(
        name,
        expected="a tensor of this name",
        got="none in the checkpoint",
        cure="Its experts are stored in one piece: load it with transformers and save "
        "it again, which stores them apart"
        if fused in have
        else "The checkpoint is incomplete: download or save it again",
    )


def wrong_shape(name: str, expected: Shape, got: Shape, of: str = "config.json") -> CheckpointError:
    """The refusal of a tensor that does not fit the model.

    Args:
        of: what the expected shape is from.
    """
    return CheckpointError(name, expected=f"shape {expected} (from {of})", got=got, cure=_OTHER)


def check_shapes(source: Checkpoint, family: Family) -> None:
    """Refuses a checkpoint whose headers do not fit together or not with config.json.

    Raises:
        CheckpointError: names the tensor, or the key of config.json.
    """
    have, tied = source.tensors, _tied(source.config, family)
    for name in (family.embedding, family.norm, *(() if tied else (family.head,))):
        if name not in have:
            raise missing_tensor(name, have)
    if len(shape := have[family.embedding].shape) != 2:
        raise CheckpointError(
            family.embedding,
            expected="two dimensions: rows and columns",
            got=f"shape {shape}",
            cure="The checkpoint is damaged: download or save it again",
        )
    width = have[family.norm].shape
    if not tied and shape[1:] != width == have[family.head].shape[1:] and len(width) == 1:
        raise wrong_shape(family.embedding, (shape[0], *width), shape, "the norm and the head")
    for name, want in ((family.norm, shape[1:]), *(() if tied else ((family.head, shape),))):
        if have[name].shape != want:
            raise wrong_shape(name, want, have[name].shape, "the embedding")
    _check_blocks(source, family)
    _check_widths(source, family)
    _check_numbers(source, family)
    _check_declared(source, family)


def _tied(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the head is the embedding.

    Raises:
        CheckpointError: transformers' own classes take nothing but true and false.
    """
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool) and not family.remote_code:
        raise CheckpointError(
            "config.json: tie_word_embeddings",
            expected="true or false",
            got="null" if tied is None else repr(tied),
            cure="Restore config.json from the model this checkpoint was made from",
        )
    return bool(tied)


def parameters(source: Checkpoint, family: Family) -> list[str]:
    """The model's tensors among the checkpoint's: `family.parameters` without strangers in blocks.

    Raises:
        CheckpointError: a number in config.json is none.
    """
    known: dict[frozenset[str], Collection[str]] = {}
    strangers = set()
    for index, block in _blocks(source, family).items():
        kind = parts_of(block, family)
        if kind not in known:
            known[kind] = tensors_of(source.config, family, kind)
        strangers |= {f"{family.blocks}.{index}.{name}" for name in block.keys() - known[kind]}
    strangers -= {f"{name}.weight" for name in family.linear_names(source.tensors)}
    return [n for n in family.parameters(source.config, source.tensors) if n not in strangers]


def _blocks(source: Checkpoint, family: Family) -> dict[int, dict[str, Shape]]:
    """What the headers have of each block, by the names inside it."""
    prefix = f"{family.blocks}."
    blocks: dict[int, dict[str, Shape]] = {}
    for name in family.parameters(source.config, source.tensors):
        if name.startswith(prefix):
            index, _, inner = name.removeprefix(prefix).partition(".")
            blocks.setdefault(int(index), {})[inner] = source.tensors[name].shape
    return blocks


def _check_blocks(source: Checkpoint, family: Family) -> None:
    """Blocks of one kind have the same linears of the same shapes, and all of them."""
    prefix, blocks = f"{family.blocks}.", _blocks(source, family)
    linears = family.by_block(source.tensors)
    expected: dict[frozenset[str], dict[str, Shape]] = {}
    for index, block in sorted(blocks.items()):
        kind = expected.setdefault(_kind(block, family), {})
        for name in linears.get(index, ()):
            kind.setdefault(f"{name}.weight", block[f"{name}.weight"])
    needed = [] if family.varied else [f"{name}.weight" for name in family.linears]
    for index, block in sorted(blocks.items()):
        if any(inner.endswith(".experts.gate_up_proj") for inner in block):
            raise missing_tensor(
                f"{prefix}{index}.{family.experts}.0.gate_proj.weight", source.tensors
            )
        kind = expected[_kind(block, family)]
        for inner in (*needed, *kind):
            if inner not in block:
                raise missing_tensor(f"{prefix}{index}.{inner}", source.tensors)
            if block[inner] != kind[inner]:
                raise wrong_shape(
                    f"{prefix}{index}.{inner}", kind[inner], block[inner], "other blocks"
                )


def _check_declared(source: Checkpoint, family: Family) -> None:
    """Every block has the tensors that the class makes of config.json.

    What else the checkpoint has beside them is none of the model's and left out (`plan.py`).
    """
    known: dict[frozenset[str], dict[str, Shape]] = {}
    linears = family.by_block(source.tensors)
    for index, block in sorted(_blocks(source, family).items()):
        kind = parts_of(block, family)
        if len(kind & {"self_attn", "linear_attn"}) != 1:
            raise CheckpointError(
                f"{family.blocks}.{index}",
                expected="attention of one kind",
                got=f"tensors of {' and '.join(sorted(kind)) or 'none'}",
                cure=_OTHER,
            )
        if kind not in known:
            known[kind] = tensors_of(source.config, family, kind)
        for linear in linears.get(index, ()):
            if (inner := f"{linear}.weight") not in known[kind]:
                raise CheckpointError(
                    f"{family.blocks}.{index}.{inner}",
                    expected="no such tensor in a block with these others",
                    got=block[inner],
                    cure=_OTHER,
                )
        for inner, shape in known[kind].items():
            name = f"{family.blocks}.{index}.{inner}"
            if inner not in block:
                raise missing_tensor(name, source.tensors)
            if block[inner] != shape:
                raise wrong_shape(name, shape, block[inner])


def _kind(block: Collection[str], family: Family) -> frozenset[str]:
    """What tells kinds of blocks apart: their parts that a family has in some blocks only."""
    if not family.varied:
        return frozenset()
    parts = {name.partition(".")[0] for name in family.linears} | {family.experts or ""}
    return frozenset(p for p in parts if p and any(name.startswith(f"{p}.") for name in block))


def parts_of(block: Collection[str], family: Family) -> frozenset[str]:
    """What `declared.tensors_of` takes: the parts of a block that not every block has.

    Args:
        block: names of its tensors inside it.
    """
    return _kind(block, family) if family.varied else frozenset({"self_attn"})


def _check_widths(source: Checkpoint, family: Family) -> None:
    """Linears read and write what stands before and after them."""
    hidden = source.info(family.embedding).shape[1]
    for index, names in family.by_block(source.tensors).items():
        inner: dict[str, int] = {}  # numbers inside of each feed-forward network
        for name in names:
            full = f"{family.blocks}.{index}.{name}.weight"
            n, k = source.info(full).shape
            stem, _, last = name.rpartition(".")
            writes = last in _WRITES
            expected = (hidden, k) if writes else (n, hidden)
            if stem.startswith("mlp"):
                width = inner.setdefault(stem, n)  # the first one is never the one that writes
                expected = (hidden, width) if writes else (width, hidden)
            if (n, k) != expected:
                raise wrong_shape(full, expected, (n, k), "the tensors beside it")


def _check_numbers(source: Checkpoint, family: Family) -> None:
    """config.json's numbers that name a width are the weights'."""
    config = source.config
    rows, hidden = source.info(family.embedding).shape
    first = family.by_block(source.tensors)
    shapes = {
        name: source.info(f"{family.blocks}.{i}.{name}.weight").shape
        for i, names in sorted(first.items(), reverse=True)
        for name in names
    }
    _agree(config, family, "vocab_size", rows)
    _agree(config, family, "hidden_size", hidden)
    if family.experts:
        number(config, family, "num_experts_per_tok")
    twice = 2 if family.remote_code else 1
    for key, name in (
        ("intermediate_size", "mlp.c_proj"),
        ("intermediate_size", "mlp.down_proj"),
        ("moe_intermediate_size", "mlp.experts.0.down_proj"),
        ("shared_expert_intermediate_size", "mlp.shared_expert.down_proj"),
    ):
        if name in shapes:
            _agree(config, family, key, shapes[name][1] * twice)
    if experts := _experts(source, family):
        if config.get("num_local_experts") is None:
            _agree(config, family, "num_experts", experts)
    attention = next((shapes[name] for name in _ATTENTION_OUT if name in shapes), None)
    if attention:
        _check_heads(source, family, attention[1], shapes.get("self_attn.k_proj"))


def _check_heads(source: Checkpoint, family: Family, width: int, keys: Shape | None) -> None:
    """Heads are as wide together as the weights have it.

    Args:
        width: of all of them.
        keys: shape of the linear that makes keys; None where there is no such.
    """
    config = source.config
    heads, size = number(config, family, "num_attention_heads"), head_size(config, family)
    key = key_of(config, family, "num_attention_heads")
    if heads and heads * size != width:
        raise CheckpointError(
            f"config.json: {key}",
            expected=f"heads that are {width} wide together, as the weights have",
            got=f"{heads} of {size}" if key in config else f"none, which means {heads} of {size}",
            cure=_OTHER if key in config else f"Add {key}",
        )
    if keys is None:
        return
    if key not in config and number(config, family, "num_key_value_heads") != keys[0] / size:
        raise CheckpointError(
            f"config.json: {key}",
            expected="the number of heads",
            got=f"none, which means {heads} of {size}",
            cure=f"Add {key}",
        )
    _agree(config, family, "num_key_value_heads", keys[0] / size)


def _agree(config: Mapping[str, Any], family: Family, key: str, weights: float) -> None:
    """Refuses a number that is not the weights', be it there or what its absence means."""
    said = number(config, family, key)
    if said is None or said == weights:
        return
    key = key_of(config, family, key)
    there = config.get(key) is not None
    got = "null" if key in config else "none"
    raise CheckpointError(
        f"config.json: {key}",
        expected=f"{weights:g}, as the weights have",
        got=said if there else f"{got}, which means {said}",
        cure=_OTHER if there else f'Add "{key}": {weights:g}',
    )


def _experts(source: Checkpoint, family: Family) -> int:
    """How many experts the weights have."""
    prefix = f"{family.experts}."
    numbers = {
        name.removeprefix(prefix).partition(".")[0]
        for names in family.by_block(source.tensors).values()
        for name in names
        if name.startswith(prefix)
    }
    return len(numbers)


def _expert_share(source: Checkpoint, family: Family) -> float:
    experts = _experts(source, family)
    chosen = number(source.config, family, "num_experts_per_tok")
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _groups(
    source: Checkpoint, family: Family, linears: Mapping[int, tuple[str, ...]], expert_share: float
) -> tuple[Group, ...]:
    whole = {part: name for name, parts in family.fused for part in parts}
    found: Counter[Group] = Counter()
    for i, names in linears.items():
        groups: dict[str, list[tuple[int, int, float]]] = {}
        for name in names:
            kind = family.kind_of(name)
            # An expert's number comes first in what its linears have in common.
            stem = name.rpartition(".")[0] if kind != name else ""
            n, k = source.info(f"{family.blocks}.{i}.{name}.weight").shape
            share = expert_share if kind != name else 1.0
            groups.setdefault(stem + whole.get(kind, kind), []).append((n, k, share))
        for parts in groups.values():
            found[Group(tuple(n for n, _, _ in parts), *parts[0][1:])] += 1
    return tuple(replace(group, times=times) for group, times in found.items())
