"""Whether the stored state of bitsandbytes linears is whole: names, shapes, dtypes, finite scales.

What a loader would not notice is the point. bitsandbytes reads scales by position, so a scale
tensor of the right size in the wrong order loads and is wrong everywhere; one in bfloat16 is
silently coarser. Both happen at once when bitsandbytes 0.50.2 saves a 4-bit model after a forward
on a CPU with AVX512-BF16: `absmax` comes out as bfloat16 [K/64, N] where float32 [N·K/64] belongs;
with double quantization they are put back in order, but made anew from rounded ones, and the state
then says `nested_dtype: bfloat16`. Both are seen here. Scales in a wrong order behind an intact
shape show only against the source (`bnb_verify.py`).

Used by `verify` on any directory and by `bnb.save` before it publishes. Needs no bitsandbytes;
where it is installed, the table of code values is compared with its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .bnb_layout import BnbLayout, decode_state, linears_of, state_key
from .bnb_spec import NESTED_BLOCK
from .bnb_state import need_bitsandbytes
from .checkpoint import Checkpoint
from .errors import CheckpointError, MissingDependencyError
from .findings import LayerRow, Problem, VerifyReport
from .headers import dtype_name

_AGAIN = "Quantize the source again; the file cannot be repaired."
_AFTER_FORWARD = (
    "bitsandbytes 0.50.2 writes this when a model is saved after a forward on a CPU with "
    "AVX512-BF16: " + _AGAIN[0].lower() + _AGAIN[1:]
)


def check_states(
    checkpoint: Checkpoint, layout: BnbLayout, report: VerifyReport
) -> dict[str, LayerRow]:
    """Checks every quantized linear of a directory; what is wrong goes to `report`.

    Returns:
        A row per linear that is whole, by name.
    """
    rows = {}
    for name, parts in linears_of(checkpoint.tensors).items():
        before = len(report.problems)
        try:
            check = _check_rows if layout.method == "int8" else _check_blocks
            row = check(checkpoint, name, parts, layout, report)
        except CheckpointError as error:
            report.problems.append(Problem.of(error))
            continue
        if row is not None and len(report.problems) == before:
            rows[name] = row
    return rows


def read_parts(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors of one linear, by the rest of their name; its bias apart."""
    parts = linears_of(n for n in checkpoint.tensors if n.startswith(f"{name}."))[name]
    return {part: checkpoint.read(f"{name}.{part}") for part in parts - {"bias"}}


def _check_rows(
    checkpoint: Checkpoint, name: str, parts: set[str], layout: BnbLayout, report: VerifyReport
) -> LayerRow | None:
    if not _have(name, parts, {"weight", "SCB", "weight_format"}, layout, report):
        return None
    shape = checkpoint.tensors[f"{name}.weight"].shape
    if len(shape) != 2:
        report.problem(f"shape of {name}.weight", "[outputs, inputs]", list(shape))
        return None
    n, k = shape
    want = {"weight": ("I8", (n, k)), "SCB": ("F32", (n,)), "weight_format": ("U8", ())}
    if not _fits(checkpoint, name, want, report):
        return None
    if form := int(checkpoint.read(f"{name}.weight_format")):
        report.problem(f"{name}.weight_format", "0 (plain rows)", form, _AGAIN)
    _scales(f"{name}.SCB", checkpoint.read(f"{name}.SCB"), report)
    return LayerRow(name, k, n, 8, -1, "int8")


