"""A target is finished or absent, whatever ends the run: exceptions, signals, kills."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from qquant.errors import TargetError
from qquant.publish import WorkDir


def listing(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def model(path: Path, text: str = "{}") -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def refused(match: str, *args: object, **options: object) -> TargetError:
    with pytest.raises(TargetError, match=match) as caught:
        WorkDir(*args, **options)  # type: ignore[arg-type]
    return caught.value


def test_published_whole_and_alone(tmp_path: Path):
    with WorkDir(tmp_path / "dst", need_bytes=10) as work:
        assert work.path.parent.parent == tmp_path and work.path.parent.name.startswith(".dst")
        (work.path / "config.json").write_text("{}")
        (work.path / "sub").mkdir()
        (work.path / "sub" / "x").write_text("x")
        (work.scratch / "spill").write_text("x")
        assert not (tmp_path / "dst").exists()
        assert work.publish() == tmp_path / "dst"
        assert listing(tmp_path) == ["dst"]
    assert listing(tmp_path) == ["dst"]
    assert listing(tmp_path / "dst") == ["config.json", "sub"]


def test_modes_follow_the_umask(tmp_path: Path):
    old = os.umask(0o022)
    try:
        with WorkDir(tmp_path / "dst") as work:
            work.publish()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "dst").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, error, overwrite: bool):
    if overwrite:
        model(tmp_path / "dst", "old")
    with pytest.raises(error), WorkDir(tmp_path / "dst", overwrite=overwrite) as work:
        (work.path / "config.json").write_text("new")
        raise error
    assert listing(tmp_path) == (["dst"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "dst" / "config.json").read_text() == "old"


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path):
    with WorkDir(tmp_path / "dst"):
        pass
    assert listing(tmp_path) == []


def test_what_is_kept_stays_whatever_resists_in_scratch(tmp_path: Path, monkeypatch):
    """Other ranks may still make files there; the reason why the run ends is told, not that."""
    remove = shutil.rmtree

    def filled_again(path, ignore_errors=False, **more):
        if ignore_errors:
            return remove(path, ignore_errors=True, **more)
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(shutil, "rmtree", filled_again)
    with pytest.raises(ZeroDivisionError), WorkDir(tmp_path / "dst", resumable=True) as work:
        (work.scratch / "spill").touch()
        assert work.keep()
        raise ZeroDivisionError
    assert listing(tmp_path / ".dst.qquant-work") == ["lock", "out", "state"]


def test_nothing_is_kept_of_what_is_published(tmp_path: Path):
    with WorkDir(tmp_path / "dst") as work:
        work.publish()
        assert not work.keep()
    assert listing(tmp_path) == ["dst"]


def test_a_taken_target_is_refused_before_any_work(tmp_path: Path):
    model(tmp_path / "dst")
    assert "--overwrite" in str(refused("got a directory", tmp_path / "dst"))
    (tmp_path / "file").write_text("")
    refused("got a file", tmp_path / "file")
    refused("a directory to overwrite, got a file", tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    refused("got a directory", tmp_path / "empty")
    assert listing(tmp_path) == ["dst", "empty", "file"]


def test_overwriting_replaces_all_of_a_model_and_nothing_else(tmp_path: Path):
    model(tmp_path / "dst")
    (tmp_path / "dst" / "stale").write_text("")
    with WorkDir(tmp_path / "dst", overwrite=True) as work:
        (work.path / "config.json").write_text("new")
        assert listing(tmp_path / "dst") == ["config.json", "stale"]
        work.publish()
    assert listing(tmp_path) == ["dst"] and listing(tmp_path / "dst") == ["config.json"]
    (home := tmp_path / "home").mkdir()
    (home / "letters").write_text("dear")
    refused(r"a model directory.*got letters", home, overwrite=True)
    (model(tmp_path / "clone") / ".git").mkdir()
    refused(r"no \.git", tmp_path / "clone", overwrite=True)
    (tmp_path / "empty").mkdir()
    with WorkDir(tmp_path / "empty", overwrite=True) as work:
        work.publish()


MOUNTED = """
import subprocess, sys
from qquant.errors import TargetError
from qquant.publish import WorkDir
disk = sys.argv[1]
made = subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True)
if made.returncode:
    sys.exit(77)
