"""Memory of large tensors on the CPU that come and go by the thousand, in a few sizes.

glibc's heap serves such tensors badly: a small object that lives longer takes a piece of a large
hole, and the next large tensor no longer fits. The heap grew by half of what a run needs, page by
page, each cleared by the system. Here each tensor has a mapping of its own, which is the next one's
of about that size when nothing refers to it any more.

Left out on purpose: what waits between blocks (`calibration/hold.py`), what one function works in
(`scratch.py`), and what torch's own operations return.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEAST = 256 << 10  # bytes from which tensors are large
_ROOMY = 1.25  # so many times as large as a tensor its memory may be

# Free ones: numpy's arrays of bytes. What a tensor leaves is added without the lock, since that may
# happen within it.
_rooms: list[Any] = []
_lock = threading.Lock()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of this shape on the CPU, its numbers whatever was there."""
    size = prod(shape) * dtype.itemsize
    if size < _LEAST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    with _lock:
        fits = [(-r.nbytes, i) for i, r in enumerate(_rooms) if size <= r.nbytes <= _ROOMY * size]
        # The smallest, and of those the last used: caches have it.
        room = _rooms.pop(max(fits)[1]) if fits else None
    if room is None:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room = np.frombuffer(pages, dtype=np.uint8)
    lent = room[:size]  # its end is that of the tensor's storage
    weakref.finalize(lent, _rooms.append, room).atexit = False
    # No view, whose base would keep its storage where another one is put in its place.
    return torch.frombuffer(lent, dtype=dtype).resize_(shape)


def less(a: Tensor, b: Tensor) -> Tensor:
    """a - b, of one shape and dtype, without gradients; on the CPU such a tensor."""
    if a.device.type != "cpu":
        return a - b
    return torch.sub(a, b, out=empty(*a.shape, dtype=a.dtype))


def moved(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As `t.to`; what is converted on the CPU is such a tensor."""
    if not t.device.type == device.type == "cpu" or t.dtype == dtype:
        return t.to(device=device, dtype=dtype)
    return empty(*t.shape, dtype=dtype).copy_(t)


def trim() -> None:
    """Gives what is free back to the system."""
    with _lock:
        _rooms.clear()
