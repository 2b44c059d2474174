"""A checkpoint directory, opened once, checked wholly, read one tensor at a time.

`Checkpoint.open` reads `config.json`, the index and every shard's header, and nothing else: whether
all the tensors are there and all their bytes are there is known before any work begins. Then
`read` copies one tensor into memory of its own with plain reads. Not a memory map: pages of a map
count as the process's own memory for as long as they stay mapped, and the promise is that a
checkpoint larger than the memory quantizes.

Opening needs no torch, reading does. Which files may be read at all is `directory.py`; the
safetensors format is `headers.py`; writing is `shards.py` and `publish.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .directory import (
    CHUNK,
    CONFIG,
    INDEX,
    WEIGHTS,
    contained,
    find_directory,
    read_json,
    refuse_adapter,
    sha256_files,
    weight_files,
)
from .errors import CheckpointError
from .headers import Header, TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZE_CONFIGS = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened directory; make one with `open` (or `examine`).

    Attributes:
        path: the directory, absolute, links resolved.
        config: `config.json`.
        tensors: by name, in the order of the shards and of the data within each.
        headers: by file.
        index: `model.safetensors.index.json`, or None where there is a single file.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    headers: dict[str, Header]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Opens and checks a directory; reads headers only.

        Raises:
            CheckpointError: anything is missing, damaged, or points outside the directory.
        """
        checkpoint, problems = cls.examine(path)
        if problems:
            raise problems[0]
        return checkpoint

    @classmethod
    def examine(cls, path: str | os.PathLike[str]) -> tuple[Checkpoint, list[CheckpointError]]:
        """As `open`, but goes on past broken shards and returns what is wrong with them.

        Raises:
            CheckpointError: there is nothing to look at: no directory, `config.json` or index.
        """
        root = find_directory(path)
        refuse_adapter(root)
        config = read_json(root, CONFIG)
        index, files = weight_files(root)
        problems: list[CheckpointError] = []
        headers: dict[str, Header] = {}
        for file in sorted(set(files.values())) if index else [WEIGHTS]:
            try:
                headers[file] = read_header(contained(root, file), file)
            except CheckpointError as error:
                problems.append(error)
        tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            for info in header.tensors:
                if index is None or files.get(info.name) == file:
                    tensors[info.name] = info
        for name, file in files.items():
            if name not in tensors and file in headers:
                problems.append(
                    CheckpointError(
                        f"tensor {name}",
                        expected=f"in {file}, where {INDEX} puts it",
                        got="no such tensor there",
                        cure="The index and the shards are of different versions: download both.",
                    )
                )
        if not tensors and not problems:
            problems.append(CheckpointError(f"{WEIGHTS} in {root}", expected="tensors", got="none"))
        return cls(root, config, tensors, headers, index), problems

    @property
    def files(self) -> tuple[str, ...]:
        """The files that make up the checkpoint: config, index, shards; relative names."""
        return (CONFIG, *((INDEX,) if self.index else ()), *self.headers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """How the checkpoint is quantized already, by `config.json` or else `quantize_config.json`.

        Raises:
            CheckpointError: it is there and is not a JSON object.
        """
        inside = self.config.get("quantization_config")
        if inside is not None:
            if not isinstance(inside, dict):
                what = f"{CONFIG}: quantization_config"
                raise CheckpointError(what, expected="an object", got=type(inside).__name__)
            return inside
        for name in QUANTIZE_CONFIGS:
            if os.path.lexists(self.path / name):
                return read_json(self.path, name)
        return None

    def file(self, name: str) -> Path:
        """The path of a file of the directory, once it is known to lie in it.

        Raises:
            CheckpointError: it is missing, or leads outside.
        """
        return contained(self.path, name)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"tensor {name}",
                expected=f"in {self.path.name}",
                got=f"{len(self.tensors)} tensors, none of that name",
                cure="The weights do not fit the config's model_type: take both from one model.",
            )
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: there is none of that name, or the file has changed since `open`.
        """
        info = self.info(name)
        return self._bytes(info, info.start, info.end).view(info.torch_dtype).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Rows `start` to `stop` (first dimension) of a tensor, read without the others.

        Args:
            into: [n] uint8 on the CPU, no fewer bytes than the rows have: memory to read them to,
                for whoever reads many; the result is a view of it.

        Raises:
            CheckpointError: as in `read`.
            IndexError: the tensor has no such rows.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name} {list(info.shape)}")
        row = info.nbytes // max(info.shape[0], 1)
        flat = self._bytes(info, info.start + start * row, info.start + stop * row, into)
        return flat.view(info.torch_dtype).view(stop - start, *info.shape[1:])

    def sha256(self, stop: threading.Event | None = None) -> str:
        """A hash over config, index and weights: of each file its name, size and contents.

        Files are taken by name, so the same checkpoint has the same hash wherever it lies. Reads
        every byte.

        Args:
            stop: as for `directory.sha256_file`.
        """
        whole = hashlib.sha256()
        paths = {name: self.file(name) for name in sorted(self.files)}
        digests = sha256_files(list(paths.values()), stop)
        for name, path in paths.items():
            whole.update(f"{name}\0{path.stat().st_size}\0{digests[path]}\n".encode())
        return whole.hexdigest()

    def tensor_sha256(self, name: str) -> str:
        """`tensor_sha256` of a tensor as it is stored, a few megabytes in memory at a time.

        Raises:
            CheckpointError: as in `read`.
        """
        import torch

        info, digest = self.info(name), hashlib.sha256()
        into = torch.empty(min(CHUNK, info.nbytes), dtype=torch.uint8)
        for at in range(info.start, info.end, CHUNK):
            part = self._bytes(info, at, min(at + CHUNK, info.end), into)
            digest.update(tensor_memory(part, 0, part.numel()))
        return digest.hexdigest()

    def _bytes(self, info: TensorInfo, start: int, end: int, into: Tensor | None = None) -> Tensor:
        import torch

        out = torch.empty(end - start, dtype=torch.uint8) if into is None else into[: end - start]
        try:
            with open(self.file(info.file), "rb", buffering=0) as handle:
                handle.seek(start)
                at = 0
                while at < out.numel():
                    got = handle.readinto(tensor_memory(out, at, out.numel()))
                    if not got:
                        raise CheckpointError(
                            f"{info.file}: {info.name}",
                            expected=f"{end - start} bytes",
                            got=at,
                            cure="The file has become shorter while it was read.",
                        )
                    at += got
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read", got=error.strerror) from error
        return out


def tensor_memory(flat: Tensor, start: int, end: int) -> memoryview:
    """Bytes `start` to `end` of a contiguous CPU tensor, to read into or write from.

    Numpy would do, but has no bfloat16. The view does not keep the tensor alive.
    """
    count = end - start
    if not count:
        return memoryview(b"")
    return memoryview((ctypes.c_char * count).from_address(flat.data_ptr() + start)).cast("B")


def tensor_sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    import torch

    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(tensor_memory(flat, 0, flat.numel())).hexdigest()
