"""What a model takes of memory: its weights, and the peak of reading and of writing text.

Everything is counted above what stood before the model was loaded, in bytes: on a GPU what torch's
allocator gave out, on a CPU the resident memory of the process (all of it, pages of mapped files
included). Loading's peak is kept apart: the counters begin again once the model stands, so that the
peak of a run is the run's. Qwen's published figures were made otherwise, by
`torch.cuda.max_memory_allocated` at the end of it all, in units of 2^30 bytes that they call GB;
`qwen_gib` is that, and on a CPU the same of resident memory.

A process that has done other things before has holes in its heap that a measurement could hide in:
measure in a fresh one, one measurement per process. What is imported before is not the model's; the
caller does that, and `warm` helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .caches import make_cache
from .devices import choose_device
from .generation import generate, random_prompt
from .heap import trim_heap
from .host import peak_memory, reset_peak_memory, resident_bytes

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes; those of the device (the process's, on a CPU) less what stood before loading.

    Attributes:
        held: what stands once the model is loaded.
        loading_peak: the most that loading took.
        peak: the most while running, None where nothing was run, or where the system does not let
            it be told from loading's.
        allocator_peak, allocator_reserved: the most that torch's CUDA allocator gave out, and held,
            loading included, nothing subtracted; None on a CPU.
        process_peak: the most resident memory of the process, loading included, nothing subtracted.
    """

    held: int
    loading_peak: int
    peak: int | None
    allocator_peak: int | None
    allocator_reserved: int | None
    process_peak: int

    @property
    def qwen_gib(self) -> float:
        """The peak with loading, in GiB."""
        if self.allocator_peak is not None:
            return self.allocator_peak / GIB
        return max(self.loading_peak, self.peak or 0) / GIB


def warm(device: str) -> None:
    """Makes what any model needs: transformers' imports, torch's threads, the CUDA context."""
    import transformers.generation  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.modeling_utils import PreTrainedModel  # noqa: F401

    from .models import register

    register()
    place = choose_device(device)
    square = torch.ones(512, 512, device=place)
    (square @ square).sum().item()


def memory_of(
    load: Callable[[], Any], run: Callable[[Any], Any] | None, device: str
) -> tuple[Memory, Any]:
    """Loads, runs, and tells what that took.

    Args:
        load: gives the model (`runtime.Loaded`).
        run: what is measured, handed what `load` gave; None for loading alone.
        device: where it is loaded, as in `runtime.load`.

    Returns:
        The figures, and what `load` gave.
    """
    meter = _Cuda(choose_device(device)) if choose_device(device).type == "cuda" else _Resident()
    trim_heap()
    before = meter.now()
    known = meter.reset()
    host = peak_memory()
    loaded = load()
    loading = meter.peak()
    reserved, host = meter.reserved(), max(host, peak_memory())
    trim_heap()
    held = meter.now()
    peak: int | None = None
    if run is not None:
        known = meter.reset() and known
        run(loaded)
        peak = meter.peak() - before if known else None
    whole = max(loading, meter.peak())
    both = meter.reserved()
    return (
        Memory(
            held=held - before,
            loading_peak=loading - before,
            peak=peak,
            allocator_peak=whole if isinstance(meter, _Cuda) else None,
            allocator_reserved=None if both is None else max(both, reserved or 0),
            process_peak=max(host, peak_memory()),
        ),
        loaded,
    )


def generating(
    context: int, new_tokens: int, cache: str, told: Callable[[int], None]
) -> Callable[[Any], None]:
    """A run for `memory_of`: `context` random tokens are read and `new_tokens` generated."""

    def run(loaded: Any) -> None:
        model = loaded.model
        empty = make_cache(cache, model.config, context + new_tokens)
        generate(model, random_prompt(model, 1, context), new_tokens, cache=empty, told=told)

    return run


class _Resident:
    """The process's resident memory."""

    def now(self) -> int:
        return resident_bytes()

    def reset(self) -> bool:
        return reset_peak_memory()

    def peak(self) -> int:
        return peak_memory()

    def reserved(self) -> int | None:
        return None


class _Cuda:
    """What torch's allocator gave out. Not yet run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return True

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reserved(self) -> int | None:
        return torch.cuda.max_memory_reserved(self.device)
