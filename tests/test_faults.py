"""Disks that fill up, sources that cannot be read: a clear error, nothing published, nothing lost.

Faults are put in front of the system's calls, one at a time, at moments spread over a whole run.
After each the same command, on a disk that works again, has to end in the reference's bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_convert import make
from test_resume import run, same

import qquant.checkpoint as checkpoint
from qquant.calibration.hold import Holder
from qquant.errors import CheckpointError, QQuantError
from qquant.events import BlockDone, Event

# What puts bytes or names on a disk, in this package and in what it calls.
WRITES = ("pwrite", "posix_fallocate", "fsync", "replace", "rename", "mkdir")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("faults") / "src")


@pytest.fixture(scope="module")
def reference(source: Path) -> Path:
    return run(source, source.parent / "reference")[0].path


class Fault:
    """Lets so many calls through, then fails one with `number`."""

    def __init__(self, number: int, let: int) -> None:
        self.number, self.let, self.calls = number, let, 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.let + 1:
                raise OSError(self.number, os.strerror(self.number))
            return call(*args, **kwargs)

        return wrapper

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in WRITES:
            patch.setattr(os, name, self.wrap(getattr(os, name)))
        writes = self.wrap(lambda path, *args, **kwargs: ORIGINAL(path, *args, **kwargs))
        patch.setattr(Path, "write_text", writes)


ORIGINAL = Path.write_text


def calls_of_a_run(source: Path, dst: Path) -> int:
    counter = Fault(0, 10**9)
    with pytest.MonkeyPatch.context() as patch:
        counter.install(patch)
        run(source, dst)
    return counter.calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_disk_that_fails_at_any_write(
    source: Path, tmp_path: Path, reference: Path, number: int
) -> None:
    """Every write of a run in turn, in strides that differ by the kind of fault."""
    total = calls_of_a_run(source, tmp_path / "counted")
    assert total > 60
    failed = 0
    for let in range(number % 5, total, 6):
        dst = tmp_path / f"dst{let}"
        with pytest.MonkeyPatch.context() as patch:
            Fault(number, let).install(patch)
            try:
                run(source, dst)
            except (QQuantError, OSError) as error:
                failed += 1
                text = str(error)
                assert os.strerror(number) in text, (let, text)
                assert not dst.exists(), let
        if not dst.exists():
            run(source, dst)
        assert same(dst, reference), let
    assert failed > total // 6 - 5


def test_a_full_disk_is_one_line_for_the_user(source: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from qquant.cli import cli

    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--method", "rtn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", Fault(errno.ENOSPC, 10).wrap(os.pwrite))
        result = CliRunner().invoke(cli, [*words, "--group-size", "32"])
    assert result.exit_code in (1, 2) and not (tmp_path / "dst").exists()
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "No space left" in lines[0] and "larger" in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("let", [2, 9, 15, 20, 26])
def test_a_source_that_cannot_be_read_for_a_moment(
    source: Path, tmp_path: Path, reference: Path, let: int
) -> None:
    """A network file system that drops out: named, and what was done is kept."""
    done = 0

    def watch(event: Event) -> None:
        nonlocal done
        done += isinstance(event, BlockDone)

    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(errno.EIO, let)
        patch.setattr(checkpoint, "open", fault.wrap(open), raising=False)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
            run(source, tmp_path / "dst", watch=watch)
    assert not (tmp_path / "dst").exists()
    result, _ = run(source, tmp_path / "dst")
    assert result.resumed == done
    assert same(tmp_path / "dst", reference)


def test_no_room_to_spill(source: Path, tmp_path: Path, reference: Path) -> None:
    full = Fault(errno.ENOSPC, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qquant.convert.make_holder", lambda *_, **__: Holder(host_budget=0, spill_outputs=True)
        )
        patch.setattr("qquant.calibration.hold.os.posix_fallocate", full.wrap(os.posix_fallocate))
        with pytest.raises(QQuantError, match="No space left"):
            run(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    run(source, tmp_path / "dst")
    assert same(tmp_path / "dst", reference)


def test_the_source_is_only_read(source: Path, tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, int, int]]:
        found = []
        for path in sorted([source, *source.rglob("*")]):
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        return found

    before = state()
    run(source, tmp_path / "dst")
    assert state() == before
