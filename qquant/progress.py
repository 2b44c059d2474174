"""Watchers of a run: what a person, a log file or a program sees while it goes on.

Each is a context manager that is called with events. `Bar` draws on a terminal (block, linear, its
error, time left), `Lines` writes to a log at a low rate, `Json` prints one object per line,
`Silent` shows warnings only. All but `Json` are given a writer to stderr, so that stdout carries
results alone. rich is imported by `Bar` when it starts, never at import.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .events import (
    BlockDone,
    Event,
    Kept,
    LinearDone,
    Planned,
    Resumed,
    Stage,
    Warned,
    event_dict,
)
from .report import human_seconds, relative_error

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Write = Callable[[str], None]


class Pace:
    """How far the linears are and how long the rest takes, at the pace so far.

    Args:
        clock: seconds from an arbitrary start; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.total = self.done = self.blocks = self.before = 0
        self.start: float | None = None

    def see(self, event: Event) -> None:
        if isinstance(event, Planned):
            self.total, self.blocks = event.linears, event.blocks
        if isinstance(event, Planned) or (isinstance(event, Stage) and self.done == self.before):
            self.start = self.clock()
        if isinstance(event, Resumed):
            self.done = self.before = event.linears
        if isinstance(event, LinearDone):
            self.done += 1

    @property
    def left(self) -> float | None:
        """Seconds left for the linears to come; None before the first one is done."""
        here = self.done - self.before
        if self.start is None or not here:
            return None
        return (self.clock() - self.start) * max(0, self.total - self.done) / here

    def left_text(self) -> str:
        left = self.left
        return "" if left is None else f"about {human_seconds(left)} left"


def plan_line(event: Planned) -> str:
    """The plan in words."""
    read = f", {event.calibration_tokens} calibration tokens" if event.calibration_tokens else ""
    return f"{event.blocks} blocks, {event.linears} linears{read}, on {event.device}"


class Silent:
    """Nothing but notes and warnings."""

    def __init__(self, write: Write) -> None:
        self.write = write

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Planned):
            for note in event.notes:
                self.write(f"note: {note}")
        elif isinstance(event, Warned):
            self.write(f"warning: {event.text}")
        elif isinstance(event, Resumed):
            self.write(f"going on with block {event.block + 1} of {event.blocks}, as kept")
        elif isinstance(event, Kept):
            done = f"{event.block} of {event.blocks} blocks are"
            if not event.block:
                done = "what was found before the first block is"
            self.write(
                f"{done} kept in {event.path}: the same command goes on from there, --restart "
                "begins anew"
            )


class Json(Silent):
    """Every event as one JSON object on a line of its own."""

    def __call__(self, event: Event) -> None:
        self.write(dump(event_dict(event)))


class Lines(Silent):
    """The plan, then a line per finished block, at most one every `every` seconds."""

    def __init__(
        self, write: Write, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(write)
        self.every, self.clock, self.pace = every, clock, Pace(clock)
        self.last = clock()
        self.linear: LinearDone | None = None

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        self.pace.see(event)
        if isinstance(event, Planned):
            self.write(plan_line(event))
        elif isinstance(event, LinearDone):
            self.linear = event
        elif isinstance(event, BlockDone) and self.clock() - self.last >= self.every:
            self.last = self.clock()
            error = f", last error {relative_error(self.linear):.2%}" if self.linear else ""
            self.write(f"block {event.block + 1}/{event.blocks}{error}, {self.pace.left_text()}")


class Bar(Silent):
    """A bar on the terminal: block, linear, its loss and relative error, time left."""

    def __init__(self, write: Write) -> None:
        super().__init__(write)
        self.pace = Pace()
        self.bar: RichProgress | None = None
        self.stage = "starting"

    def __enter__(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[linear]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(self.stage, total=None, linear="", left="")
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        self.pace.see(event)
        if self.bar is None:
            return
        changes: dict[str, Any] = {"left": self.pace.left_text()}
        if isinstance(event, Stage):
            changes.update(description=event.name, linear="")
        elif isinstance(event, Planned):
            changes["total"] = event.linears
            self.write(plan_line(event))
        elif isinstance(event, LinearDone):
            changes.update(
                description=f"block {event.block + 1}/{self.pace.blocks}",
                completed=self.pace.done,
                linear=f"{event.name}  loss {event.loss:.3g} ({relative_error(event):.2%})",
            )
        self.bar.update(self.task, **changes)


def dump(value: dict[str, Any]) -> str:
    """One line of JSON; non-finite numbers become null, so that every parser reads it."""

    def clean(item: Any) -> Any:
        if isinstance(item, float) and item - item != 0:
            return None
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        return item

    text = json.dumps(clean(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair: \\udXXX