try:
    WorkDir(disk, overwrite=True)
except TargetError as error:
    print(error)
with WorkDir(disk + "/dst") as work:  # a folder inside is on one file system with its work
    (work.path / "config.json").write_text("{}")
    print(work.publish().name)
"""


def test_a_target_on_another_file_system(tmp_path: Path):
    """A mount point cannot be replaced: refused at once. Inside of it the work is there, too."""
    (tmp_path / "disk").mkdir()
    words = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", MOUNTED]
    try:
        done = subprocess.run([*words, str(tmp_path / "disk")], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare, so no file system can be mounted for this test")
    if done.returncode and not done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() or 'mount'}")
    refusal, name = done.stdout.splitlines()
    assert "a mount point" in refusal and "inside of it" in refusal
    assert name == "dst"
    assert listing(tmp_path) == ["disk"]


def test_a_rename_across_file_systems_leaves_the_target(tmp_path: Path, monkeypatch):
    """However a system comes to refuse the rename, the target is what it was."""
    model(tmp_path / "dst", "old")
    real = os.rename

    def across(source: Path, target: Path) -> None:
        if str(target) == str(tmp_path / "dst") and "out" in str(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "rename", across)
    with (
        pytest.raises(TargetError, match="cross-device"),
        WorkDir(tmp_path / "dst", overwrite=True) as work,
    ):
        (work.path / "config.json").write_text("new")
        work.publish()
    assert (tmp_path / "dst" / "config.json").read_text() == "old"
    assert listing(tmp_path) == ["dst"]


def test_source_and_target_stay_apart(tmp_path: Path):
    source = model(tmp_path / "src")
    refused("outside the source", source, source=source, overwrite=True)
    refused("outside the source", source / "int4", source=source)
    (tmp_path / "config.json").write_text("{}")
    refused("does not hold the source", tmp_path, source=source, overwrite=True)
    (tmp_path / "link").symlink_to(source)
    refused("outside the source", tmp_path / "link" / "int4", source=source)
    WorkDir(tmp_path / "src-int4", source=source)  # a sibling with the name as its beginning


def test_parents_are_checked(tmp_path: Path, monkeypatch):
    assert "mkdir -p" in str(refused("nothing there", tmp_path / "no" / "dst"))
    (tmp_path / "file").write_text("")
    refused("got a file", tmp_path / "file" / "dst")
    refused("the name of a new directory", "/")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused("not writable for you", tmp_path / "dst")


def test_room_on_the_disk_is_checked(tmp_path: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
    WorkDir(tmp_path / "dst", need_bytes=9 * 10**8)
    error = refused(r"expected 2\.07 GB free, got 1\.00 GB", tmp_path / "dst", need_bytes=2 * 10**9)
    assert "Free 1.07 GB" in str(error)


def test_links(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "dst").symlink_to(tmp_path / "disk" / "real")
    with WorkDir(tmp_path / "dst") as work:
        (work.path / "config.json").write_text("one")
        work.publish()
    with WorkDir(tmp_path / "dst", overwrite=True) as work:
        (work.path / "config.json").write_text("two")
        work.publish()
    assert (tmp_path / "dst").is_symlink() and listing(tmp_path / "disk") == ["real"]
    assert (tmp_path / "dst" / "config.json").read_text() == "two"
    (tmp_path / "loop").symlink_to("loop")
    refused("loop", tmp_path / "loop")


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path):
    with pytest.raises(TargetError, match="nothing there yet"), WorkDir(tmp_path / "dst") as work:
        model(tmp_path / "dst", "theirs")
        work.publish()
    assert listing(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "theirs"


def test_a_failing_rename_restores_the_old_target(tmp_path: Path, monkeypatch):
    model(tmp_path / "dst", "old")
    rename = os.rename

    def fail(src: Path, dst: Path) -> None:
        if Path(src).name == "out":
            raise OSError(5, "Input/output error")
        rename(src, dst)

    monkeypatch.setattr(os, "rename", fail)
    with (
        pytest.raises(TargetError, match=r"cannot publish .*Input/output error.*as it was"),
        WorkDir(tmp_path / "dst", overwrite=True) as work,
    ):
        work.publish()
    assert listing(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "old"


def test_two_runs_for_one_target(tmp_path: Path):
    with WorkDir(tmp_path / "dst") as first:
        (first.path / "x").write_text("x")
        with (
            pytest.raises(TargetError, match=f"process {os.getpid()} on "),
            WorkDir(tmp_path / "dst"),
        ):
            pass
        assert (first.path / "x").exists()
        with WorkDir(tmp_path / "other") as other:
            other.publish()
        first.publish()
    assert listing(tmp_path) == ["dst", "other"]


def test_a_foreign_folder_of_the_work_name_is_refused(tmp_path: Path):
    work = tmp_path / ".dst.qquant-work"
    work.mkdir()
    (work / "letters").write_text("dear")
    with pytest.raises(TargetError, match="something else of that name"), WorkDir(tmp_path / "dst"):
        pass
    assert listing(work) == ["letters"]
    shutil.rmtree(work)
    work.symlink_to(tmp_path)
    with pytest.raises(TargetError, match="something else of that name"), WorkDir(tmp_path / "dst"):
        pass
    assert work.is_symlink()


RUN = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # ... or after `&` in a script
from qquant.publish import WorkDir
with WorkDir(sys.argv[1], overwrite=True) as work:
    (work.path / "config.json").write_text("new")
    (work.scratch / "spill").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def running(target: Path):
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)]
)
def test_signals_leave_no_trace(tmp_path: Path, signum: int, code: int):
    model(tmp_path / "dst", "old")
    with running(tmp_path / "dst") as process:
        process.send_signal(signum)
        assert process.wait(20) == code
    assert listing(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "old"


def test_a_killed_run_is_cleared_up_by_the_next(tmp_path: Path):
    with running(tmp_path / "dst") as process:
        process.kill()
        process.wait(20)
    assert listing(tmp_path) == [".dst.qquant-work"]
    with WorkDir(tmp_path / "dst") as work:
        assert listing(work.path) == [] and listing(work.scratch) == []
        work.publish()
    assert listing(tmp_path) == ["dst"]


def test_a_kill_within_the_swap_loses_nothing(tmp_path: Path):
    """As left by a kill between the two renames: no target, the old one aside."""
    with running(tmp_path / "dst") as process:
        process.kill()
        process.wait(20)
    old = model(tmp_path / ".dst.qquant-work" / "old", "old")
    with pytest.raises(TargetError, match="nothing there yet"), WorkDir(tmp_path / "dst"):
        pass
    assert listing(tmp_path) == ["dst"] and not old.exists()
    assert (tmp_path / "dst" / "config.json").read_text() == "old"


def test_an_interrupt_during_the_swap_is_too_late(tmp_path: Path, monkeypatch):
    """The target is complete: to end with «nothing was written» would be false."""
    model(tmp_path / "dst", "old")
    rename = os.rename

    def interrupted(src: Path, dst: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        rename(src, dst)

    monkeypatch.setattr(os, "rename", interrupted)
    with WorkDir(tmp_path / "dst", overwrite=True) as work:
        (work.path / "config.json").write_text("new")
        work.publish()
    assert listing(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "new"


def test_signal_handlers_are_as_before_afterwards(tmp_path: Path):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(s) for s in signals]
    with WorkDir(tmp_path / "a") as work:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        work.publish()
    with contextlib.suppress(ValueError), WorkDir(tmp_path / "b"):
        raise ValueError
    with contextlib.suppress(TargetError), WorkDir(tmp_path / "c"), WorkDir(tmp_path / "c"):
        pass
    assert [signal.getsignal(s) for s in signals] == before


def test_it_works_in_another_thread(tmp_path: Path):
    def work() -> None:
        with WorkDir(tmp_path / "dst") as place:
            place.publish()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert listing(tmp_path) == ["dst"]
