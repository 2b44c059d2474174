"""Machine code that this process writes for its processor by llvmlite, and torch's threads run.

Neither a compiler nor built code for every platform can be asked of whoever installs this; LLVM's
code generator comes as a package and takes some tenths of a second. The system has to let a process
run what it has written, which is asked first: LLVM does not look, and would end the process.

Threads are torch's: `GOMP_parallel`, the entry of the OpenMP library that torch itself is linked
to. A pool of one's own would compete with torch's threads, which wait by spinning.

Left out on purpose: what the functions compute (`avx2_code.py`, `fused.py`, `int8.py`,
`int8_weight.py`, `int16.py`, `int16_attention.py`, `solver_code.py`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import said_of
from .llvm_ir import THREAD, THREADS

FEATURES = ("avx2", "fma", "f16c")  # that all of the code may use
_NOT_NEEDED = 4  # MADV_DONTNEED
WIDER = ("avx512f", "avx512bw", "avx512dq", "avx512vl")  # what is used where it is there
# With which 8- and 16-bit integers are multiplied and added to earlier sums.
VNNI = (*FEATURES, *WIDER, "avx512vnni")
_AMX = "amx-bf16"
# Newer LLVMs make two instructions of one of those unless told that it is fast; older ones do not
# know the word, and say so.
_ONE_INSTRUCTION, _KNOWS_THE_WORD = "fast-dpwssd", 20


class Threads(NamedTuple):
    """Of the OpenMP library that torch is linked to.

    Attributes:
        run: calls a function in all of its threads.
        number, total: addresses of what tells a thread its number, and how many there are.
    """

    run: Any
    number: int
    total: int


class Program:
    """Compiled functions.

    Args:
        text: of the module, in LLVM's language.
        features: of the processor, that the code may use.

    Raises:
        ImportError: there is no llvmlite.
        OSError, AttributeError: as `threads`.
        RuntimeError: LLVM refuses.
    """

    def __init__(self, text: str, features: tuple[str, ...] = FEATURES) -> None:
        import llvmlite.binding as llvm

        own = threads()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.add_symbol(THREAD, own.number)
        llvm.add_symbol(THREADS, own.total)
        module = llvm.parse_assembly(text)
        module.verify()
        # By features, not by the processor's name, which a virtual machine may have less than.
        if features == VNNI and llvm.llvm_version_info[0] >= _KNOWS_THE_WORD:
            features = (*features, _ONE_INSTRUCTION)
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu="x86-64", features=",".join(f"+{name}" for name in features), opt=3
        )
        self._engine = llvm.create_mcjit_compiler(module, machine)  # owns the code
        self._engine.finalize_object()
        # Of its functions. LLVM is not asked again: that takes longer than a small call.
        self.address: dict[str, int] = {
            function.name: self._engine.get_function_address(function.name)
            for function in module.functions
            if not function.is_declaration
        }
        _give_back()

    def run(self, name: str, *fields: int, count: int | None = None) -> None:
        """Calls one with the address of its fields, in `count` threads; None for torch's number."""
        held = (ctypes.c_int64 * (len(fields) + 1))(*fields, 0)  # the last for `Emitter.each`
        count = torch.get_num_threads() if count is None else count
        threads().run(self.address[name], ctypes.addressof(held), count, 0)


def _give_back() -> None:
    """Takes the pages of LLVM's own code out of this process: 60 MB that nobody reads now.

    They stay in the system's cache of files, and come back where LLVM is asked for something more.
    Only those that nothing can have been written to: other parts of the library are this process's
    own. Linux alone.
    """
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    give = ctypes.CDLL(None).madvise
    give.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    part: tuple[int, int] | None = None  # of the library, that cannot be written to
    for line in lines:
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(place, 16) for place in first.split("-"))
            own = line.endswith("/libllvmlite.so") and "w" not in rest[:4]
            part = (begin, end - begin) if own else None
        elif first == "Anonymous:" and part and rest.split() == ["0", "kB"]:  # none is a copy
            give(*part, _NOT_NEEDED)


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


@cache
def unavailable() -> str | None:
    """Why no such code runs in this process, or None."""
    if platform.machine() == "x86_64" and importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed (pip install llvmlite)"
    try:
        if why := unfit():
            return why
        threads()
    except Exception as error:  # an llvmlite that does not load, a torch that is built otherwise
        return said_of(error)
    return None


def against(wrong: Callable[[], str | None]) -> str | None:
    """Why some code is not to run in this process, or None.

    Args:
        wrong: compiles and tries it; says what is not right, or None.
    """
    if why := unavailable():
        return why
    try:
        return wrong()
    except Exception as error:  # LLVM, or a torch that is built otherwise
        return said_of(error)


def against_results(trial: Callable[[], Sequence[float]], most: float) -> str | None:
    """As `against`, of code whose results are tried.

    Args:
        trial: how far each result is off. most: that one may be; NaN is more.
    """
    wrong = "its results are not those of plain torch"
    return against(lambda: None if all(off < most for off in trial()) else wrong)


def curable() -> bool:
    """Whether something else may be installed, where such code is `unavailable`."""
    try:
        return unfit() is None
    except Exception:  # there is no llvmlite, or it does not load
        return True


def unfit() -> str | None:
    """Why this machine runs no such code, whatever is installed, or None.

    Raises:
        ImportError, OSError: of llvmlite, which tells the processor's features.
    """
    if platform.machine() != "x86_64":
        return f"a processor of kind {platform.machine()}, the kernel is for x86-64"
    if missing := [name for name in FEATURES if not has(name)]:
        return f"a processor without {' and '.join(missing)}"
    return None if _may_run_code() else "the system lets no process run code that it has written"


def widest() -> tuple[str, ...]:
    """What of a processor that is not `unavailable` may be used: `FEATURES`, or AVX-512 too."""
    return (*FEATURES, *WIDER) if has(*WIDER) else FEATURES


def against_vnni() -> str | None:
    """Why no code of `VNNI` is to run in this process, or None.

    With matrix units for bfloat16 (AMX), which are faster, it was never tried.
    """
    if why := unavailable():
        return why
    if not has(*VNNI):
        return "a processor without AVX-512's products of integers (VNNI)"
    return "a processor that multiplies bfloat16 faster (AMX)" if has(_AMX) else None


def has(*features: str) -> bool:
    """Whether the processor has all of these, as LLVM calls them.

    Raises:
        ImportError, OSError: of llvmlite.
    """
    import llvmlite.binding as llvm

    there = llvm.get_host_cpu_features()
    return all(there.get(name) for name in features)


def _may_run_code() -> bool:
    size = mmap.PAGESIZE
    with mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE) as page:
        held = ctypes.c_char.from_buffer(page)
        change = ctypes.CDLL(None).mprotect
        change.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        done = bool(change(ctypes.addressof(held), size, mmap.PROT_READ | mmap.PROT_EXEC) == 0)
        del held  # the page cannot be given back before
    return done
