"""`avx2`'s product as one operator, which torch.compile calls and does not look into.

Apart, since importing it registers the operator. Left out on purpose: everything it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import avx2_code


@torch.library.custom_op("qquant::avx2", mutates_args=())
def product(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """As `avx2_code.product`; of tensors that hold nothing, the shape."""
    return avx2_code.product(x, words, scales, zeros, bits)


@product.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0] * scales.shape[2])
