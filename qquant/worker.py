"""Parts of a profile in a fresh process, where nothing else has left its mark on the heap.

One process serves the parts of one model and one `Part.process` name, one after another: the model
is loaded once, by the first part that asks for it. It is spawned, not forked, and ends with the
`with` block, at once where that is left by an exception. Results and progress come back through a
pipe; a process that dies says nothing more, which is told apart from a measurement that failed.
"""

from __future__ import annotations

import logging
import multiprocessing
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from .errors import QQuantError, RunError, shown
from .parts.base import Advance, Part, Subject


def failure(error: BaseException) -> str:
    """What to say of a measurement that failed: one line."""
    if isinstance(error, QQuantError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    return shown(f"{type(error).__name__}: {error}")


class Worker:
    """A process of its own.

    Args:
        subject: what its parts measure; not loaded yet.
        threads: of torch in it.
    """

    def __init__(self, subject: Subject, threads: int) -> None:
        self.subject, self.threads = subject, threads

    def __enter__(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        s = self.subject
        fresh = (s.model, s.reference, s.device, s.dtype)
        self._process = context.Process(target=_serve, args=(theirs, fresh, self.threads))
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._pipe.close()
        self._process.join()

    def measure(self, part: Part, advance: Advance) -> dict[str, Any]:
        """`part.measure` over there.

        Raises:
            RunError: it failed, or the process died.
        """
        try:
            self._pipe.send(part)
            while True:
                told, value = self._pipe.recv()
                if told == "done":
                    return dict(value)
                if told == "failed":
                    raise RunError(value)
                advance(*value)
        except (EOFError, OSError) as error:
            raise RunError(
                part.label,
                expected="a result",
                got="a process that was killed, as when memory runs out",
                cure="Use shorter contexts, or leave this out",
            ) from error


def _serve(pipe: Connection, fresh: tuple[Any, ...], threads: int) -> None:
    # What other packages remark while they are imported tells nobody anything (see `console`).
    logging.root.addHandler(logging.NullHandler())
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(threads)
    model, reference, device, dtype = fresh
    subject = Subject(model, reference, device, dtype)
    subject.advance = lambda done, total: pipe.send(("advance", (done, total)))
    try:
        while True:
            part = pipe.recv()
            try:
                pipe.send(("done", part.measure(subject)))
            except Exception as error:  # told to the run, which goes on with the next
                pipe.send(("failed", failure(error)))
    except (EOFError, OSError, KeyboardInterrupt):  # the run has ended
        return
