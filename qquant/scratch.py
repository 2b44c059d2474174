"""Memory that machine code works in, kept from one call to the next.

Fresh memory comes page by page, cleared: for what is written and read once that took as long as a
tenth of the product. What a call leaves there is nobody's when it returns; every thread has its
own.

Left out on purpose: results, and what is too large to be kept.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_MOST = 32 << 20  # bytes of one kind that are kept

_kept = threading.local()


def scratch(kind: str, dtype: torch.dtype, count: int) -> Tensor:
    """Room for so many numbers, [count], on the CPU; the next call for this kind gives it again.

    Args:
        kind: what for; two that are needed at once are of two kinds.
    """
    size = count * dtype.itemsize
    if size > _MOST:
        return torch.empty(count, dtype=dtype, device="cpu")
    room: Tensor | None = getattr(_kept, kind, None)
    if room is None or room.numel() < size:
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_kept, kind, room)
    return room[:size].view(dtype)
