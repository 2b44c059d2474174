"""The target appears complete or not at all.

A run works in a hidden sibling of the target, on the same file system, and its last act is a
rename. For a target `DST` the sibling is

    .DST.qquant-work/
        lock      locked (flock) by the process that works here, and saying which; its presence
                  marks the folder ours
        out/      what will become DST
        state/    what a run that can go on later keeps for that (`journal.py`)
        scratch/  anything else the run puts on the disk
        old/      the directory that DST was, for the moment of an overwriting swap

Leaving without `publish` (an exception, Ctrl-C, SIGTERM, SIGHUP) removes all of it, unless the run
said `keep`: then `out` and `state` stay for the next run. A process killed outright leaves
everything; the next run for the same target finds the lock free, puts `old` back if the kill fell
between the two renames of a swap, and clears up. What was kept it clears only when told to
(`restart`). A folder of that name that is locked belongs to a living run; one without `lock` is
somebody else's; both are refused.

What could go wrong is asked before any work: target free, its parent there and writable, the disk
large enough, source and target apart. Overwriting replaces a model directory (it has a
`config.json`) and nothing else, so that a slip of the keyboard cannot wipe a home directory. A
target that is a symbolic link stays one: the directory that it points to is created or replaced.

Of several processes of one run the first has the work directory; the others are a `Guest` in it.

POSIX only (flock, rename over an empty directory). What is kept, and whether it may be used, is
decided elsewhere (`journal.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .directory import CONFIG
from .errors import TargetError

logger = logging.getLogger(__name__)

JOURNAL = "journal.json"  # in `state`: there is something to go on with
_SLACK = 64 << 20  # bytes beyond the weights: tokenizer, code, index
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class WorkDir:
    """A place to build `target`; use as a context manager and call `publish` at the end.

    Making one only checks; entering creates the folders.

    Args:
        target: the directory that is to appear.
        overwrite: replace a model directory that is there.
        source: what is read meanwhile; the target may not be, hold or lie in it.
        need_bytes: what will be written, to compare with the room on the disk.
        resumable: go on with what an earlier run kept; otherwise that is refused.
        restart: throw away what an earlier run kept.

    Attributes:
        target: absolute, links resolved.
        path: where to write what will be published; exists once entered.
        state: for what a later run needs to go on; exists once entered.
        scratch: for anything else, on the same disk, removed at the end; exists once entered.

    Raises:
        TargetError: the target cannot be written, or must not be.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        source: str | os.PathLike[str] | None = None,
        need_bytes: int = 0,
        resumable: bool = False,
        restart: bool = False,
    ) -> None:
        self.target = _resolve(target)
        self._overwrite, self._resumable, self._restart = overwrite, resumable, restart
        self._check_target()
        if source is not None:
            _check_apart(self.target, Path(source).expanduser().resolve())
        self._root = self.target.parent / f".{self.target.name}.qquant-work"
        self.path, self.state, self.scratch = _folders(self._root)
        _check_parent(self.target.parent, need_bytes, _allocated(self._root))
        self._lock = -1
        self._kept = False
        self._restore: dict[signal.Signals, Any] = {}

    def __enter__(self) -> WorkDir:
        self._catch_ending()
        try:
            self._acquire()
            for folder in (self.path, self.state, self.scratch):
                folder.mkdir(exist_ok=True)
        except BaseException as error:
            self._leave()
            if not isinstance(error, OSError):
                raise
            raise TargetError(
                f"cannot create {self._root}",
                got=error.strerror,
                cure="Give a target in a directory that you may write to and that can lock files.",
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    @property
    def invitation(self) -> tuple[str, str]:
        """What makes a `Guest`, once entered."""
        return str(self._root), _owner(self._root / "lock")

    def keep(self) -> bool:
        """From now on, leaving keeps `path` and `state` for the next run; not once published."""
        self._kept = self._lock >= 0
        return self._kept

    def publish(self) -> Path:
        """Flushes everything to the disk and renames it to the target, which it returns.

        Raises:
            TargetError: the target appeared meanwhile, or the rename failed; the target is as it
                was.
        """
        try:
            _fsync_tree(self.path)
            with _no_interrupts() as held:
                self._swap()
                self._kept = False
                self._remove()
                held.clear()  # it came too late: the target stands
        except OSError as error:
            raise TargetError(
                f"cannot publish {self.target}",
                got=error.strerror,
                cure="The target is as it was before. Check its disk and its permissions.",
            ) from error
        with contextlib.suppress(OSError):  # it stands; only a power cut could still undo it
            _fsync(self.target.parent)
        return self.target

    def _leave(self) -> None:
        try:
            with _no_interrupts():
                if self._lock >= 0 and self._kept:
                    # Other ranks may still write there; what stays, the next run removes.
                    shutil.rmtree(self.scratch, ignore_errors=True)
                    self._release()
                elif self._lock >= 0:
                    self._remove()
        finally:
            for signum, handler in self._restore.items():
                signal.signal(signum, handler)
            self._restore = {}

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not self._overwrite:
            raise TargetError(
                f"target {self.target}",
                expected="nothing there yet",
                got="a directory" if self.target.is_dir() else "a file",
                cure="Give another target, or --overwrite to replace a model directory.",
            )
        if not self.target.is_dir():
            raise TargetError(
                f"target {self.target}", expected="a directory to overwrite", got="a file"
            )
        if os.path.ismount(self.target):  # no rename can replace it, from whatever disk
            raise TargetError(
                f"target {self.target}",
                expected="a directory on the file system of its parent",
                got="a mount point",
                cure="Give a folder inside of it",
            )
        try:
            names = os.listdir(self.target)
        except OSError as error:
            raise TargetError(f"target {self.target}", got=error.strerror) from error
        if names and (CONFIG not in names or ".git" in names):
            raise TargetError(
                f"target {self.target}",
                expected=f"a model directory ({CONFIG}, no .git), to be overwritten",
                got=", ".join(sorted(names)[:4]),
                cure="Only model directories are replaced: give another target.",
            )

    def _swap(self) -> None:
        self._check_target()  # once more: hours have passed
        old = self._root / "old"
        if os.path.lexists(self.target):
            os.rename(self.target, old)
        try:
            os.rename(self.path, self.target)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, self.target)
            raise

    def _acquire(self) -> None:
        """Makes the work folder ours alone, and empty."""
        while True:
            try:
                self._root.mkdir()
            except FileExistsError:
                if not self._check_leftover():
                    continue
            try:
                lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # its owner has just finished
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise TargetError(
                    f"target {self.target}",
                    expected="no other run writing it",
                    got=f"{self._root} locked by {_owner(self._root / 'lock')}",
                    cure="Wait for that run, stop it, or give another target.",
                ) from error
            # Its last owner may have removed the folder between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self._root / "lock")):
                    self._lock = lock
                    break
            os.close(lock)
        back = self._put_back_old()
        kept = self._left_behind()
        if back:
            self._check_target()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        for name in os.listdir(self._root):
            if name not in kept:
                logger.info("removing %s, left by a run that was killed", self._root / name)
                _delete(self._root / name)

    def _left_behind(self) -> tuple[str, ...]:
        """What of the folder is for us to go on with, the lock included.

        Without `out` there is nothing to go on with: a kill came just after the target had its
        name.
        """
        if self._restart or not (self.path.is_dir() and os.path.lexists(self.state / JOURNAL)):
            return ("lock",)
        self._kept = True  # until the run publishes, or somebody says `restart`
        if not self._resumable:
            raise TargetError(
                f"target {self.target}",
                expected="no unfinished run of another kind",
                got=f"one that can go on, in {self._root}",
                cure="Give the command of that run to go on with it, or --restart to begin anew.",
            )
        return ("lock", self.path.name, self.state.name)

    def _check_leftover(self) -> bool:
        """Whether the folder is still there; refuses one that is not ours."""
        try:
            found = os.lstat(self._root)
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if ours and (names := os.listdir(self._root)):
                ours = "lock" in names
        except FileNotFoundError:
            return False
        if not ours:
            raise TargetError(
                f"work directory {self._root}",
                expected="none, or one that an earlier run of yours left",
                got="something else of that name",
                cure="Move it away, or give another target.",
            )
        return True

    def _put_back_old(self) -> bool:
        """A kill between the two renames of a swap: the target is gone and waits in `old`."""
        old = self._root / "old"
        if os.path.lexists(old) and not os.path.lexists(self.target):
            os.rename(old, self.target)
            return True
        return False

    def _remove(self) -> None:
        """Deletes the work folder; what resists is told, since the target is settled already."""
        try:
            for name in sorted(os.listdir(self._root), key=lambda n: n == "lock"):
                _delete(self._root / name)
            self._root.rmdir()
        except OSError as error:
            # Not empty, with `lock` gone: the next run was quick to move in, and it is theirs.
            if error.errno != errno.ENOTEMPTY:
                logger.warning("could not remove %s: %s", self._root, error)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _catch_ending(self) -> None:
        """SIGTERM and SIGHUP leave through the exception path while we are open.

        Only where they would kill the process anyway (handlers of the caller stay) and in the main
        thread, the only one that may set them.
        """
        if threading.current_thread() is threading.main_thread():
            for signum in _ENDING:
                if signal.getsignal(signum) is signal.SIG_DFL:
                    self._restore[signum] = signal.signal(signum, _end)


