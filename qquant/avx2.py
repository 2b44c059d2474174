"""Packed codes multiplied by few rows with AVX2: how they are held, and the product.

The words of the file (`pack.py`) are kept as they are and only put in another order: outputs in
blocks, of each block the words of one run of inputs after those of the run before, so that a
block is read from memory in one go. They take the place of the file's, with the same bytes; scales
and zero points of a group lie in the same blocks, beside those of the file.

Inputs are rounded to 16 bits, group by group, and everything after that is whole numbers until the
group's sum is scaled, in float32: the error is about a seventieth of that of bfloat16 inputs.
3 bits are held as 4, whose codes do not straddle words. Groups longer than 256 inputs count as
several, so that sums of 8-bit codes fit in 32 bits. Where inputs of a group do not lie side by side
(a stored activation order), their codes are packed side by side and the inputs gathered.

Left out on purpose: the machine code (`avx2_code.py`); groups that differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import llvm_code
from .avx2_code import product
from .avx2_ir import LANES, TOP, WORD
from .held import Held
from .pack import pack_codes

_VECTORS = (8, 4, 2, 1)  # in a block of outputs, the widest that divides them
_LONGEST = 256  # inputs of a group: 256 * 255 * 32767 fits in 32 bits, with its sign
_SHORTEST = 32  # of such a part: scales are held once for each
_NEAR = 1e-3  # of the norm, of a product that is right; 16 bits give about 2e-5
assert _LONGEST * 255 * TOP < 2**31


def misfit(bits: int, group: int, outputs: int, device: torch.device) -> str | None:
    """Why the kernel cannot run such a linear on a device, or None.

    Args:
        group: inputs of each; 0 where they differ.
    """
    if why := unfit(bits, group, outputs):
        return why
    if device.type != "cpu":
        return f"device {device.type}, the kernel is for cpu"
    return unavailable()


def unfit(bits: int, group: int, outputs: int) -> str | None:
    """Why the kernel cannot run such a linear on any machine, or None; `group` as above."""
    if not group:
        return "groups differ in size (a short last one)"
    if group % _codes(bits):
        return f"group size {group}, the kernel takes multiples of {_codes(bits)}"
    if (part := _divisor(group, _codes(bits))) < min(group, _SHORTEST):
        return f"group size {group}, which falls into parts of {part}"
    if outputs % LANES:
        return f"{outputs} outputs, the kernel takes multiples of {LANES}"
    return None


@cache
def unavailable() -> str | None:
    """Why the kernel runs nowhere in this process, or None; tried once, on a small product."""
    return llvm_code.against(_wrong)


def _wrong() -> str | None:
    off = _trial()
    return None if off < _NEAR else f"its products are off by {off:.2g}"


def _trial() -> float:
    """The relative error of a product."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    how: Any = {"generator": draw, "device": "cpu"}  # by name: torch's defaults may be others
    codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8, **how)
    zeros = torch.randint(0, 16, (128, 2), dtype=torch.uint8, **how)
    scales = torch.rand(2, 128, dtype=torch.float32, **how).half()
    x = torch.randn(2, 64, dtype=torch.float32, **how)
    weight = codes.double() - zeros.double().repeat_interleave(32, dim=1)
    weight *= scales.double().t().repeat_interleave(32, dim=1)
    want = x.double() @ weight.t()
    got = Avx2.pack(pack_codes(codes, 4), scales, zeros, 4, 32).product(x)
    return float((got - want).norm() / want.norm())


def _codes(bits: int) -> int:
    """In a word, as they are held."""
    return WORD // held_bits(bits)


def held_bits(bits: int) -> int:
    """Of codes of so many bits."""
    return 4 if bits == 3 else bits


@dataclass
class Avx2(Held):
    """A linear's weights as the kernel takes them.

    Attributes:
        words: int32 [blocks, K * bits / 32, block width]. scales: float16 or float32, and zeros:
            uint8, both [blocks, groups, block width].
        bits: as held, 2, 4 or 8.
        inputs, gather: as of `Held`.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    inputs: int
    gather: Tensor | None = None

    @classmethod
    def pack(
        cls,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
        group: int,
        gather: Tensor | None = None,
    ) -> Avx2:
        """Of a linear that fits (`misfit`).

        Args:
            qweight: int32 [K * held bits / 32, N], of 3 bits packed as 4, inputs as gathered.
            scales: floating [G, N]. zeros: uint8 [N, G]. bits: of the codes.
            group: inputs of each. gather: as above.
        """
        outputs = qweight.shape[1]
        width = LANES * next(v for v in _VECTORS if outputs % (LANES * v) == 0)
        times = group // _divisor(group, _codes(bits))
        kind = torch.float16 if scales.dtype == torch.float16 else torch.float32

        def blocks(rows: Tensor) -> Tensor:  # [any, N]
            return rows.view(-1, outputs // width, width).transpose(0, 1).contiguous()

        return cls(
            blocks(qweight),
            blocks(scales.to(kind).repeat_interleave(times, dim=0)),
            blocks(zeros.t().repeat_interleave(times, dim=0)),
            held_bits(bits),
            qweight.shape[0] * _codes(bits),
            gather,
        )

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def codes_held(self) -> list[Tensor]:
        """What stands for the file's `qweight`."""
        return [self.words]

    @property
    def tensors(self) -> list[Tensor]:
        own = [self.words, self.scales, self.zeros]
        return own if self.gather is None else [*own, self.gather]

    def product(self, x: Tensor) -> Tensor:
        """[M, K] floating, on a CPU -> [M, N], the same dtype."""
        inputs = self.gathered(x.to(torch.float32))
        multiply = product
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
            from .avx2_op import product as multiply

        return multiply(inputs, self.words, self.scales, self.zeros, self.bits).to(x.dtype)

    def spans(self, most: int) -> list[tuple[int, int]]:
        """Outputs in runs of whole blocks, of `most` or one block."""
        blocks, _, width = self.words.shape
        step = max(1, most // width) * width
        return [(at, min(at + step, blocks * width)) for at in range(0, blocks * width, step)]

    def read(self, span: tuple[int, int], out: Tensor) -> None:
        """As `Held.read`."""
        width = self.words.shape[2]
        part = self.words[span[0] // width : span[1] // width].transpose(0, 1)
        count = WORD // self.bits
        place = out.view(part.shape[0], count, part.shape[1], width)
        for j in range(count):
            place[:, j] = (part >> (j * self.bits)) & ((1 << self.bits) - 1)


def _divisor(group: int, codes: int) -> int:
    """The longest part of a group that is whole words and not too long."""
    parts = range(codes, min(group, _LONGEST) + 1, codes)
    return max(size for size in parts if group % size == 0)
