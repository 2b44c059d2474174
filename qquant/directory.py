"""Which files of a model directory may be read, and which of them hold the weights.

A directory comes from elsewhere, and so do the names in its index. They must stay in it: no
absolute path, no `..`. A symbolic link must end in the directory too, with one exception: the
Hugging Face cache keeps `snapshots/REVISION/NAME` as links to `../../blobs/HASH` of the same
repository, so a directory in a `snapshots` folder may link into the `blobs` beside that. The
directory itself may be reached through any link.

Never unpickled: `pytorch_model.bin` and its like, which can run code. Never followed: names of hub
repositories; what is read lies on the disk. Whether the weights' files are whole is for
`headers.py` and `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CHUNK = 1 << 22  # bytes read at a time
_TOGETHER = 8  # files or tensors read at a time
T = TypeVar("T")
R = TypeVar("R")
_JSON_BYTES = 64 << 20  # Qwen's own tokenizer.json has 11 MB
_JSON_DEPTH = 64
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """The file's SHA-256, read in chunks.

    Args:
        stop: once it is set the rest is not read, and what is returned means nothing.
    """
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while (stop is None or not stop.is_set()) and (chunk := handle.read(CHUNK)):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], stop: threading.Event | None = None) -> dict[Path, str]:
    """Each file's SHA-256, several at a time (`in_threads`).

    Args:
        stop: as for `sha256_file`.
    """
    return dict(zip(paths, in_threads(lambda p: sha256_file(p, stop), paths), strict=True))


def in_threads(call: Callable[[T], R], items: Collection[T]) -> list[R]:
    """The call's result for each: up to eight at a time, by as many threads as there are cores.

    For what lets other threads run meanwhile, as reading and hashing do.
    """
    with ThreadPoolExecutor(max(1, min(_TOGETHER, len(items), os.cpu_count() or 1))) as pool:
        return list(pool.map(call, items))


def find_directory(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute directory, links resolved.

    Raises:
        CheckpointError: it is not there, or is no directory; for what looks like a hub repository's
            name the cure is the command that downloads it.
    """
    given = os.fspath(path)
    try:
        root = Path(given).expanduser().resolve()
        if root.is_dir():
            os.listdir(root)
            return root
        there = root.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {given!r}", expected="a readable directory", got=str(error)
        ) from error
    cure = "Check the path."
    if there:
        cure = f"Give the directory that holds it: {root.parent}."
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given):
        name = given.split("/")[1]
        cure = (
            f"If it is a repository on the Hugging Face hub, download it first: "
            f"hf download {given} --local-dir {name}, then give ./{name}."
        )
    raise CheckpointError(
        f"checkpoint {given!r}",
        expected="a directory",
        got="a file" if there else "nothing there",
        cure=cure,
    )


def contained(root: Path, name: str) -> Path:
    """The file `name` of the directory `root`, once it is known to lie in it.

    Raises:
        CheckpointError: the name is absolute or climbs, the file is missing or no file, or a link
            leaves the directory other than into the hub cache's own blobs.
    """
    cure = "Do not use this checkpoint unless you know who made it."
    if not name or "\0" in name or "\\" in name or PurePosixPath(name).is_absolute():
        raise CheckpointError(
            f"file {name!r}", expected="a name within the directory", got="another", cure=cure
        )
    if ".." in PurePosixPath(name).parts:
        raise CheckpointError(
            f"file {name!r}", expected="a name within the directory", got="..", cure=cure
        )
    path = root / name
    try:
        real, target = root.resolve(), path.resolve()
        inside = target.is_relative_to(real)
        if not inside and real.parent.name == "snapshots":
            inside = target.is_relative_to(real.parent.parent / "blobs")
        if not inside:
            raise CheckpointError(
                f"file {name}",
                expected=f"within {root}",
                got=f"a link to {target}",
                cure="Put the file itself, or a hard link to it, into the directory.",
            )
        if target.is_file():
            return path
        got = "something else" if target.exists() else "nothing there"
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        got = str(error)
    raise CheckpointError(
        f"file {name} of {root}",
        expected="a file",
        got=got,
        cure="Download it again: the copy is incomplete.",
    )


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of `root`.

    Raises:
        CheckpointError: the file is missing, cannot be read, or holds something else.
    """
    path = contained(root, name)
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"more than {_JSON_BYTES >> 20} MiB")
        data = path.read_bytes()
        value = json.loads(data.decode(), parse_constant=_no_number)
        _check_depth(value)
        if b"\\u" in data:  # an escape may be half of a surrogate pair: it could not be written
            json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name} of {root}",
            expected="JSON",
            got=str(error),
            cure="Download the file again.",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{name} of {root}", expected="a JSON object", got=type(value).__name__
        )
    return value


def _no_number(text: str) -> float:
    """Python's json reads and writes NaN and Infinity; JSON has neither, nor have other readers."""
    raise ValueError(f"{text}, which is no JSON")


