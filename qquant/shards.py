"""Writing safetensors shards whose layout is known before any tensor is.

Which tensors a run will write, and how large they are, is known from the source's headers and the
spec. So the headers are written first, each file gets its full size at once (a full disk shows now,
not after hours), and every tensor then goes to its final place as soon as it exists: any order, no
copy of a shard in memory, no second pass. A large embedding can go in rows. What `close` leaves is
byte for byte what `safetensors.torch.save_file` writes, whatever the order of writing.

Shards are named as the hub does; the index is written only when there are several. Modes follow the
umask (some tools leave 0600, which a server under another user cannot read). Not here: where the
directory stands and when it becomes visible (`publish.py`), and reading (`checkpoint.py`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .checkpoint import tensor_memory
from .directory import INDEX, WEIGHTS
from .errors import RunError, TargetError
from .headers import TensorInfo, TensorPlan, dtype_name, encode_header

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 26  # bytes copied at a time where a tensor is not plain CPU memory


@dataclass
class _Place:
    """Where a planned tensor goes, and which of its rows are there (as sorted, merged spans)."""

    plan: TensorPlan
    info: TensorInfo
    done: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.plan.shape[0] if self.plan.shape else 1

    @property
    def complete(self) -> bool:
        return self.done == [(0, self.rows)] or self.rows == 0


def split_shards(plan: Sequence[TensorPlan], shard_size: int) -> list[list[TensorPlan]]:
    """The plan in its own order, cut so that no shard's data pass `shard_size` bytes.

    A tensor larger than that has a shard to itself.
    """
    shards: list[list[TensorPlan]] = []
    room = 0
    for tensor in plan:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards or [[]]


def shard_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and so on."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class ShardWriter:
    """Files for `plan` in `directory`, open for writing; use as a context manager.

    On leaving normally `close` is called; on an exception files are only closed, and the caller's
    work directory is expected to be removed, or gone on with by another writer. One thread at a
    time.

    Args:
        directory: exists, and has no weights in it.
        plan: every tensor that will be written.
        shard_size: bytes of data per file at the most.
        metadata: for every file's `__metadata__`. `format: pt` is there unless it says otherwise:
            without it transformers refuses to load the file.
        done: hashes (`checkpoint.tensor_sha256`) of tensors that an earlier writer of the same plan
            has written and flushed, to go on from. Nothing else in its files counts. None begins
            with new files.

    Raises:
        RunError: two tensors of the plan have one name; the earlier files are not of this plan or
            hold other bytes.
        TargetError: a file exists, cannot be created, or does not fit the disk.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[TensorPlan],
        shard_size: int,
        metadata: Mapping[str, str] | None = None,
        done: Mapping[str, str] | None = None,
    ) -> None:
        shards = split_shards(plan, shard_size)
        names = shard_names(len(shards))
        meta = {"format": "pt"} | dict(metadata or {})
        self._directory = directory
        self._places: dict[str, _Place] = {}
        self._handles: dict[str, int] = {}
        try:
            for name, shard in zip(names, shards, strict=True):
                start, infos = encode_header(shard, meta, name)
                plans = {t.name: t for t in shard}
                for info in infos:
                    if info.name in self._places or len(plans) != len(shard):
                        raise RunError(f"plan: tensor {info.name}", expected="once", got="twice")
                    self._places[info.name] = _Place(plans[info.name], info)
                size = infos[-1].end if infos else len(start)
                if done is None:
                    self._create(name, start, size)
                else:
                    self._reopen(name, start, size)
            for name, digest in (done or {}).items():
                self._adopt(name, digest)
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that `close` leaves, the index included; relative names."""
        shards = tuple(dict.fromkeys(p.info.file for p in self._places.values())) or (WEIGHTS,)
        return shards if len(shards) == 1 else (*shards, INDEX)

    @property
    def nbytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(p.plan.nbytes for p in self._places.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor; it may be on any device and need not be contiguous.

        Raises:
            RunError: it is not in the plan, has another dtype or shape, or is there already.
            TargetError: the disk refuses.
        """
        place = self._place(name)
        if tuple(tensor.shape) != tuple(place.plan.shape):
            raise RunError(
                f"shape of {name}", expected=list(place.plan.shape), got=list(tensor.shape)
            )
        self._write(place, 0, tensor if tensor.dim() else tensor.reshape(1))

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Writes `rows` as the rows (first dimension) from `start` on.

        Raises:
            RunError: as in `write`; also for rows outside the tensor or written before.
            TargetError: the disk refuses.
        """
        place = self._place(name)
        shape = place.plan.shape
        if not shape or tuple(rows.shape[1:]) != tuple(shape[1:]) or not rows.dim():
            raise RunError(f"rows of {name}", expected=["*", *shape[1:]], got=list(rows.shape))
        if not 0 <= start <= start + rows.shape[0] <= shape[0]:
            raise RunError(
                f"rows of {name}",
                expected=f"within 0 to {shape[0]}",
                got=f"{start} to {start + rows.shape[0]}",
            )
        self._write(place, start, rows)

    def flush(self) -> None:
        """Makes what was written so far durable.

        Raises:
            TargetError: the disk refuses.
        """
        for name, handle in self._handles.items():
            try:
                os.fsync(handle)
            except OSError as error:
                raise _disk(self._directory / name, error) from error

    def again(self, names: Iterable[str]) -> None:
        """Counts tensors as not written: their bytes will be replaced."""
        for name in names:
            self._place(name).done = []

    def close(self) -> tuple[str, ...]:
        """Checks that all is written, flushes it to the disk, writes the index; returns `files`.

        Raises:
            RunError: a tensor, or rows of it, were never written.
            TargetError: the disk refuses.
        """
        missing = [p for p in self._places.values() if not p.complete]
        if missing:
            first = missing[0]
            got = "nothing"
            if first.done:
                got = "rows " + ", ".join(f"{a} to {b}" for a, b in first.done)
            raise RunError(
                f"tensor {first.plan.name} ({len(missing)} of {len(self._places)} incomplete)",
                expected=f"all of its {first.rows} rows written",
                got=got,
            )
        files = self.files
        try:
            self.flush()
            if INDEX in files:
                weight_map = {n: p.info.file for n, p in sorted(self._places.items())}
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
                with (self._directory / INDEX).open("x", encoding="utf-8") as out:
                    json.dump(index, out, indent=2, ensure_ascii=False)
                    out.write("\n")
                    out.flush()
                    os.fsync(out.fileno())
        except OSError as error:
            raise _disk(self._directory, error) from error
        finally:
            self.abort()
        return files

    def abort(self) -> None:
        """Closes the files as they are."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._handles:
            self.close()
        self.abort()

    def _create(self, name: str, start: bytes, size: int) -> None:
        try:
            handle = os.open(self._directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._handles[name] = handle
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(handle, size)  # this file system cannot reserve room
            _pwrite(handle, memoryview(start), 0)
        except OSError as error:
            raise _disk(self._directory / name, error) from error

    def _reopen(self, name: str, start: bytes, size: int) -> None:
        path = self._directory / name
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            self._handles[name] = handle
            found = os.fstat(handle).st_size
            same = found == size and os.pread(handle, len(start), 0) == start
        except OSError as error:
            raise _disk(path, error) from error
        if not same:
            raise RunError(
                f"unfinished {path}",
                expected=f"{size} bytes with the header of this run",
                got=f"{found} bytes",
                cure="Use --restart to begin anew",
            )

    def _adopt(self, name: str, digest: str) -> None:
        """Counts a tensor as written, once its bytes are the ones that were."""
        place = self._place(name)
        handle, found = self._handles[place.info.file], hashlib.sha256()
        for at in range(place.info.start, place.info.end, _PIECE):
            found.update(os.pread(handle, min(_PIECE, place.info.end - at), at))
        if found.hexdigest() != digest:
            raise RunError(
                f"{name} in unfinished {self._directory / place.info.file}",
                expected="what was written there",
                got="other bytes",
                cure="The disk may be failing. Use --restart to begin anew",
            )
        place.done = [(0, place.rows)]

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise RunError(f"tensor {name}", expected="one of the plan", got="another")
        place = self._places[name]
        if place.info.file not in self._handles:
            raise RunError(f"tensor {name}", expected="an open writer", got="a closed one")
        return place

    def _write(self, place: _Place, start: int, rows: Tensor) -> None:
        name, plan = place.plan.name, place.plan
        if (dtype := dtype_name(rows.dtype)) != plan.dtype:
            raise RunError(f"dtype of {name}", expected=plan.dtype, got=dtype)
        stop = start + rows.shape[0]
        if start == stop:
            return
        if any(a < stop and start < b for a, b in place.done):
            raise RunError(f"rows {start} to {stop} of {name}", expected="once", got="twice")
        row = plan.nbytes // place.rows
        plain = rows.device.type == "cpu" and rows.is_contiguous()
        step = rows.shape[0] if plain else max(1, _PIECE // max(row, 1))
        handle = self._handles[place.info.file]
        try:
            for at in range(0, rows.shape[0], step):
                piece = rows[at : at + step].detach().to("cpu").contiguous()
                memory = tensor_memory(piece, 0, piece.numel() * piece.element_size())
                _pwrite(handle, memory, place.info.start + (start + at) * row)
        except OSError as error:
            raise _disk(self._directory / place.info.file, error) from error
        place.done = _merge([*place.done, (start, stop)])


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _pwrite(handle: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(handle, data, at)
        data, at = data[count:], at + count


def _disk(path: Path, error: OSError) -> TargetError:
    cure = "Check the target's disk."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "Free room on the target's disk, or give a target on a larger one."
    return TargetError(f"cannot write {path}", got=error.strerror, cure=cure)
