"""Whether a quantized directory has every tensor of the model that its config.json describes.

Whatever the quantization: blocks are compared with each other, since a reader makes every linear
of a block a quantized one. That shows what one of them lacks and not what all lack: without
`down_proj` anywhere most readers fill it with random numbers and only warn. So names and shapes
are also held against what the family's class makes of config.json (`models/declared.py`); a
quantized linear counts with the shape that its packed tensors stand for. Models that carry the
text model under another name (a bare `AutoModel`, a text model saved with its prefix) are found by
where their embedding is.

Left out on purpose: tensors that the model does not know (readers pass over them), and models of
other families.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .findings import VerifyReport, some
from .layout import block_of, layer_count, text_stack, within_block
from .models.declared import Shape, number, tensors_of
from .models.families import Family, family_of
from .models.shapes import parts_of

_AGAIN = "The directory is incomplete: download or quantize it again."
_OTHER = "config.json and the weights are not of the same model."
_FLOATS = ("F16", "BF16", "F32", "F64")
_KINDS = {"full_attention": "self_attn", "linear_attention": "linear_attn"}


def known_family(checkpoint: Checkpoint) -> Family | None:
    """The family; None for other models, of which readers of GPTQ take many."""
    try:
        return family_of(checkpoint.config)
    except CheckpointError:
        return None


def _form(family: Family | None, modules: Collection[str]) -> frozenset[str]:
    """What blocks of one model may differ in: with experts or not, one attention or another.

    Args:
        modules: names inside a block.
    """
    if family is None or not family.varied:
        return frozenset()
    experts = {"experts"} if family.experts and any(family.experts in m for m in modules) else ()
    return frozenset(experts) | {m.partition(".")[0] for m in modules if "attn" in m}


def check_alike(
    checkpoint: Checkpoint,
    linears: Collection[str],
    left_out: Callable[[str, int, str], bool],
    report: VerifyReport,
) -> None:
    """Blocks all there, and each with the quantized linears that others of its form have.

    Args:
        linears: names of the quantized ones.
        left_out: whether the config leaves a linear in 16 bits, by its stack, block and name there.
    """
    blocks: dict[str, dict[int, set[str]]] = {}
    for name in checkpoint.tensors:
        if place := block_of(name):
            blocks.setdefault(place[0], {}).setdefault(place[1], set())
    for name in linears:
        if place := block_of(f"{name}."):
            blocks[place[0]][place[1]].add(within_block(f"{name}.").removesuffix("."))
    counted, stack = layer_count(checkpoint.config), text_stack(checkpoint.tensors)
    family = known_family(checkpoint)
    for prefix, found in blocks.items():
        count = counted if prefix == stack else None
        if count is not None and (len(found) != count or max(found) != count - 1):
            got = f"{len(found)} blocks, the last {max(found)}"
            report.problem(f"blocks {prefix}", f"0 to {count - 1}", got)
        unions: dict[frozenset[str], set[str]] = {}
        for modules in found.values():
            unions.setdefault(_form(family, modules), set()).update(modules)
        for index, modules in sorted(found.items()):
            lacking = sorted(unions[_form(family, modules)] - modules)
            if missing := [m for m in lacking if not left_out(prefix, index, m)]:
                expected = "the linears of the other blocks, quantized"
                report.problem(f"{prefix}.{index}", expected, f"not {some(missing)}")


def missing_tensors(checkpoint: Checkpoint, quantized: Collection[str]) -> list[str]:
    """Names of what is not there, plain or packed; none where the family is not known.

    Args:
        quantized: linears that have packed tensors.

    Raises:
        CheckpointError: a number in config.json is none.
    """
    if (family := known_family(checkpoint)) is None:
        return []
    there = {*checkpoint.tensors, *(f"{name}.weight" for name in quantized)}
    return [name for name, _ in _wanted(checkpoint, family) if name not in there]


def check_complete(
    checkpoint: Checkpoint, quantized: Collection[str], report: VerifyReport
) -> None:
    """Names what is missing, of another shape or no float.

    Args:
        checkpoint: one whose shards can all be read.
        quantized: linears that have packed tensors. Those without a row in the report have a
            problem of their own.
        report: takes the findings; its rows say what the packed tensors stand for.

    Raises:
        CheckpointError: a number in config.json is none.
    """
    if (family := known_family(checkpoint)) is None:
        return
    there = checkpoint.tensors
    packed = {f"{row.name}.weight": (row.outputs, row.inputs) for row in report.layers}
    troubled = {f"{name}.weight" for name in quantized} - packed.keys()
    missing, shapes, dtypes = [], [], []
    for name, shape in _wanted(checkpoint, family):
        if name in troubled:
            continue
        if name in packed:
            got: Shape = packed[name]
        elif name in there:
            got = tuple(there[name].shape)
            if there[name].dtype not in _FLOATS:
                dtypes.append(name)
        else:
            missing.append(name)
            continue
        if got != shape:
            shapes.append((name, shape, got))
    if missing:
        expected = f"every tensor that a {family.model_type} of this config.json has"
        report.problem("tensors", expected, f"not {some(missing)}", _AGAIN)
    for name, shape, got in shapes[:1]:
        more = f", and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        expected = f"{list(shape)}, by config.json"
        report.problem(f"shape of {name}{more}", expected, list(got), _OTHER)
    for name in dtypes[:1]:
        more = f", and {len(dtypes) - 1} more" if len(dtypes) > 1 else ""
        report.problem(f"dtype of {name}{more}", "F16, BF16 or F32", there[name].dtype)


def _wanted(checkpoint: Checkpoint, family: Family) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the tensors that make the model, without the blocks that are not there:
    those are counted elsewhere."""
    config, stack = checkpoint.config, text_stack(checkpoint.tensors) or family.blocks
    base, own = stack.rpartition(".")[0], family.blocks.rpartition(".")[0]
    matrix = tuple(number(config, family, key) or 0 for key in ("vocab_size", "hidden_size"))
    for name, shape in ((family.embedding, matrix), (family.norm, matrix[1:])):
        yield f"{base}.{name.removeprefix(f'{own}.')}".removeprefix("."), shape
    if not config.get("tie_word_embeddings") and _has_head(config):
        yield family.head, matrix
    blocks: dict[int, set[str]] = {}
    for name in checkpoint.tensors:
        if (place := block_of(name)) and place[0] == stack:
            inner = name.removeprefix(f"{stack}.{place[1]}.")
            blocks.setdefault(place[1], set()).add(inner)
    known: dict[tuple[frozenset[str], bool], dict[str, Shape]] = {}
    for index, names in blocks.items():
        fused = any(".experts.gate_up_proj" in n or ".experts.down_proj" in n for n in names)
        kind = _kind(config, family, index, names), fused
        if kind not in known:
            made = tensors_of(config, family, kind[0])
            known[kind] = _fused(made, family.experts) if fused and family.experts else made
        for name, shape in known[kind].items():
            yield f"{stack}.{index}.{name}", shape


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether it is a model that predicts tokens; classifiers and bare models have another head
    or none."""
    named = config.get("architectures")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return True
    return not named or any("LM" in name or "Generation" in name for name in named)


def _kind(
    config: Mapping[str, Any], family: Family, index: int, names: Collection[str]
) -> frozenset[str]:
    """As `parts_of`, with one kind of attention even if the block has none."""
    parts = parts_of(names, family)
    if len(parts & set(_KINDS.values())) == 1:
        return parts
    types = config.get("layer_types")
    said = types[index] if isinstance(types, list) and index < len(types) else None
    return parts - set(_KINDS.values()) | {_KINDS.get(str(said), "self_attn")}


def _fused(tensors: Mapping[str, Shape], experts: str) -> dict[str, Shape]:
    """With a block's experts as transformers' classes have them, in two tensors."""
    apart = {name for name in tensors if name.startswith(f"{experts}.")}
    count = len(apart) // 3
    width, hidden = tensors[f"{experts}.0.gate_proj.weight"]
    return {
        **{name: shape for name, shape in tensors.items() if name not in apart},
        f"{experts}.gate_up_proj": (count, 2 * width, hidden),
        f"{experts}.down_proj": (count, hidden, width),
    }
