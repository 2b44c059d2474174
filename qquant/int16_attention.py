"""Causal attention of whole samples in 16-bit integers, on a CPU.

Of float32 with AVX2, for a CPU that `int16.py` is for, where torch's kernel reaches a third of the
rate of its own products. Of bfloat16 with AVX-512 and VNNI, which multiplies 16-bit integers as
fast as bfloat16, and 16 times as exactly. Keys and values become integers once (`int16_ir.py` says
how exactly), then each thread takes some queries through all keys that they see, with scores and
shares in its caches.

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
from .int16_ir import AVX2, CHUNK, VNNI, pairs_of
from .llvm_code import Program
from .scratch import scratch

_FORMS = {torch.float32: AVX2, torch.bfloat16: VNNI}
# Of the norm, of a result that is right.
_NEAR = {torch.float32: 4e-4, torch.bfloat16: 4e-3}


@cache
def unavailable(dtype: torch.dtype) -> str | None:
    """Why nothing of this runs in this process, or None; tried once, on small tensors.

    Args:
        dtype: of queries, keys and values, float32 or bfloat16.
    """
    if _FORMS[dtype] is VNNI and (why := llvm_code.against_vnni()):
        return why
    return llvm_code.against_results(lambda: _trial(dtype), _NEAR[dtype])


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these may go to `causal_attention`."""
    width = query.shape[-1]
    return (
        query.dtype in _FORMS
        and all(
            t.dim() == 4
            and t.dtype == query.dtype
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
        and width % _FORMS[query.dtype].wide == 0
        and width <= CHUNK
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Each query with the keys up to its own.

    Of later ones within the same 256 only the largest values are felt, in the rounding.

    Args:
        query: [samples, heads, n, width], float32 or bfloat16. key, value: [samples, heads or a
            divisor, n, width], such that it `takes` them. scaling: of the scores.

    Returns:
        [samples, n, heads, width], of their dtype.

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
    form, half = _FORMS[query.dtype], query.dtype == torch.bfloat16
    keys = -(-n // form.wide) * form.wide
    of_heads = (
        ("keys", torch.int16, keys * width),
        ("key steps", torch.float32, keys),
        ("values", torch.int16, 2 * pairs_of(n) * width),
        ("value steps", torch.float32, -(-n // CHUNK) * width),
    )
    held = [scratch(kind, dtype, samples * heads * size) for kind, dtype, size in of_heads]
    prepared = [t.data_ptr() for t in held]
    program, given = _compiled(query.dtype), (key.data_ptr(), value.data_ptr(), *prepared)
    strides = (*key.stride()[:3], *value.stride()[:3])
    program.run("prepare", *given, samples, heads, n, width, *strides)
    size = room(form, n, width, half)
    own = scratch("attention", torch.float32, torch.get_num_threads() * size)
    out = pool.empty(samples, n, all_heads, width, dtype=query.dtype)
    factor = torch.tensor([scaling], dtype=torch.float32, device="cpu")
    places = [t.data_ptr() for t in (own, out, factor)]
    counts = samples, heads, n, width, all_heads, *query.stride()[:3], size
    program.run("attend", query.data_ptr(), *prepared, *places, *counts)
    return out


@cache
def _compiled(dtype: torch.dtype) -> Program:
    form = _FORMS[dtype]
    text = Writer(form, half=dtype == torch.bfloat16).text()
    return Program(text, llvm_code.VNNI if form is VNNI else llvm_code.FEATURES)


def _trial(dtype: torch.dtype) -> list[float]:
    """How far each result is off, of the norm."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    off = []
    for n in (1, 37, CHUNK + 9):
        query, key, value = (
            torch.randn(2, heads, n, 32, generator=draw, device="cpu", dtype=torch.float32)
            for heads in (4, 2, 2)
        )
        query, key, value = (t.to(dtype) for t in (query, key, value))
        k, v = (t.double().repeat_interleave(2, 1) for t in (key, value))
        scores = query.double() @ k.transpose(2, 3) * 0.3
        later = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(1)
        want = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)
        got = causal_attention(query, key, value, 0.3)
        off.append(float((got - want).norm() / want.norm()))
    return off
