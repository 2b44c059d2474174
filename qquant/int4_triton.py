"""Decoding's product as a Triton kernel: a few rows times GPTQ's tensors, read as they are stored.

`qweight` int32 [K*bits/32, N] is read once and no second packing is held. A program has 64 outputs
and a share of the inputs (as many shares as fill the device; their float32 sums are added up
afterwards, in a fixed order, so the result does not change from run to run). It takes 16 words of
each output at a time. The codes at one place of the words are every 8th (4th, 16th) input, so a
product needs no shuffling: the matching inputs are read with that step.

Weights are `scale * (code - zero)` in float32, rounded once to the input's dtype, as in kernel
`dequantize`; sums are float32. Any group, also by `g_idx` (activation order). 3 bits, whose codes
straddle words, are not taken.

To torch the product is one operator of its own (`qquant::few_rows`), which torch.compile calls and
does not look into.

Run under Triton's interpreter on a CPU by the tests; not yet run on a GPU. Imports Triton, so it is
imported only where that is there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 16  # of a program's product; more rows take more programs
_WORDS, _OUTPUTS = 16, 64


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, index, out, m, n, k, groups, words, steps,
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
            zero = tl.load(zeros + col[None, :] * groups + group[:, None], mask=both, other=0)
            code = (packed >> (BITS * place)) & ((1 << BITS) - 1)
            weight = (code.to(tl.float32) - zero.to(tl.float32)) * scale.to(tl.float32)
            b = weight.to(a.dtype)
            if WIDEN:
                total += tl.dot(a.to(tl.float32), b.to(tl.float32))
            else:
                total += tl.dot(a, b)
    place = (tl.program_id(1) * m + row[:, None]) * n + col[None, :]
    tl.store(out + place, total, mask=live[:, None] & there[None, :])


@torch.library.custom_op("qquant::few_rows", mutates_args=())
def few_rows(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, bits: int
) -> Tensor:
    """`x @ W.T`.

    Args:
        x: [M, K] float16 or bfloat16. qweight: int32 [K*bits/32, N]. scales: float16 [G, N].
            zeros: uint8 [N, G]. index: int32 [K], each input's group. bits: 2, 4 or 8.

    Returns:
        [M, N] in x's dtype.
    """
    x = x.contiguous()
    (m, k), n = x.shape, qweight.shape[1]
    words, across = qweight.shape[0], triton.cdiv(n, _OUTPUTS)
    steps = triton.cdiv(words, _WORDS)
    shares = min(steps, max(1, triton.cdiv(2 * _processors(x.device), across)))
    steps = triton.cdiv(steps, shares)
    out = torch.empty(shares, m, n, dtype=torch.float32, device=x.device)
    grid = across, shares, triton.cdiv(m, MOST_ROWS)
    flat = zeros.contiguous()
    with on_its_device(x):
        _product[grid](
            x, qweight, scales, flat, index, out, m, n, k, scales.shape[0], words, steps,
            BITS=bits, ROWS=MOST_ROWS, WORDS=_WORDS, OUTPUTS=_OUTPUTS,
            WIDEN=x.device.type == "cpu",  # the interpreter's product takes no bfloat16
        )  # fmt: skip
    return out.sum(0).to(x.dtype)


@few_rows.register_fake
def _(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, bits: int
) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[1])


def on_its_device(x: Tensor) -> AbstractContextManager[object]:
    """While it lasts, the current device is `x`'s: Triton launches on the current one."""
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 where it is not one (the interpreter)."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
