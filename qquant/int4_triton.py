"""Decoding's product as Triton kernels: a few rows times GPTQ's tensors, read as they are stored.

`qweight` int32 [K*bits/32, N] is read once and no second packing is held. To torch the product is
one operator of its own (`qquant::few_rows`), which torch.compile calls and does not look into; it
adds the bias, too, since a launch of its own costs as much as a tenth of a product. Sums are
float32 in a fixed order, so the result does not change from run to run.

`_alone` is for one row, in groups of whole words. Decoding is to take no longer
than memory needs, so what counts is instructions per weight, 4 of which fit into that time on an
H200. Two codes at a time become the halves of a word whose upper bits are those of the bfloat16
number 128: shifted left by 16 the lower one is the float32 number 128 + code; the upper one is that
and about a quarter without any operation, since what is below it counts as its fraction. The sum of
a word's inputs times what is too much comes off once, as does the scale. A program has 32 outputs
and all inputs, which its warps share, so nothing is left to add up by another launch. It fetches
the next words before it computes. Weights are not rounded; inputs are multiplied as they are.

`_several` is for up to 16 rows of those groups, and `_product` for any group, also by `g_idx`
(activation order). A program has 64 outputs and a share of the inputs: as many shares as fill the
device, which `_added` adds up with the bias. `_several` multiplies a group's inputs by such
numbers, 128 + code (in float16 1024 + code), which are pairs as the product wants them; the inputs
are put in their order. `_product` multiplies 16 words' codes at one place, which are every 8th
(4th, 16th) input: the matching inputs are read with that step. Its weights are
`scale * (code - zero)` in float32, rounded once to the input's dtype, as in kernel `dequantize`.

3 bits, whose codes straddle words, are not taken.

Run under Triton's interpreter on a CPU and compiled for an H200 by the tests; not yet run on a GPU.
Compiled so, a loop has 3.8, 5.7 and 17.5 instructions per weight of 4 bits. Imports Triton, so it
is imported only where that is there.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_its_device

MOST_ROWS = 16  # of a program for several; more rows take more programs
_WORDS, _OUTPUTS = 16, 64
_SPAN = 128  # inputs that `_several` multiplies at a time, or as many as a group has
_MANY = 512  # outputs whose shares a program adds up
_LEAST = 16  # inputs of a product of Triton's
_BFLOAT = 0x43004300  # twice the bfloat16 number 128, whose last bits hold a code
_HALF = 0x64006400  # twice the float16 number 1024, which has room for 8 bits


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _inputs(pair, BFLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both of a word's 16-bit numbers, as float32."""
    if BFLOAT:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _codes(packed, magic, place: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes at `place` of each half of a word, too large by what `_alone` takes off."""
    both = ((packed >> (BITS * place)) & ((2**BITS - 1) * 65537)) | magic
    if BITS == 8:
        low = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (both << 16).to(tl.float32, bitcast=True)
        high = both.to(tl.float32, bitcast=True)
    return low, high


# `magic` is an argument: as a constant it would take an instruction of its own to put in.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _alone(  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, bias, out, n, words, magic,
    BITS: tl.constexpr, RUN: tl.constexpr, MIDDLE: tl.constexpr, BIAS: tl.constexpr,
    BFLOAT: tl.constexpr, WORDS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = 16 // BITS  # codes in half a word, and pairs of inputs to a word
    excess: tl.constexpr = 1024.0 if BITS == 8 else 128.0
    fraction: tl.constexpr = 0.0 if BITS == 8 else 0x4300 / 65536
    col = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = col < n
    total = tl.zeros((WORDS, OUTPUTS), dtype=tl.float32)
    word = tl.arange(0, WORDS)
    both = (word < words)[:, None] & there[None, :]
    first = qweight + word[:, None] * n + col[None, :]
    packed = tl.load(first, mask=both, other=0, eviction_policy="evict_first")
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < words
        both = inside[:, None] & there[None, :]
        later = word + WORDS
        more = (later < words)[:, None] & there[None, :]
        next_ones = qweight + later[:, None] * n + col[None, :]
        following = tl.load(next_ones, mask=more, other=0, eviction_policy="evict_first")
        at = (word // RUN)[:, None] * n + col[None, :]
        scale = tl.load(scales + at, mask=both, other=0.0).to(tl.float32)
        for p in tl.static_range(0, half, 2):
            here = x + word * half + p // 2
            a0, a1 = _inputs(tl.load(here, mask=inside, other=0), BFLOAT)
            b0, b1 = _inputs(tl.load(here + half // 2, mask=inside, other=0), BFLOAT)
            c0, d0 = _codes(packed, magic, p, BITS)
            c1, d1 = _codes(packed, magic, p + 1, BITS)
            if p == 0:
                lower, upper = a0 + a1, b0 + b1
                part = a0[:, None] * c0
            else:
                lower += a0 + a1
                upper += b0 + b1
                part += a0[:, None] * c0
            part += a1[:, None] * c1
            part += b0[:, None] * d0
            part += b1[:, None] * d1
        if MIDDLE:
            part -= ((excess + 2 ** (BITS - 1)) * (lower + upper) + fraction * upper)[:, None]
        else:
            zero = tl.load(zeros + at, mask=both, other=0).to(tl.float32) + excess
            part -= zero * (lower + upper)[:, None] + (fraction * upper)[:, None]
        total += part * scale
        packed = following
    whole = tl.sum(total, axis=0)
    if BIAS:
        whole += tl.load(bias + col, mask=there, other=0.0).to(tl.float32)
    tl.store(out + col, whole.to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pairs(packed, magic, BITS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves' codes at every `STEP`-th place from `FIRST` on: [..., 2, 2] by place."""
    if STEP == 16 // BITS:
        found = ((packed >> (BITS * FIRST)) & ((2**BITS - 1) * 65537)) | magic
    else:
        even = _pairs(packed, magic, BITS, FIRST, 2 * STEP)
        found = tl.join(even, _pairs(packed, magic, BITS, FIRST + STEP, 2 * STEP))
    return found


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _several(  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, out, m, n, k, words, steps, magic,
    BITS: tl.constexpr, RUN: tl.constexpr, MIDDLE: tl.constexpr, BFLOAT: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, OUTPUTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = 16 // BITS
    span: tl.constexpr = WORDS * 2 * half
    kind: tl.constexpr = x.dtype.element_ty
    excess: tl.constexpr = (-128.0 if BITS == 8 else 128.0) if BFLOAT else 1024.0
    col = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    there, live = col < n, row < m
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for step in range(steps):
        start = (tl.program_id(1) * steps + step) * WORDS
        word = start + tl.arange(0, WORDS)
        both = (word < words)[:, None] & there[None, :]
        packed = tl.load(qweight + word[:, None] * n + col[None, :], mask=both, other=0)
        at = start * 2 * half + tl.arange(0, span)
        known = live[:, None] & (at < k)[None, :]
        a = tl.load(x + row[:, None] * k + at[None, :], mask=known, other=0.0)
        summed = tl.sum(a.to(tl.float32), axis=1)
        a = tl.permute(tl.reshape(a, (ROWS, WORDS, 2, half)), (0, 1, 3, 2))
        a = tl.reshape(a, (ROWS, span))
        pairs = _pairs(packed, magic, BITS, 0, 1)
        low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
        if BFLOAT and BITS == 8:  # bfloat16 has no room for 1024 + code, but for code - 128
            low = (low.to(tl.float16, bitcast=True).to(tl.float32) - 1152.0).to(kind)
            high = (high.to(tl.float16, bitcast=True).to(tl.float32) - 1152.0).to(kind)
        else:
            low, high = low.to(kind, bitcast=True), high.to(kind, bitcast=True)
        b = tl.join(low, high)
        if BITS == 2:
            b = tl.permute(b, (0, 2, 3, 4, 5, 1))
        elif BITS == 4:
            b = tl.permute(b, (0, 2, 3, 4, 1))
        else:
            b = tl.permute(b, (0, 2, 3, 1))
        b = tl.reshape(b, (span, OUTPUTS))
        if WIDEN:
            part = tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            part = tl.dot(a, b)
        here = start // RUN * n + col
        inside = there & (start < words)
        scale = tl.load(scales + here, mask=inside, other=0.0).to(tl.float32)
        if MIDDLE:
            part -= ((excess + 2 ** (BITS - 1)) * summed)[:, None]
        else:
            zero = tl.load(zeros + here, mask=inside, other=0).to(tl.float32) + excess
            part -= summed[:, None] * zero[None, :]
        total += part * scale[None, :]
    place = (tl.program_id(1) * m + row[:, None]) * n + col[None, :]
    tl.store(out + place, total, mask=live[:, None] & there[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, index, out, m, n, k, words, steps,
    BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    per: tl.constexpr = 32 // BITS
    col = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    there, live = col < n, row < m
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for step in range(steps):
        word = (tl.program_id(1) * steps + step) * WORDS + tl.arange(0, WORDS)
        inside = word < words
        both = inside[:, None] & there[None, :]
        packed = tl.load(qweight + word[:, None] * n + col[None, :], mask=both, other=0)
        for place in tl.static_range(per):
            at = word * per + place
            a = tl.load(
                x + row[:, None] * k + at[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            group = tl.load(index + at, mask=inside, other=0)
            scale = tl.load(scales + group[:, None] * n + col[None, :], mask=both, other=0.0)
            zero = tl.load(zeros + group[:, None] * n + col[None, :], mask=both, other=0)
            code = (packed >> (BITS * place)) & ((1 << BITS) - 1)
            weight = (code.to(tl.float32) - zero.to(tl.float32)) * scale.to(tl.float32)
            b = weight.to(a.dtype)
            if WIDEN:
                total += tl.dot(a.to(tl.float32), b.to(tl.float32))
            else:
                total += tl.dot(a, b)
    place = (tl.program_id(1) * m + row[:, None]) * n + col[None, :]
    tl.store(out + place, total, mask=live[:, None] & there[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _added(  # type: ignore[no-untyped-def]
    sums, bias, out, n, size, shares, BIAS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The shares of every output, in their order, and the bias."""
    at = tl.program_id(0) * MANY + tl.arange(0, MANY)
    inside = at < size
    total = tl.zeros((MANY,), dtype=tl.float32)
    for share in range(shares):
        total += tl.load(sums + share * size + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("qquant::few_rows", mutates_args=())
def few_rows(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    index: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`x @ W.T + bias`.

    Args:
        x: [M, K] float16 or bfloat16. qweight: int32 [K*bits/32, N]. scales: float16 [G, N].
            zeros: uint8 [G, N], contiguous; None where all are the middle of the grid. index: int32
            [K], each input's group. bias: floating [N]. bits: 2, 4 or 8. group: inputs of each
            group, where group j is the j-th run of them; otherwise 0.

    Returns:
        [M, N] in x's dtype.
    """
    if x.shape[0] == 1 and group and not group % (32 // bits):
        return _one_row(x, qweight, scales, zeros, bias, bits, group)
    return _several_rows(x.contiguous(), qweight, scales, zeros, index, bias, bits, group)


@few_rows.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    index: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[1])


def _one_row(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`few_rows` by `_alone`."""
    words, n = qweight.shape
    # Read two at a time: a view may begin in the middle of a word.
    x = x.clone() if x.storage_offset() % 2 else x.contiguous()
    out = x.new_empty(1, n)
    outputs, rows, warps = _tile(n, bits, _processors(x.device))
    with on_its_device(x):
        _alone[(triton.cdiv(n, outputs),)](
            x.view(torch.int32), qweight, scales, zeros, bias, out, n, words,
            _HALF if bits == 8 else _BFLOAT,
            BITS=bits, RUN=group * bits // 32, MIDDLE=zeros is None, BIAS=bias is not None,
            BFLOAT=x.dtype == torch.bfloat16, WORDS=rows, OUTPUTS=outputs, num_warps=warps,
        )  # fmt: skip
    return out


def _several_rows(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    index: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`few_rows` by `_several`, or by `_product`."""
    (m, k), (words, n) = x.shape, qweight.shape
    run = group * bits // 32
    together = gcd(run, _SPAN * bits // 32) if group and not group % (32 // bits) else 0
    even = together * 32 // bits >= _LEAST
    tile = together if even else _WORDS
    across, steps = triton.cdiv(n, _OUTPUTS), triton.cdiv(words, tile)
    shares = min(steps, max(1, triton.cdiv(2 * _processors(x.device), across)))
    steps = triton.cdiv(steps, shares)
    sums = torch.empty(shares, m, n, dtype=torch.float32, device=x.device)
    grid = across, shares, triton.cdiv(m, MOST_ROWS)
    # The interpreter's product takes no bfloat16.
    same = {"BITS": bits, "ROWS": MOST_ROWS, "OUTPUTS": _OUTPUTS, "WIDEN": x.device.type == "cpu"}
    bfloat = x.dtype == torch.bfloat16
    out = x.new_empty(m, n)
    with on_its_device(x):
        if even:
            _several[grid](
                x, qweight, scales, zeros, sums, m, n, k, words, steps,
                _BFLOAT if bfloat and bits != 8 else _HALF,
                RUN=run, MIDDLE=zeros is None, BFLOAT=bfloat, WORDS=tile, **same,
            )  # fmt: skip
        else:
            if zeros is None:
                zeros = qweight.new_full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
            _product[grid](
                x, qweight, scales, zeros, index, sums, m, n, k, words, steps, WORDS=tile, **same
            )
        _added[(triton.cdiv(m * n, _MANY),)](
            sums, bias, out, n, m * n, shares, BIAS=bias is not None, MANY=_MANY
        )
    return out


def _tile(n: int, bits: int, processors: int) -> tuple[int, int, int]:
    """Of `_alone`: outputs and words of a program, and its warps.

    So much is read ahead that memory is kept busy: where there are too few programs for two to a
    processor, each has twice the warps, and more words for each thread as far as registers go.
    """
    if triton.cdiv(n, 32) >= 2 * processors:
        return 32, 64, 8
    return 32, 128 if bits == 2 else 256, 16


def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 where it is not one (the interpreter)."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
