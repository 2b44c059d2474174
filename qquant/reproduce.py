"""A published directory made again from its manifest, and compared file by file.

The manifest says what a directory was made from and how, so whoever has the same source (and the
same calibration files) can check the claim: the run is repeated with the manifest's settings and
thread count into a directory of its own, and every file is compared by hash. Bytes depend on the
versions of torch and of the other packages, on the processor and on how many processes shared the
work (here it is one) too. Where those differ, the
difference is told beside the result: equal hashes prove the claim whatever the versions, unequal
ones disprove it only where nothing else differs.

Left out on purpose: fetching anything. The source and calibration files are the caller's to give.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .bnb_spec import METHODS, BnbSpec
from .calibration.sources import parse_sources
from .checkpoint import Checkpoint
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .directory import find_directory, read_json, sha256_files
from .engine import forms
from .errors import CalibrationError, CheckpointError, SpecError, TargetError, shown
from .events import Progress
from .journal import differences
from .manifest import FORMAT, device_name, processor, versions
from .manifest import NAME as MANIFEST
from .methods import quantize


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Attributes:
        path: the directory that was checked.
        same: files whose bytes came out again.
        different: files that came out otherwise, or on one side only.
        circumstances: versions and machine facts that are not those of the manifest.
    """

    path: str
    same: tuple[str, ...]
    different: tuple[str, ...]
    circumstances: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.different

    @property
    def weights_ok(self) -> bool:
        """Whether at least all the weights came out again."""
        return not any(name.endswith(".safetensors") for name in self.different)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "weights_ok": self.weights_ok, **asdict(self)}

    def render(self) -> str:
        """For a person."""
        count = len(self.same) + len(self.different)
        if self.ok:
            lines = [f"{self.path}: made again, all {count} files the same"]
        else:
            what = "the weights are the same" if self.weights_ok else "NOT the same weights"
            lines = [f"{self.path}: {what}; {len(self.different)} of {count} files differ:"]
            lines += [f"  {name}" for name in self.different]
        if self.circumstances:
            lines.append("Made with other versions or on another machine:")
            lines += [f"  {text}" for text in self.circumstances]
        return "\n".join(lines)


