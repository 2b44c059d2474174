"""Causal attention of whole samples in 16-bit integers, for a CPU that `int16.py` is for.

Torch's kernel reaches a third of the rate of its own products there, in float32. Here keys and
values become integers once (`int16_ir.py` says how exactly), then each thread takes some queries
through all keys that they see, with scores and shares in its caches.

Left out on purpose: what the functions compute (`int16_attention_ir.py`), who attends so
(`attention.py`), masks, decoding, gradients.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import llvm_code, pool
from .errors import RunError
from .int16_attention_ir import Writer, room
from .int16_ir import CHUNK, WIDE, pairs_of
from .llvm_code import Program
from .scratch import scratch

_NEAR = 4e-4  # of the norm, of a result that is right


@cache
def unavailable() -> str | None:
    """Why nothing of this runs in this process, or None; tried once, on small tensors."""
    return llvm_code.against_results(_trial, _NEAR)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these may go to `causal_attention`."""
    width = query.shape[-1]
    return (
        all(
            t.dim() == 4
            and t.dtype == torch.float32
            and t.device.type == "cpu"
            and t.stride(-1) == 1
            and not t.is_neg()
            for t in (query, key, value)
        )
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and key.shape[2:] == query.shape[2:]
        and query.numel() > 0
        and width % WIDE == 0
        and width <= CHUNK
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Each query with the keys up to its own.

    Of later ones within the same 256 only the largest values are felt, in the rounding.

    Args:
        query: [samples, heads, n, width] float32. key, value: [samples, heads or a divisor, n,
            width], such that it `takes` them. scaling: of the scores.

    Returns:
        [samples, n, heads, width] float32.

    Raises:
        RunError: they are not such.
    """
    if not takes(query, key, value):
        raise RunError(
            "attention in 16-bit integers",
            expected="what `int16_attention.py` says, on the CPU",
            got=", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in (query, key, value)),
        )
    samples, all_heads, n, width = query.shape
    heads = key.shape[1]
    panels = -(-n // WIDE)
    of_heads = (
        ("keys", torch.int16, panels * WIDE * width),
        ("key steps", torch.float32, panels * WIDE),
        ("values", torch.int16, 2 * pairs_of(n) * width),
        ("value steps", torch.float32, -(-n // CHUNK) * width),
    )
    held = [scratch(kind, dtype, samples * heads * size) for kind, dtype, size in of_heads]
    prepared = [t.data_ptr() for t in held]
    program, given = _compiled(), (key.data_ptr(), value.data_ptr(), *prepared)
    strides = (*key.stride()[:3], *value.stride()[:3])
    program.run("prepare", *given, samples, heads, n, width, *strides)
    size = room(n, width)
    own = scratch("attention", torch.float32, torch.get_num_threads() * size)
    out = pool.empty(samples, n, all_heads, width)
    factor = torch.tensor([scaling], dtype=torch.float32, device="cpu")
    places = [t.data_ptr() for t in (own, out, factor)]
    counts = samples, heads, n, width, all_heads, *query.stride()[:3], size
    program.run("attend", query.data_ptr(), *prepared, *places, *counts)
    return out


@cache
def _compiled() -> Program:
    return Program(Writer().text())


def _trial() -> list[float]:
    """How far each result is off, of the norm."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    off = []
    for n in (1, 37, CHUNK + 9):
        query, key, value = (
            torch.randn(2, heads, n, 32, generator=draw, device="cpu", dtype=torch.float32)
            for heads in (4, 2, 2)
        )
        k, v = (t.double().repeat_interleave(2, 1) for t in (key, value))
        scores = query.double() @ k.transpose(2, 3) * 0.3
        later = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(1)
        want = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)
        got = causal_attention(query, key, value, 0.3)
        off.append(float((got - want).norm() / want.norm()))
    return off
