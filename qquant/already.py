"""A target that the same command has made already.

A kill, or a lost connection, can fall between the moment when the target gets its name and the
moment when the command says so. Whoever gives the command again is then not to be told that the
target is in the way, but that it is there. That it is this command's is read off its manifest:
the same source and calibration files by hash, the same settings, versions and machine, and the
source's tokenizer not written to since; the same command would make the same bytes.

Left out on purpose: reading the target's own files again, which `qquant verify` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .calibration.sources import Source, parse_sources
from .checkpoint import Checkpoint
from .config import CalibrationSpec
from .directory import read_json, sha256_file
from .errors import AlreadyDone, QQuantError
from .export import COPIED
from .manifest import NAME, SpecLike, public_calibration
from .publish import clear_leftover

_FOUND = {"mixed", "calibration", "layers", "files"}  # in the run, or compared otherwise


def check_not_done(
    dst: str | os.PathLike[str],
    source: Checkpoint,
    quant: SpecLike,
    expected: Callable[[], Mapping[str, Any]],
    calib: CalibrationSpec | None = None,
    tokens_sha256: str | None = None,
    *,
    clear: bool = True,
) -> None:
    """Refuses to make again what stands at `dst`.

    Args:
        quant: how linears are quantized.
        expected: gives the manifest that the run would write, as far as it is known beforehand;
            asked for last, since it hashes the source.
        calib: None where the method reads no calibration data.
        tokens_sha256: of calibration ids that the caller gave; `calib`'s sources then say nothing.
        clear: remove what the killed run left beside `dst`.

    Raises:
        AlreadyDone: `dst` was made by the same run. Of anything else there others judge.
    """
    target = Path(dst).expanduser()
    try:
        made = read_json(target, NAME)
        written = (target / NAME).stat().st_mtime_ns
    except (OSError, QQuantError):
        return
    files = [source.path / name for name in COPIED]
    if any(file.stat().st_mtime_ns > written for file in files if file.is_file()):
        return
    if not _same_calibration(made.get("calibration"), calib, tokens_sha256):
        return
    if _settled(made.get("quantization")) != _settled(_plain(quant.to_dict())):
        return
    if _settings(made) != _settings(_plain(dict(expected()))):
        return
    if clear:
        clear_leftover(target)
    raise AlreadyDone(
        f"target {target}",
        got="the finished directory of this very command",
        cure="There is nothing to do; --overwrite makes it again",
    )


def _plain(value: Any) -> Any:
    """As it comes back from the file."""
    return json.loads(json.dumps(value))


def _settled(quant: Any) -> Any:
    """The spec without what the run itself chose."""
    if isinstance(quant, dict) and quant.get("target_bpw"):
        return {key: value for key, value in quant.items() if key != "bits"}
    return quant


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in manifest.items() if key not in _FOUND}
    return found | {"quantization": _settled(found.get("quantization"))}


def _same_calibration(made: Any, calib: CalibrationSpec | None, tokens_sha256: str | None) -> bool:
    if calib is None or not isinstance(made, dict):
        return calib is None and made is None
    if made.get("spec") != _plain(public_calibration(calib)):
        return False
    if tokens_sha256 is not None:
        return bool(made.get("sha256") == tokens_sha256)
    records, sources = made.get("sources"), parse_sources(calib.sources)
    if not isinstance(records, list) or len(records) != len(sources):
        return False
    return all(map(_same_source, records, sources))


def _same_source(record: Any, source: Source) -> bool:
    if not isinstance(record, dict) or record.get("name") != source.label:
        return False
    if not source.is_path:
        return True
    path = Path(source.name)
    try:
        return path.is_file() and sha256_file(path) == record.get("sha256")
    except OSError:  # it cannot be read: for the run to say
        return False
