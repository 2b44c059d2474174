"""How a model was loaded: the kernel that ran, its sizes, the hashes of its files.

The hashes tell later whether a directory is the one that was measured (`profile_card`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..directory import sha256_files
from .base import Options, Part, Subject


@dataclass(frozen=True)
class LoadPart(Part):
    """`load` of the model's entry."""

    @property
    def place(self) -> tuple[str, ...]:
        return ("load",)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from ..slow import slow_kernel

        kernel = subject.loaded.kernel
        files = sorted(Path(subject.model.path).glob("*.safetensors"))
        return {
            "kernel": str(kernel),
            "slow_kernel": slow_kernel(kernel),
            "method": subject.model.method,
            "weight_bytes": kernel.weight_bytes,
            "file_bytes": sum(file.stat().st_size for file in files),
            "weights": {file.name: digest for file, digest in sha256_files(files).items()},
            "reference": subject.is_reference,
        }


@dataclass(frozen=True)
class LoadOptions(Options):
    """Nothing to choose."""

    def parts(self) -> tuple[Part, ...]:
        return (LoadPart(),)
