"""A table of figures, before it is text, Markdown or HTML: what is shown, and the raw number.

A cell keeps both: the rounded text with its standard error, which people read, and the number,
which sorting and tooltips use. What differs is put in words by one rule, `verdict`: a difference is
told from noise if zero is not in its 95% interval. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..report import human_bytes, markdown_table, text_table
from .schema import of

NORMAL_95 = 1.959964  # half the width of a 95% interval, in standard errors
Pair = Sequence[float]  # a value and its standard error, which may be None
SAME, NOISE, WORSE, BETTER = "the same", "not told from noise", "worse", "better"


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: as shown.
        value: what is sorted by; None sorts last, or by `text` where no cell of the column has one.
        raw: the number in full, with its error.
        tone: `worse`, `better`, `same` or `warn`, never told by colour alone.
    """

    text: str = ""
    value: float | None = None
    raw: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Attributes:
    id: names it within a report.
    title: its heading.
    head: of the columns; the first column names things, the others are figures.
    rows: as long as `head`.
    notes: sentences below it.
    """

    id: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = field(default=())

    def texts(self) -> list[list[str]]:
        """The rows as shown."""
        return [[cell.text for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """A GitHub table with its notes; `|` and line ends in names are defused."""
        rows = [[markdown_text(t) for t in row] for row in self.texts()]
        head = [markdown_text(h) for h in self.head]
        table = markdown_table(head, rows, self.words())
        return "\n\n".join([table, *map(markdown_text, self.notes)])

    def text(self) -> str:
        """For a terminal."""
        return text_table(self.head, self.texts(), self.words())

    def words(self) -> list[int]:
        """The columns that hold no figures."""
        columns = enumerate(zip(*self.rows, strict=True))
        return [place for place, cells in columns if all(cell.value is None for cell in cells)]

    def filled(self) -> Table:
        """Without columns that are empty in every row; the first one stays."""
        kept = [
            place
            for place in range(len(self.head))
            if not place or any(row[place].text for row in self.rows)
        ]
        rows = tuple(tuple(row[place] for place in kept) for row in self.rows)
        return replace(self, head=tuple(self.head[place] for place in kept), rows=rows)


def markdown_text(text: str) -> str:
    """`text` such that Markdown shows it and does nothing else with it."""
    text = " ".join(text.split())
    for char in "\\`*_[]<>|":
        text = text.replace(char, "\\" + char)
    return text


def number(value: float | None, digits: int, unit: str = "", scale: float = 1) -> Cell:
    """A figure without an error."""
    if value is None:
        return Cell()
    return Cell(f"{value * scale:.{digits}f}{unit}", value, repr(value))


def pair(given: Pair | None, digits: int, unit: str = "", scale: float = 1) -> Cell:
    """A figure with its standard error, where that is known; more digits where it needs them."""
    if given is None:
        return Cell()
    value, error = given
    if error and abs(error) * scale < 0.5 * 10.0**-digits:  # so small that it would look like none
        digits = 1 - math.floor(math.log10(abs(error) * scale))
    text, raw = f"{value * scale:.{digits}f}", repr(value)
    if error is not None:
        text, raw = f"{text} ± {error * scale:.{digits}f}", f"{raw} ± {error!r}"
    return Cell(text + unit, value, raw)


def percent(given: Pair | None, digits: int = 2) -> Cell:
    """A share with its error, as a percentage."""
    return pair(given, digits, "%", 100)


def size(count: float | None) -> Cell:
    """Bytes, in decimal units."""
    return Cell() if count is None else Cell(human_bytes(count), count, f"{count} bytes")


def gib(count: float | None) -> Cell:
    """Bytes, in GiB, as Qwen's tables have them."""
    if count is None:
        return Cell()
    value = count / 2**30
    return Cell(f"{value:.2f}" if value >= 0.1 else f"{value:.4f}", value, f"{count} bytes")


def name(text: str) -> Cell:
    """What a row is about."""
    return Cell(text)


def interval_of(lost: Pair | None, interval: Pair | None) -> tuple[float, float] | None:
    """The 95% interval of a difference: as given, else from its standard error."""
    if interval is not None and interval[1] is not None:
        return interval[0], interval[1]
    if lost is None or lost[1] is None:
        return None
    return lost[0] - NORMAL_95 * lost[1], lost[0] + NORMAL_95 * lost[1]


def verdict(interval: tuple[float, float] | None) -> str:
    """What the interval of a loss says, in words; empty where there is none."""
    if interval is None:
        return ""
    low, high = interval
    if low == high == 0:
        return SAME
    if low > 0:
        return WORSE
    return BETTER if high < 0 else NOISE


def verdict_cell(interval: tuple[float, float] | None) -> Cell:
    """The words, with the tone that goes with them."""
    words = verdict(interval)
    return Cell(words, None, "", "same" if words in (SAME, NOISE) else words)


def interval_cell(interval: tuple[float, float] | None, digits: int, scale: float = 1) -> Cell:
    """`[low, high]`."""
    if interval is None:
        return Cell()
    low, high = (v * scale for v in interval)
    text = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
    return Cell(text, interval[0], f"{interval[0]!r} to {interval[1]!r}")


def models_of(found: Mapping[str, Any]) -> list[str]:
    """The models' names, the reference first, the others as they were given."""
    names = list(found["models"])
    return sorted(names, key=lambda n: not is_reference(found, n))


def is_reference(found: Mapping[str, Any], model: str) -> bool:
    """Whether the others are compared with it."""
    return model == found.get("reference") or bool(of(found["models"][model], "load", "reference"))
