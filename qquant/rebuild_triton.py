"""`rebuild.py`'s weights by one Triton kernel: codes are read once, weights written once.

A program has some words of 128 outputs. The codes at one place of the words are every 8th (4th,
16th) input: rows of the result, of which neighbouring threads write neighbouring outputs. The float
operations are torch's: a difference that is exact, a product, one rounding.

Run under Triton's interpreter on a CPU and compiled for an H200 by the tests; not yet run on a GPU.
Imports Triton, so it is imported only where that is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_its_device

INTERPRETED = bool(triton.knobs.runtime.interpret)  # and then cuts off what bfloat16 rounds
_WORDS, _OUTPUTS = 8, 128


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rebuild(  # type: ignore[no-untyped-def]
    qweight, scales, zeros, index, out, n, words, codes_row, scales_row, zeros_row, zeros_col,
    BITS: tl.constexpr, WORDS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    per: tl.constexpr = 32 // BITS
    col = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    both = inside[:, None] & (col < n)[None, :]
    packed = tl.load(qweight + word[:, None] * codes_row + col[None, :], mask=both, other=0)
    for place in tl.static_range(per):
        at = word * per + place
        group = tl.load(index + at, mask=inside, other=0)
        scale = tl.load(scales + group[:, None] * scales_row + col[None, :], mask=both, other=0.0)
        here = zeros + col[None, :] * zeros_row + group[:, None] * zeros_col
        zero = tl.load(here, mask=both, other=0)
        code = (packed >> (BITS * place)) & (2**BITS - 1)
        weight = (code.to(tl.float32) - zero.to(tl.float32)) * scale.to(tl.float32)
        to = out + at[:, None] * n + col[None, :]
        tl.store(to, weight.to(out.dtype.element_ty), mask=both)


@torch.library.custom_op("qquant::rebuild", mutates_args=())
def rebuild(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    index: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `rebuild.weights`; one operator to torch.compile, which does not look into it."""
    words, n = qweight.shape
    assert qweight.stride(1) == scales.stride(1) == 1
    out = torch.empty(words * 32 // bits, n, dtype=dtype, device=qweight.device)
    grid = triton.cdiv(n, _OUTPUTS), triton.cdiv(words, _WORDS)
    with on_its_device(qweight):
        _rebuild[grid](
            qweight, scales, zeros, index, out, n, words,
            qweight.stride(0), scales.stride(0), *zeros.stride(),
            BITS=bits, WORDS=_WORDS, OUTPUTS=_OUTPUTS,
        )  # fmt: skip
    return out


@rebuild.register_fake
def _(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    index: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    return scales.new_empty(index.shape[0], qweight.shape[1], dtype=dtype)
