"""A GPTQ directory beside the checkpoint it was made from: how far each weight moved, and that
nothing else did.

How large may the error of a linear be? Solvers differ, and may move weights further than rounding
would, on purpose. So the measure is rounding to nearest on the same grid, for the same weight: two
and a half times that is a warning, four times (or 0.95 of the weight's own norm) is a problem. Zero
points off by one give about 3.6 times, and are recognised apart: the other offset then fits better.

What was not quantized must equal the source in the stored dtype. Flat in memory: one slice of one
tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .findings import LayerRow, VerifyReport, some
from .layout import KINDS, Layout
from .models.families import family_of
from .models.shapes import parameters
from .pack import Packed, dequantize, outputs

_SLICE = 1 << 23  # bytes of float32 looked at together: what caches hold goes fastest
_REFERENCE_ROWS = 256  # outputs on which rounding to nearest is computed
_WARN, _WRONG, _MOST = 2.5, 4.0, 0.95
_BETTER = 0.36  # share of the squared error: the other zero offset fits, this one does not
# Buffers that older code saved with its weights and nobody needs.
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_HEAD = "lm_head.weight"


def compare_linear(
    checkpoint: Checkpoint,
    source: Checkpoint,
    name: str,
    own: Layout,
    row: LayerRow,
    report: VerifyReport,
) -> LayerRow:
    """`row` with the errors of the linear `name` filled in; what is wrong goes to `report`."""
    weight = source.tensors.get(f"{name}.weight")
    if weight is None or weight.shape != (row.outputs, row.inputs):
        there = "none" if weight is None else list(weight.shape)
        report.problem(f"{name}.weight of the source", [row.outputs, row.inputs], there)
        return row
    packed = Packed(*(checkpoint.read(f"{name}.{kind}") for kind in KINDS))
    step = max(32, _SLICE // (4 * row.inputs) // 32 * 32)  # whole words of zero points
    every = -(-row.outputs // _REFERENCE_ROWS)
    error = norm = few_error = few_norm = rounding = moved = 0.0
    for start in range(0, row.outputs, step):
        stop = min(start + step, row.outputs)
        part = outputs(packed, start, stop, own.bits)
        want = source.read_rows(f"{name}.weight", start, stop).float()
        got = dequantize(part, own.bits, zero_offset=own.zero_offset)
        difference = got.sub_(want)
        error += _square(difference)
        norm += _square(want)
        few, off = want[::every], difference[::every]
        few_norm += _square(few)
        few_error += _square(off)
        rounding += _square(_round_to_nearest(few, own) - few)
        # Read as the other format, every weight would be one step higher (v1) or lower (v2).
        one = part.scales.float().t()[::every, part.g_idx.long()]
        moved += _square(off + one if own.zero_offset else off - one)
    relative, reference = _ratio(error, norm), _ratio(rounding, few_norm)
    key, near = f"dequantized error of {name}", f"near {reference:.4f} (rounding to nearest)"
    if moved < _BETTER * few_error:
        cure = "The zero points are off by one: checkpoint_format is not that of the files."
        report.problem(key, near, f"{relative:.4f}", cure)
    elif not relative <= min(max(_WRONG * reference, 0.05), _MOST):  # NaN too
        cure = "The tensors are damaged, or of another checkpoint than the source."
        report.problem(key, near, f"{relative:.4f}", cure)
    elif relative > max(_WARN * reference, 0.02):
        report.warn(key, near, f"{relative:.4f}")
    return replace(row, relative_error=relative, rounding_error=reference)


def compare_rest(
    checkpoint: Checkpoint,
    source: Checkpoint,
    linears: Mapping[str, set[str]],
    report: VerifyReport,
) -> None:
    """Biases and everything outside the quantized linears; what is wrong goes to `report`."""
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for name, ours in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if module in linears and kind != "bias":
            continue
        origin = name
        if tied and name == _HEAD and name not in source.tensors:
            origin = next((n for n in source.tensors if n.endswith(_EMBEDDINGS)), name)
        theirs = source.tensors.get(origin)
        if theirs is None:
            if module not in linears:
                report.problem(name, "a tensor of the source", "none of that name there")
            elif bool(checkpoint.read(name).any()):
                report.problem(name, "zeros, since the source has no bias", "other numbers")
        elif theirs.shape != ours.shape:
            want = f"{list(theirs.shape)}, as the source"
            report.problem(f"shape of {name}", want, list(ours.shape))
        else:
            for rows, part in slices(checkpoint, name):
                same = source.read(origin) if rows is None else source.read_rows(origin, *rows)
                if not torch.equal(same.to(part.dtype), part):
                    got = "other values"
                    report.problem(name, f"the source's values as {ours.dtype}", got)
                    break
    missing = [
        name
        for name in _of_the_model(source)
        if name not in checkpoint.tensors
        and name.removesuffix(".weight") not in linears
        and not name.endswith(_BUFFERS)
        and not (tied and name == _HEAD)
    ]
    if missing:
        report.problem("tensors of the source", "all of them", f"not {some(missing)}")


def _of_the_model(source: Checkpoint) -> list[str]:
    """The source's tensors without those that no model of its config.json has, such as the blocks
    that predict several tokens ahead: a quantized directory leaves them out."""
    try:
        return parameters(source, family_of(source.config))
    except CheckpointError:
        return list(source.tensors)


def slices(checkpoint: Checkpoint, name: str) -> Iterator[tuple[tuple[int, int] | None, Tensor]]:
    """Slices of rows of bounded size: ((start, stop), rows); (None, tensor) for a scalar."""
    info = checkpoint.tensors[name]
    if not info.shape:
        yield None, checkpoint.read(name)
        return
    step = max(1, _SLICE * info.shape[0] // max(info.nbytes, 1))
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        yield (start, stop), checkpoint.read_rows(name, start, stop)


def _round_to_nearest(weight: Tensor, own: Layout) -> Tensor:
    """[rows, K] float32 rounded on a symmetric grid with each group's largest weight at its end."""
    rows, k = weight.shape
    size = k if own.group_size == -1 else min(own.group_size, k)
    grouped = torch.nn.functional.pad(weight, (0, -k % size)).view(rows, -1, size)
    step = grouped.abs().amax(dim=-1, keepdim=True) * 2 / (2**own.bits - 1)
    step = torch.where(step == 0, torch.ones_like(step), step)
    half = 2 ** (own.bits - 1)
    return ((grouped / step).round().clamp(-half, half - 1) * step).view(rows, -1)[:, :k]


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2


def _ratio(error: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return float((error / norm) ** 0.5)
