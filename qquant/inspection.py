"""What is in a model directory, quantized or not: sizes by kind, bits per weight, how it was made.

Headers, config and manifest only; no tensor is read, so a 72B directory answers at once. A count of
parameters is that of the float model: a packed matrix counts as inputs times outputs. Bits per
weight are the honest ones, with scales, zero points and `g_idx`, once for the whole directory and
once for the blocks (where a small model's embeddings do not hide what quantizing does).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from . import compressed, compressed_layout
from .bnb_layout import BnbLayout, is_bnb
from .bnb_layout import kind_of as bnb_kind
from .bnb_layout import linears_of as bnb_linears
from .bnb_layout import parameters_of as bnb_parameters
from .checkpoint import Checkpoint
from .directory import read_json
from .errors import CheckpointError, shown
from .headers import TensorInfo
from .layout import Layout, block_of, layer_count, linears_of, text_stack
from .manifest import NAME as MANIFEST
from .report import human_bytes, text_table

_PACKED = {"qweight": "codes", "qzeros": "zero points", "scales": "scales", "g_idx": "g_idx"}


@dataclass(frozen=True)
class InspectReport:
    """What is in a directory.

    Attributes:
        path: as given.
        model_type: of config.json; `unknown` where it says nothing.
        layers: blocks of the text model.
        quantization: `quantization_config` as it stands, None for a float checkpoint.
        summary: one line on how the weights are stored.
        parameters: of the float model; None where the packing is not understood.
        tensors, shards: how many.
        nbytes: of all tensors.
        bits_per_weight: `nbytes` in bits over `parameters`; None as they.
        bits_per_weight_blocks: the same within the blocks; None where there are none, too.
        kinds: bytes by what they are for (codes, scales, embeddings, ...), the largest first.
        dtypes: tensors and bytes by dtype.
        manifest: source, calibration, quantization and versions from `qquant_manifest.json`.
    """

    path: str
    model_type: str
    layers: int
    quantization: dict[str, Any] | None
    summary: str
    parameters: int | None
    tensors: int
    shards: int
    nbytes: int
    bits_per_weight: float | None
    bits_per_weight_blocks: float | None
    kinds: dict[str, int]
    dtypes: dict[str, dict[str, int]]
    manifest: dict[str, Any] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> str:
        """Plain text."""
        blocks, whole = self.bits_per_weight_blocks, self.bits_per_weight
        count = "" if self.parameters is None else f"{self.parameters / 1e6:,.1f} M parameters in "
        in_blocks = "" if blocks is None else f", {blocks:.2f} in the blocks"
        lines = [
            f"{self.path}: {shown(self.model_type)}, {self.layers} layers, {shown(self.summary)}",
            f"{count}{human_bytes(self.nbytes)}, "
            f"{self.tensors} tensors, {self.shards} file{'s' if self.shards != 1 else ''}",
            *([] if whole is None else [f"{whole:.2f} bits per weight{in_blocks}"]),
            "",
            text_table(
                ("kind", "size", "share"),
                [
                    (kind, human_bytes(size), f"{100 * size / max(self.nbytes, 1):.1f}%")
                    for kind, size in self.kinds.items()
                ],
            ),
            "",
            text_table(
                ("dtype", "tensors", "size"),
                [
                    (dtype, str(row["tensors"]), human_bytes(row["bytes"]))
                    for dtype, row in self.dtypes.items()
                ],
            ),
        ]
        if self.manifest:
            lines += ["", *_manifest_lines(self.manifest)]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> InspectReport:
    """Describes a directory.

    Raises:
        CheckpointError: it cannot be opened whole (`verify` tells more of a broken one).
    """
    checkpoint = Checkpoint.open(path)
    quantization = checkpoint.quantization_config
    stored = checkpoint
    if compressed_layout.is_compressed(quantization):
        with contextlib.suppress(CheckpointError):  # shown as it is, if not understood
            checkpoint = compressed.view(checkpoint)
    bnb = is_bnb(quantization)
    linears = (bnb_linears if bnb else linears_of)(checkpoint.tensors)
    kinds: dict[str, int] = {}
    dtypes: dict[str, dict[str, int]] = {}
    whole = [0, 0]  # bytes, parameters
    blocks = [0, 0]
    for info in checkpoint.tensors.values():
        kind = (bnb_kind(info, linears) if bnb else None) or _kind(info, linears)
        kinds[kind] = kinds.get(kind, 0) + info.nbytes
        for sums in (whole, blocks) if block_of(info.name) else (whole,):
            sums[0] += info.nbytes
            own = bnb_parameters(info, linears) if bnb else None
            sums[1] += _parameters(checkpoint, info, linears) if own is None else own
    if apart := stored.nbytes - checkpoint.nbytes:  # `weight_shape`s, which GPTQ has not
        kinds["shapes"] = apart
        whole[0] += apart
    for info in stored.tensors.values():
        row = dtypes.setdefault(info.dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += info.nbytes
    stack = text_stack(checkpoint.tensors)
    found = {p for name in checkpoint.tensors if (p := block_of(name)) and p[0] == stack}
    known = _understood(checkpoint, quantization)
    return InspectReport(
        path=os.fspath(path),
        model_type=str(checkpoint.config.get("model_type", "unknown")),
        layers=len(found) or layer_count(checkpoint.config) or 0,
        quantization=quantization,
        summary=_summary(quantization, dtypes, linears),
        parameters=whole[1] if known else None,
        tensors=len(stored.tensors),
        shards=len(checkpoint.headers),
        nbytes=whole[0],
        bits_per_weight=8 * whole[0] / max(whole[1], 1) if known else None,
        bits_per_weight_blocks=8 * blocks[0] / blocks[1] if blocks[1] and known else None,
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])),
        manifest=_manifest(checkpoint),
    )


def _understood(checkpoint: Checkpoint, quantization: dict[str, Any] | None) -> bool:
    """Whether it is known what the packed tensors stand for."""
    if quantization is None or is_bnb(quantization):
        return True
    packed = compressed_layout.is_compressed(quantization)
    return packed == isinstance(checkpoint, compressed.View) and (
        packed or quantization.get("quant_method") in (None, "gptq")
    )


def _kind(info: TensorInfo, linears: Mapping[str, set[str]]) -> str:
    module, _, kind = info.name.rpartition(".")
    last = module.rpartition(".")[2]
    if module in linears and kind in _PACKED:
        return _PACKED[kind]
    if kind == "bias":
        return "biases"
    if last in ("embed_tokens", "wte"):
        return "embeddings"
    if last == "lm_head":
        return "lm_head"
    if kind == "weight" and len(info.shape) == 1:
        return "norms"
    return "matrices" if kind == "weight" and len(info.shape) == 2 else "other"


def _parameters(checkpoint: Checkpoint, info: TensorInfo, linears: Mapping[str, set[str]]) -> int:
    """Of the float model: codes count for their matrix, what comes with them for nothing."""
    module, _, kind = info.name.rpartition(".")
    if module not in linears or kind not in _PACKED:
        return info.numel
    g_idx = checkpoint.tensors.get(f"{module}.g_idx")
    if kind != "qweight" or g_idx is None or len(info.shape) != 2:
        return 0
    return prod(g_idx.shape) * info.shape[1]


def _summary(
    quantization: dict[str, Any] | None,
    dtypes: Mapping[str, Any],
    linears: Mapping[str, set[str]],
) -> str:
    if quantization is None:
        return "not quantized (" + ", ".join(sorted(dtypes)) + ")"
    packed = compressed_layout.is_compressed(quantization)
    try:
        if is_bnb(quantization):
            return BnbLayout.parse(quantization).summary
        layout = Layout.parse(compressed_layout.as_gptq(quantization) if packed else quantization)
    except CheckpointError as error:
        method = quantization.get("quant_method")
        known = packed or method in (None, "gptq")
        return f"quantized, not understood: {error}" if known else f"quantized by {method}"
    group = "one scale per output" if layout.group_size == -1 else f"group {layout.group_size}"
    widths = Counter(own.bits for name in linears if (own := layout.of(name)) is not None)
    mixed = " and ".join(f"{n} of {b} bits" for b, n in sorted(widths.items()))
    parts = [
        ("compressed-tensors " if packed else "GPTQ ")
        + (f"mixed: linears {mixed}" if len(widths) > 1 else f"int{layout.bits}"),
        group,
        "symmetric" if layout.sym else "asymmetric",
        *(() if packed else ("v1 zeros" if layout.zero_offset else "v2 zeros",)),
    ]
    if layout.desc_act:
        parts.append("act-order")
    if layout.dynamic:
        count = len(layout.dynamic)
        parts.append(f"{count} rule{'s' if count != 1 else ''} for exceptions")
    return ", ".join(parts)


def _manifest(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The parts of the manifest that say how the directory was made; not its long lists."""
    if not os.path.lexists(checkpoint.path / MANIFEST):
        return None
    whole = read_json(checkpoint.path, MANIFEST)
    keys = ("source", "recipe", "quantization", "calibration", "output", "versions", "machine")
    return {key: whole[key] for key in keys if whole.get(key) is not None}


def _manifest_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Each part on a line; nested values as they are, hashes shortened."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        if isinstance(value, list):
            return "[" + "; ".join(text(v) for v in value) + "]"
        plain = str(value)
        return plain[:12] if len(plain) == 64 and plain.isalnum() else plain

    return [f"{key}: {shown(text(value), 2000)}" for key, value in manifest.items()]
