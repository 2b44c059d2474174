"""Which kernel a quantized linear gets, and for how many rows.

On CUDA by trying: `fastest` times those that fit and are right. On a CPU by rule, so that a model
gets the same one every time it is loaded: `avx2` where torch's vector code is AVX2's
(measured there, 4096 x 11008 by one row: 1.4 ms, `torch-int4` 3.9), `torch-int4` with AVX-512,
whose codes torch multiplies as fast as memory brings them; the other one where that does not fit.
Where they and `dequantize` meet depends on the machine: `measure_few_tokens` finds it.

Left out on purpose: the kernels (`kernels.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .avx2 import unavailable
from .devices import on_its_device
from .errors import RunError, said_of
from .kernels import ANY_ROWS, FEW_TOKENS, PRODUCTS, QuantLinear, misfit
from .timings import device_seconds, fastest_of

_WRONG = 0.02  # of the norm: codes mixed up give far more, rounding to bfloat16 far less
_WORTH = 1 << 20  # weights below which no measurement says anything
_MANY = 256  # rows: where `avx2` is still quicker, it is for more

_EXACT = "float32 was asked for, and other kernels round their inputs"


def on_cpu(linear: QuantLinear, exact: bool) -> tuple[str, str | None]:
    """The kernel that `auto` gives a linear on a CPU.

    Args:
        exact: whether float32 was asked for, which leaves what rounds its inputs alone.

    Returns:
        (the kernel, why it is `dequantize`: what speaks against `torch-int4`, and against `avx2`
        where that is something else; or None).
    """
    if exact:
        return "dequantize", _EXACT
    against = {
        "torch-int4": misfit(linear, "torch-int4") or int4_unwise(linear.device),
        "avx2": misfit(linear, "avx2"),
    }
    for name in ("avx2", "torch-int4") if avx2_first() else ("torch-int4", "avx2"):
        if against[name] is None:
            return name, None
    first, second = against.values()
    return "dequantize", first if first == second else f"{first}; not avx2: {second}"


def faster_missing() -> str | None:
    """What speaks against the kernel that would be the faster here, or None."""
    why = unavailable() if avx2_first() else None
    return why and f"avx2, which is faster on this processor, is not taken: {why}"


def avx2_first() -> bool:
    """Whether `avx2` is the faster of both here, where both fit."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def fastest(
    linear: QuantLinear,
    dtype: torch.dtype,
    without: Sequence[str] = (),
    compiled: bool = False,
) -> tuple[str, str]:
    """The fastest kernel for one row that is right, by trying those that fit; for accelerators.

    Right is: within 2% (of norms) of the float32 product with the dequantized weights. A kernel
    that raises is not right.

    Args:
        without: kernels that are not tried.
        compiled: whether decoding will be a graph that the device replays: then its own time
            counts, and otherwise also what the host takes to launch it, which is often more.

    Returns:
        (the kernel, left in use; a line with every candidate's time or what is wrong with it).
    """
    x = _drawn(1, linear, dtype)
    want = x.float() @ linear.dense(torch.float32).weight.T
    times: dict[str, float] = {}
    said = []
    for name in PRODUCTS:
        if why := "not tried" if name in without else misfit(linear, name):
            said.append(f"{name}: {why}")
            continue
        try:
            linear.use(name, dtype)
            with torch.inference_mode():
                got = _product(linear, x)
                off = float((got.float() - want).norm() / want.norm().clamp(min=1e-30))
                if not off < _WRONG:
                    said.append(f"{name}: wrong, off by {off:.2g}")
                    continue
                if compiled:
                    with on_its_device(x):
                        times[name] = device_seconds(lambda: linear(x), 5, x.device)
                else:
                    times[name] = fastest_of(lambda: linear(x), 5, device=x.device)
        except Exception as error:  # whatever a compiler or a driver raises
            said.append(f"{name}: {said_of(error)}")
            continue
        said.append(f"{name}: {1e6 * times[name]:.0f} us")
    if not times:
        shape = f"{linear.in_features} x {linear.out_features}"
        raise RunError(f"kernels for {shape}", expected="one that is right", got="; ".join(said))
    best = min(times, key=lambda name: times[name])
    linear.use(best, dtype)
    return best, "; ".join(said)


def _product(linear: QuantLinear, x: Tensor) -> Tensor:
    """Without the bias: beside a large one it would be lost in rounding."""
    bias, linear.bias = linear.bias, None
    try:
        product: Tensor = linear(x)
    finally:
        linear.bias = bias
    return product


def _drawn(rows: int, linear: QuantLinear, dtype: torch.dtype) -> Tensor:
    """Inputs to try a kernel with; torch's own generator, by which users seed, is left alone."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, linear.in_features, generator=draw, device="cpu")
    return drawn.to(linear.device, dtype)


def int4_unwise(device: torch.device) -> str | None:
    """Why `auto` leaves `torch-int4` alone on this device although it would run, or None."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "torch has no vector code for it on this CPU"
    return None


def measure_few_tokens(linear: QuantLinear, dtype: torch.dtype) -> int:
    """Rows up to which the linear's kernel is no slower than `dequantize`.

    A power of two, up to 32 for `torch-int4`; for `avx2` up to 128, or `ANY_ROWS` where it is no
    slower for 256. One row always goes through the kernel, and a small linear is not measured.

    Args:
        linear: runs under one of the two; best a wide one. dtype: of its inputs.
    """
    most = FEW_TOKENS if linear.kernel == "torch-int4" else _MANY
    few = most
    if linear.in_features * linear.out_features >= _WORTH:
        with torch.inference_mode():
            while few > 1:
                x = _drawn(few, linear, dtype)
                kernel = fastest_of(partial(linear._by_held, x), 3, device=x.device)
                if kernel <= fastest_of(partial(linear._by_tiles, x), 3, device=x.device):
                    break
                few //= 2
    return ANY_ROWS if few == _MANY else few
