"""The product of a linear on a CPU, by the library that is faster there.

Torch's own float32 products go to MKL, which on processors that are not Intel's is slower than
oneDNN, the library that torch brings along for other operations: measured on two cores of an AMD
EPYC with AVX2, 1024 rows, in GFLOP/s, MKL and oneDNN: 87 and 119 (512 to 1408), 101 and 125 (512
to 512), 88 and 122 (2048 to 2048), 40 and 112 (256 to 512). So there oneDNN it is. The choice
follows from the processor and not from a measurement, since the two sum in another order and a run
must give the same bytes every time; `chosen` names it for the report.

Left out on purpose: products with a transposed input (a Hessian's), which oneDNN takes slowly.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Library = Literal["onednn", "torch"]


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
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def _intel() -> bool:
    """Whether this is Intel's processor; True, too, where the system does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
