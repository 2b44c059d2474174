"""Watchers of a profile: a table that fills while it runs, or a line per finished measurement.

`ProfileBar` draws on a terminal what is known of every model so far, what is being measured and the
time left; `ProfileLines` writes to a log. Both are `progress.Silent` with more to say, and
`progress.Json` serves a profile as it is. rich is imported by `ProfileBar` when it starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .events import Event, Measured, MeasureFailed, Measuring, ProfilePlanned
from .progress import Silent, Write
from .report import human_seconds

if TYPE_CHECKING:
    from rich.live import Live


class ProfilePace:
    """How far the profile is, and how long the rest takes.

    A measurement takes as long as those of its part took on other models, this run's or an
    earlier one's; a part not yet seen, as long as all that were seen on the average. One that
    counts what it does is taken at its own pace.

    Args:
        clock: seconds from an arbitrary start; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.left: list[tuple[str, str]] = []
        self.total = 0
        self.seconds: dict[str, list[float]] = {}
        self.now: tuple[str, str] | None = None
        self.start = 0.0
        self.share = 0.0

    def see(self, event: Event) -> None:
        if isinstance(event, ProfilePlanned):
            self.left, self.total = list(event.left), len(event.left) + len(event.known)
            for _, part, _, seconds in event.known:
                if seconds:
                    self.seconds.setdefault(part, []).append(seconds)
        elif isinstance(event, Measuring):
            if (event.model, event.part) != self.now:
                self.now, self.start, self.share = (event.model, event.part), self.clock(), 0.0
            if event.total:
                self.share = event.done / event.total
        elif isinstance(event, Measured | MeasureFailed):
            if isinstance(event, Measured):
                self.seconds.setdefault(event.part, []).append(event.seconds)
            self.now = None
            if (event.model, event.part) in self.left:
                self.left.remove((event.model, event.part))

    @property
    def done(self) -> int:
        return self.total - len(self.left)

    @property
    def left_seconds(self) -> float | None:
        """None while nothing is known to go by."""
        if not self.left:
            return 0.0
        elapsed = self.clock() - self.start
        current = elapsed / self.share if self.now and self.share else None
        known = [s for all_of in self.seconds.values() for s in all_of]
        if current is not None:
            known.append(current)
        if not known:
            return None
        mean = sum(known) / len(known)
        total = 0.0
        for pair in self.left:
            seen = self.seconds.get(pair[1])
            expected = sum(seen) / len(seen) if seen else mean
            if pair == self.now:
                expected = max(0.0, (expected if current is None else current) - elapsed)
            total += expected
        return total

    def left_text(self) -> str:
        left = self.left_seconds
        return "" if left is None or left < 1 else f"about {human_seconds(left)} left"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class ProfileLines(Silent):
    """A line per finished measurement, and failures."""

    def __init__(self, write: Write, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(write)
        self.pace = ProfilePace(clock)

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        self.pace.see(event)
        if isinstance(event, ProfilePlanned):
            text = f"{_count(len(event.models), 'model')}, {_count(self.pace.total, 'measurement')}"
            self.write(text + (f", {self.pace.done} measured before" if event.known else ""))
        elif isinstance(event, Measured):
            place = f"{self.pace.done} of {self.pace.total}"
            left = self.pace.left_text()
            text = f"{event.model}: {event.part}: {event.headline} ({place}"
            self.write(f"{text}, {left})" if left and self.pace.left else f"{text})")
        elif isinstance(event, MeasureFailed):
            self.write(f"warning: {event.model}: {event.part} failed: {event.error}")


class ProfileBar(Silent):
    """The table, and what is being measured, redrawn in place on the terminal."""

    def __init__(self, write: Write) -> None:
        super().__init__(write)
        self.pace = ProfilePace()
        self.live: Live | None = None
        self.plan: ProfilePlanned | None = None
        self.cells: dict[tuple[str, str], str] = {}

    def __enter__(self) -> ProfileBar:
        from rich.console import Console
        from rich.live import Live

        self.live = Live(
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=2,
            get_renderable=self.render,
        )
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        self.pace.see(event)
        if isinstance(event, ProfilePlanned):
            self.plan = event
            self.cells = {(model, part): text for model, part, text, _ in event.known}
        elif isinstance(event, Measured):
            self.cells[event.model, event.part] = event.headline
        elif isinstance(event, MeasureFailed):
            self.cells[event.model, event.part] = "failed"
            self.write(f"warning: {event.model}: {event.part} failed: {event.error}")

    def render(self) -> Any:
        """A row for each measurement, a column for each model, and a line on what is going on."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        if self.plan is None:
            return Text("planning: reading texts, looking up benchmarks, checking models")
        table = Table("", *map(escape, self.plan.models), box=None, pad_edge=False)
        for part in self.plan.parts:
            row = [self.cells.get((model, part), "") for model in self.plan.models]
            table.add_row(Text(part), *map(Text, row))
        now = " ".join(self.pace.now) if self.pace.now else "starting"
        share = f" {self.pace.share:.0%}" if self.pace.now and self.pace.share else ""
        line = f"{now}{share}, {self.pace.done} of {self.pace.total} done"
        left = self.pace.left_text()
        return Group(table, Text(f"{line}, {left}" if left else line))
