"""The weights that a directory's linears stand for, whatever they are stored as, in slices of rows.

GPTQ (`pack`), compressed-tensors (`compressed.view`, as GPTQ), bitsandbytes (`bnb_state`) and plain
tensors are read alike, and so is a plain directory as bitsandbytes would round it while it is
loaded. One linear as it is stored and a slice of it in float32 are in memory at a time. Linears are
the matrices of the blocks; embedding, head and whatever stands in tensors of three dimensions
(experts) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from . import bnb_layout, compressed, compressed_layout
from .bnb_check import read_parts
from .bnb_spec import BnbSpec
from .bnb_state import dequantize_rows, quantize_weight, row_slices, shape_of
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .layout import KINDS, Layout, block_of, linears_of
from .pack import Packed, dequantize, outputs

Rows = Callable[[int, int], Tensor]


class DenseReader:
    """Linears of one directory by name.

    Args:
        checkpoint: opened. method: `nf4`, `fp4` or `int8`, where a plain directory is taken as
            bitsandbytes rounds it.

    Raises:
        CheckpointError: the quantization config is none that is known.
    """

    def __init__(self, checkpoint: Checkpoint, method: str | None = None) -> None:
        if compressed_layout.is_compressed(checkpoint.quantization_config):
            checkpoint = compressed.view(checkpoint)
        self.checkpoint, self.method = checkpoint, method
        quant = checkpoint.quantization_config
        bnb = bnb_layout.is_bnb(quant)
        self.layout = Layout.parse(quant) if quant is not None and not bnb else None
        if bnb:
            self.packed = set(bnb_layout.linears_of(checkpoint.tensors))
        else:
            self.packed = set(linears_of(checkpoint.tensors)) if self.layout else set()
        plain = {
            name.removesuffix(".weight")
            for name, info in checkpoint.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        }
        names = {name for name in plain | self.packed if block_of(f"{name}.")}
        self.names = tuple(name for name in sorted(names, key=_natural))

    def rows(self, name: str) -> tuple[tuple[int, int], Rows]:
        """[N, K] of a linear's weight, and what gives its rows from start to stop in float32.

        `start` and `stop` have to be those of `slices`.

        Raises:
            CheckpointError: the linear is not there, or its tensors do not fit together.
        """
        if name not in self.packed:
            info = self.checkpoint.info(f"{name}.weight")
            shape = (info.shape[0], info.shape[1])
            if self.method is None:
                read = self.checkpoint.read_rows
                return shape, lambda start, stop: read(info.name, start, stop).float()
            weight = self.checkpoint.read(info.name)
            made = quantize_weight(weight, BnbSpec(self.method), weight.device).parts
            return shape, lambda start, stop: dequantize_rows(made, start, stop)
        if self.layout is None:
            parts = read_parts(self.checkpoint, name)
            return shape_of(parts, name), lambda start, stop: dequantize_rows(parts, start, stop)
        own = self.layout.of(name)
        if own is None:
            raise CheckpointError(name, expected="plain, as `dynamic` says", got="quantized")
        outs, inputs, _ = compressed.sizes_of(self.checkpoint, name)
        packed = Packed(*(self.checkpoint.read(f"{name}.{kind}") for kind in KINDS))
        bits, offset = own.bits, own.zero_offset

        def tile(start: int, stop: int) -> Tensor:
            return dequantize(outputs(packed, start, stop, bits), bits, zero_offset=offset)

        return (outs, inputs), tile


def slices(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Runs of rows that every way of storing can be cut at (multiples of 32, and the end)."""
    step = max(32, next(iter(row_slices(*shape)))[1] // 32 * 32)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def relative_errors(reference: DenseReader, candidate: DenseReader) -> Iterator[tuple[str, float]]:
    """(name, ‖W − Ŵ‖ / ‖W‖) of every linear of the reference, one after another.

    Raises:
        CheckpointError: the candidate lacks a linear, or has it in another shape.
    """
    for name in reference.names:
        if name not in candidate.names:
            raise CheckpointError(name, expected="a linear of both directories", got="one's only")
        (shape, want), (other, got) = reference.rows(name), candidate.rows(name)
        if shape != other:
            raise CheckpointError(f"shape of {name}", expected=list(shape), got=list(other))
        error = norm = 0.0
        for start, stop in slices(shape):
            whole = want(start, stop)
            norm += float(whole.double().square().sum())
            error += float((got(start, stop) - whole).double().square().sum())
        yield name, float((error / norm) ** 0.5) if norm else float(error > 0)


def _natural(name: str) -> tuple[str, int, str]:
    """By block's number, not its spelling."""
    prefix, index = block_of(f"{name}.") or ("", 0)
    return prefix, index, name
