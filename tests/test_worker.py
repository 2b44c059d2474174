"""A process of its own: what it measures comes back, and its death is told.

Imports little: so does the process, which imports this.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from qquant.errors import RunError
from qquant.parts.base import Model, Part, Subject
from qquant.worker import Worker


@dataclass(frozen=True)
class Obeys(Part):
    """Does what its word says."""

    word: str

    @property
    def place(self) -> tuple[str, ...]:
        return ("speed", self.word)

    def measure(self, subject: Subject) -> dict[str, Any]:
        import torch

        subject.advance(1, 2)
        if self.word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.word == "remark":  # as torchao does while it is imported
            logging.getLogger("torchao").warning("a remark of another package")
        if self.word == "fail":
            raise ZeroDivisionError("never mind")
        return {"threads": torch.get_num_threads(), "pid": os.getpid()}


def test_one_process_serves_until_it_dies() -> None:
    told: list[tuple[int, int]] = []

    def advance(*at: int) -> None:
        told.append(at)  # type: ignore[arg-type]

    with Worker(Subject(Model("nowhere")), 1) as worker:
        first = worker.measure(Obeys("one"), advance)
        with pytest.raises(RunError, match="ZeroDivisionError: never mind"):
            worker.measure(Obeys("fail"), advance)
        assert worker.measure(Obeys("two"), advance) == first  # the same process
        with pytest.raises(RunError, match=r"speed die.*killed"):
            worker.measure(Obeys("die"), advance)
        with pytest.raises(RunError, match=r"speed more.*killed"):
            worker.measure(Obeys("more"), advance)
    assert first["threads"] == 1 and first["pid"] != os.getpid()
    assert told == [(1, 2)] * 4


def test_remarks_of_other_packages_stay_there(capfd: pytest.CaptureFixture[str]) -> None:
    with Worker(Subject(Model("nowhere")), 1) as worker:
        worker.measure(Obeys("remark"), lambda *_: None)
    assert "remark" not in capfd.readouterr().err
