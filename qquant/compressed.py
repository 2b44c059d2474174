"""A linear's tensors in the compressed-tensors format, and such a directory seen as GPTQ.

Since the numbers are GPTQ's own (`compressed_layout.py`), everything that looks at such a directory
looks at it as GPTQ: `view` is a checkpoint with the names, tensors and config that a GPTQ v2
directory of the same weights would have, made while they are read. `verify`, `inspect` and
`qquant.load` need to know nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .compressed_layout import (
    ORDER,
    PACKED,
    PARTS,
    SCALE,
    SHAPE,
    ZERO,
    as_gptq,
    check_bits,
    shapes_of,
)
from .errors import CheckpointError
from .headers import TensorInfo
from .layout import KINDS, Layout
from .pack import Packed, symmetric_zero, trivial_g_idx, unpack_zeros, zero_words


def parts_of(packed: Packed, *, bits: int, zero_offset: int, sym: bool) -> dict[str, Tensor]:
    """The tensors of a linear in this format.

    Args:
        packed: as GPTQ stores it, `g_idx` trivial.

    Raises:
        SpecError: other bits than the format's.
    """
    check_bits(bits)
    shape = torch.tensor([packed.qweight.shape[1], packed.g_idx.numel()])
    found = {
        PACKED: packed.qweight.t().contiguous(),
        SCALE: packed.scales.t().contiguous(),
        SHAPE: shape,
    }
    if not sym:
        zeros = unpack_zeros(packed.qzeros, bits, zero_offset)
        found[ZERO] = zero_words(zeros, bits).t().contiguous()
    return found


@dataclass(frozen=True)
class View(Checkpoint):
    """A directory of this format, seen as a GPTQ v2 one; make one with `view`.

    Attributes:
        layout: the GPTQ `quantization_config`.
        stored: the directory's own tensors by name.
        widths: bits by linear.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, TensorInfo] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        return self.layout

    def read(self, name: str) -> Tensor:
        """As `Checkpoint.read`, also for the tensors that a GPTQ directory would have."""
        module, _, kind = name.rpartition(".")
        if module not in self.widths or kind not in KINDS:
            return super().read(name)
        inputs, bits = self.tensors[f"{module}.g_idx"].shape[0], self.widths[module]
        if kind == "g_idx":
            return trivial_g_idx(inputs, self.layout["group_size"])
        if kind == "qzeros" and f"{module}.{ZERO}" not in self.stored:
            groups, words = self.tensors[name].shape
            zeros = torch.full((words * 32 // bits, groups), symmetric_zero(bits))
            return zero_words(zeros.to(torch.uint8), bits)
        own = {"qweight": PACKED, "scales": SCALE, "qzeros": ZERO}[kind]
        info = self.stored[f"{module}.{own}"]
        flat = self._bytes(info, info.start, info.end)
        return flat.view(info.torch_dtype).view(info.shape).t().contiguous()


def sizes_of(checkpoint: Checkpoint, module: str) -> tuple[int, int, int]:
    """(outputs, inputs, groups) of a linear as GPTQ stores it, from headers.

    Raises:
        CheckpointError: one of its tensors is missing, or no matrix (`g_idx`: no vector).
    """
    shapes = [checkpoint.info(f"{module}.{kind}").shape for kind in KINDS]
    for kind, shape, rank in zip(KINDS, shapes, (2, 2, 2, 1), strict=True):
        if len(shape) != rank:
            raise CheckpointError(
                f"shape of {module}.{kind}",
                expected=f"{rank} dimension{'s' if rank > 1 else ''}",
                got=list(shape),
                cure="The file is damaged, or no GPTQ directory's: download or quantize it again",
            )
    return shapes[0][1], shapes[3][0], shapes[2][0]


def view(checkpoint: Checkpoint) -> View:
    """The directory as GPTQ.

    Raises:
        CheckpointError: its config or a linear's tensors are not of this format as qquant reads it;
            what is wrong is named.
    """
    gptq = as_gptq(checkpoint.quantization_config or {})
    layout = Layout.parse(gptq)
    stored = checkpoint.tensors
    tensors = {n: i for n, i in stored.items() if n.rpartition(".")[2] not in (*PARTS, ORDER)}
    widths: dict[str, int] = {}
    for name, info in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == ORDER:
            raise CheckpointError(name, expected="no stored activation order", got="one")
        if kind == PACKED:
            own = layout.of(module) or layout  # `verify` tells of one that is to be ignored
            widths[module] = own.bits
            tensors |= _as_gptq(checkpoint, module, info, own.bits, gptq)
    return View(
        checkpoint.path,
        checkpoint.config,
        tensors,
        checkpoint.headers,
        checkpoint.index,
        gptq,
        dict(stored),
        widths,
    )


def _as_gptq(
    checkpoint: Checkpoint, module: str, packed: TensorInfo, bits: int, base: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    """The tensors that GPTQ would store for a linear, at the bytes that they are made from."""

    def bad(kind: str, expected: object, got: object) -> CheckpointError:
        return CheckpointError(f"{module}.{kind}", expected=expected, got=got)

    found = {kind: checkpoint.tensors.get(f"{module}.{kind}") for kind in PARTS}
    scale, shape = found[SCALE], found[SHAPE]
    if scale is None or shape is None:
        raise bad(SCALE if scale is None else SHAPE, "beside weight_packed", "none")
    if shape.dtype != "I64" or shape.shape != (2,):
        raise bad(SHAPE, "I64 [2]", f"{shape.dtype} {list(shape.shape)}")
    outputs, inputs = (int(size) for size in checkpoint.read(shape.name))
    size = inputs if base["group_size"] == -1 else base["group_size"]
    if not 0 < inputs <= 1 << 40 or not 0 < outputs <= 1 << 40:
        raise bad(SHAPE, "outputs and inputs", [outputs, inputs])
    groups = -(-inputs // size)
    for kind, (dtype, want) in shapes_of(outputs, inputs, groups, bits, base["sym"]).items():
        info = found[kind]
        if info is None or info.shape != want or (kind != SCALE and info.dtype != dtype):
            got = "none" if info is None else f"{info.dtype} {list(info.shape)}"
            raise bad(kind, f"{dtype} {list(want)}, by weight_shape and the config", got)
    zero = found[ZERO]
    if base["sym"] and zero is not None:
        raise bad(ZERO, "none, since the config says symmetric", "one")

    def at(kind: str, dtype: str, want: tuple[int, ...], info: TensorInfo | None) -> TensorInfo:
        start, end = (0, 0) if info is None else (info.start, info.end)
        file = packed.file if info is None else info.file
        return TensorInfo(f"{module}.{kind}", dtype, want, file, start, end)

    made = (
        at("qweight", "I32", (inputs * bits // 32, outputs), packed),
        at("qzeros", "I32", (groups, outputs * bits // 32), zero),
        at("scales", scale.dtype, (groups, outputs), scale),
        at("g_idx", "I32", (inputs,), None),
    )
    return {info.name: info for info in made}
