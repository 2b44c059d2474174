"""Speed and the peak of memory, in a process of its own, where nothing else has left its mark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SpecError
from .base import Options, Part, Subject


@dataclass(frozen=True)
class SpeedPart(Part):
    """One setting; batch 1, greedy."""

    prompt_len: int
    new_tokens: int
    repeats: int

    @property
    def place(self) -> tuple[str, ...]:
        return ("speed", f"modern-b1-c{self.prompt_len}-n{self.new_tokens}")

    @property
    def process(self) -> str | None:
        return "speed"

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Speed, and the peak of memory from before loading: of the device, or of the process."""
        import torch
        import transformers  # noqa: F401  (its own memory is not the model's)

        from .. import profile
        from ..devices import peak_memory, reset_peak_memory, resident_bytes

        before = resident_bytes()
        loaded = subject.loaded
        place = loaded.kernel.device
        known = reset_peak_memory()  # loading's peak is not running's
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        found = profile.speed(loaded.model, self.prompt_len, self.new_tokens, self.repeats)
        if place.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(place)
        else:
            peak = peak_memory() - before if known else None
        return {**asdict(found), "peak_bytes": peak}

    def headline(self, found: Mapping[str, Any]) -> str:
        return f"{found['decode_tokens_per_s']:.4g} tokens/s"


@dataclass(frozen=True)
class SpeedOptions(Options):
    """The speed run.

    Attributes:
        prompt_len, new_tokens: batch 1; no new tokens leaves speed out.
        repeats: after one to warm up.
    """

    prompt_len: int = 512
    new_tokens: int = 128
    repeats: int = 3

    def __post_init__(self) -> None:
        for key, least in (("prompt_len", 1), ("new_tokens", 0), ("repeats", 1)):
            if getattr(self, key) < least:
                raise SpecError(key, expected=f"at least {least}", got=getattr(self, key))
        if self.new_tokens == 1:
            raise SpecError("new_tokens", expected="0 or at least 2", got=1, cure="Use 128")

    def parts(self) -> tuple[Part, ...]:
        if not self.new_tokens:
            return ()
        return (SpeedPart(self.prompt_len, self.new_tokens, self.repeats),)
