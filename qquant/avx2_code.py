"""Machine code for products of few rows with packed codes, on x86-64 processors with AVX2.

Torch's own int4 product has the vector width of the processor, but multiplies in float32 by codes
that it converts one by one: with AVX2 it is held up by arithmetic long before memory. Here inputs
become 16-bit integers, and one instruction (`vpmaddwd`) multiplies sixteen of them by codes and
adds them in pairs, exactly; what is left is to shift and mask.

What the two functions do is in `avx2_ir.py`, how they are compiled and run in `llvm_code.py`.

Left out on purpose: how weights are laid out (`avx2.py`), other instruction sets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .avx2_ir import LANES, WORD, Writer
from .errors import RunError
from .llvm_code import Program

_ROWS = 128  # at a time, whose integers stay in a cache


@dataclass(frozen=True)
class Code:
    """The compiled functions.

    Attributes:
        quantize: takes addresses of inputs (float32), pairs, steps and totals (as in `FIELDS`),
            then how many groups there are and the words of each.
        program: which has `multiply`, of `FIELDS`.
    """

    quantize: Callable[[int, int, int, int, int, int], None]
    program: Program


@cache
def compiled(bits: int, vectors: int, half: bool) -> Code:
    """The functions for codes of so many bits.

    Args:
        bits: 2, 4 or 8.
        vectors: width of a block of outputs, in vectors of 8.
        half: whether scales are float16; otherwise they are float32.

    Raises:
        ImportError, OSError, AttributeError, RuntimeError: as of a `Program`.
    """
    program = Program(Writer(bits, vectors, half).text())
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2)
    return Code(kind(program.address["quantize"]), program)


def product(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Inputs by weights.

    Args:
        x: float32 [M, K]. words, scales, zeros, bits: as of an `avx2.Avx2`. All on the CPU.

    Returns:
        float32 [M, N].

    Raises:
        RunError: they are not of one linear, or not on the CPU.
    """
    x = x.contiguous().resolve_neg()
    _check(x, words, scales, zeros, bits)
    parts = [_product(part, words, scales, zeros, bits) for part in torch.split(x, _ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    (blocks, groups, width), runs = scales.shape, words.shape[1]
    held = x, words, scales, zeros
    if not (
        all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in held)
        and (x.dtype, words.dtype, zeros.dtype) == (torch.float32, torch.int32, torch.uint8)
        and scales.dtype in (torch.float16, torch.float32)
        and zeros.shape == scales.shape
        and words.shape == (blocks, runs, width)
        and runs % groups == 0
        and width % LANES == 0
        and x.shape == (x.shape[0], runs * WORD // bits)
    ):
        raise RunError(
            "kernel avx2",
            expected="inputs, codes, scales and zero points of one linear, on the CPU",
            got=", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in held),
        )


def _product(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    blocks, groups, width = scales.shape
    rows, size = x.shape[0], words.shape[1] // groups
    code = compiled(bits, width // LANES, scales.dtype == torch.float16)
    # By name, since torch's defaults are the user's to set.
    pairs = torch.empty(x.shape, dtype=torch.int16, device="cpu")
    steps = torch.empty(rows, groups, dtype=torch.float32, device="cpu")
    totals = torch.empty(rows, groups, dtype=torch.int32, device="cpu")
    out = torch.empty(rows, blocks * width, dtype=torch.float32, device="cpu")
    given = x.data_ptr(), pairs.data_ptr(), steps.data_ptr(), totals.data_ptr()
    code.quantize(*given, rows * groups, size)
    held = words.data_ptr(), scales.data_ptr(), zeros.data_ptr()
    fields = *given[1:], *held, out.data_ptr(), blocks, groups, size, rows
    code.program.run("multiply", *fields)
    return out
