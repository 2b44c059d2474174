"""When free heap pages go back to the system, and how many are kept."""

from __future__ import annotations

import pytest

from qquant import devices
from qquant.devices import Tidy
from qquant.host import heap_slack


def test_free_heap_goes_back_where_more_is_resident_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And has grown since it was lowest. The second block goes through the first one's figures."""
    resident, trimmed = 100, 0

    def trim() -> bool:
        nonlocal resident, trimmed
        resident, trimmed = resident - 20, trimmed + 1
        return True

    monkeypatch.setattr(devices, "resident_bytes", lambda: resident)
    monkeypatch.setattr(devices, "trim_heap", trim)
    tidy = Tidy()
    for resident, then, total in (
        (140, 140, 0),
        (141, 121, 1),  # 41 more than the least
        (161, 161, 1),
        (162, 142, 2),  # 41 more than after the last time
        (90, 90, 2),
        (160, 160, 2),  # 70 more than the least, but no more than before
        (163, 143, 3),
    ):
        tidy(40)
        assert (resident, trimmed) == (then, total)


def test_free_heap_that_is_kept_has_bounds() -> None:
    assert heap_slack() == heap_slack(1 << 20) == 32 << 20
    assert heap_slack(8 << 20) == 128 << 20
    assert heap_slack(1 << 30) == 256 << 20
