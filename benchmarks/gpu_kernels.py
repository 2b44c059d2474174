"""`gpu.py`'s step `kernels`: every kernel of a linear, right before it is timed, and what stands
beside it.

Left out: whole models (`qquant profile`), which the suite's other steps measure.
"""

from __future__ import annotations

from typing import Any

import torch

from qquant.bandwidth import copy_bandwidth
from qquant.devices import choose_dtype
from qquant.kernel_choice import fastest
from qquant.kernels import QuantLinear, misfit
from qquant.pack import Packed, pack
from qquant.timings import device_seconds


def measure(place: str, tiny: bool) -> dict[str, Any]:
    """Every kernel of a linear, right before timed: `fastest` by shape, bits and group.

    `eager` has what the host takes in it, `compiled` is the device's time, from cold caches. Beside
    them what one and 2048 rows take in a plain linear of the same shape, and 2048 in this one.
    """
    device = torch.device(place)
    dtype = choose_dtype(None, device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(128, 384)] if tiny else [(4096, 4096), (4096, 11008), (11008, 4096)]
    found = {}
    for (k, n), bits, group in [(s, b, g) for s in shapes for b in (4, 8) for g in (32, 128)]:
        codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(n, k // group, generator=generator) + 0.1) / 100
        zeros = torch.full_like(scales, 2 ** (bits - 1)).to(torch.uint8)
        packed = Packed(
            *(t.to(device) for t in pack(codes, scales, zeros, bits=bits, group_size=group))
        )
        linear = QuantLinear(packed, bits=bits)
        row: dict[str, Any] = {"rebuilt": linear.form}
        for way in ("eager", *(["compiled"] if device.type == "cuda" else [])):
            best, said = fastest(linear, dtype, compiled=way == "compiled")
            row[way] = {"fastest": best, "tried": said}
        if device.type == "cuda":
            row["us"] = beside_plain(linear, dtype)
            if bits == 4 and group == 128:
                row["tiles_us"] = tiles(linear, dtype)
        found[f"{k} x {n}, {bits} bits, groups of {group}"] = row
    return {"kernels": found, "copy_bytes_per_s": copy_bandwidth(device)}


def beside_plain(linear: QuantLinear, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds of the device: a plain linear of the same weights, and many rows in this one."""
    plain, device = linear.dense(dtype), linear.device
    linear.use("dequantize")
    x = torch.randn(2048, linear.in_features, device=device, dtype=dtype)
    calls = {
        "plain, 1 row": lambda: plain(x[:1]),
        "plain, 2048 rows": lambda: plain(x),
        "dequantize, 2048 rows": lambda: linear(x),
    }
    with torch.inference_mode():
        return {name: 1e6 * device_seconds(call, 5, device) for name, call in calls.items()}


def tiles(linear: QuantLinear, dtype: torch.dtype) -> dict[str, float | str]:
    """Microseconds of `triton-int4` for one row, by outputs, words and warps of a program: from
    this follows whether the rule in `int4_triton._tile` is the best one."""
    if misfit(linear, "triton-int4"):
        return {}
    from qquant import int4_triton

    x = torch.randn(1, linear.in_features, device=linear.device, dtype=dtype)
    linear.use("triton-int4")
    found: dict[str, float | str] = {}
    rule = int4_triton._tile
    for tile in ((16, 128, 8), (16, 256, 16), (32, 64, 4), (32, 64, 8), (32, 128, 8), (32, 256, 16),
                 (64, 64, 8), (64, 128, 16)):  # fmt: skip
        int4_triton._tile = lambda *_, tile=tile: tile
        try:
            with torch.inference_mode():
                found[str(tile)] = 1e6 * device_seconds(lambda: linear(x), 5, linear.device)
        except Exception as error:  # whatever a compiler or a driver raises
            found[str(tile)] = f"{type(error).__name__}: {error}"[:200]
        finally:
            int4_triton._tile = rule
    return found
