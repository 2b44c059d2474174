"""The safetensors header, read and written: the format as a contract.

A file is eight bytes `n` (little-endian), `n` bytes of JSON, then the data. The JSON maps each
tensor's name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the first
data byte; `__metadata__` maps strings to strings. The tensors cover the data without hole, overlap
or rest.

qquant parses this itself, though the safetensors library would: a truncated shard, a wrong offset
or an unknown dtype must be found before any work, for all shards at once, and be told with the
file, the tensor, what was expected and the cure. And writing needs the header before the data, so
that each tensor can go to its final place as soon as it is finished. `encode_header` orders tensors
as the library does (wider dtypes first, so that every tensor is aligned, then by name): the same
tensors give the same bytes as `safetensors.torch.save_file`, which a test holds.

Nothing here needs torch, so that what follows from headers alone is known before it is imported.
Left out: types below one byte (F4, F6) and complex numbers, which no Qwen checkpoint has. Written
from the format's public specification.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_DIMS = 64  # torch's
METADATA = "__metadata__"

# By name: torch's name, bytes. Narrow to wide, in the library's order; the position decides the
# order in a file.
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
_NAMES = {theirs: name for name, (theirs, _) in _DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(_DTYPES)}

_REFETCH = "Download the file again: it is damaged or incomplete."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file.

    Attributes:
        name: as in the header.
        dtype: safetensors' spelling, such as `BF16`.
        shape: in elements.
        file: the file's name, relative to the checkpoint directory.
        start, end: bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, _DTYPES[self.dtype][0])
        return found


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors in the order of their data, its metadata, its data's size."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_bytes: int


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written.

    Attributes:
        dtype: safetensors' spelling.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


def itemsize(dtype: str) -> int:
    """Bytes of a number of this type (safetensors' spelling)."""
    return _DTYPES[dtype][1]


def dtype_name(dtype: torch.dtype | str) -> str:
    """safetensors' spelling of a torch dtype, or of its name (`bfloat16`).

    Raises:
        CheckpointError: the format has no such type, or qquant does not write it.
    """
    theirs = str(dtype).removeprefix("torch.")
    if theirs not in _NAMES:
        raise CheckpointError("dtype", expected=f"one of {', '.join(_DTYPES)}", got=dtype)
    return _NAMES[theirs]


def read_header(path: Path, file: str | None = None) -> Header:
    """Reads and checks one file's header; no data are read.

    Args:
        path: the file.
        file: what to call it in `TensorInfo.file` and in messages; its name by default.

    Raises:
        CheckpointError: the file is not a complete, consistent safetensors file.
    """
    file = path.name if file is None else file
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(file, expected="a file", got="something else", cure=_REFETCH)
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER):
                most = max(min(size - 8, MAX_HEADER), 0)
                raise CheckpointError(
                    f"{file}: header",
                    expected=f"at most {most} bytes in a file of {size}",
                    got=f"a file of {size} bytes" if len(start) < 8 else f"a length of {length}",
                    cure=_pointer_cure(path, start + handle.read(100)) or _REFETCH,
                )
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read", got=error.strerror, cure="Check the file's permissions."
        ) from error
    return parse_header(raw, size - 8 - length, file)


def parse_header(raw: bytes, data_bytes: int, file: str) -> Header:
    """The header from its JSON `raw`, checked against the `data_bytes` that follow it.

    Raises:
        CheckpointError: as in `read_header`.
    """

    def bad(what: str, expected: object, got: object, cure: str = _REFETCH) -> CheckpointError:
        return CheckpointError(f"{file}: {what}", expected=expected, got=got, cure=cure)

    try:
        # The library demands the brace: nothing may precede it, though JSON allows blanks.
        entries = json.loads(raw.decode(), object_pairs_hook=_unique) if raw[:1] == b"{" else None
    except (ValueError, RecursionError) as error:
        raise bad("header", "JSON", _short(error)) from error
    if not isinstance(entries, dict):
        raise bad("header", "a JSON object", _short(raw[:20]))
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad(METADATA, "strings only", _short(metadata))

    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in entries.items():
        if not _is_text(name):
            raise bad("tensor's name", "text", _name(name))
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise bad(f"tensor {_name(name)}", "dtype, shape and data_offsets", _short(entry))
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            cure = "qquant reads whole-byte types only; convert the tensor to BF16 or F16."
            raise bad(
                f"dtype of {_name(name)}", f"one of {', '.join(_DTYPES)}", _short(dtype), cure
            )
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMS
            or not all(_is_count(d) for d in shape)
        ):
            raise bad(f"shape of {_name(name)}", f"at most {MAX_DIMS} counts", _short(shape))
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise bad(f"data_offsets of {_name(name)}", "[begin, end]", _short(offsets))
        begin, end = offsets
        need = prod(shape) * itemsize(dtype)
        if end - begin != need:
            what = f"bytes of {_name(name)} ({dtype} {_short(shape)})"
            raise bad(what, _int(need), _int(end - begin))
        found.append((begin, end, name, dtype, tuple(shape)))

    # Empty tensors sort before the one that starts at the same byte.
    found.sort(key=lambda t: (t[0], t[1]))
    at = 0
    for begin, end, name, _, _ in found:
        if begin != at:
            what = "a hole" if begin > at else "an overlap"
            raise bad(f"data of {_name(name)}", f"from byte {_int(at)}", f"{what} at {_int(begin)}")
        at = end
    if at != data_bytes:
        name = next((t[2] for t in found if t[1] > data_bytes), None)
        what = f"truncated in {_name(name)}" if name is not None else "bytes after the last tensor"
        raise bad(what, f"{_int(at)} bytes of data", _int(data_bytes))
    base = 8 + len(raw)
    tensors = tuple(
        TensorInfo(name, dtype, shape, file, base + begin, base + end)
        for begin, end, name, dtype, shape in found
    )
    return Header(tensors, metadata, data_bytes)


def encode_header(
    tensors: Sequence[TensorPlan], metadata: Mapping[str, str], file: str
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The first bytes of a file that will hold `tensors`, and where each one's data go.

    Args:
        tensors: their names are unique.
        metadata: goes to `__metadata__`, sorted by key.
        file: the file's name, for `TensorInfo.file`.
    """
    ordered = sorted(tensors, key=lambda t: (-_RANK[t.dtype], t.name))
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    places, at = [], 0
    for t in ordered:
        end = at + t.nbytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, end]}
        places.append((t, at, end))
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    infos = tuple(
        TensorInfo(t.name, t.dtype, t.shape, file, base + begin, base + end)
        for t, begin, end in places
    )
    return len(raw).to_bytes(8, "little") + raw, infos


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of two equal keys; which one a reader takes is not defined."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{_name(counts.most_common(1)[0][0])} is there twice")
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: str) -> bool:
    """False for lone surrogates, which JSON can escape and UTF-8 cannot hold."""
    return value.isascii() or not any(0xD800 <= ord(c) <= 0xDFFF for c in value)


def _short(value: object) -> str:
    """At most a line of something foreign, escaped."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, deep nesting
        return f"a {type(value).__name__} too large to show"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 120 else text[:117] + "..."


def _name(name: object) -> str:
    return _short(name)[1:-1] if isinstance(name, str) else _short(name)


def _int(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"


def _pointer_cure(path: Path, start: bytes) -> str | None:
    """A git clone without LFS leaves small text files in place of the weights."""
    if start.startswith(b"version https://git-lfs"):
        return f"It is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}."
    return None