def _check_blocks(
    checkpoint: Checkpoint, name: str, parts: set[str], layout: BnbLayout, report: VerifyReport
) -> LayerRow | None:
    needed = {"weight", "weight.absmax", "weight.quant_map", state_key(layout.method)}
    if layout.double_quant:
        needed |= {"weight.nested_absmax", "weight.nested_quant_map"}
    if not _have(name, parts, needed, layout, report):
        return None
    raw = checkpoint.tensors[f"{name}.{state_key(layout.method)}"]
    if raw.dtype != "U8" or len(raw.shape) != 1 or raw.numel > 4096:
        report.problem(f"{raw.name}", "U8, a short text", f"{raw.dtype} {list(raw.shape)}")
        return None
    state = decode_state(name, bytes(checkpoint.read(raw.name).tolist()))
    if state["quant_type"] != layout.method:
        report.problem(f"{name}: quant_type", layout.method, state["quant_type"])
    nested = "nested_offset" in state
    if nested != layout.double_quant:
        report.problem(
            f"{name}: nested_offset",
            "there exactly where bnb_4bit_use_double_quant is true",
            "there" if nested else "missing",
        )
        return None
    if nested and state.get("nested_dtype") != "float32":
        got = state.get("nested_dtype")
        report.problem(f"{name}: nested_dtype", "float32", got, _AFTER_FORWARD)
    (n, k), block = state["shape"], state["blocksize"]
    blocks = -(-n * k // block)
    storage = getattr(torch, layout.quant_storage)
    words = n * k // (2 * storage.itemsize)
    want: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": (dtype_name(storage), (words, 1)),
        "weight.absmax": ("U8" if nested else "F32", (blocks,)),
        "weight.quant_map": ("F32", (16,)),
    }
    if nested:
        want["weight.nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCK),))
        want["weight.nested_quant_map"] = ("F32", (256,))
    if not _fits(checkpoint, name, want, report):
        return None
    _table(name, layout.method, checkpoint.read(f"{name}.weight.quant_map"), report)
    if nested:
        scales = checkpoint.read(f"{name}.weight.nested_absmax")
        _scales(f"{name}.weight.nested_absmax", scales, report)
        table = torch.cat(
            (
                checkpoint.read(f"{name}.weight.nested_quant_map"),
                torch.tensor([float(state["nested_offset"])]),
            )
        )
        if not bool(torch.isfinite(table).all()):
            report.problem(f"{name}: nested scales", "finite numbers", "infinities or NaN", _AGAIN)
    else:
        _scales(f"{name}.weight.absmax", checkpoint.read(f"{name}.weight.absmax"), report)
    return LayerRow(name, k, n, 4, block, layout.method)


def _have(
    name: str, parts: set[str], needed: set[str], layout: BnbLayout, report: VerifyReport
) -> bool:
    if missing := sorted(needed - parts):
        report.problem(f"{name}, {layout.method}", ", ".join(sorted(needed)), f"no {missing[0]}")
    if extra := sorted(parts - needed - {"bias"}):
        report.problem(
            f"{name}, {layout.method}",
            "no other parts",
            f"{', '.join(extra)} too",
            "quantization_config and the files are of different runs.",
        )
    return not missing and not extra


def _fits(
    checkpoint: Checkpoint,
    name: str,
    want: Mapping[str, tuple[str, tuple[int, ...]]],
    report: VerifyReport,
) -> bool:
    good = True
    for part, (dtype, shape) in want.items():
        info = checkpoint.tensors[f"{name}.{part}"]
        if info.dtype == dtype and info.shape == shape:
            continue
        good = False
        after = part == "weight.absmax" and info.dtype == "BF16"
        report.problem(
            f"{name}.{part}",
            f"{dtype} {list(shape)}",
            f"{info.dtype} {list(info.shape)}",
            _AFTER_FORWARD if after else _AGAIN,
        )
    return good


def _scales(name: str, scales: Tensor, report: VerifyReport) -> None:
    if bad := int((~torch.isfinite(scales)).sum()):
        report.problem(name, "finite numbers", f"{bad} of {scales.numel()} not", _AGAIN)
    elif bad := int((scales < 0).sum()):
        report.problem(name, "no negative scale", f"{bad} of {scales.numel()} negative", _AGAIN)
    elif none := int((scales == 0).sum()):
        report.warn(name, "scales above zero", f"{none} of {scales.numel()} zero")


def _table(name: str, method: str, table: Tensor, report: VerifyReport) -> None:
    """The values of the 16 codes; a wrong one would be wrong in every weight."""
    key = f"{name}.weight.quant_map"
    try:
        own = need_bitsandbytes().get_4bit_type(method, device="cpu").float()
    except MissingDependencyError:
        own = None
    if own is not None:
        right = torch.equal(table, own)
    else:  # what any such table has: the largest is 1, there is a zero, NF4 rises
        right = bool(torch.isfinite(table).all()) and float(table.abs().max()) == 1.0
        right = right and bool((table == 0).any())
        if method == "nf4":
            right = right and bool((table[1:] > table[:-1]).all())
    if not right:
        report.problem(key, f"the 16 values of {method}", "others", _AGAIN)
