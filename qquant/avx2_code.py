"""Machine code for products of few rows with packed codes, on x86-64 processors with AVX2.

Torch's own int4 product has the vector width of the processor, but multiplies in float32 by codes
that it converts one by one: with AVX2 it is held up by arithmetic long before memory. Here inputs
become 16-bit integers, and one instruction (`vpmaddwd`) multiplies sixteen of them by codes and
adds them in pairs, exactly; what is left is to shift and mask. That is written in LLVM's language
and compiled by llvmlite in this process, in some hundredths of a second, since neither a compiler
nor built code for every platform can be asked of whoever installs this. The system has to let a
process run what it has written, which is asked first.

What the two functions do is in `avx2_ir.py`.

Threads are torch's: `GOMP_parallel`, the entry of the OpenMP library that torch itself is linked
to. A pool of one's own would compete with torch's threads, which wait by spinning.

Left out on purpose: how weights are laid out (`avx2.py`), other instruction sets.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .avx2_ir import FIELDS, LANES, WORD, Writer
from .errors import RunError

_ROWS = 128  # at a time, whose integers stay in a cache
FEATURES = ("avx2", "fma", "f16c")


@dataclass(frozen=True)
class Code:
    """The compiled functions.

    Attributes:
        quantize: takes addresses of inputs (float32), pairs, steps and totals (as in `FIELDS`),
            then how many groups there are and the words of each.
        address: of `multiply`.
        engine: LLVM's, which owns the code.
    """

    quantize: Callable[[int, int, int, int, int, int], None]
    address: int
    engine: Any

    def multiply(self, *given: int) -> None:
        """`FIELDS`, in as many threads as torch computes with."""
        held = (ctypes.c_int64 * len(FIELDS))(*given)
        threads().run(self.address, ctypes.addressof(held), torch.get_num_threads(), 0)


class Threads(NamedTuple):
    """Of the OpenMP library that torch is linked to.

    Attributes:
        run: calls a function in all of its threads.
        number, total: addresses of what tells a thread its number, and how many there are.
    """

    run: Any
    number: int
    total: int


@cache
def threads() -> Threads:
    """Torch's.

    Raises:
        OSError, AttributeError: torch is built otherwise.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    if library is None:
        raise OSError("torch has no libtorch_cpu")
    linked = ctypes.CDLL(str(library))  # looks names up in what it is linked to, as well
    run = linked.GOMP_parallel
    run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    run.restype = None
    return Threads(run, _address(linked.omp_get_thread_num), _address(linked.omp_get_num_threads))


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def lacking() -> list[str]:
    """Which of `FEATURES` this processor is without.

    Raises:
        ImportError: there is no llvmlite.
    """
    import llvmlite.binding as llvm

    here = llvm.get_host_cpu_features()
    return [name for name in FEATURES if not here.get(name)]


def may_run_code() -> bool:
    """Whether the system lets a process run what it has written; some services may not.

    LLVM does not look: there its code would end the process.
    """
    size = mmap.PAGESIZE
    with mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE) as page:
        held = ctypes.c_char.from_buffer(page)
        change = ctypes.CDLL(None).mprotect
        change.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        done = bool(change(ctypes.addressof(held), size, mmap.PROT_READ | mmap.PROT_EXEC) == 0)
        del held  # the page cannot be given back before
    return done


@cache
def compiled(bits: int, vectors: int, half: bool) -> Code:
    """The functions for codes of so many bits.

    Args:
        bits: 2, 4 or 8.
        vectors: width of a block of outputs, in vectors of 8.
        half: whether scales are float16; otherwise they are float32.

    Raises:
        ImportError: there is no llvmlite.
        OSError, AttributeError: as `threads`.
        RuntimeError: LLVM refuses.
    """
    import llvmlite.binding as llvm

    own = threads()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol("qquant_thread", own.number)
    llvm.add_symbol("qquant_threads", own.total)
    module = llvm.parse_assembly(Writer(bits, vectors, half).text())
    module.verify()
    # By features, not by the processor's name, which a virtual machine may have less than.
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu="x86-64", features=",".join(f"+{name}" for name in FEATURES), opt=3
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2)
    quantize = kind(engine.get_function_address("quantize"))
    return Code(quantize, engine.get_function_address("multiply"), engine)


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
    code.multiply(*given[1:], *held, out.data_ptr(), blocks, groups, size, rows)
    return out
