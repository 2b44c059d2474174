"""The product of a linear on a CPU, by the library that is faster there.

Torch's own float32 products go to MKL, which on processors that are not Intel's is slower than
oneDNN, the library that torch brings along for other operations: measured on two cores of an AMD
EPYC with AVX2, 1024 rows, in GFLOP/s, MKL and oneDNN: 87 and 119 (512 to 1408), 101 and 125 (512
to 512), 88 and 122 (2048 to 2048), 40 and 112 (256 to 512). So there oneDNN it is. With AVX-512
(Zen 5) it is 200 and 450. The choice follows from the
processor and not from a measurement, since the two sum in another order and a run must give the
same bytes every time; `chosen` names it for the report.

Torch's other products in float32 (a Hessian's, the solver's) ask oneDNN only where they may be
rounded to bfloat16. On a processor with AVX-512 but without matrix units for bfloat16 (AMX) it does
not round, and is the faster one too: `in_float32` allows it where a trial shows that sums stay
exact.

A bfloat16 product lays its matrix out anew each time. `packed` does that once for a matrix that
many batches meet: 850 and 1000 GFLOP/s (1024 rows, 512 to 1408, Zen 5), with the same bits. Where
integers are multiplied faster, `packed` and `packed_codes` lay weights out for that (`int16.py`,
`int8_weight.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from . import int8, int8_weight, int16
from .devices import native_bfloat16

Library = Literal["onednn", "torch"]
Integers = type[int8.Columns] | type[int16.Columns]
Laid = int8_weight.Weight | int16.Weight  # a weight as integers
_ROWS = 1024  # that a packed matrix is laid out for; it takes any number
_LARGE = 256  # rows and inputs from which a Hessian's product in bfloat16 is worth its care
_lock = threading.Lock()
_inside: list[str] = []  # torch's setting as each that is inside found it
_EXACT = 1e-5  # of the norm: float32's sums come to 1e-6, rounded to bfloat16 they are off by 2e-3


@cache
def chosen() -> Library:
    """Which library multiplies float32 on the CPU; `torch` is whatever torch was built with."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    # Without MKL torch's products are OpenBLAS's or the system's: nothing to get away from.
    both = bool(torch._C._has_mkldnn and torch._C.has_mkl)
    return "onednn" if known and both and not _intel() else "torch"


def linear(x: Tensor, weight: Tensor | Laid, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, without gradients: x [..., K], weight [N, K], bias [N] -> [..., N].

    The weight may be one that `packed` or `packed_codes` gave.
    """
    if isinstance(weight, Laid):
        return weight.multiply(x, bias)
    if weight.is_mkldnn:
        return onednn(x.contiguous(), weight, bias)
    if x.device.type == "cpu" and x.dtype == torch.float32 and chosen() == "onednn":
        # Operands that are not contiguous send it to a reference, thousands of times as slow.
        return onednn(x.contiguous(), weight.contiguous(), bias)
    return F.linear(x, weight, bias)


def packed(weight: Tensor, in_int16: bool = False) -> Tensor | Laid:
    """A copy for `linear` of a weight [N, K] in oneDNN's layout; itself where that gains nothing.

    Results are the same bit for bit. The copy is opaque: it has a shape and a dtype, no elements.

    Args:
        in_int16: one that is multiplied in 16-bit integers instead, if it has the sizes for that.
    """
    if in_int16 and int16.takes(weight):
        return int16.Weight(weight)
    if weight.dtype != torch.bfloat16 or not native_bfloat16(weight.device) or weight.is_cuda:
        return weight
    return onednn_layout(weight, _ROWS) if _packs_exactly() else weight


def packed_codes(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Laid | None:
    """For `linear`, a quantized weight that inputs of a dtype meet as integers; None: it is none.

    Args:
        codes, scales, zeros: as of `int8_weight.Weight`.
    """
    if dtype != torch.bfloat16 or not int8_weight.takes(codes, scales, zeros):
        return None
    return int8_weight.Weight(codes, scales, zeros)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, by oneDNN: x and the weight contiguous, or the weight in its layout."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def onednn_layout(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight [N, K], opaque to everything but `onednn`, made for `rows` rows of x."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return out


@cache
def has_onednn_layout() -> bool:
    """Whether oneDNN lays bfloat16 out here, by trial: torch and the processor both have a say."""
    known = ("_linear_pointwise", "_reorder_linear_weight")
    if not all(hasattr(torch.ops.mkldnn, name) for name in known):
        return False
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device="cpu")
    try:
        onednn(x, onednn_layout(x, 1))
    except RuntimeError:
        return False
    return True


@cache
def _packs_exactly() -> bool:
    """Whether oneDNN's layout is there, and changes no bit, by trial."""
    if not has_onednn_layout():
        return False
    # More inputs than are summed at a time, and numbers of rows and outputs that are no multiples.
    draw = torch.Generator(device="cpu").manual_seed(0)

    def made(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=draw, device="cpu", dtype=torch.float32)
        return x.bfloat16()

    x, weight = made(_LARGE + 1, 3 * _LARGE), made(_LARGE + 8, 3 * _LARGE)
    bias = made(_LARGE + 8)
    laid = onednn_layout(weight, _ROWS)
    return all(torch.equal(onednn(x, laid, b), F.linear(x, weight, b)) for b in (None, bias))


@contextmanager
def in_float32() -> Iterator[None]:
    """Products of float32 in here are made by the library that is faster, without being rounded.

    It is torch's setting for the whole process while any thread is in here. Products of other
    threads are as exact then, but the last bits of their sums may differ.
    """
    if not _faster_without_rounding():
        yield
        return
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined, unused-ignore]
    with _lock:
        _inside.append(setting.fp32_precision)
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            found = _inside[0]  # by the first of them; the others found what it set
            _inside.pop()
            if not _inside:
                setting.fp32_precision = found


