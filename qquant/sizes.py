"""What a run will quantize and write, by headers and settings alone.

None of this needs torch, or measures anything: `--dry-run` prints it at once, and the rest
(`estimate.py`) after it.

Left out on purpose: memory and time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .checkpoint import Checkpoint
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .headers import dtype_name, itemsize
from .mixed import storage_bits
from .models.families import Family, family_of
from .models.shapes import parameters
from .plan import bytes_needed, check_format, check_source
from .report import human_bytes, labelled

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Sizes:
    """What follows from headers.

    Attributes:
        blocks, linears: to quantize.
        bits_per_weight: of the quantized linears, scales and zero points included.
        output_bytes: of all tensors written.
        unquantized_bytes: of those, what stays in 16 bits.
        calibration_tokens, widest: tokens read, inputs of the widest linear.
    """

    blocks: int
    linears: int
    bits_per_weight: float
    output_bytes: int
    unquantized_bytes: int
    calibration_tokens: int
    widest: int

    def rows(self) -> Rows:
        """What is printed: (label, text)."""
        rows = [
            ("to quantize", f"{self.linears} linears in {self.blocks} blocks"),
            ("bits per weight", f"{self.bits_per_weight:.3f} in the quantized linears"),
            (
                "output",
                f"{human_bytes(self.output_bytes)}, "
                f"{human_bytes(self.unquantized_bytes)} of it in 16 bits",
            ),
        ]
        if self.calibration_tokens:
            per = self.calibration_tokens / self.widest
            rows.append(
                (
                    "calibration",
                    f"{self.calibration_tokens} tokens, {per:.1f} per input of the widest linear "
                    f"({self.widest})",
                )
            )
        return rows

    def render(self) -> str:
        """For a person."""
        return labelled(self.rows())


def foresee(
    src: str | os.PathLike[str], quant: QuantSpec, calib: CalibrationSpec, out: OutputSpec
) -> Sizes:
    """Of quantizing a directory.

    Raises:
        InputError: as in `quantize`, as far as headers and settings tell.
    """
    source = Checkpoint.open(src)
    family = family_of(source.config)
    check_format(quant, out, family)
    check_source(source, family, quant)
    return sizes(source, family, quant, calib, out)


def sizes(
    source: Checkpoint,
    family: Family,
    quant: QuantSpec,
    calib: CalibrationSpec,
    out: OutputSpec,
) -> Sizes:
    """Of quantizing a checkpoint.

    Raises:
        CheckpointError: a number in config.json is none.
    """
    own = parameters(source, family)
    linears = family.linear_names(source.tensors)
    shapes = [source.info(f"{name}.weight").shape for name in linears]
    bits = float(quant.target_bpw or 0)
    if not quant.target_bpw:
        stored = sum(storage_bits(n, k, k // quant.group_of(k), quant.bits) for n, k in shapes)
        bits = stored / sum(n * k for n, k in shapes)
    quantized = {f"{name}.weight" for name in linears}
    plain = sum(source.info(name).numel for name in own if name not in quantized)
    return Sizes(
        blocks=family.layers(source.config),
        linears=len(linears),
        bits_per_weight=bits,
        output_bytes=bytes_needed(source, family, own, quant, out),
        unquantized_bytes=plain * itemsize(dtype_name(out.dtype)),
        calibration_tokens=calib.samples * calib.seqlen if quant.method == "gptq" else 0,
        widest=max(k for _, k in shapes),
    )