def clear_leftover(target: str | os.PathLike[str]) -> None:
    """Removes what a run that was killed left beside a target that stands, unless a run can go on
    with it: then it is another's.

    Raises:
        TargetError: another run works there.
    """
    work = WorkDir(target, overwrite=True, resumable=True)
    if os.path.lexists(work.path.parent):
        with work:
            pass


class Guest:
    """The entered work directory of another process, for one that keeps a part of its state there.

    Args:
        invitation: from that `WorkDir`.

    Attributes:
        path, state, scratch: as there.

    Raises:
        TargetError: what is here under that name is not it.
    """

    def __init__(self, invitation: tuple[str, str]) -> None:
        root, owner = Path(invitation[0]), invitation[1]
        self.path, self.state, self.scratch = _folders(root)
        if not self.state.is_dir() or (found := _owner(root / "lock")) != owner:
            raise TargetError(
                f"work directory {root}",
                expected=f"the one of {owner}, who writes the target",
                got=f"one of {found}" if self.state.is_dir() else "nothing there",
                cure="Give a target on a disk that all ranks see",
            )

    def keep(self) -> bool:
        """It is not this process's to keep."""
        return False


def _folders(root: Path) -> tuple[Path, Path, Path]:
    return root / "out", root / "state", root / "scratch"


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[list[int]]:
    """Holds Ctrl-C and its kind back for a moment; those left in the list go through afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield []  # handlers never run here
        return
    held: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for signum in (signal.SIGINT, *_ENDING):
            if (handler := signal.getsignal(signum)) not in (signal.SIG_IGN, None):
                before[signum] = handler
                signal.signal(signum, lambda number, _: held.append(number))
        yield held
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def _resolve(target: str | os.PathLike[str]) -> Path:
    try:
        path = Path(target).expanduser().resolve()
        looping = path.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise TargetError(f"target {os.fspath(target)!r}", got=str(error)) from error
    if looping or not path.name:
        raise TargetError(
            f"target {os.fspath(target)!r}",
            expected="the name of a new directory",
            got="a loop of links" if looping else "the root",
        )
    return path


def _check_apart(target: Path, source: Path) -> None:
    cure = "Give a target outside the source."
    if target == source or target.is_relative_to(source):
        raise TargetError(
            f"target {target}", expected="outside the source", got=f"{source}", cure=cure
        )
    if source.is_relative_to(target):
        raise TargetError(
            f"target {target}",
            expected="a directory that does not hold the source",
            got=f"the source within it, {source}",
            cure=cure,
        )


def _owner(lock: Path) -> str:
    """Who holds the lock, by what it says; only ever a hint."""
    try:
        return lock.read_text(encoding="utf-8", errors="replace")[:100] or "a living process"
    except OSError:
        return "a living process"


def _allocated(root: Path) -> int:
    """Bytes on the disk that an earlier run's folder takes, which this one will use or free."""
    found = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return found


def _check_parent(parent: Path, need_bytes: int, allocated: int = 0) -> None:
    if not parent.is_dir():
        raise TargetError(
            f"parent of the target, {parent}",
            expected="a directory",
            got="a file" if parent.exists() else "nothing there",
            cure=f"Create it: mkdir -p {parent}",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(
            f"parent of the target, {parent}",
            expected="writable",
            got="not writable for you",
            cure="Give a target in a directory that you may write to.",
        )
    need = need_bytes + _SLACK if need_bytes else 0
    free = shutil.disk_usage(parent).free + allocated
    if free < need:
        raise TargetError(
            f"disk of {parent}",
            expected=f"{need / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            cure=f"Free {(need - free) / 1e9:.2f} GB, or give a target on a larger disk.",
        )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            if not (path := Path(folder) / name).is_symlink():
                _fsync(path)
        _fsync(Path(folder))
