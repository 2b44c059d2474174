"""What the bytes of a result depend on, as flat names and values that can be compared.

A run that goes on with an earlier one's work must be the same run: the same settings, the same
source and calibration files, the same versions, device, threads and number of processes (sums in
another order round otherwise). Files are told apart by size and time of change, since hashing a
large checkpoint takes longer than a block; the manifest has the hash of the source, taken once, and
`check_unchanged` asks again after that. What does not change the result (memory budgets, what is
shown) is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import llvm_code
from .batching import tokens_per_unit
from .calibration.sources import parse_sources
from .calibration.tokens import ids_sha256
from .checkpoint import Checkpoint
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .engine import in_integers
from .errors import CheckpointError
from .export import COPIED
from .manifest import device_name, versions
from .products import chosen
from .world import Seat


def run_identity(
    source: Checkpoint,
    quant: QuantSpec,
    calib: CalibrationSpec,
    out: OutputSpec,
    *,
    device: torch.device,
    compute: str,
    tokens: Tensor | None,
    seat: Seat,
) -> dict[str, Any]:
    """Everything that decides the result, by name; values that JSON can hold.

    Args:
        compute: of the forward, by name. tokens: calibration ids given by the caller, instead of
            `calib`.
        seat: of this process, of whose numbers only that of all counts.
    """
    found: dict[str, Any] = {"source": str(source.path), **source_identity(source)}
    for part, spec in (("quant", quant), ("output", out), ("calibration", calib)):
        if spec is calib and (tokens is not None or quant.method == "rtn"):
            continue
        found |= {f"{part}.{key}": _plain(value) for key, value in asdict(spec).items()}
        if spec is calib:
            found |= _local_files(calib)
    if tokens is not None:
        found["calibration.tokens"] = ids_sha256(tokens)
    found |= {f"version of {name}": value for name, value in versions().items()}
    return found | {
        # Several processes have a device each: its number is not to differ.
        "device": f"{device if seat.size == 1 else device.type}, {device_name(str(device))}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "products": chosen(),
        **({"machine code": llvm_code.unavailable() or "llvm"} if device.type == "cpu" else {}),
        "compute dtype": compute,
        **(_sums(quant, device.type, compute) if quant.method == "gptq" else {}),
        "threads": torch.get_num_threads(),
        "processes": seat.size,
    }


def _sums(quant: QuantSpec, device: str, compute: str) -> dict[str, Any]:
    """How a run with calibration multiplies and adds up its batches."""
    apart = tokens_per_unit(device, quant.streams)
    return {"tokens whose products are made apart": apart, **in_integers(device, compute, quant)}


def source_identity(source: Checkpoint) -> dict[str, Any]:
    """Size and time of change of every file that is read from the source."""
    names = [*source.files, *(n for n in COPIED if os.path.lexists(source.path / n))]
    return {f"source file {name}": _file(source.path / name) for name in sorted(set(names))}


def check_unchanged(source: Checkpoint, before: Mapping[str, Any]) -> None:
    """Refuses a source that was written to since `before` (a `run_identity`) was taken.

    Raises:
        CheckpointError: names a file.
    """
    for key, value in source_identity(source).items():
        if before.get(key) != value:
            raise CheckpointError(
                f"{key} of {source.path}",
                expected="the same as when the run began",
                got="a changed file",
                cure="Quantize a copy that nothing writes to, with --restart",
            )


def _local_files(calib: CalibrationSpec) -> dict[str, Any]:
    names = [source.name for source in parse_sources(calib.sources)]
    return {f"calibration file {n}": _file(Path(n)) for n in names if os.path.isfile(n)}


def _file(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
