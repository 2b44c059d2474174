"""Reading and writing beside the computation, where that runs on a device of its own.

While an accelerator walks and solves, the host has nothing to do: a thread reads the next block's
tensors meanwhile, another hashes packed tensors and writes them, and the source's own hash, which
reads all of it, is taken by further ones. What reads or writes has one thread, so reads and writes
keep their order, and what is written, and its bytes, are those of a run without threads. On a CPU
the same work would take the cores that compute, and a second block the memory that a limit may not
leave: there everything happens at once, in the caller. But for hashes of whole files: once the last
block is solved they are taken while the disk makes what was written durable, anywhere.

Left out on purpose: what makes a block durable (the journal's commit waits for the writes).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from types import TracebackType
from typing import Generic, TypeVar

MOST = 8  # linears that may wait to be written
T = TypeVar("T")


def overlaps(device_type: str) -> bool:
    """Whether a run on a device of that type (`cpu`, `cuda`) leaves the host free."""
    return device_type != "cpu"


class Later:
    """Calls whose effects are waited for in the end.

    Args:
        threaded: in a thread of its own; otherwise each call is made where it is asked for.
        most: calls that may wait, each of which holds what it is to work on.
    """

    def __init__(self, *, threaded: bool, most: int = MOST) -> None:
        self._pool = ThreadPoolExecutor(1, "qquant-write") if threaded else None
        self._waiting: deque[Future[None]] = deque()
        self._most = most

    def __call__(self, call: Callable[[], None]) -> None:
        """Makes the call, now or soon.

        Raises:
            Exception: of this call, or of an earlier one that had been waiting.
        """
        if self._pool is None:
            return call()
        self._waiting.append(self._pool.submit(call))
        while len(self._waiting) > self._most or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def settle(self) -> None:
        """Waits for all calls.

        Raises:
            Exception: of the first one that failed; those after it have been made or dropped.
        """
        try:
            while self._waiting:
                self._waiting.popleft().result()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Waits for a call that is under way; the others are not made, and no error is raised."""
        while self._waiting:
            future = self._waiting.pop()
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        """As `drop`; the thread ends."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown()


class Ahead(Generic[T]):
    """One result that is made before it is asked for.

    Args:
        make: the result of a number, such as a block's.
        threaded: make it ahead; otherwise it is made when it is taken.
    """

    def __init__(self, make: Callable[[int], T], *, threaded: bool) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, "qquant-read") if threaded else None
        self._next: tuple[int, Future[T]] | None = None

    def prepare(self, key: int) -> None:
        """Begins to make the result of `key`, in place of another that was not taken."""
        if self._pool is not None:
            self.forget()
            self._next = key, self._pool.submit(self._make, key)

    def take(self, key: int) -> T:
        """The result of `key`; waits for it, or makes it.

        Raises:
            Exception: as `make` does.
        """
        if self._next is not None and self._next[0] == key:
            future, self._next = self._next[1], None
            return future.result()
        return self._make(key)

    def forget(self) -> None:
        """Gives back what was made and not taken."""
        if self._next is not None:
            self._next[1].cancel()
            self._next = None

    def close(self) -> None:
        """As `forget`; the thread ends."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown()


class Aside(Generic[T]):
    """One result that is made while other things happen; use as a context manager.

    On leaving, whether it was taken or not, nobody waits for the rest of its making.

    Args:
        make: handed an event; once that is set nobody wants the result.
    """

    def __init__(self, make: Callable[[Event], T]) -> None:
        self._in_vain, self._begun = Event(), False
        self._ahead = Ahead(lambda _: make(self._in_vain), threaded=True)

    def begin(self) -> None:
        """Begins to make it, unless that is under way."""
        if not self._begun:
            self._ahead.prepare(0)
        self._begun = True

    def take(self) -> T:
        """The result; waits for it, or makes it.

        Raises:
            Exception: as `make` does.
        """
        return self._ahead.take(0)

    def __enter__(self) -> Aside[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._in_vain.set()
        self._ahead.close()
