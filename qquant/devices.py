"""Where to compute and in what: names from the command line to torch's, and what `auto` means.

`auto` takes the first CUDA device, else the CPU. There is one rule for the compute dtype, for the
calibration forward and for a loaded model alike: what was asked for; else the dtype the weights are
stored in, if the device is fast at it; else float16 on CUDA (before compute capability 8.0) and
float32 on a CPU. A CPU is fast at bfloat16 only with instructions for it (AVX512-BF16, AMX):
elsewhere such a matmul is several times slower than float32 and no smaller while it runs. No CPU is
taken to be fast at float16.

A run that quantizes has one more (`choose_compute`): its tensors are float32, and its largest
products are made of 16-bit integers (`int16.py`). `auto` takes it where that is the fastest.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import int16, int16_attention
from .errors import SpecError, said_of
from .host import cpu_multiplies_bfloat16, int16_is_fastest

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INT16 = "int16"


def choose_device(device: str | torch.device) -> torch.device:
    """The device meant by `auto` or by its name.

    Raises:
        SpecError: no such device, or CUDA where there is none.
    """
    cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise SpecError(
            "device", expected="auto, cpu, cuda or cuda:N", got=repr(device), cure="Use auto."
        ) from error
    if place.type not in ("cpu", "cuda"):
        raise SpecError("device", expected="auto, cpu, cuda or cuda:N", got=repr(str(device)))
    if place.type == "cuda":
        count = torch.cuda.device_count() if cuda else 0
        if (place.index or 0) >= count:
            raise SpecError(
                "device",
                expected=f"one of {count} CUDA devices" if count else "cpu",
                got=f"{place}, and torch sees {count} CUDA devices",
                cure="Use --device cpu, or install a CUDA build of torch.",
            )
        if device in ("cuda", torch.device("cuda")):  # no index given
            place = torch.device("cuda", torch.cuda.current_device())
    return place


def gpu_facts(device: str) -> dict[str, object] | None:
    """What a report says of the GPU that `device` means; None on a CPU. Not yet run on a GPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(choose_device(device))
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "count": torch.cuda.device_count(),
    }


def driver_version(said: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """NVIDIA's kernel driver, such as `550.54.15`; None where there is none."""
    try:
        found = re.search(r"Module\D*(\d+(?:\.\d+)+)", said.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 at full speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return _native_on_cpu()


@cache
def _native_on_cpu() -> bool:
    if (said := cpu_multiplies_bfloat16()) is not None:
        return said
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask is not None else {}
    return any(bool(found.get(key)) for key in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def choose_dtype(
    asked: str | torch.dtype | None,
    device: torch.device,
    stored: torch.dtype | None = torch.bfloat16,
) -> torch.dtype:
    """What to compute in, by the rule at the top.

    Args:
        asked: a dtype or its name; `auto` and None leave the choice to the rule.
        device: where.
        stored: the weights' dtype; bfloat16 is what Qwen checkpoints are, None is an unknown one.

    Raises:
        SpecError: another dtype than float32, float16, bfloat16.
    """
    if asked is not None and asked != "auto":
        named = (
            COMPUTE_DTYPES.get(asked.removeprefix("torch.")) if isinstance(asked, str) else asked
        )
        if named not in COMPUTE_DTYPES.values():
            raise SpecError(
                "compute dtype",
                expected=f"auto, {', '.join(COMPUTE_DTYPES)}",
                got=repr(asked),
                cure="Use auto.",
            )
        assert named is not None
        return named
    if stored == torch.bfloat16 and native_bfloat16(device):
        return torch.bfloat16
    if device.type == "cuda" and stored in (torch.bfloat16, torch.float16):
        return torch.float16
    return torch.float32


class Compute(NamedTuple):
    """What a run that quantizes computes in.

    Attributes:
        dtype: of its tensors.
        int16: linears, attention and Hessians are multiplied in 16-bit integers.
    """

    dtype: torch.dtype
    int16: bool = False

    @property
    def name(self) -> str:
        """As `--compute-dtype` has it."""
        return INT16 if self.int16 else str(self.dtype).removeprefix("torch.")


def choose_compute(asked: str | torch.dtype, device: torch.device) -> Compute:
    """What to quantize in: as `choose_dtype`, or `int16`, which `auto` is where that is fastest.

    Raises:
        SpecError: another name, or `int16` where that does not run.
    """
    if asked not in (INT16, f"torch.{INT16}", torch.int16):
        try:
            dtype = choose_dtype(asked, device)
        except SpecError as error:
            known = f"auto, {', '.join((*COMPUTE_DTYPES, INT16))}"
            raise SpecError("compute dtype", expected=known, got=repr(asked)) from error
        auto = asked == "auto" and dtype == torch.float32 and device.type == "cpu"
        return Compute(dtype, auto and int16_is_fastest() and not _against_int16())
    why = _against_int16() if device.type == "cpu" else f"it is for CPUs, and this is {device}"
    if why:
        raise SpecError(
            "compute dtype",
            expected=f"one that runs here ({INT16}: with AVX2 and llvmlite)",
            got=f"{INT16}: {why}",
            cure="Leave the choice to `auto`; `reproduce` needs such a machine.",
        )
    return Compute(torch.float32, True)


def _against_int16() -> str | None:
    """Why not all of it runs in this process, or None."""
    return int16.unavailable() or int16_attention.unavailable(torch.float32)


def against_triton(right: Callable[[], bool]) -> str:
    """Why a Triton kernel does not run, in words; "" where it does.

    Args:
        right: compiles it, and says whether it gives what torch gives.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        return "" if right() else "triton's kernel gave other numbers than torch"
    except Exception as error:  # whatever a compiler, its driver or a missing C compiler raises
        return f"triton failed: {said_of(error)}"


def on_its_device(x: Tensor) -> AbstractContextManager[object]:
    """While it lasts, the current device is `x`'s, where launches and events go."""
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()