def _check_depth(value: Any) -> None:
    """Deep nesting would break whoever walks through the value later."""
    level = [value]
    for _ in range(_JSON_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    if level:
        raise ValueError(f"values nested more than {_JSON_DEPTH} deep")


def refuse_adapter(root: Path) -> None:
    """An adapter is no model: it has neither config.json nor all weights.

    Raises:
        CheckpointError: the directory is one.
    """
    beside = os.path.lexists(root / "adapter_config.json")
    if beside and not os.path.lexists(root / CONFIG):
        raise CheckpointError(
            f"{root}",
            expected="a whole model",
            got="a LoRA adapter (adapter_config.json and no config.json)",
            cure="Merge it into its base: peft's merge_and_unload(), then save_pretrained(DIR).",
        )


def weight_files(root: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The index, and which file each tensor is in; (None, {}) for a single file.

    Raises:
        CheckpointError: there are no safetensors weights, the index is malformed or names a file
            elsewhere, or there are two sets of weights.
    """
    single, several = (os.path.lexists(root / name) for name in (WEIGHTS, INDEX))
    if not single and not several:
        raise _no_weights(root)
    if not several:
        return None, {}
    index = read_json(root, INDEX)
    files = index.get("weight_map")
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(file, str) for file in files.values())
    ):
        raise CheckpointError(
            f"{INDEX}: weight_map",
            expected="tensor names and the files they are in",
            got=type(files).__name__ if not files else "other values",
            cure="Download the index again.",
        )
    for file in sorted(set(files.values())):
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX}: file {file!r}",
                expected="safetensors files",
                got="another kind",
                cure="qquant never unpickles: use the safetensors version of the checkpoint.",
            )
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            contained(root, file)  # raises
    if single and WEIGHTS not in files.values():
        raise CheckpointError(
            f"weights of {root}",
            expected=f"{WEIGHTS} or the shards of {INDEX}",
            got="both, and readers differ in which they take",
            cure="Remove the one that is out of date.",
        )
    return index, files


def _no_weights(root: Path) -> CheckpointError:
    what, expected = f"weights of {root}", f"{WEIGHTS} or {INDEX}"
    others = sorted(p.name for p in root.glob("*.safetensors"))
    pickles = sorted(p.name for pattern in _PICKLES for p in root.glob(pattern))
    if others:
        cure = f"If {others[0]} is the whole model, rename it to {WEIGHTS}."
        if re.search(r"-of-\d+", others[0]):
            cure = f"The shards' {INDEX} is missing: download it."
        return CheckpointError(what, expected=expected, got=", ".join(others[:3]), cure=cure)
    if pickles:
        return CheckpointError(
            what,
            expected=expected,
            got=f"pickled weights only ({pickles[0]})",
            cure=(
                "qquant never unpickles, since that can run code. Download the safetensors version "
                "of the checkpoint, or convert it where you trust it: load it with "
                "transformers and call save_pretrained(DIR)."
            ),
        )
    return CheckpointError(
        what, expected=expected, got="neither", cure="Download the weights, not only the config."
    )
