"""The product of a linear on a CPU, by the library that is faster there.

Torch's own float32 products go to MKL, which on processors that are not Intel's is slower than
oneDNN, the library that torch brings along for other operations: measured on two cores of an AMD
EPYC with AVX2, 1024 rows, in GFLOP/s, MKL and oneDNN: 87 and 119 (512 to 1408), 101 and 125 (512
to 512), 88 and 122 (2048 to 2048), 40 and 112 (256 to 512). So there oneDNN it is. With AVX-512
(Zen 5), which MKL leaves alone on such a processor, it is 200 and 450. The choice follows from the
processor and not from a measurement, since the two sum in another order and a run must give the
same bytes every time; `chosen` names it for the report.

A Hessian's product has its input transposed, which oneDNN takes slowly unless the transpose is laid
out first. With AVX-512 that pays (190 to 290 GFLOP/s and more), without it it does not.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import native_bfloat16

Library = Literal["onednn", "torch"]
_LARGE = 256  # rows and inputs from which a Hessian's product in bfloat16 is worth its care


@cache
def chosen() -> Library:
    """Which library multiplies float32 on the CPU; `torch` is whatever torch was built with."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    # Without MKL torch's products are OpenBLAS's or the system's: nothing to get away from.
    both = bool(torch._C._has_mkldnn and torch._C.has_mkl)
    return "onednn" if known and both and not _intel() else "torch"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, without gradients: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and chosen() == "onednn":
        # Operands that are not contiguous send it to a reference, thousands of times as slow.
        x, weight = x.contiguous(), weight.contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def laid_out(x: Tensor) -> Tensor:
    """xᵀ as `RunningSum` likes its operands: x [n, K] -> [K, n], float32 or what is exact in it.

    bfloat16 stays where a product of it pays (`running_sum.py`) and is large enough to.
    """
    if x.is_cuda:
        return x.T
    if x.dtype == torch.bfloat16 and min(x.shape) >= _LARGE and native_bfloat16(x.device):
        return x.T
    return x.T.contiguous().float() if _transposes() else x.float().T


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a bᵀ, summed in float32 and not rounded on the way.

    Args:
        out: [A, B] float32. a, b: [A, n] and [B, n], any dtype that is exact in float32.
    """
    if a.is_cuda and a.dtype != torch.float32:
        out += torch.mm(a, b.T, out_dtype=torch.float32)
    elif not a.is_cuda and _transposes():
        out += linear(a.contiguous().float(), b.contiguous().float())
    else:
        out.addmm_(a.float(), b.float().T)


@cache
def _transposes() -> bool:
    """Whether transposing first pays."""
    return chosen() == "onednn" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _intel() -> bool:
    """Whether this is Intel's processor; True, too, where the system does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
