"""A packed linear's weights as numbers, some outputs at a time: what a product of many rows takes.

Two forms with the same bits. `torch`'s goes through a dozen operations, each of which writes as
many numbers as there are weights: for a model of 7 billion some 400 GB are moved, which is longer
than a prompt of 2048 tokens takes to multiply on an H200. `triton`'s (`rebuild_triton.py`) reads
the codes and writes the weights, 16 GB. It is taken on CUDA where a trial gives the same bits.

Left out on purpose: products (`kernels.py`), packings of other kernels.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .devices import against_triton
from .pack import pack_codes, unpack_codes

Form = Literal["torch", "triton"]
FORMS: tuple[Form, Form] = ("torch", "triton")


class Choice(NamedTuple):
    """The form that runs, and why it is not the faster one ("" where it is, or on a CPU)."""

    form: Form
    reason: str = ""


@cache
def choose(device: torch.device) -> Choice:
    """The form for a device; compiles and tries the kernel where it might be used."""
    if device.type != "cuda":
        return Choice("torch")
    why = against_triton(lambda: _kernel_is_right(device))
    return Choice("torch", why) if why else Choice("triton")


def weights(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    index: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
    form: Form,
) -> Tensor:
    """`scale * (code - zero)`, computed in float32, rounded once.

    Args:
        qweight: int32 [K*bits/32, N]. scales: float16 [G, N]. zeros: uint8 [N, G]. index: int32
            [K], each input's group. These may be parts of a linear's, by outputs. bits: 2, 3, 4 or
            8; `triton` takes no 3. group: inputs of each group, where group j is the j-th run of
            them; otherwise 0.

    Returns:
        [K, N] in dtype.
    """
    if form == "triton":
        from .rebuild_triton import rebuild

        whole: Tensor = rebuild(qweight, scales, zeros, index, bits, dtype)
        return whole
    weight = unpack_codes(qweight, bits).to(torch.float32)  # [N, K]
    zero, scale = zeros.to(torch.float32), scales.t().to(torch.float32)
    if group:
        grouped = weight.view(weight.shape[0], -1, group)
        grouped -= zero.unsqueeze(-1)
        grouped *= scale.unsqueeze(-1)
    else:
        groups = index.long()
        weight -= zero[:, groups]
        weight *= scale[:, groups]
    return weight.to(dtype).t()


def _kernel_is_right(device: torch.device) -> bool:
    """Whether both forms give the same bits there, on parts of linears that fill no tile."""
    from .rebuild_triton import INTERPRETED

    draw = partial(torch.randint, 0, generator=torch.Generator().manual_seed(0), device="cpu")
    dtypes = [torch.float16, torch.float32]
    if not INTERPRETED:
        dtypes.append(torch.bfloat16)
    for bits in (2, 4, 8):
        codes = draw(2**bits, (80, 96), dtype=torch.uint8)
        zeros = draw(2**bits, (3, 80), dtype=torch.uint8).t()  # as a linear's lie in memory
        scales = (draw(1000, (3, 80), dtype=torch.int32) / 999).to(torch.float16)
        index = draw(3, (96,), dtype=torch.int32)
        whole = [t.to(device) for t in (pack_codes(codes, bits), scales, zeros, index)]
        parts = whole[0][:, 16:], whole[1][:, 16:], whole[2][16:], whole[3]
        for dtype in dtypes:
            by_torch, by_triton = (weights(*parts, bits, 0, dtype, form) for form in FORMS)
            if not torch.equal(by_torch, by_triton):
                return False
    return True
