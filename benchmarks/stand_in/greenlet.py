"""What qquant uses of `greenlet`, by threads: for machines where that cannot be installed.

Each greenlet has a thread of its own, and only one of them runs at a time: `switch` hands over and
waits to be handed back to. So a stopped greenlet keeps its frames, exceptions go to the parent, and
the results are those of the real one, with the same bytes. It takes longer: a hand-over costs tens
of microseconds instead of one, a greenlet a thread. `benchmarks/gpu.py` puts it where nothing of
that name can be imported, and its results say so.

What torch keeps per thread a new thread takes over from the one that first switches to it:
inference and grad mode, numbers of threads, the current CUDA device and stream. Changes made later
stay with the thread that made them. cuBLAS has a handle per thread, each with a workspace (32 MiB
on an H200), which would pile up while batches wait: they are dropped whenever a greenlet hands
back, and come from torch's cache again.

Left out on purpose: switching between greenlets of different native threads; keyword arguments,
tracing, `gr_frame`; autocast and torch's modes (`torch.device` as a context), which qquant's walk
does not use; and the end of greenlets that nobody refers to any more: one that is neither run to
its end nor thrown into stays until the process ends. What a signal's handler raises while another
greenlet runs is raised when that one hands back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__version__ = "stand-in by threads"
_here = threading.local()  # `current`: the greenlet of this thread, for as long as the thread lives


class GreenletExit(BaseException):
    """Thrown into a greenlet to end it; what ends so has this for its result."""


class greenlet:
    """A function that can stop in the midst of itself, hand a value back, and be resumed.

    Args:
        run: what it calls. parent: who goes on when it ends; the current one unless told.
    """

    def __init__(self, run: Callable[..., Any] | None = None, parent: Any = None) -> None:
        if run is not None:
            self.run = run
        self.parent: greenlet | None = getcurrent() if parent is None else parent
        self.dead = False
        self._started = False
        self._wake: SimpleQueue[None] = SimpleQueue()
        # What it is handed: a value, an exception, and the thread that has come to its end.
        self._box: tuple[Any, BaseException | None, threading.Thread | None] | None = None

    def __bool__(self) -> bool:
        return self._started and not self.dead

    def switch(self, *args: Any) -> Any:
        """Runs it, or on from where it stopped; what it, or whoever switches back, hands over."""
        return self._hand_over(args, None)

    def throw(self, kind: Any = GreenletExit, value: Any = None, traceback: Any = None) -> Any:
        """As `switch`, but raises there; what has not begun, or is at its end, does not run."""
        if isinstance(kind, BaseException):
            error = kind
        elif isinstance(value, BaseException):
            error = value
        else:
            error = kind() if value is None else kind(value)
        if traceback is not None:
            error = error.with_traceback(traceback)
        if not self:
            self.dead = self._started = True
            self.__dict__.pop("run", None)
            if isinstance(error, GreenletExit):
                return self._hand_over((error,), None)
        try:
            return self._hand_over((), error)
        finally:
            del error  # its traceback refers to this frame

    def _hand_over(self, args: tuple[Any, ...], error: BaseException | None) -> Any:
        me, target = getcurrent(), self
        while target.dead:
            assert target.parent is not None  # a thread's first greenlet does not end
            target = target.parent
        value = args[0] if len(args) == 1 else args
        if target is me:
            if error is not None:
                raise error
            return value
        if me.parent is not None:
            _drop_workspaces()
        if target._started:
            target._box = value, error, None
            target._wake.put(None)
        else:
            target._start(args)
        del args, value, error, target, self  # nothing is kept alive by who only waits
        return me._wait()

    def _start(self, args: tuple[Any, ...]) -> None:
        # A bound method there would refer to this object from itself.
        run = self.__dict__.pop("run", None) or type(self).run  # type: ignore[attr-defined]
        words = (run, args, _state_of_torch())
        thread = threading.Thread(target=self._live, args=words, name="greenlet", daemon=True)
        self._started = True
        thread.start()

    def _live(self, run: Callable[..., Any], args: tuple[Any, ...], state: Any) -> None:
        """The thread, from its beginning to its end."""
        _here.current = self
        value, error = _outcome(run, args, state)
        del run, args
        self.dead = True
        _drop_workspaces()
        target = self.parent
        while target is not None and target.dead:
            target = target.parent
        assert target is not None
        del _here.current
        target._box = value, error, threading.current_thread()
        target._wake.put(None)

    def _wait(self) -> Any:
        """Until this one is handed something."""
        late: BaseException | None = None
        while True:
            try:
                while self._box is None:
                    self._wake.get()
                break
            except BaseException as raised:  # by a signal's handler: the other one is running
                late = raised
        (value, error, ended), self._box = self._box, None
        if ended is not None:
            ended.join()  # it, and all that its frames referred to, is gone
        try:
            if late is not None:
                raise late
            if error is not None:
                raise error
            return value
        finally:
            del late, error


def getcurrent() -> greenlet:
    """The greenlet that runs; each native thread begins with one."""
    found: greenlet | None = getattr(_here, "current", None)
    if found is None:
        found = greenlet.__new__(greenlet)
        _here.current = found
        greenlet.__init__(found, parent=found)
        found.parent, found._started = None, True
    return found


def _outcome(
    run: Callable[..., Any], args: tuple[Any, ...], state: Any
) -> tuple[Any, BaseException | None]:
    """A greenlet's result or what it raised; its frames are gone on return, but for a traceback."""
    try:
        if state is None:
            return run(*args), None
        return _with_state(state, run, args), None
    except GreenletExit as error:
        return error.with_traceback(None), None
    except BaseException as error:
        return None, error


def _state_of_torch() -> tuple[bool, bool, int, Any] | None:
    """What torch keeps per thread: of this one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    cuda = torch.backends.cuda.is_built() and torch.cuda.is_initialized()
    place = (torch.cuda.current_device(), torch.cuda.current_stream()) if cuda else None
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return inference, grad, torch.get_num_threads(), place


def _with_state(state: tuple[bool, bool, int, Any], run: Any, args: tuple[Any, ...]) -> Any:
    import torch

    inference, grad, threads, place = state
    torch.set_num_threads(threads)  # MKL and OpenMP each keep it by thread, too
    if place is not None:
        torch.cuda.set_device(place[0])
        torch.cuda.set_stream(place[1])
    if inference:
        with torch.inference_mode():
            return run(*args)
    with torch.set_grad_enabled(grad):
        return run(*args)


def _drop_workspaces() -> None:
    """cuBLAS's, of every thread; on the stream they were made on they may be given to others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.cuda.is_built() and torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
