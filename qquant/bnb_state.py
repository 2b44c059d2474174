"""One linear's weight to bitsandbytes' tensors and back: bitsandbytes rounds, this module stores.

The arithmetic of quantizing is bitsandbytes' own, called on the stored weight and nothing else. No
module is built and nothing runs forward, so the fault of 0.50.2 on CPUs with AVX512-BF16 (a forward
repacks the weight and leaves its scales transposed and in bfloat16; saving then writes them so)
cannot touch what is written here.

Blocks of 64 weights, and rows at 8 bits, are independent, so a weight goes through in slices of
rows: bitsandbytes' own temporaries are some twenty bytes per weight on a CPU.

Dequantizing is written out here, from the format (`bnb_layout.py`) and without bitsandbytes: a
directory can be verified where bitsandbytes is not installed, and two readings are compared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bnb_layout import decode_state, encode_state, state_key, state_size
from .bnb_spec import BLOCK, NESTED_BLOCK, BnbSpec
from .errors import CheckpointError, MissingDependencyError, SpecError
from .headers import TensorPlan, dtype_name

OLDEST = (0, 50)  # the first bitsandbytes with a CPU backend for all of this
_SLICE = 1 << 22  # weights at a time
_CURE = "pip install 'bitsandbytes>=0.50' (or 'qquant[bnb]')"


class Quantized(NamedTuple):
    """One linear, quantized.

    Attributes:
        parts: its tensors on the CPU, by the rest of their name (`weight`, `SCB`, ...).
        loss: the squared error of the weight, summed.
        norm: the squared weight, summed.
    """

    parts: dict[str, Tensor]
    loss: float
    norm: float


def need_bitsandbytes() -> Any:
    """The module `bitsandbytes.functional`, imported now.

    Raises:
        MissingDependencyError: it is not installed, too old, or does not load here.
    """
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            "bitsandbytes", expected="installed, 0.50 or later", got="not installed", cure=_CURE
        ) from error
    numbers = tuple(int(n) for n in found.split(".")[:2] if n.isdigit())
    if numbers < OLDEST:
        raise MissingDependencyError(
            "bitsandbytes", expected="0.50 or later", got=found, cure=_CURE
        )
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # a broken native library raises what it likes
        raise MissingDependencyError(
            f"bitsandbytes {found}",
            expected="a package that can be imported",
            got=(str(error).splitlines() or [type(error).__name__])[0][:200],
            cure=_CURE,
        ) from error


def linear_plan(
    name: str, shape: tuple[int, int], spec: BnbSpec, dtype: torch.dtype
) -> list[TensorPlan]:
    """The tensors of the linear `name`, bias apart.

    Args:
        shape: [N, K] of its weight.
        dtype: that the weight has when it is quantized.

    Raises:
        SpecError: the weight does not fill whole elements of the storage dtype.
    """
    n, k = shape
    if spec.method == "int8":
        return [
            TensorPlan(f"{name}.weight", "I8", shape),
            TensorPlan(f"{name}.SCB", "F32", (n,)),
            TensorPlan(f"{name}.weight_format", "U8", ()),
        ]
    storage = getattr(torch, spec.quant_storage)
    if n * k % (2 * storage.itemsize):
        raise SpecError(
            f"{name}.weight: {n} x {k} weights",
            expected=f"a multiple of {2 * storage.itemsize}, which fill {spec.quant_storage}",
            got=n * k,
            cure="Use --quant-storage uint8"
            if n * k % 2 == 0
            else f"Leave it in 16 bits: --skip-module {name}",
        )
    blocks = -(-n * k // BLOCK)
    words = n * k // (2 * storage.itemsize)
    kept = "U8" if spec.double_quant else "F32"
    size = state_size(spec.method, _name(dtype), shape, nested=spec.double_quant)
    plan = [
        TensorPlan(f"{name}.weight", dtype_name(storage), (words, 1)),
        TensorPlan(f"{name}.weight.absmax", kept, (blocks,)),
        TensorPlan(f"{name}.weight.quant_map", "F32", (16,)),
        TensorPlan(f"{name}.{state_key(spec.method)}", "U8", (size,)),
    ]
    if spec.double_quant:
        nested = -(-blocks // NESTED_BLOCK)
        plan += [
            TensorPlan(f"{name}.weight.nested_absmax", "F32", (nested,)),
            TensorPlan(f"{name}.weight.nested_quant_map", "F32", (256,)),
        ]
    return plan


def quantize_weight(weight: Tensor, spec: BnbSpec, device: torch.device) -> Quantized:
    """Rounds a weight as bitsandbytes does when a model is loaded with its config.

    Args:
        weight: [N, K] float16, bfloat16 or float32, finite (for int8 also in float16); the dtype is
            kept in the result, and is what a 4-bit weight comes out in again.
        device: where bitsandbytes works; the result is the same bits on one kind of device.
    """
    functional = need_bitsandbytes()
    if spec.method == "int8":
        return _quantize_rows(functional, weight, device)
    storage = getattr(torch, spec.quant_storage)
    codes, scales = [], []
    table = None
    for start, stop in _slices(*weight.shape):
        part, state = functional.quantize_4bit(
            weight[start:stop].contiguous().to(device),
            quant_type=spec.method,
            blocksize=BLOCK,
        )
        codes.append(part.cpu())
        scales.append(state.absmax.cpu())
        table = state.code.cpu().float()
    assert table is not None  # a weight has rows
    packed, absmax = torch.cat(codes), torch.cat(scales)
    parts = {"weight": packed.view(-1).view(storage).unsqueeze(1), "weight.quant_map": table}
    offset = None
    if spec.double_quant:
        mean = absmax.to(device).mean()
        absmax, nested = functional.quantize_blockwise(
            absmax.to(device) - mean, blocksize=NESTED_BLOCK
        )
        absmax, offset = absmax.cpu(), mean.item()
        parts["weight.nested_absmax"] = nested.absmax.cpu()
        parts["weight.nested_quant_map"] = nested.code.cpu().clone()
    raw = encode_state(spec.method, _name(weight.dtype), tuple(weight.shape), offset)
    parts["weight.absmax"] = absmax
    parts[state_key(spec.method)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return Quantized(parts, *_error(parts, weight))


def _quantize_rows(functional: Any, weight: Tensor, device: torch.device) -> Quantized:
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8)
    scales = torch.empty(n, dtype=torch.float32)
    for start, stop in _slices(n, k):
        half = weight[start:stop].to(device=device, dtype=torch.float16).contiguous()
        part, rows, _ = functional.int8_vectorwise_quant(half)
        codes[start:stop], scales[start:stop] = part.cpu(), rows.cpu()
    form = torch.zeros((), dtype=torch.uint8)
    parts = {"weight": codes, "SCB": scales, "weight_format": form}
    return Quantized(parts, *_error(parts, weight))


def dequantize_rows(parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the weight that the parts stand for, float32 [stop - start, K].

    At 4 bits the values are those of the dtype that the parts name, which readers get.

    Raises:
        CheckpointError: the JSON of a 4-bit linear is none.
    """
    if "SCB" in parts:
        scale = parts["SCB"][start:stop].float().unsqueeze(1) / 127
        return parts["weight"][start:stop].float() * scale
    state = state_of(parts)
    k, block = state["shape"][1], state["blocksize"]
    # Whole blocks around the rows asked for: rows need not begin at one.
    low, high = start * k // block, -(-stop * k // block)
    flat = parts["weight"].reshape(-1).view(torch.uint8)
    some = flat[low * block // 2 : high * block // 2]
    codes = torch.stack((some >> 4, some & 15), dim=1).reshape(-1)
    values = parts["weight.quant_map"][codes.long()]
    scale = absmax_of(parts, state, low, high).repeat_interleave(block)[: values.numel()]
    values = (values * scale).to(getattr(torch, state["dtype"])).float()
    first = start * k - low * block
    return values[first : first + (stop - start) * k].view(stop - start, k)


def absmax_of(parts: Mapping[str, Tensor], state: Mapping[str, Any], low: int, high: int) -> Tensor:
    """Scales of the blocks `low` to `high`, float32, undone where they are quantized themselves."""
    absmax = parts["weight.absmax"][low:high]
    if "weight.nested_absmax" not in parts:
        return absmax.float()
    index = torch.arange(low, low + absmax.numel()) // state["nested_blocksize"]
    values = parts["weight.nested_quant_map"][absmax.long()]
    nested = values * parts["weight.nested_absmax"][index]
    return nested + float(state["nested_offset"])


def state_of(parts: Mapping[str, Tensor], name: str = "weight") -> dict[str, Any]:
    """The JSON of a 4-bit linear.

    Raises:
        CheckpointError: there is none, or it is none.
    """
    for method in ("nf4", "fp4"):
        if state_key(method) in parts:
            return decode_state(name, bytes(parts[state_key(method)].tolist()))
    raise CheckpointError(f"{name}: quant_state", expected="a tensor of its own", got="none")


def shape_of(parts: Mapping[str, Tensor], name: str = "weight") -> tuple[int, int]:
    """[N, K] of the float weight.

    Raises:
        CheckpointError: as in `state_of`.
    """
    n, k = parts["weight"].shape if "SCB" in parts else state_of(parts, name)["shape"]
    return int(n), int(k)


def row_slices(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Rows of an [n, k] weight, a bounded number of weights at a time."""
    step = max(1, _SLICE // k)
    for start in range(0, n, step):
        yield start, min(start + step, n)


def _slices(n: int, k: int) -> Iterator[tuple[int, int]]:
    """As `row_slices`, each but the last a whole number of blocks."""
    whole = BLOCK // math.gcd(k, BLOCK)
    step = max(whole, _SLICE // k // whole * whole)
    for start in range(0, n, step):
        yield start, min(start + step, n)


def _error(parts: Mapping[str, Tensor], weight: Tensor) -> tuple[float, float]:
    """(summed squared error, summed squared weight)."""
    loss = norm = 0.0
    for start, stop in row_slices(*weight.shape):
        want = weight[start:stop].float()
        norm += float(torch.linalg.vector_norm(want)) ** 2
        got = dequantize_rows(parts, start, stop)
        loss += float(torch.linalg.vector_norm(got.sub_(want))) ** 2
    return loss, norm


def left_in_16_bit(
    shapes: Mapping[str, Sequence[int]], quantized: set[str], apart: set[str]
) -> list[str]:
    """Parameters that multiply activations and are not quantized: what a user might not expect.

    Experts of a mixture held as one tensor of three dimensions are the case that bitsandbytes
    passes over in silence.

    Args:
        shapes: of the model's parameters, by name.
        quantized: names of the linears that are.
        apart: parameters known to stay (embedding, a head or linears left out by name).
    """
    return [
        name
        for name, shape in shapes.items()
        if len(shape) >= 2 and name not in apart and name.removesuffix(".weight") not in quantized
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
