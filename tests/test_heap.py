"""When free heap pages go back to the system, and how many are kept."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from qquant import heap
from qquant.heap import MOST_SLACK, Tidy, free_heap, heap_slack

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo"), reason="no glibc, whose heap this is about"
)


def test_free_heap_goes_back_where_more_is_resident_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And has grown since it was lowest. The second block goes through the first one's figures."""
    resident, free, trimmed = 100, 50, 0

    def trim() -> bool:
        nonlocal resident, trimmed
        resident, trimmed = resident - 20, trimmed + 1
        return True

    monkeypatch.setattr(heap, "resident_bytes", lambda: resident)
    monkeypatch.setattr(heap, "free_heap", lambda: free)
    monkeypatch.setattr(heap, "trim_heap", trim)
    tidy = Tidy()
    for resident, free, then, total in (  # noqa: B007
        (140, 50, 140, 0),
        (141, 50, 121, 1),  # 41 more than the least
        (161, 50, 161, 1),
        (162, 50, 142, 2),  # 41 more than after the last time
        (90, 50, 90, 2),
        (160, 50, 160, 2),  # 70 more than the least, but no more than before
        (163, 40, 163, 2),  # but the heap has no more free than is kept
        (164, 41, 144, 3),
    ):
        tidy(40)
        assert (resident, trimmed) == (then, total)


def test_free_heap_that_is_kept_has_bounds() -> None:
    assert heap_slack() == heap_slack(1 << 20) == 16 << 20
    assert heap_slack(8 << 20) == 32 << 20
    assert heap_slack(1 << 30) == MOST_SLACK == 256 << 20


@needs_glibc
def test_what_is_freed_below_what_is_kept_is_free_heap() -> None:
    code = (
        "import ctypes\n"
        "from qquant.heap import free_heap\n"
        "c = ctypes.CDLL(None)\n"
        "c.malloc.restype, c.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)\n"
        "before = free_heap()\n"
        "held = [c.malloc(100_000) for _ in range(400)]\n"
        "for at in held[:-1]: c.free(at)\n"
        "print(free_heap() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 39_000_000 < int(run.stdout) < 42_000_000


@needs_glibc
def test_heaps_are_asked_about_by_older_systems_too(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = free_heap()
    monkeypatch.setattr(heap, "_ask", heap._ask.__wrapped__)

    class Older:
        mallinfo = ctypes.CDLL(None).mallinfo

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Older)
    assert abs(free_heap() - newest) < 8 << 20
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert free_heap() == 0
