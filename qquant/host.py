"""What the system says of this machine and this process, without torch.

Memory: what is resident, what was at the most, what may still be had. And the two questions that
decide where a run computes on a machine that `devices.py` would ask torch about, importing it:
whether torch could find an accelerator at all, and whether the processor multiplies bfloat16.
Neither guesses: where the system does not say, the answer is that it is not known.

Left out on purpose: what is on an accelerator.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

_CGROUP_1 = ("limit_in_bytes", "usage_in_bytes", "stat")
_CUDA = "libcuda.so.1"  # the driver's library, which torch's own libraries open
_ROCM = Path("/dev/kfd")
# Of a processor with instructions for bfloat16, as Linux names them (x86, Arm).
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# What `llvm_code.py` needs, and what it uses beyond that.
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})


def no_accelerator() -> bool:
    """Whether torch is sure to find none: a Linux without a GPU's driver."""
    if sys.platform != "linux" or _ROCM.exists():
        return False
    try:
        ctypes.CDLL(_CUDA)
    except OSError:
        return True
    return False


def cpu_multiplies_bfloat16(said: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor has instructions for it; None where the system does not say.

    Args:
        said: the system's description of its processors.
    """
    flags = _flags(said)
    return None if flags is None else not _BFLOAT16.isdisjoint(flags)


def int16_is_fastest(said: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of 16-bit integers (`int16.py`) are the fastest that this processor makes:
    AVX2, and neither instructions for bfloat16 nor all of AVX-512 that matters, whose float32 is as
    fast.

    Args:
        said: as above; where the system does not say, the answer is no.
    """
    flags = _flags(said) or frozenset()
    return flags >= _AVX2 and not flags >= _AVX512 and _BFLOAT16.isdisjoint(flags) and writes_code()


def _flags(said: Path) -> frozenset[str] | None:
    try:
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def imports_hqq() -> bool:
    """Whether transformers imports hqq, with scipy and triton: wherever it is installed (extra
    `kv`; gptqmodel's environment may have it, too)."""
    return find_spec("hqq") is not None


def writes_code() -> bool:
    """Whether llvmlite is there to write machine code for this processor (`llvm_code.py`, which
    also asks the processor and the system, and imports torch)."""
    return platform.machine() == "x86_64" and find_spec("llvmlite") is not None


def torch_for_cuda() -> bool:
    """Whether the torch that is installed is a build for CUDA, whose libraries come into every
    process, GPU or not; torch is not imported."""
    found = find_spec("torch")
    places = (found.submodule_search_locations if found else None) or ()
    return any(os.path.exists(os.path.join(p, "lib", "libtorch_cuda.so")) for p in places)


def threads() -> int:
    """Threads that numerical libraries take here by themselves."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdigit() and int(said):
        return int(said)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes this process may still take: what the system has available, within its cgroup's limit.

    Linux only; elsewhere a guess of 8 GiB.
    """
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        return 8 << 30
    folder = Path("/sys/fs/cgroup")
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (*(f"memory/memory.{n}" for n in _CGROUP_1), "total_inactive_file"),
    ):
        try:
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        # What was read from files is counted, and given up when memory is asked for.
        found.append(most - max(0, taken - _told(folder / stat, cached)))
    return max(0, min(found, default=8 << 30))


def _told(path: Path, key: str) -> int:
    """A number of a file of `key number` lines; 0 where it is not told."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
        return sum(int(word[1]) for word in words if len(word) == 2 and word[0] == key)
    except (OSError, ValueError):
        return 0


def reset_peak_memory() -> bool:
    """Starts `peak_memory` from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Peak resident bytes of this process.

    Linux tells it in `/proc/self/status`. Its `ru_maxrss` would not do: that of a child starts at
    what its parent held, so a run started from a large process would report that process's size.
    Elsewhere `ru_maxrss` it is, in kilobytes, on macOS in bytes.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
