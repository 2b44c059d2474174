"""GPTQ's tensors on disk: the bit layout, as prose first and then as the code that obeys it.

One quantized linear: `K` inputs, `N` outputs, `b` bits, groups of `g` inputs, `G = ceil(K/g)`.

    qweight  int32    [K*b/32, N]   codes, packed along the inputs (down a column)
    qzeros   int32    [G, N*b/32]   zero points, packed along the outputs (along a row)
    scales   float16  [G, N]
    g_idx    int32    [K]           the group of each input; `k // g` when trivial

    w[n, k] = scales[g_idx[k], n] * (code[n, k] - zero[g_idx[k], n])

**Bits.** Codes are unsigned, `0 .. 2^b - 1`, and form one stream of bits, least significant first:
value `i` takes bits `b*i .. b*i + b - 1`; word `r` holds bits `32*r .. 32*r + 31`, bit 0 its least
significant. For 2, 4 and 8 bits a word holds 16, 8 and 4 whole values. For 3 bits 32 values fill 3
words exactly and two of them straddle: value 10 has two bits in word 0 and one in word 1, value 21
one bit in word 1 and two in word 2. Nothing is special about them once the words are seen as one
stream, so the code below thinks in bytes of that stream (words are little-endian, as the
safetensors file is and as every host is that torch has wheels for) and one loop serves all widths.

**The trap.** A v1 file (`checkpoint_format: "gptq"`, or no such key) stores *zero minus one* and
its readers add one; a v2 file (`"gptq_v2"`) stores the zero itself. A symmetric int4 file has
`zero = 8`: words 0x77777777 in v1, 0x88888888 in v2. No reader can tell from the tensors, so a file
that says one and holds the other loads without a word and is wrong by one step in every weight.
Further, v1 cannot hold `zero = 0`: zero minus one wraps round to all ones. Some readers mask after
adding one and come back to 0, others turn v1 into v2 by adding 1 to every field of the packed word
at once, where the wrapped field carries into its neighbour and spoils that as well. So `pack`
refuses it; `min_zero` tells a solver where its grid may start. `unpack_zeros` takes wrapped fields
in files of other tools as 0, which is what their writers meant.

Left out on purpose: what the codes should be (`gptq.py`), the names of tensors and files, and
kernels. Sources: AutoGPTQ `qlinear_cuda_old.pack`, GPTQModel `qlinear/__init__.py`, vLLM's gptq
loader (all read; shapes and conventions only).
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .config import BITS
from .errors import CheckpointError, NumericsError, RunError, SpecError

V1, V2 = 1, 0  # what is subtracted from a zero before it is stored
ZERO_OFFSETS = {"gptq": V1, "gptq_v2": V2}


class Packed(NamedTuple):
    """One linear as it is stored; shapes and dtypes as in the module's opening."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def pack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group_size: int,
    zero_offset: int = V1,
    g_idx: Tensor | None = None,
) -> Packed:
    """Packs one linear.

    Args:
        codes: [N, K] uint8, each `0 .. 2^bits - 1`.
        scales: [N, G] floating; stored as float16, so round them before choosing the codes.
        zeros: [N, G] uint8, the real zero points (8 for symmetric int4), `min_zero .. 2^bits - 1`.
        bits: 2, 3, 4 or 8.
        group_size: inputs per scale; -1 for all of them. The last group may be shorter.
        zero_offset: 1 for v1 files, 0 for v2.
        g_idx: [K] the group of each input, where it is not `k // group_size`.

    Raises:
        SpecError: `bits` unknown, or K or N do not fill whole words.
        RunError: shapes disagree, a code or zero is out of range (zero 0 in v1 included).
        NumericsError: a scale is not finite as float16.
    """
    n, k = codes.shape
    size = _group_size(group_size, k)
    groups = -(-k // size)
    _need_words("inputs", k, bits)
    _need_words("outputs", n, bits)
    for name, grid in (("scales", scales), ("zeros", zeros)):
        if tuple(grid.shape) != (n, groups):
            raise RunError(f"shape of {name}", expected=[n, groups], got=list(grid.shape))
    for name, values, least in (("code", codes, 0), ("zero", zeros, min_zero(zero_offset))):
        if values.dtype != torch.uint8:
            raise RunError(f"dtype of {name}s", expected="torch.uint8", got=values.dtype)
        low, high = (int(v) for v in values.aminmax()) if values.numel() else (least, least)
        if low < least or high >= 2**bits:
            wrong = low if low < least else high
            cure = None
            if name == "zero" and low < least:
                cure = (
                    "A v1 file stores zero minus one, which wraps round for 0: choose the grid "
                    "so that every zero is at least pack.min_zero(zero_offset), or write gptq_v2."
                )
            raise RunError(f"a {name}", expected=f"{least} to {2**bits - 1}", got=wrong, cure=cure)
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        at = int((~torch.isfinite(half)).any(dim=1).nonzero()[0])
        raise NumericsError(
            f"scale of output {at}",
            expected="a finite float16 (at most 65504)",
            got=float(scales[at][~torch.isfinite(half[at])][0]),
            cure="The weights of this output are not finite or too large to quantize.",
        )
    if g_idx is None:
        g_idx = trivial_g_idx(k, group_size).to(codes.device)
    return Packed(
        qweight=pack_codes(codes, bits),
        qzeros=_to_words((zeros - zero_offset).t().contiguous(), bits),
        scales=half.t().contiguous(),
        g_idx=g_idx.to(torch.int32).contiguous(),
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`qweight` int32 [K*bits/32, N] of codes uint8 [N, K], which fit `bits`."""
    return _to_words(codes, bits).t().contiguous()


def unpack_codes(qweight: Tensor, bits: int) -> Tensor:
    """The codes, uint8 [N, K], of `qweight` int32 [K*bits/32, N]."""
    return _from_words(qweight.t().contiguous(), bits)


def unpack_zeros(qzeros: Tensor, bits: int, zero_offset: int = V1) -> Tensor:
    """The real zero points, uint8 [N, G], of `qzeros` int32 [G, N*bits/32]; wrapped ones are 0.

    They lie in memory as [G, N].
    """
    stored = _from_words(qzeros.contiguous(), bits)
    zeros: Tensor = (stored + zero_offset) & (2**bits - 1)
    return zeros.t()


def zero_words(zeros: Tensor, bits: int) -> Tensor:
    """`qzeros` int32 [G, N*bits/32] of real zero points, uint8 [N, G], as v2 stores them."""
    return _to_words(zeros.t().contiguous(), bits)


def outputs(packed: Packed, start: int, stop: int, bits: int) -> Packed:
    """Outputs `start` to `stop` (multiples of 32, or the end) of a packed linear."""
    words = slice(start * bits // 32, stop * bits // 32)
    return Packed(
        packed.qweight[:, start:stop].contiguous(),
        packed.qzeros[:, words].contiguous(),
        packed.scales[:, start:stop].contiguous(),
        packed.g_idx,
    )


def dequantize(
    packed: Packed,
    bits: int,
    *,
    zero_offset: int = V1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [N, K] that `packed` stands for, computed in float32 (or wider) and rounded once.

    Any `g_idx` whose entries name a group will do, act-order's included.

    Raises:
        CheckpointError: `g_idx` has another length than the codes, or names no group.
    """
    codes = unpack_codes(packed.qweight, bits)
    zeros = unpack_zeros(packed.qzeros, bits, zero_offset)
    group = packed.g_idx.long()
    groups = packed.scales.shape[0]
    if group.numel() != codes.shape[1]:
        raise CheckpointError("length of g_idx", expected=codes.shape[1], got=group.numel())
    if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < groups:
        wrong = int(group.min() if int(group.min()) < 0 else group.max())
        raise CheckpointError("entry of g_idx", expected=f"0 to {groups - 1}", got=wrong)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight: Tensor = codes.to(wide)
    zero, scale = zeros.to(wide), packed.scales.t().to(wide)
    size = codes.shape[1] // groups if groups else 0
    if size * groups == codes.shape[1] and torch.equal(
        group, torch.arange(codes.shape[1], device=group.device) // max(size, 1)
    ):  # trivial: broadcast over each group instead of gathering a whole matrix of scales
        grouped = weight.view(weight.shape[0], groups, size)
        grouped -= zero.unsqueeze(-1)
        grouped *= scale.unsqueeze(-1)
    else:
        weight -= zero[:, group]
        weight *= scale[:, group]
    return weight.to(dtype)


def trivial_g_idx(inputs: int, group_size: int) -> Tensor:
    """int32 [inputs]: `k // group_size`; all zero for -1."""
    return torch.arange(inputs, dtype=torch.int32) // _group_size(group_size, inputs)


def min_zero(zero_offset: int = V1) -> int:
    """The smallest zero point a file can hold: 1 in v1, 0 in v2 (why: the module's opening)."""
    if zero_offset not in (V1, V2):
        raise SpecError("zero_offset", expected="1 (gptq) or 0 (gptq_v2)", got=zero_offset)
    return zero_offset


def values_per_cycle(bits: int) -> int:
    """How many values fill a whole number of words: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    if bits not in BITS:
        raise SpecError("bits", expected=f"one of {BITS}", got=bits)
    return 32 // gcd(bits, 32)


def symmetric_zero(bits: int) -> int:
    """The zero point of the symmetric grid: the middle, `2^(bits-1)`."""
    return int(2 ** (bits - 1))


def _group_size(group_size: int, inputs: int) -> int:
    if group_size == -1:
        return max(inputs, 1)
    if group_size < 1:
        raise SpecError("group_size", expected="-1 or at least 1", got=group_size)
    return group_size


def _need_words(what: str, count: int, bits: int) -> None:
    if count % values_per_cycle(bits):
        raise SpecError(
            f"{what} of a linear packed at {bits} bits",
            expected=f"a multiple of {values_per_cycle(bits)}",
            got=count,
            cure="Leave this linear unquantized.",
        )


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Which value touches which byte within one cycle of the stream: (byte, value, shift).

    `shift > 0` moves the value up into the byte, `shift < 0` down.
    """
    values = 8 // gcd(bits, 8)
    return [
        (byte, value, bits * value - 8 * byte)
        for byte in range(values * bits // 8)
        for value in range(values)
        if -bits < bits * value - 8 * byte < 8
    ]


def _shift(x: Tensor, by: int) -> Tensor:
    """uint8 shifted up by `by` (down when negative); bits pushed out are dropped."""
    if by == 0:
        return x
    return x << by if by > 0 else x >> -by


def _to_words(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R, C*bits/32]: packs along the last dimension."""
    rows, count = values.shape
    if bits == 8:
        return values.contiguous().view(-1).view(torch.int32).reshape(rows, count // 4)
    cycle = 8 // gcd(bits, 8)
    per = cycle * bits // 8
    stream = values.new_zeros((rows, count // cycle, per))
    lanes = values.reshape(rows, count // cycle, cycle)
    for byte, value, shift in _overlaps(bits):
        stream[..., byte] |= _shift(lanes[..., value], shift)
    return stream.view(-1).view(torch.int32).view(rows, count * bits // 32)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W*32/bits]: the inverse of `_to_words`."""
    rows, count = words.shape[0], words.shape[1] * 32 // bits
    if words.dtype != torch.int32 or (words.shape[1] * 32) % (bits * values_per_cycle(bits)):
        raise CheckpointError(
            f"packed words at {bits} bits",
            expected=f"int32, a multiple of {values_per_cycle(bits) * bits // 32} of them",
            got=f"{words.dtype} {list(words.shape)}",
        )
    stream = words.contiguous().view(-1).view(torch.uint8)
    if bits == 8:
        return stream.reshape(rows, count).clone()
    cycle = 8 // gcd(bits, 8)
    per = cycle * bits // 8
    stream = stream.reshape(rows, count // cycle, per)
    lanes = stream.new_zeros((rows, count // cycle, cycle))
    for byte, value, shift in _overlaps(bits):
        lanes[..., value] |= _shift(stream[..., byte], -shift)
    lanes &= 2**bits - 1
    return lanes.reshape(rows, count)
