"""What is drawn, as data: every bar's length, whisker and label, before any pixel.

Three forms suffice. `bars` start at zero, because a length is read as a ratio. `points` stand on an
axis of their own, because a difference is read as a position: around zero (told from noise or
not), or below what full agreement would be. `columns` are one per linear in the model's order, for
errors layer by layer; the largest is named. Tests hold what these say, and `svg` and `png` draw
nothing else. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .accuracy import domain_names, is_share, task_names, task_scale, task_title
from .figures import NORMAL_95, WORSE, is_reference, models_of, verdict
from .figures import interval_of as difference_interval
from .running import peak_of, peaks, rates, whats
from .schema import of

NAMES = ACCURACY, SPEED, MEMORY, LAYERS = "accuracy", "speed", "memory", "layers"


@dataclass(frozen=True)
class Mark:
    """One bar, point or column.

    Attributes:
        label: whose, in full.
        value: where it ends, in the panel's unit.
        low, high: of its whisker; None where no error is known.
        text: the figure beside it.
        quiet: drawn in grey: the reference.
        loud: drawn in the colour of warnings: a slow kernel, the largest error.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    quiet: bool = False
    loud: bool = False


@dataclass(frozen=True)
class Panel:
    """Attributes:
    title: what is measured, with its unit; form: `bars`, `points` or `columns`.
    line: a value marked on the axis of `points`; note: a sentence below.
    ticks: below `columns`: the place among the marks where a block begins, and its number.
    """

    title: str
    form: str
    marks: tuple[Mark, ...]
    line: float | None = None
    note: str = ""
    ticks: tuple[tuple[int, str], ...] = ()

    def span(self) -> tuple[float, float]:
        """The ends of the axis: everything drawn fits, and bars and columns begin at zero."""
        reach = [m.value for m in self.marks]
        reach += [v for m in self.marks for v in (m.low, m.high) if v is not None]
        reach += [] if self.line is None else [self.line]
        low, high = min(reach), max(reach)
        if self.form != "points":
            return min(0.0, low), max(high, 0.0) or 1.0
        margin = 0.06 * (high - low) or 0.5
        return low - margin, high + (margin if high != self.line else margin / 3)