def reproduce(
    directory: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    calib_dir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Makes `directory` again from `source` by its manifest and compares the two.

    Args:
        directory: has a manifest of qquant's.
        source: the checkpoint it was made from; its hash must be the manifest's.
        calib_dir: where the calibration files are that the manifest names, if there are any.
        out: keep the new directory here; otherwise it is made beside `directory` and removed.
        progress: called with each event of the run.

    Raises:
        CheckpointError: there is no manifest, or `source` is not what it names.
        CalibrationError: calibration files are missing, or the ids came from a program.
        SpecError: the manifest has settings that this version does not know.
        TargetError: `out` exists.
    """
    root = find_directory(directory)
    manifest = read_json(root, MANIFEST)
    if manifest.get("manifest") != FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: manifest", expected=FORMAT, got=manifest.get("manifest")
        )
    if "quantization" not in manifest:
        raise CheckpointError(
            f"{MANIFEST}: quantization",
            expected="the settings of `qquant quantize`",
            got="none",
            cure="Of a converted directory reproduce what was converted, and give the "
            "`qquant convert` command again",
        )
    quant, written = _spec(manifest), _spec_of(OutputSpec, manifest, "output")
    calib = _calibration(manifest, None if calib_dir is None else Path(calib_dir))
    machine = _part(manifest, "machine")
    found = Checkpoint.open(source)
    if found.sha256() != _part(manifest, "source").get("sha256"):
        raise CheckpointError(
            f"source {found.path}",
            expected=f"the bytes of {_part(manifest, 'source').get('name')!r}, by the manifest",
            got="other ones",
            cure="Give the very checkpoint that the directory was made from",
        )
    if out is not None and os.path.lexists(out):
        raise TargetError(
            f"output {out}",
            expected="nothing there yet",
            got="a directory" if Path(out).is_dir() else "a file",
            cure="Give another place with -o, or leave it out: then nothing is kept",
        )
    more: dict[str, Any] = {"device": str(machine.get("device"))}
    if isinstance(quant, BnbSpec):
        more["dtype"] = written.dtype
    else:
        more["compute_dtype"] = str(machine.get("compute_dtype"))
    with _threads(machine.get("threads")), _place(root, out) as target:
        quantize(found.path, target, quant, calib, written, progress=progress, **more)
        before, now = (_hashes(folder) for folder in (root, target))
    names = sorted(before.keys() | now.keys())
    same = tuple(n for n in names if before.get(n) == now.get(n))
    known = _part(manifest, "versions")
    extra = [name for name in known if name not in versions()]
    told = differences(known, versions(*extra))
    if (processes := machine.get("processes", 1)) != 1:
        told.append(
            f"processes: {shown(processes)} then, 1 now (sums in another order round otherwise)"
        )
    here_now = {"device_name": device_name(more["device"])}
    if more["device"] == "cpu":
        here_now["processor"] = processor()
    for key, here in here_now.items():
        if (there := machine.get(key, here)) != here:
            told.append(f"{key.replace('_', ' ')}: {shown(there)} then, {here} now")
    if isinstance(quant, QuantSpec):
        for key, here in forms(more["device"], more["compute_dtype"], quant).items():
            if (there := machine.get(key, here)) != here:
                told.append(f"{key}: {shown(there)} then, {here} now (sums in another order)")
    if (name := _part(manifest, "source").get("name")) != found.path.name:
        told.append(f"source directory: {name} then, {found.path.name} now (the card names it)")
    return Reproduction(
        os.fspath(directory), same, tuple(n for n in names if n not in same), tuple(told)
    )


def _spec(manifest: Mapping[str, Any]) -> QuantSpec | BnbSpec:
    method = _part(manifest, "quantization").get("method")
    found: QuantSpec | BnbSpec = _spec_of(
        BnbSpec if method in METHODS else QuantSpec, manifest, "quantization"
    )
    return found


def _spec_of(kind: Any, manifest: Mapping[str, Any], key: str) -> Any:
    values = _part(manifest, key)
    if kind is BnbSpec:
        values.pop("bits", None)  # follows from the method
    known = {field.name for field in fields(kind)}
    if strange := sorted(set(values) - known):
        raise SpecError(
            f"{MANIFEST}: {key}",
            expected="settings that this version knows",
            got=", ".join(strange),
            cure="Use the version of qquant that the manifest names",
        )
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:  # a string where a number should be
        raise SpecError(f"{MANIFEST}: {key}", expected="settings", got=error) from error


def _part(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = manifest.get(key)
    if not isinstance(part, dict):
        raise CheckpointError(
            f"{MANIFEST}: {key}",
            expected="an object",
            got=type(part).__name__,
            cure="The manifest is damaged",
        )
    return part


def _calibration(manifest: Mapping[str, Any], folder: Path | None) -> CalibrationSpec | None:
    if manifest.get("calibration") is None:
        return None
    record = _part(manifest, "calibration")
    named = record.get("sources")
    named = [s.get("name") for s in named if isinstance(s, dict)] if isinstance(named, list) else []
    if named == ["tokens"]:
        raise CalibrationError(
            "calibration",
            expected="sources that can be read again",
            got="token ids that a program gave",
            cure="Only that program can make this directory again",
        )
    spec = _spec_of(CalibrationSpec, record, "spec")
    assert isinstance(spec, CalibrationSpec)
    sources = []
    for given, parsed in zip(spec.sources, parse_sources(spec.sources), strict=True):
        if not parsed.is_path:
            sources.append(given)
            continue
        if folder is None or not (folder / parsed.name).exists():
            raise CalibrationError(
                f"calibration file {parsed.name}",
                expected="in the folder given" if folder else "a folder that has it",
                got="no such file" if folder else "none",
                cure="Give the folder of the manifest's calibration files with --calib-dir",
            )
        sources.append(str(folder / given))
    return replace(spec, sources=tuple(sources))


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files as they are; not what a list beside them says."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): h for p, h in sha256_files(files).items()}


@contextmanager
def _threads(count: object) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if isinstance(count, int) and 0 < count <= 4096:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _place(root: Path, out: str | os.PathLike[str] | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.again-") as folder:
        yield Path(folder) / root.name
