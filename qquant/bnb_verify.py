"""`verify` for bitsandbytes directories: whole states, whole blocks, nothing moved but by rounding.

What is asked of a GPTQ directory is asked here in the same words (`verify.py`); the state of each
linear is `bnb_check.py`. bitsandbytes has no freedom in rounding, so against the source the error
of a linear must be that of rounding to nearest with the same table and the same scales: half as
much again is a problem. That also shows scales in the wrong order, which no shape tells.

Matrices of the blocks that stay in 16 bits without being left out by name are named: a mixture's
experts, which bitsandbytes passes over.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from .bnb_check import check_states, read_parts
from .bnb_layout import BnbLayout, linears_of
from .bnb_state import dequantize_rows, row_slices, state_of
from .checkpoint import QUANTIZE_CONFIGS, Checkpoint
from .compare import compare_rest, slices
from .complete import check_alike
from .findings import LayerRow, VerifyReport, some
from .finite import all_finite
from .layout import block_of, within_block

_WRONG = 1.5  # times the error of rounding to nearest
_LEAST = {4: 0.02, 8: 0.002}  # a relative error that is no problem whatever the reference
_REFERENCE_ROWS = 256


def verify_bnb(
    checkpoint: Checkpoint, source: Checkpoint | None, sample: int | None, report: VerifyReport
) -> None:
    """Checks an opened bitsandbytes directory; what is found goes to `report`.

    Args:
        source: the unquantized checkpoint to compare with.
        sample: compare only so many linears, evenly spread.

    Raises:
        CheckpointError: the quantization config is none of bitsandbytes.
    """
    layout = BnbLayout.parse(checkpoint.quantization_config or {})
    for name in QUANTIZE_CONFIGS:
        if (checkpoint.path / name).exists():
            cure = "Remove it: servers read it as a GPTQ directory's."
            report.problem(name, "not in a bitsandbytes directory", "there", cure)
    linears = linears_of(checkpoint.tensors)
    if not linears:
        report.problem("tensors", "quantized linears (NAME.weight.absmax or NAME.SCB)", "none")
    rows = check_states(checkpoint, layout, report)
    _check_coverage(checkpoint, set(linears), layout, report)
    if source is not None:
        names = list(rows)
        count = len(names) if sample is None else min(sample, len(names))
        for name in {names[i * len(names) // count] for i in range(count)}:
            rows[name] = _compare(checkpoint, source, rows[name], report)
    report.layers += rows.values()
    for name in sorted(checkpoint.tensors):
        if _owner(name, linears) is None or name.endswith(".bias"):
            _check_finite(checkpoint, name, report)
    if source is not None:
        owned = {**linears}  # as `compare_rest` splits names: every prefix that is a linear's
        for name in checkpoint.tensors:
            if _owner(name, linears) is not None and not name.endswith(".bias"):
                owned.setdefault(name.rpartition(".")[0], set())
        compare_rest(checkpoint, source, owned, report)


def _owner(name: str, linears: Collection[str]) -> str | None:
    """The quantized linear that a tensor belongs to."""
    while name:
        name = name.rpartition(".")[0]
        if name in linears:
            return name
    return None


def _check_coverage(
    checkpoint: Checkpoint, linears: set[str], layout: BnbLayout, report: VerifyReport
) -> None:
    """Blocks all there and alike; what stays in 16 bits is left out by name, or named here."""

    def left_out(stack: str, index: int, name: str) -> bool:
        return _left_out(stack, index, name, layout)

    check_alike(checkpoint, linears, left_out, report)
    plain = [
        info.name
        for info in checkpoint.tensors.values()
        if (place := block_of(info.name))
        and len(info.shape) >= 2
        and _owner(info.name, linears) is None
        and not _left_out(*place, within_block(info.name).removesuffix("weight"), layout)
    ]
    if plain:
        report.warn(
            f"matrices of blocks: {some(plain)}",
            "quantized like the others",
            f"{len(plain)} in 16 bits, {sum(checkpoint.tensors[n].nbytes for n in plain)} bytes",
        )


def _left_out(prefix: str, index: int, within: str, layout: BnbLayout) -> bool:
    full = f".{prefix}.{index}.{within}"
    full = full if full.endswith(".") else f"{full}."
    return any(full.startswith(f".{s}.") or full.endswith(f".{s}.") for s in layout.skip)


def _check_finite(checkpoint: Checkpoint, name: str, report: VerifyReport) -> None:
    for _, part in slices(checkpoint, name):
        if not all_finite(part):
            report.problem(name, "finite numbers", "infinities or NaN")
            return


def _compare(
    checkpoint: Checkpoint, source: Checkpoint, row: LayerRow, report: VerifyReport
) -> LayerRow:
    """`row` with its errors against the source."""
    weight = source.tensors.get(f"{row.name}.weight")
    if weight is None or weight.shape != (row.outputs, row.inputs):
        there = "none" if weight is None else list(weight.shape)
        report.problem(f"{row.name}.weight of the source", [row.outputs, row.inputs], there)
        return row
    parts = read_parts(checkpoint, row.name)
    error = norm = few_error = few_norm = 0.0
    every = -(-row.outputs // _REFERENCE_ROWS)
    for start, stop in row_slices(row.outputs, row.inputs):
        want = source.read_rows(f"{row.name}.weight", start, stop).float()
        got = dequantize_rows(parts, start, stop)
        norm += _square(want)
        error += _square(got - want)
        few = want[::every]
        few_norm += _square(few)
        few_error += _square(_nearest(parts, want)[::every] - few)
    relative = (error / norm) ** 0.5 if norm else float(error > 0)
    reference = (few_error / few_norm) ** 0.5 if few_norm else 0.0
    if not relative <= max(_WRONG * reference, _LEAST[row.bits]):  # NaN too
        report.problem(
            f"dequantized error of {row.name}",
            f"near {reference:.4f} (rounding to nearest)",
            f"{relative:.4f}",
            "The tensors are damaged, or of another checkpoint than the source; scales in the "
            "wrong order come from saving after a forward: quantize again.",
        )
    return replace(row, relative_error=relative, rounding_error=reference)


def _nearest(parts: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Rows of the source rounded to the nearest value that a code
    has with scales taken from the rows themselves: [rows, K] float32."""
    if "SCB" in parts:
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        step = torch.where(step == 0, torch.ones_like(step), step)
        return (weight / step).round() * step
    block = state_of(parts)["blocksize"]
    flat = weight.reshape(-1)
    # Whole blocks from this slice's first weight on: off by less than a block, which is all right
    # for a reference.
    grouped = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    scale = grouped.abs().amax(dim=1, keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    table = parts["weight.quant_map"].float().sort().values
    bounds = (table[1:] + table[:-1]) / 2
    rounded = table[torch.bucketize(grouped / scale, bounds)] * scale
    return rounded.view(-1)[: flat.numel()].view_as(weight)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2