def exact_in_float32() -> bool:
    """Whether torch's setting is to multiply float32 without rounding it to fewer bits."""
    with _lock:  # torch refuses to answer while its setting is one library's own
        return bool(_inside) or torch.get_float32_matmul_precision() == "highest"


def integers(device: torch.device, dtype: torch.dtype, in_int16: bool = False) -> Integers | None:
    """What a linear's inputs are rounded to in sums over tokens, where that is faster.

    Args:
        device, dtype: of the inputs.
        in_int16: the run's products are of 16-bit integers.
    """
    if in_int16:
        return int16.Columns
    narrow = device.type == "cpu" and dtype == torch.bfloat16
    return int8.Columns if narrow and int8.unavailable() is None else None


def laid_out(x: Tensor) -> Tensor:
    """xᵀ as `RunningSum` likes its operands: x [n, K] -> [K, n], float32 or what is exact in it.

    bfloat16 stays where a product of it pays (`running_sum.py`) and is large enough to.
    """
    large = x.dtype == torch.bfloat16 and min(x.shape) >= _LARGE
    if x.is_cuda or (large and native_bfloat16(x.device) and _rounds_last()):
        return x.T
    return x.float().T


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a bᵀ, summed in float32 and not rounded on the way.

    Args:
        out: [A, B] float32. a, b: [A, n] and [B, n], any dtype that is exact in float32.
    """
    if a.is_cuda and a.dtype != torch.float32:
        out += torch.mm(a, b.T, out_dtype=torch.float32)
        return
    with in_float32():
        out.addmm_(a.float(), b.float().T)


@cache
def _rounds_last() -> bool:
    """Whether what is added to a bfloat16 product is added before the sum is rounded, by trial."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(_LARGE, _LARGE, generator=draw, device="cpu", dtype=torch.float32).bfloat16()
    exact = x.double() @ x.double().T
    most = exact.bfloat16()
    rest = torch.addmm(most, x, x.T, beta=-1).double()
    return float((most + rest - exact).norm() / exact.norm()) < _EXACT


@cache
def _faster_without_rounding() -> bool:
    """Whether oneDNN is to make float32 products that torch would send to MKL, by trial."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if (
        chosen() != "onednn"
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or getattr(settings, "fp32_precision", None) != "none"
        or not exact_in_float32()
    ):
        return False
    draw = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(256, 256, generator=draw, device="cpu", dtype=torch.float32)
    settings.fp32_precision = "bf16"
    try:
        got = torch.mm(x, x).double()
    finally:
        settings.fp32_precision = "none"
    want = x.double() @ x.double()
    return float((got - want).norm() / want.norm()) < _EXACT


def _intel() -> bool:
    """Whether this is Intel's processor; True, too, where the system does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
