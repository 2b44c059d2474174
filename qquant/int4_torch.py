"""Torch's int4 product, and what of a quantized linear it can be made to multiply.

The op multiplies by 4-bit codes in groups of 32 to 256 inputs, `(q - 8) * scale + offset`, where
GPTQ has `scale * (q - zero)`: hence `offset = (8 - zero) * scale`, nothing at all for symmetric
files. More goes through it than it was made for:

- 2 and 3 bits are 4-bit codes around 8: held as 4 bits, not as the file's.
- 8 bits are two products, of the high and of the low half of the codes:
  `scale * (16 h + l - zero) = 16 scale * (h - 8) + scale * (l - 8) + scale * (136 - zero)`.
  The same bytes as in the file. On a CPU only: on CUDA there are other kernels for them.
- A group that is a multiple of one of the op's is as many groups of that size; so are all inputs,
  where 32 divides their number.
- Where inputs of a group do not lie side by side (a stored activation order), their codes are
  packed side by side and the inputs gathered at each call. On a CPU only, too.

Inputs, scales and offsets are rounded to bfloat16, whatever the model's dtype: on CUDA the op takes
nothing else, and on a CPU it has vector code for nothing else. Offsets are those of the rounded
scale, since their error is the same for a whole group; both halves of 8 bits share theirs out,
which leaves none of a symmetric one (8 times the scale) and next to none of the others.

On a CPU torch's packing is read back (`int4_cpu.py`) and takes the place of the file's; where it
cannot be, and on CUDA, both are held.

Left out on purpose: groups that differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .held import Held
from .int4_cpu import Int4Order, pack_int4

GROUPS = (32, 64, 128, 256)  # what the op checks for


def op_group(group: int) -> int:
    """The op's group for linears in groups of `group` inputs; 0 where there is none."""
    return next((size for size in reversed(GROUPS) if group and group % size == 0), 0)


def int4_misfit(
    bits: int, group: int, trivial: bool, inputs: int, outputs: int, device: torch.device
) -> str | None:
    """Why the op cannot run such a linear on a device, or None.

    Args:
        group: inputs of each; 0 where they differ.
        trivial: whether each group's inputs lie side by side.
    """
    if device.type == "cpu":
        return int4_cpu_misfit(group, outputs)
    if bits != 4:
        return f"{bits} bits, the op takes 4"
    if why := _group_misfit(group):
        return why
    if not trivial:
        return "g_idx is not trivial (activation order)"
    if device.type != "cuda":
        return f"device {device.type}, the op is for cpu and cuda"
    if torch.version.hip is not None:
        return "a ROCm build, whose packing differs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU before compute capability 8.0, which has no bfloat16"
    if outputs % 8 or inputs % 32:
        return f"{inputs} inputs and {outputs} outputs, the op takes multiples of 32 and 8"
    return None


def int4_cpu_misfit(group: int, outputs: int) -> str | None:
    """Why the op cannot run a linear of that group (as above) on a CPU, or None; all bits fit."""
    if why := _group_misfit(group):
        return why
    return None if outputs % 16 == 0 else f"{outputs} outputs, the op takes multiples of 16"


def _group_misfit(group: int) -> str | None:
    if not group:
        return "groups differ in size (a short last one)"
    if not op_group(group):
        return f"group size {group}, the op takes multiples of {GROUPS[0]}"
    return None


@dataclass
class Int4(Held):
    """A linear in torch's packing.

    Attributes:
        planes: one, or two for 8 bits (high halves first): codes in torch's packing, opaque and of
            their device, and bfloat16 [K / group, N, 2] scales and offsets.
        group: of the op.
        inputs, outputs: of the linear.
        gather: int64 [K], the inputs group by group; None where they lie so.
        shift: how much larger packed codes are than the file's.
        order: how the codes are read back; None where they are not.
    """

    planes: tuple[tuple[Tensor, Tensor], ...]
    group: int
    inputs: int
    outputs: int
    gather: Tensor | None = None
    shift: int = 0
    order: Int4Order | None = None

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
        gather: Tensor | None = None,
        whole: bool = False,
    ) -> Int4:
        """Of a linear that fits (`int4_misfit`).

        Args:
            codes: uint8 [N, K]. scales: floating [G, N]. zeros: uint8 [N, G].
            gather: as above. whole: as for `pack_int4`.
        """
        outputs, inputs = codes.shape
        own = inputs // scales.shape[0]
        group = op_group(own)
        codes = codes if gather is None else codes[:, gather]
        scale = scales.to(torch.bfloat16).float().repeat_interleave(own // group, dim=0)
        zero = zeros.t().float().repeat_interleave(own // group, dim=0)
        if bits == 8:
            offset = (136 - zero) * scale
            first = offset.to(torch.bfloat16).float()
            high = _pack(codes >> 4, whole), _grid(16 * scale, first)
            planes = high, (_pack(codes & 15, whole), _grid(scale, offset - first))
            return cls(planes, group, inputs, outputs, gather)
        middle = 2 ** (bits - 1)
        plane = _pack(codes + (8 - middle), whole), _grid(scale, (middle - zero) * scale)
        return cls((plane,), group, inputs, outputs, gather, 8 - middle)

    @property
    def device(self) -> torch.device:
        return self.planes[0][0].device

    @property
    def codes_held(self) -> list[Tensor]:
        """What stands for the file's `qweight`."""
        return [codes for codes, _ in self.planes]

    @property
    def tensors(self) -> list[Tensor]:
        own = [tensor for plane in self.planes for tensor in plane]
        return own if self.gather is None else [*own, self.gather]

    def product(self, x: Tensor) -> Tensor:
        """[M, K] floating, on the planes' device -> [M, N], the same dtype."""
        ops = torch.ops.aten
        mm = ops._weight_int4pack_mm if x.is_cuda else ops._weight_int4pack_mm_for_cpu
        half = self.gathered(x.to(torch.bfloat16)).contiguous()
        parts = [mm(half, codes, self.group, grid) for codes, grid in self.planes]
        out: Tensor = parts[0] if len(parts) == 1 else parts[0].float() + parts[1]
        return out.to(x.dtype)

    def spans(self, most: int) -> list[tuple[int, int]]:
        """As `Int4Order.spans`."""
        assert self.order is not None
        return self.order.spans(self.outputs, most)

    def read(self, span: tuple[int, int], out: Tensor) -> None:
        """As `Held.read`."""
        assert self.order is not None
        self.order.codes(self.planes[0][0], span, self.inputs, out)
        for codes, _ in self.planes[1:]:
            low = torch.empty_like(out)
            self.order.codes(codes, span, self.inputs, low)
            out.mul_(16).add_(low)
        if self.shift:
            out.sub_(self.shift)


def _pack(codes: Tensor, whole: bool) -> Tensor:
    if not codes.is_cuda:
        return pack_int4(codes, whole)
    # Two codes to a byte, the even one high.
    tiles = next(n for n in (8, 4, 2) if codes.shape[1] % (16 * n) == 0)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return packed


def _grid(scale: Tensor, offset: Tensor) -> Tensor:
    return torch.stack((scale, offset), dim=-1).to(torch.bfloat16).contiguous()
