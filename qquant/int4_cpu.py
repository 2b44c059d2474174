"""Torch's CPU packing of int4 weights, read back.

`torch._convert_weight_to_int4pack_for_cpu` puts the codes of a linear in an order of its own, made
for one token: the vector code reads them as they lie. With many tokens a product with the rebuilt
weights is several times faster, and to rebuild them from the file's tensors both packings would
have to be held, a byte per weight. So the packing is read back here instead.

What is known of it (torch 2.11 to 2.13): rows (outputs) lie in blocks, column by column (input by
input) inside a block, two codes to a byte; a block is as wide as the vector code of the machine
takes (32 rows with AVX2, 64 with AVX-512), and a last, shorter one has another order inside. None
of that is documented, so nothing of it is taken on trust: `Int4Order` learns the block and the
order by packing row numbers, and whoever packs a weight compares it with what is read back.

Left out on purpose: the packing of CUDA, whose op takes many tokens too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .errors import RunError

_BLOCKS = (16, 32, 64, 128)
_PIECE = 4 << 20  # bytes of int32 codes, which torch packs from, at a time


def pack_int4(codes: Tensor, whole: bool = False) -> Tensor:
    """Codes [N, K] of 0 to 15 -> torch's packing, opaque, N*K/2 bytes; N a multiple of 16.

    Some whole blocks at a time, where there are blocks: torch takes four bytes a code, eight times
    what comes of it. Whoever packs reads it back, and if that fails packs again in one piece.

    Args:
        whole: in one piece.
    """
    rows, inputs = codes.shape
    most = max(1, _PIECE // (4 * inputs * _BLOCKS[-1])) * _BLOCKS[-1]
    if whole or rows <= most or not _in_blocks():
        return _convert(codes)
    packed = torch.empty(rows, inputs // 2, dtype=torch.uint8)
    for start in range(0, rows, most):
        packed[start : start + most] = _convert(codes[start : start + most])
    return packed


def _convert(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    return packed


@dataclass(frozen=True)
class Int4Order:
    """Where codes lie in the packing of a linear with `rows` outputs.

    Attributes:
        block: rows of a whole block.
        whole, last: which rows of a block the low nibbles of one column are, then the high ones;
            of whole blocks, and of the last one, which is shorter (empty where there is none).
    """

    block: int
    whole: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def of(cls, rows: int) -> Int4Order:
        """Learnt from torch.

        Raises:
            RunError: this torch packs in a way that is not understood.
        """
        block = _block()
        return cls(block, _order(min(block, rows)), _order(rows % block if rows > block else 0))

    def spans(self, rows: int, most: int) -> list[tuple[int, int]]:
        """Rows in runs that begin with a block, of `most` rows or one block."""
        step = max(1, most // self.block) * self.block
        found = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        cut = rows - rows % self.block
        if self.last and found[-1][0] < cut:  # the last block has an order of its own
            found[-1:] = [(found[-1][0], cut), (cut, rows)]
        return found

    def codes(self, packed: Tensor, span: tuple[int, int], inputs: int, out: Tensor) -> None:
        """The codes of the rows of a span from `spans`, as numbers, transposed.

        Args:
            packed: from `pack_int4`. inputs: K. out: [K, rows of the span], any dtype.
        """
        start, stop = span
        short = bool(self.last) and stop - start < self.block
        order = self.last if short else self.whole
        width = len(order)
        piece = packed.view(-1)[start * inputs // 2 : stop * inputs // 2]
        pairs = piece.view(-1, inputs, width // 2).transpose(0, 1)  # [K, blocks, half a block]
        place = out.view(inputs, -1, width)
        low, high = pairs & 15, pairs >> 4
        if order == tuple(range(width)):
            place[..., : width // 2].copy_(low)
            place[..., width // 2 :].copy_(high)
        else:
            index = torch.tensor(order, device=out.device)
            place[..., index] = torch.cat((low, high), dim=-1).to(out.dtype)


@cache
def _block() -> int:
    """Rows of a whole block: the fewest by which a packing falls into parts."""
    rows = 2 * _BLOCKS[-1]
    codes = (torch.arange(rows)[:, None] + 5 * torch.arange(2)[None]) % 16
    codes = (codes + torch.arange(rows)[:, None] // 16) % 16  # no two columns or blocks alike
    whole = _convert(codes).flatten()
    for block in _BLOCKS:
        parts = [_convert(part).flatten() for part in torch.split(codes, block)]
        if torch.equal(torch.cat(parts), whole):
            return block
    raise _unknown("no blocks")


def _in_blocks() -> bool:
    try:
        return _block() > 0
    except RunError:
        return False


@cache
def _order(rows: int) -> tuple[int, ...]:
    """Which rows the low, then the high nibbles of a column are, in a block of so many rows."""
    if not rows:
        return ()
    number = torch.arange(rows)[:, None].expand(rows, 2)
    low = torch.zeros(rows // 2, dtype=torch.int64)
    high = low.clone()
    for shift in (0, 4):
        packed = _convert((number >> shift) & 15).view(2, rows // 2)
        if not torch.equal(packed[0], packed[1]):
            raise _unknown("columns that differ in order")
        low |= (packed[0].long() & 15) << shift
        high |= (packed[0].long() >> 4) << shift
    order = tuple(low.tolist() + high.tolist())
    if sorted(order) != list(range(rows)):
        raise _unknown("rows that are not all there")
    return order


def _unknown(got: str) -> RunError:
    return RunError("torch's int4 packing", expected="blocks of rows, column by column", got=got)
