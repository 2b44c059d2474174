"""The Triton kernels of `int4_triton.py`.

`alone` is for one row, in groups of whole words. Decoding is to take no longer than memory needs,
so what counts is instructions per weight, some 4 of which fit into that time on an H200. Two codes
at a time become the halves of a word whose upper bits are those of the bfloat16 number 128: shifted
left by 16 the lower one is the float32 number 128 + code; the upper one is that and about a quarter
without any operation, since what is below it counts as its fraction. The sum of a word's inputs
times what is too much comes off once, as does the scale. So weights are not rounded; what stays is
the lower code's part in the fraction, up to 2^bits / 2^17 of a step. A program has 32 outputs and
all inputs, which its warps share, so nothing is left to add up by another launch. It fetches the
next words before it computes.

`several` is for up to 16 rows of those groups. A program has 64 outputs and a share of the inputs:
as many shares as fill the device, which `added` adds up with the bias. It multiplies a group's
inputs by numbers that hold codes as they are, two to a word as the product wants them: in bfloat16
128 + code (of 8 bits code - 128), in float16 code / 2^24. The inputs are put in their order.

`product` is for any group, also by `g_idx` (activation order). It multiplies 16 words' codes at one
place, which are every 8th (4th, 16th) input: the matching inputs are read with that step. Its
weights are `scale * (code - zero)` in float32, rounded once to the input's dtype, as in kernel
`dequantize`.

Run under Triton's interpreter on a CPU and compiled for an H200 by the tests; not yet run on a GPU.
Left out on purpose: which one runs, and on how many programs (`int4_triton.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """The codes at `place` of each half of a word, too large by what `alone` takes off."""
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
def alone(  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, bias, out, n, words, magic,
    BITS: tl.constexpr, RUN: tl.constexpr, MIDDLE: tl.constexpr, BIAS: tl.constexpr,
    BFLOAT: tl.constexpr, WORDS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = 16 // BITS  # codes in half a word, and pairs of inputs to a word
    excess: tl.constexpr = 1024.0 if BITS == 8 else 128.0
    # What lies below the upper one: 128's bits and a code, of which the middle one comes off.
    fraction: tl.constexpr = 0.0 if BITS == 8 else (0x4300 + 2 ** (BITS - 1)) / 65536
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
def several(  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, out, m, n, k, words, steps, magic,
    BITS: tl.constexpr, RUN: tl.constexpr, MIDDLE: tl.constexpr, BFLOAT: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, OUTPUTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = 16 // BITS
    span: tl.constexpr = WORDS * 2 * half
    kind: tl.constexpr = x.dtype.element_ty
    excess: tl.constexpr = (-128.0 if BITS == 8 else 128.0) if BFLOAT else 0.0
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
        if BFLOAT and BITS == 8:  # bfloat16 has no room for 128 + code, but for code - 128
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
        if not BFLOAT:
            part *= 2.0**24  # of float16, a code's bits alone are the number code / 2^24
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
def product(  # type: ignore[no-untyped-def]
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
def added(  # type: ignore[no-untyped-def]
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
