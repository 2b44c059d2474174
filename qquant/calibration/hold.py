"""Where suspended activations wait: on the device, in host memory, or in a spill file.

The walk stops every batch in front of a linear and must keep what that batch was handed until the
linear is solved. The tensors are referenced by the suspended frames, so they cannot be replaced;
but their storage can: `hold` swaps it for a smaller or cheaper one and `restore` swaps it back, bit
for bit. Places are filled in order of speed up to their budget; the last one is a memory-mapped,
already unlinked file, which costs no anonymous memory and vanishes with the process.

In host memory, held tensors lie side by side in slabs, those together that are given up together: a
slab is free when its last tensor is. Left where the forward allocated them, they
would sit between its short-lived tensors, and the heap could neither reuse nor return the holes: on
the demo checkpoint that cost 300 MB beside 190 MB of held data. A free slab is the next one's room:
the system clears every page it gives out, which was a fifteenth of a run.

Linear inputs may be rounded to a 16-bit dtype when held (see `walk`): that is a choice of numerics,
made once for all tensors whatever the budget, so that the budget never changes the result.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import fused, pool
from ..errors import TargetError

SLAB = 16 << 20  # bytes
_APART = 40 << 20  # bytes from which a tensor is no part of a heap: above glibc's largest threshold
_ALIGN = 64


@dataclass
class Holder:
    """Keeps tensors' storage within budgets.

    Attributes:
        host_budget: bytes of held tensors in host memory before spilling to a file.
        device_budget: bytes kept on an accelerator before moving to the host (0 on CPU).
        device_outputs: what waits from block to block stays on the accelerator.
        spill_dir: where spill files go; None refuses to spill and stays in host memory.
        spill_outputs: what waits from block to block goes to files, too.
        recompute_from: bytes in memory from which a block's last inputs are rather made again
            (`batch.Recompute`). What waits from block to block counts on the host, not on an
            accelerator.
        spilled_bytes: most bytes that were in spill files at one time, for the report.
        peak_bytes: most bytes held anywhere at one time.
        kept_inputs, recomputed_inputs: bytes of last inputs that found room, and that did not.
    """

    host_budget: int
    device_budget: int = 0
    device_outputs: bool = False
    spill_dir: Path | None = None
    spill_outputs: bool = False
    recompute_from: int = 2**62
    spilled_bytes: int = 0
    peak_bytes: int = 0
    kept_inputs: int = 0
    recomputed_inputs: int = 0
    _used: dict[str, int] = field(default_factory=lambda: {"device": 0, "host": 0, "file": 0})
    _open: dict[object, tuple[Tensor, int]] = field(default_factory=dict)  # slabs, and where next
    _rooms: dict[int, mmap.mmap] = field(default_factory=dict)  # by address, in use and free
    _free: dict[int, list[Any]] = field(default_factory=dict)  # numpy's arrays, by size
    _taken: dict[int, int] = field(default_factory=dict)  # bytes of rooms in use, by address
    _apart: int = 0  # bytes held on the host in storages that are no rooms

    def hold(
        self,
        t: Tensor,
        rounded: Tensor | None = None,
        dtype: torch.dtype | None = None,
        kind: object = None,
    ) -> Held:
        """Moves the tensor's storage to where there is room; the tensor object stays the same.

        Args:
            t: any shape; not usable until `Held.restore`.
            rounded: the same values in a smaller dtype, to keep instead; the tensor comes back in
                its own dtype.
            dtype: keep the values in this dtype, which must hold them exactly.
            kind: tensors of one kind are given up at about the same time.
        """
        stored = t.data if rounded is None else rounded
        dtype = dtype or stored.dtype
        size = stored.numel() * dtype.itemsize
        place = self._place(stored, size)
        if place == "host":
            stored = self.settle(stored, dtype, kind)
        elif place == "file":
            stored = self._to_file(stored.to(dtype))
        else:
            stored = stored.to(dtype)
        apart = place == "host" and stored.untyped_storage().data_ptr() not in self._rooms
        held = Held(self, t, t.device, t.dtype, place, size, size if apart else 0)
        t.data = stored
        self._used[place] += size
        self._apart += held.apart
        self.peak_bytes = max(self.peak_bytes, sum(self._used.values()))
        self.spilled_bytes = max(self.spilled_bytes, self._used["file"])
        return held

    @property
    def taken(self) -> int:
        """Bytes in memory of all that waits; see `recompute_from`."""
        return sum(self._taken.values()) + self._apart + self._used["device"]

    def has_room(self, size: int, more: int) -> bool:
        """Whether an input that can be made again is better kept.

        Args:
            size: its bytes. more: of those, what has no place yet.
        """
        room = self.taken + more <= self.recompute_from
        if room:
            self.kept_inputs += size
        else:
            self.recomputed_inputs += size
        return room

    @property
    def recomputed_share(self) -> float:
        """Of the last inputs, what found no room."""
        return self.recomputed_inputs / max(1, self.kept_inputs + self.recomputed_inputs)

    def output(self, t: Tensor, dtype: torch.dtype | None = None, kind: object = None) -> Tensor:
        """What a block hands to the next one, in `dtype`, where it can wait."""
        dtype = dtype or t.dtype
        if self.device_outputs and t.device.type != "cpu":
            return t.to(dtype)
        if self.spill_outputs and t.numel():
            return self._to_file(t.to("cpu", dtype))
        return self.settle(t, dtype, kind)

    def leave_device(self) -> None:
        """From now on everything waits on the host; what was held is given up."""
        self.device_budget, self.device_outputs = 0, False
        self.recompute_from = min(self.recompute_from, self.host_budget)
        self._used, self._apart = dict.fromkeys(self._used, 0), 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, kind: object = None) -> Tensor:
        """Room on the host for what a batch begins with, where an output would go."""
        if self.spill_outputs:
            return self._file(prod(shape), dtype).view(shape)
        return self._slot(prod(shape) * dtype.itemsize, kind).view(dtype).view(shape)

    def settle(self, t: Tensor, dtype: torch.dtype | None = None, kind: object = None) -> Tensor:
        """The values on the host in `dtype`, in a slab unless they are there or are large."""
        dtype = dtype or t.dtype
        storage = t.untyped_storage()
        size = t.numel() * dtype.itemsize
        if (
            t.device.type == "cpu"
            and t.dtype == dtype
            and (storage.data_ptr() in self._rooms or storage.nbytes() == size >= _APART)
        ):
            return t
        return self._slot(size, kind).view(dtype).view(t.shape).copy_(t)

    def round(self, t: Tensor, dtype: torch.dtype, kind: object = None) -> Tensor:
        """As `settle`, of a tensor on the host whose own numbers are rounded, too."""
        if fused.narrows(t, dtype) and not fused.unavailable():
            slot = self._slot(t.numel() * dtype.itemsize, kind).view(dtype).view(t.shape)
            return fused.narrow(t, slot)
        rounded = self.settle(t, dtype, kind)
        if t.dtype != dtype:
            t.copy_(rounded)
        return rounded

    def _slot(self, size: int, kind: object) -> Tensor:
        """So many bytes beside others of their kind, or, where that is much, by themselves."""
        if size > SLAB // 2:
            return self._room(size)
        slab, at = self._open.get(kind) or (torch.empty(0, dtype=torch.uint8), 0)
        if at + size > slab.numel():
            self._give_back_end(slab, at)
            slab, at = self._room(SLAB), 0
        end = at + -(-size // _ALIGN) * _ALIGN
        self._open[kind] = slab, end
        self._taken[slab.data_ptr()] = end
        return slab[at : at + size]

    def trim(self) -> None:
        """Gives what is free back to the system: something else is about to need it."""
        for rooms in self._free.values():
            while rooms:
                del self._rooms[rooms.pop().ctypes.data]

    def _give_back_end(self, slab: Tensor, at: int) -> None:
        """Pages of a full slab behind its last tensor; an earlier use may have left them there."""
        start = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < slab.numel() and hasattr(mmap, "MADV_DONTNEED"):
            room = self._rooms[slab.untyped_storage().data_ptr()]
            room.madvise(mmap.MADV_DONTNEED, start, slab.numel() - start)

    def _room(self, size: int) -> Tensor:
        """So many bytes, free again when the last tensor in there is gone."""
        free = self._free.setdefault(size, [])
        if free:
            room = free.pop()
        else:
            self.trim()  # rooms of another size would stay resident beside this one
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            pages = mmap.mmap(-1, size, flags=private)
            room = np.frombuffer(pages, dtype=np.uint8)
            self._rooms[room.ctypes.data] = pages
        taken, address = self._taken, room.ctypes.data
        taken[address] = size

        def end() -> None:
            del taken[address]
            free.append(room)

        lent = room[:]  # its end is that of the tensors' storage
        weakref.finalize(lent, end).atexit = False
        return torch.from_numpy(lent)

    def _place(self, t: Tensor, size: int) -> str:
        if t.device.type != "cpu" and self._used["device"] + size <= self.device_budget:
            return "device"
        if self.spill_dir is None or self._used["host"] + size <= self.host_budget:
            return "host"
        return "file"

    def _to_file(self, t: Tensor) -> Tensor:
        return self._file(t.numel(), t.dtype).view(t.shape).copy_(t)

    def _file(self, count: int, dtype: torch.dtype) -> Tensor:
        """A mapping of a new, already unlinked file, [count]."""
        assert self.spill_dir is not None
        size = count * dtype.itemsize
        name = ""
        try:
            handle, name = tempfile.mkstemp(prefix="spill-", dir=self.spill_dir)
            try:  # a hole would be a SIGBUS on a full disk
                os.posix_fallocate(handle, 0, max(1, size))
            finally:
                os.close(handle)
            return torch.from_file(name, shared=True, size=count, dtype=dtype)
        except (OSError, RuntimeError) as error:
            gone = isinstance(error, FileNotFoundError) or bool(name and not os.path.exists(name))
            if isinstance(error, RuntimeError) and not gone:  # torch's, of the mapping
                raise
            cure = "Free disk room beside the target, or use fewer --samples"
            if gone:
                cure = "Its folder was removed, as rank 0 does when it ends: it says why"
            raise TargetError(
                f"spill file in {self.spill_dir}",
                expected=f"room for {size} bytes of activations",
                got=error.strerror if isinstance(error, OSError) else "no such file",
                cure=cure,
            ) from error
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)


@dataclass
class Held:
    """One tensor on hold."""

    owner: Holder
    tensor: Tensor
    device: torch.device
    dtype: torch.dtype
    place: str
    size: int
    apart: int

    def restore(self) -> Tensor:
        """Gives the storage back, on its own device and in its own dtype."""
        self._release()
        data = pool.moved(self.tensor.data, self.device, self.dtype)
        # A tensor that stayed in the file's mapping must not be written through it.
        self.tensor.data = data.clone() if self.place == "file" else data
        return self.tensor

    def forget(self) -> None:
        """Drops what was held; nobody needs it any more."""
        self._release()
        self.tensor.data = self.tensor.new_empty(0)

    def _release(self) -> None:
        self.owner._used[self.place] -= self.size
        self.owner._apart -= self.apart
