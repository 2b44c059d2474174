"""A GPU for tests on a machine without one: torch's CUDA device, in the host's memory.

`environment` is that of processes which take it for a real one; `test_gpu_stand_in.py` runs the
tests of a GPU in it. It shows what a CPU alone cannot: tensors of two devices in one product,
something left on the host, storages that change their place, memory that runs out. It shows no
speed, no kernel written for a GPU (what they compute, the CPU's do) and no order of streams.

torch's dispatcher sends operators on CUDA tensors to `gpu_stand_in.cpp`, which is compiled once and
kept; `torch.cuda` is answered from here. Nothing is undone: only for processes of its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAME = "stand-in"
TOTAL = 8 << 30
SOURCE = Path(__file__).with_suffix(".cpp")


def why_not() -> str | None:
    """Why there can be none here; None where there can."""
    if torch.version.cuda is not None:
        return "torch was built with CUDA"
    return None if shutil.which("g++") else "no g++ to build the stand-in for a GPU with"


def library() -> Path:
    """The compiled device, made anew where its source or torch is another."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "qquant-tests" / f"gpu-stand-in-{key}"
    made = folder / "gpu_stand_in.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        home = Path(torch.__file__).parent
        fresh = folder / f"{os.getpid()}.so"
        words = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-isystem{home / 'include'}"]
        words += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        words += [str(SOURCE), "-o", str(fresh), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(["g++", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        fresh.rename(made)
    return made


class StandIn:
    """The device's memory, as a test may see and limit it."""

    def __init__(self) -> None:
        path = library()
        torch.ops.load_library(path)
        self._lib = ctypes.CDLL(str(path))
        self._lib.stand_in_limit.argtypes = [ctypes.c_int64]
        for name in ("in_use", "most"):
            getattr(self._lib, f"stand_in_{name}").restype = ctypes.c_int64
        self._lib.stand_in_begin()

    def in_use(self) -> int:
        """Bytes."""
        return int(self._lib.stand_in_in_use())

    def most(self) -> int:
        """Bytes at one time since `reset`."""
        return int(self._lib.stand_in_most())

    def reset(self) -> None:
        """Begins to look for the most anew."""
        self._lib.stand_in_reset()

    def limit(self, nbytes: int) -> None:
        """Whoever asks for more is told that memory is out; 0 is no limit."""
        self._lib.stand_in_limit(nbytes)


class Event:
    """A moment; what is before it is done."""

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False  # as if the device were busy until it is waited for

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


@functools.cache
def install() -> StandIn:
    """Makes torch see one CUDA device, for good."""
    assert (reason := why_not()) is None, reason
    device = StandIn()
    nothing = lambda *_, **__: None  # noqa: E731
    answers: dict[str, Any] = {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name=NAME, total_memory=TOTAL, major=9, minor=0, multi_processor_count=4
        ),
        "mem_get_info": lambda *_: (TOTAL - device.in_use(), TOTAL),
        "memory_allocated": lambda *_: device.in_use(),
        "memory_reserved": lambda *_: device.in_use(),
        "max_memory_allocated": lambda *_: device.most(),
        "max_memory_reserved": lambda *_: device.most(),
        "reset_peak_memory_stats": lambda *_: device.reset(),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "Event": lambda **_: Event(),
        "manual_seed": nothing,
        "manual_seed_all": nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _in_place_of(getattr(torch.cuda, name), answer))
    torch.Tensor.pin_memory = lambda self, *_: self.clone()  # type: ignore[assignment]
    _own_operators()
    return device


def _in_place_of(function: Any, answer: Any) -> Any:
    @functools.wraps(function)  # torch's compiler knows them by name, each as a function of its own
    def call(*args: Any, **more: Any) -> Any:
        return answer(*args, **more)

    return call


def _own_operators() -> None:
    """What a GPU has and a CPU has not, by its meaning."""
    aten = torch.library.Library("aten", "IMPL")
    _kept.append(aten)

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return (a.float() @ b.float()).to(dtype)

    def pack(codes: Tensor, tiles: int) -> Tensor:  # uint8 [n, k / 2]: two codes, the even one high
        n, k = codes.shape[0], 2 * codes.shape[1]
        return codes.contiguous().view(torch.int32).view(n // 8, k // (tiles * 16), 32, tiles // 2)

    def int4_mm(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
        n, k = 8 * packed.shape[0], x.shape[1]
        byte = packed.reshape(-1).view(torch.uint8).view(n, k // 2)
        codes = torch.stack([byte >> 4, byte & 15], dim=-1).view(n, k // group, group).float() - 8
        scale, zero = scales.float().permute(2, 1, 0).unsqueeze(-1)  # [k / group, n, 2]
        return (x.float() @ (codes * scale + zero).view(n, k).T).to(x.dtype)

    aten.impl("mm.dtype", mm, "CUDA")
    aten.impl("_convert_weight_to_int4pack", pack, "CUDA")
    aten.impl("_weight_int4pack_mm", int4_mm, "CUDA")


_kept: list[Any] = []  # registered for as long as they live


def environment(folder: Path) -> dict[str, str]:
    """For Python processes that take the stand-in for a real GPU, and all that they start.

    Args:
        folder: an empty directory, for as long as they run.
    """
    own = library()  # compiled once, not by each
    libraries = [str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), str(own)]
    # Before torch is imported: it asks once, and then no more, what there is of CUDA.
    (folder / "sitecustomize.py").write_text(
        f"import ctypes\n\nfor path in {libraries}:\n    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)\n"
        "import sys\n\nimport gpu_stand_in\n\ngpu_stand_in.install()\n"
        # Each process would try for a quarter of a minute to build its kernels, which cannot run.
        'sys.modules["gptqmodel"] = None\n'
    )
    path = [str(folder), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
