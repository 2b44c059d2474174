"""Decoding's product on CUDA: a few rows times GPTQ's tensors, read as they are stored.

`qweight` int32 [K*bits/32, N] is read once and no second packing is held. To torch the product is
one operator of its own (`qquant::few_rows`), which torch.compile calls and does not look into; it
adds the bias, too, since a launch of its own costs as much as a tenth of a product. Sums are
float32 in a fixed order, so the result does not change from run to run.

One row goes to a kernel of its own; up to 16 rows to another, where groups are whole words and
large enough for a matrix product; what is left (`g_idx`, smaller groups) to a third. 3 bits, whose
codes straddle words, are not taken. What is not finite in a row makes all its results NaN.

Left out on purpose: the kernels (`int4_kernels.py`). Imports Triton, so it is imported only where
that is there.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from .devices import on_its_device
from .errors import RunError
from .int4_kernels import added, alone, product, several

MOST_ROWS = 16  # of a program for several; more rows take more programs
_WORDS, _OUTPUTS = 16, 64
_SPAN = 128  # inputs that `several` multiplies at a time, or as many as a group has
_MANY = 512  # outputs whose shares a program adds up
_LEAST = 16  # inputs of a product of Triton's
_BFLOAT = 0x43004300  # twice the bfloat16 number 128, whose last bits hold a code
_HALF = 0x64006400  # twice the float16 number 1024, which has room for 8 bits


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

    Raises:
        RunError: x has another dtype.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        expected = "inputs in bfloat16 or float16"
        raise RunError("kernel triton-int4", expected=expected, got=str(x.dtype))
    if x.shape[0] == 1 and group and not group % (32 // bits):
        return _one_row(x, qweight, scales, zeros, bias, bits, group)
    return _several_rows(x.contiguous(), qweight, scales, zeros, index, bias, bits, group)


@few_rows.register_fake
def _(x: Tensor, qweight: Tensor, *_rest: Any) -> Tensor:
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
    """`few_rows` by `alone`."""
    words, n = qweight.shape
    # Read two at a time: a view may begin in the middle of a word.
    x = x.reshape(-1).contiguous()
    x = x.clone() if x.storage_offset() % 2 else x
    out = x.new_empty(1, n)
    outputs, rows, warps = _tile(n, bits, _processors(x.device))
    with on_its_device(x):
        alone[(triton.cdiv(n, outputs),)](
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
    """`few_rows` by `several`, or by `product`."""
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
            several[grid](
                x, qweight, scales, zeros, sums, m, n, k, words, steps,
                (_HALF if bits == 8 else _BFLOAT) if bfloat else 0,
                RUN=run, MIDDLE=zeros is None, BFLOAT=bfloat, WORDS=tile, **same,
            )  # fmt: skip
        else:
            if zeros is None:
                zeros = qweight.new_full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
            product[grid](
                x, qweight, scales, zeros, index, sums, m, n, k, words, steps, WORDS=tile, **same
            )
        added[(triton.cdiv(m * n, _MANY),)](
            sums, bias, out, n, m * n, shares, BIAS=bias is not None, MANY=_MANY
        )
    return out


def _tile(n: int, bits: int, processors: int) -> tuple[int, int, int]:
    """Of `alone`: outputs and words of a program, and its warps.

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
