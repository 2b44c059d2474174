"""`qquant_manifest.json`: everything a result depends on, and a hash of every file beside it.

It answers three questions about a directory found later: what was it made from (source and corpus
by hash), how (both specs whole, versions, device, threads), and is it still what was written (file
hashes, which `verify` compares). Then one row per linear with its loss and damping.

Two things are left out on purpose. Paths of the machine: sources are named by their last part, so a
directory can be published as it is. Times: the same input, spec and seed give the same bytes, and
that holds for this file too; how long a run took is in the run's result and its log.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from . import __version__
from .checkpoint import Checkpoint
from .config import RECIPES, CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
from .directory import sha256_file, sha256_files
from .report import LayerLike

NAME = "qquant_manifest.json"
CARD = "README.md"
FORMAT = 1
_PACKAGES = ("transformers", "safetensors", "tiktoken", "numpy")


class TokensLike(Protocol):
    """What the manifest records of the calibration ids (see `calibration.tokens`)."""

    @property
    def ids(self) -> Any: ...
    @property
    def sha256(self) -> str: ...
    @property
    def sources(self) -> tuple[dict[str, Any], ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


class MixedLike(Protocol):
    """The choice of bits (see `mixed.Mixed`)."""

    def to_dict(self) -> dict[str, Any]: ...


class SpecLike(Protocol):
    """How linears were quantized, by whatever method."""

    def to_dict(self) -> dict[str, Any]: ...


def public_source(given: str) -> str:
    """A calibration source without the folders of this machine: `/x/a.json=2` -> `a.json=2`."""
    if given.startswith("hf:"):
        return given
    return given.rstrip("/").rsplit("/", 1)[-1] or given


def public_calibration(calib: CalibrationSpec) -> dict[str, Any]:
    """The spec as the manifest records it."""
    return asdict(calib) | {"sources": [public_source(given) for given in calib.sources]}


def versions(*more: str) -> dict[str, str]:
    """Versions of qquant, Python and the packages (and `more`) that decide the result.

    torch speaks for itself: its own version names the build (2.11.0+cu130), and builds round
    differently; the metadata of the wheels on PyPI leaves the build out.
    """
    import torch

    found = {"qquant": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    return found | {name: package_version(name) for name in (*_PACKAGES, *more)}


def package_version(name: str) -> str:
    """As its metadata have it; `unknown` where there are none: said so, not guessed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def layer_row(layer: LayerLike) -> dict[str, Any]:
    """One linear: loss tr(D H Dᵀ), the same over tr(W H Wᵀ), damping, what was unusual."""
    return {
        "name": layer.name,
        "loss": layer.loss,
        "relative_loss": layer.rel_error,
        "damp": layer.damp,
        "flags": list(layer.flags),
    }


def recipe_name(quant: QuantSpec) -> str | None:
    """The recipe that gives exactly this spec at its bits; None where an option changed it."""
    for name in RECIPES:
        same = {key: getattr(quant, key) for key in ("bits", "target_bpw", "bit_choices")}
        if spec_from_recipe(name, **same) == quant:
            return name
    return None


def build_manifest(
    *,
    source: Checkpoint,
    source_sha256: str,
    quant: SpecLike,
    calib: CalibrationSpec | None,
    tokens: TokensLike | None,
    out: OutputSpec,
    layers: Sequence[LayerLike],
    device: str,
    compute_dtype: str,
    threads: int,
    packages: Sequence[str] = (),
    mixed: MixedLike | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """The manifest as a JSON object, `files` still empty.

    Args:
        source: the checkpoint quantized. source_sha256: its `Checkpoint.sha256`.
        calib, tokens: None where the method reads no calibration data.
        layers: one per quantized linear, in the order they were solved.
        device, compute_dtype, threads: what the forwards and the solver ran on.
        packages: whose versions decide the result, beside those that always do.
        mixed: the choice of bits, where they differ between linears.
        processes: that shared the work; recorded where there were several.
    """
    calibration: dict[str, Any] | None = None
    if calib is not None and tokens is not None:
        calibration = {
            "spec": public_calibration(calib),
            "sha256": tokens.sha256,
            "shape": list(tokens.ids.shape),
            "sources": [
                {**record, "name": public_source(str(record.get("name", "")))}
                for record in tokens.sources
            ],
            "notes": list(tokens.notes),
        }
    return {
        "manifest": FORMAT,
        "source": {
            "name": source.path.name,
            "model_type": source.config.get("model_type"),
            "sha256": source_sha256,
            "tensor_bytes": source.nbytes,
        },
        "recipe": recipe_name(quant) if isinstance(quant, QuantSpec) else None,
        "quantization": quant.to_dict(),
        "mixed": None if mixed is None else mixed.to_dict(),
        "calibration": calibration,
        "output": asdict(out),
        "versions": versions(*packages),
        "machine": {
            "device": device,
            "device_name": device_name(device),
            "compute_dtype": compute_dtype,
            "threads": threads,
            **({"processes": processes} if processes > 1 else {}),
            **({"processor": processor()} if device == "cpu" else {}),
            **_forms(device, compute_dtype, quant),
        },
        "layers": [layer_row(layer) for layer in layers],
        "files": {},
    }


def _forms(device: str, compute_dtype: str, quant: SpecLike) -> dict[str, str]:
    """What of the engine computed, where there is a choice (`engine.py`)."""
    if not isinstance(quant, QuantSpec):
        return {}
    from .engine import forms

    return forms(device, compute_dtype, quant)


def processor() -> str:
    """What instructions torch uses here, in words: with others sums may round otherwise."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def device_name(device: str) -> str:
    """What the device is, in words."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return platform.machine()


def record_file(directory: Path, manifest: dict[str, Any], name: str) -> None:
    """Adds (or renews) the hash of one file and writes the manifest anew."""
    manifest["files"][name] = sha256_file(directory / name)
    _save(directory, manifest)


def _save(directory: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = dict(sorted(manifest["files"].items()))
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / NAME).write_text(text + "\n", encoding="utf-8")


def write_manifest(
    directory: Path, manifest: dict[str, Any], hashes: Mapping[Path, str] | None = None
) -> None:
    """Writes the manifest with the hashes of what is in `directory` now, filled in here.

    The card, which is made from the manifest, is added by `record_file`.

    Args:
        hashes: of files that have not changed since they were taken; the others are read.
    """
    own, known = directory / NAME, dict(hashes or {})
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != own]
    known |= sha256_files([path for path in paths if path not in known])
    for path in paths:
        manifest["files"][path.relative_to(directory).as_posix()] = known[path]
    _save(directory, manifest)
