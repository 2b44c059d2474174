"""Whether a quantized directory has every tensor of the model that its config.json describes.

Comparing blocks with each other (`verify.py`) shows what one of them lacks and not what all lack:
without `down_proj` anywhere most readers fill it with random numbers and only warn. So names and
shapes are held against what the family's class makes of config.json (`models/declared.py`); a
quantized linear counts with the shape that its packed tensors stand for.

Left out on purpose: tensors that the model does not know (readers pass over them), and models of
other families.
"""

from __future__ import annotations

from collections.abc import Iterator

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .findings import VerifyReport, some
from .layout import block_of
from .models.declared import Shape, number, tensors_of
from .models.families import Family, family_of
from .models.shapes import parts_of

_AGAIN = "The directory is incomplete: download or quantize it again."
_OTHER = "config.json and the weights are not of the same model."


def check_complete(checkpoint: Checkpoint, report: VerifyReport) -> None:
    """Names what is missing or of another shape.

    Args:
        checkpoint: a quantized one whose shards can all be read.
        report: takes the findings; its rows say what the packed tensors stand for.

    Raises:
        CheckpointError: a number in config.json is none.
    """
    try:
        family = family_of(checkpoint.config)
    except CheckpointError:  # readers of GPTQ take others, too
        return
    there = checkpoint.tensors
    packed = {f"{row.name}.weight": (row.outputs, row.inputs) for row in report.layers}
    stateful = {
        f"{name.rpartition('.')[0].removesuffix('.weight')}.weight"
        for name in there
        if not name.endswith((".weight", ".bias"))
    }
    missing, other = [], []
    for name, shape in _wanted(checkpoint, family):
        if name in packed:
            got: Shape | None = packed[name]
        elif name in stateful:  # quantized, with a problem of its own
            continue
        else:
            got = tuple(there[name].shape) if name in there else None
        if got is None:
            missing.append(name)
        elif got != shape:
            other.append((name, shape, got))
    if missing:
        expected = f"every tensor that a {family.model_type} of this config.json has"
        report.problem("tensors", expected, f"not {some(missing)}", _AGAIN)
    for name, shape, got in other[:1]:
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        report.problem(
            f"shape of {name}{more}", f"{list(shape)}, by config.json", list(got), _OTHER
        )


def _wanted(checkpoint: Checkpoint, family: Family) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the tensors that make the model, without the blocks that are not there:
    those are counted elsewhere."""
    config = checkpoint.config
    matrix = _numbers(checkpoint, family, "vocab_size", "hidden_size")
    yield family.embedding, matrix
    yield family.norm, matrix[1:]
    if not config.get("tie_word_embeddings"):
        yield family.head, matrix
    blocks: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        if (place := block_of(name)) and place[0] == family.blocks:
            prefix = f"{family.blocks}.{place[1]}."
            blocks.setdefault(prefix, set()).add(name.removeprefix(prefix))
    known: dict[frozenset[str], dict[str, Shape]] = {}
    for prefix, names in blocks.items():
        kind = parts_of(names, family)
        if kind not in known:
            known[kind] = tensors_of(config, family, kind)
        fused = any(name.endswith(".experts.gate_up_proj") for name in names)
        for name, shape in known[kind].items():
            if not (fused and family.experts and name.startswith(f"{family.experts}.")):
                yield prefix + name, shape


def _numbers(checkpoint: Checkpoint, family: Family, *keys: str) -> Shape:
    return tuple(number(checkpoint.config, family, key) or 0 for key in keys)