@dataclass(frozen=True)
class Chart:
    """Attributes:
    name: of its file, without the ending; title: its heading; panels: at least one.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]


def charts(found: Mapping[str, Any]) -> list[Chart]:
    """Every chart that the profile has figures for, in the order people read them."""
    made = (
        Chart(ACCURACY, "Accuracy kept", tuple(_accuracy(found))),
        Chart(SPEED, "Speed", tuple(_speed(found))),
        Chart(MEMORY, "Memory", tuple(_memory(found))),
        Chart(LAYERS, "Error layer by layer", tuple(_layers(found))),
    )
    return [chart for chart in made if chart.panels]


def _panel(title: str, form: str, marks: list[Mark], **more: Any) -> Iterator[Panel]:
    marks = [mark for mark in marks if math.isfinite(mark.value)]
    if marks:
        yield Panel(title, form, tuple(marks), **more)


def _with_error(label: str, given: Any, digits: int, scale: float = 1, **more: Any) -> Mark:
    """A mark with a whisker of two standard errors, 95%."""
    value, error = given
    value *= scale
    text = f"{value:.{digits}f}"
    if error is None:
        return Mark(label, value, text=text, **more)
    half = NORMAL_95 * abs(error) * scale
    low, high = value - half, value + half
    if scale == 100 and 0 <= value <= 100:  # a share: no interval reaches where none can be
        low, high = max(low, 0.0), min(high, 100.0)
    return Mark(label, value, low, high, text, **more)


def _accuracy(found: Mapping[str, Any]) -> Iterator[Panel]:
    models = found["models"]
    for task in task_names(found):
        marks = []
        for m in models_of(found):
            got = of(models[m], "tasks", task)
            if got and got.get("score") is not None:
                quiet = is_reference(found, m)
                marks.append(_with_error(m, got["score"], 1, task_scale(got), quiet=quiet))
        shares = all(is_share(models[m], task) for m in models_of(found))
        yield from _panel(task_title(task) + (", points" if shares else ""), "bars", marks)
    for model in models_of(found):
        yield from _panel(
            f"{model}: points lost",
            "points",
            list(_losses(found, model)),
            line=0.0,
            note="Paired, with 95% intervals; one that crosses zero is not told from noise.",
        )
    for domain in domain_names(found):
        rows = {m: of(models[m], "accuracy", "domains", domain) for m in models_of(found)}
        others = {m: got for m, got in rows.items() if got and not is_reference(found, m)}
        top1 = [_with_error(m, g["top1"], 2, 100) for m, g in others.items() if g.get("top1")]
        yield from _panel(f"{domain}: same top token, %", "points", top1, line=100.0)
        kl = [_with_error(m, g["kl"], 5) for m, g in others.items() if g.get("kl")]
        yield from _panel(f"{domain}: KL from the reference, nats", "bars", kl)
        if not top1 and not kl:
            ppl = [
                _with_error(m, got["perplexity"], 3, quiet=is_reference(found, m))
                for m, got in rows.items()
                if got and got.get("perplexity")
            ]
            yield from _panel(f"{domain}: perplexity", "bars", ppl)


def _losses(found: Mapping[str, Any], model: str) -> Iterator[Mark]:
    for task in task_names(found):
        got = of(found["models"][model], "tasks", task)
        if not got or got.get("lost") is None or task_scale(got) == 1:
            continue  # no points: another axis
        scale = task_scale(got)
        interval = difference_interval(got["lost"], got.get("lost_interval"))
        words = verdict(interval)
        value = got["lost"][0] * scale
        low, high = (None, None) if interval is None else (v * scale for v in interval)
        low, high = (None, None) if low is None else (min(low, value), max(high, value))
        text = f"{value:+.2f}" + (f", {words}" if words else "")
        yield Mark(task_title(task), value, low, high, text, loud=words == WORSE)


def _speed(found: Mapping[str, Any]) -> Iterator[Panel]:
    settings: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model in models_of(found):
        for setting, got in (of(found["models"][model], "speed") or {}).items():
            settings.setdefault(setting, {})[model] = got
    for setting, measured in settings.items():
        marks = []
        for model, got in measured.items():
            slow = bool(got.get("slow_kernel") or of(found["models"][model], "load", "slow_kernel"))
            quiet = is_reference(found, model)
            label = f"{model} (slow kernel)" if slow else model
            if got.get("preset") == "qwen" and got.get("qwen_tokens_per_s") is not None:
                value = got["qwen_tokens_per_s"]
                marks.append(Mark(label, value, text=f"{value:.2f}", quiet=quiet, loud=slow))
            elif (rate := rates(got)) is not None:
                low, high = rate[1:] if rate[1] != rate[2] else (None, None)
                text = f"{rate[0]:.2f}"
                marks.append(Mark(label, rate[0], low, high, text, quiet=quiet, loud=slow))
        yield from _panel(f"{setting}: tokens per second", "bars", marks)


def _memory(found: Mapping[str, Any]) -> Iterator[Panel]:
    for what in whats(found):
        marks = []
        for model in models_of(found):
            got = peaks(found, model).get(what)
            if got and (peak := peak_of(got)) is not None:
                value = peak / 2**30
                text = f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"
                marks.append(Mark(model, value, text=text, quiet=is_reference(found, model)))
        yield from _panel(f"{what}: peak, GiB", "bars", marks)


def _layers(found: Mapping[str, Any]) -> Iterator[Panel]:
    """A panel per model, every linear in the order of the model."""
    for model in models_of(found):
        linears = of(found["models"][model], "layers", "linears") or {}
        errors = {n: e["relative_error"] for n, e in linears.items() if "relative_error" in e}
        if not errors or is_reference(found, model):
            continue
        worst = max(errors, key=lambda n: errors[n])
        marks = [
            Mark(n, 100 * e, text=f"{e:.2%}", loud=n == worst and e > 0) for n, e in errors.items()
        ]
        note = f"Largest: {worst}, {errors[worst]:.2%}." if errors[worst] > 0 else "No error."
        title = f"{model}: error of each weight, %"
        yield from _panel(title, "columns", marks, note=note, ticks=_blocks(list(errors)))


def _blocks(linears: list[str]) -> tuple[tuple[int, str], ...]:
    """Where blocks begin among the linears, at most a dozen of them."""
    found: dict[str, int] = {}
    for place, linear in enumerate(linears):
        number = next((part for part in linear.split(".") if part.isdigit()), "")
        found.setdefault(number, place)
    every = -(-len(found) // 12)
    ticks = [(place, number) for number, place in found.items() if number]
    return tuple(ticks[::every])
