"""Where to compute and in what: names from the command line to torch's, and what `auto` means.

`auto` takes the first CUDA device, else the CPU. The compute dtype on CUDA is bfloat16 (float16
before compute capability 8.0); on a CPU it is bfloat16 only where the processor multiplies it
natively (AVX512-BF16 or AMX), since elsewhere a bfloat16 matmul is several times slower than
float32 and no smaller in memory while it runs.
"""

from __future__ import annotations

import ctypes

import torch

from .errors import SpecError

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 at full speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask is not None else {}
    return any(bool(found.get(key)) for key in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for `auto` or a name.

    Raises:
        SpecError: unknown name.
    """
    if name == "auto":
        if native_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in COMPUTE_DTYPES:
        raise SpecError(
            "compute dtype",
            expected=f"auto, {', '.join(COMPUTE_DTYPES)}",
            got=repr(name),
            cure="Use auto.",
        )
    return COMPUTE_DTYPES[name]


def release_memory() -> None:
    """Gives heap pages that are free back to the system.

    glibc keeps what was freed below its mmap threshold, and the solver's many short-lived matrices
    of a few megabytes would leave it fragmented: resident memory then creeps up from block to block
    though nothing is kept. Where the C library has no `malloc_trim`, nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
