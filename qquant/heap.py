"""What glibc's heap keeps of memory that was freed, and when it goes back to the system.

The heap keeps what was freed below its mmap threshold and leaves it in holes: torch's own
operations allocate there, and small things that live longer lie between. Forcing the threshold down
costs a page fault per page of every activation (the forward took twice as long); asking for the
free pages now and then costs little.

Left out on purpose: memory that never comes to lie there (`pool.py`, `calibration/hold.py`).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from .host import resident_bytes

_LEAST_SLACK, MOST_SLACK = 16 << 20, 256 << 20  # bytes


class Tidy:
    """Gives free heap pages back to the system, where that keeps resident memory from rising.

    Below what was resident before it would cost page faults for nothing: the same pages are asked
    for again, and the peak is no lower. Does nothing where there is no `/proc/self/statm` or no
    `malloc_trim`.
    """

    def __init__(self) -> None:
        self._low = self._most = resident_bytes()

    def __call__(self, slack: int, need: int = 0) -> None:
        """Looks, and acts where more is resident than at any call before, or is about to be.

        Args:
            slack: bytes of free heap that are kept (see `heap_slack`): as many must be free, and
                resident since it was lowest.
            need: bytes that are about to be asked for.
        """
        now = resident_bytes()
        self._low = min(self._low, now)
        more = now + need > max(self._most, self._low + slack)
        if more and free_heap() > slack and trim_heap():
            now = self._low = resident_bytes()
        self._most = max(self._most, now)


def trim_heap() -> bool:
    """Gives free heap pages back to the system; False where there is no `malloc_trim`."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def free_heap() -> int:
    """Bytes that the heap keeps, be they resident or not; 0 where there is no `mallinfo`."""
    ask = _ask()
    return int(ask().fordblks) if ask else 0


def heap_slack(largest: int = 0) -> int:
    """Bytes of free heap that are better kept, where tensors of `largest` bytes come and go.

    Less, and pages are given back that the next batch asks for again, cleared. More, and the peak
    is higher. Eight blocks of hidden 512, 128x512 tokens, two cores of an AMD EPYC (Zen 4): with 32
    MB or 16 activations, 16 MB or 4, and 8 MB or 2 `fast` took 19.0, 18.9 and 19.2 s (means of two)
    and 787, 757 and 763 MiB, the default 30.9 and 30.5 s and 859 and 845 MiB with the first two.
    """
    return min(max(_LEAST_SLACK, 4 * largest), MOST_SLACK)


@cache
def _ask() -> Any:
    """glibc's `mallinfo2`, or what was before it (2.33), which counts to 4 GiB."""
    library = ctypes.CDLL(None)
    for name, number in (("mallinfo2", ctypes.c_size_t), ("mallinfo", ctypes.c_uint)):
        ask: Any = getattr(library, name, None)
        if ask is not None:
            ask.restype = _counts(number)
            return ask
    return None


def _counts(number: Any) -> type[ctypes.Structure]:
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

    class Counts(ctypes.Structure):
        _fields_ = tuple((name, number) for name in names)

    return Counts
