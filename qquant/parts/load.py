"""How a model was loaded: the kernel that ran, its sizes on disk and in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Options, Part, Subject


@dataclass(frozen=True)
class LoadPart(Part):
    """`load` of the model's entry."""

    @property
    def place(self) -> tuple[str, ...]:
        return ("load",)

    def measure(self, subject: Subject) -> dict[str, Any]:
        kernel = subject.loaded.kernel
        path = Path(subject.model.path)
        return {
            "kernel": str(kernel),
            "slow_kernel": None,
            "method": subject.model.method,
            "weight_bytes": kernel.weight_bytes,
            "file_bytes": sum(p.stat().st_size for p in path.glob("*.safetensors")),
            "reference": subject.is_reference,
        }


@dataclass(frozen=True)
class LoadOptions(Options):
    """Nothing to choose."""

    def parts(self) -> tuple[Part, ...]:
        return (LoadPart(),)
