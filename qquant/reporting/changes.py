"""What changed between two profiles: every figure that both have, and whether it is outside noise.

What could make figures incomparable comes first: another machine, other versions, another protocol.
Then, per model, each figure with its difference. Where both profiles have the raw numbers of the
same questions or rows of text, the interval is that of the paired difference; else, where both have
a standard error, that of two independent measurements, which is wider. A figure without an error (a
size, a speed of one run) has no interval; that it differs is all that can be said. Rates of
repeated runs have the spread of the runs instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from .. import estimates
from ..tasks.paired import lost
from .accuracy import task_scale, task_title
from .figures import NORMAL_95, Cell, Table
from .protocol import machine_rows, protocol_rows
from .running import peak_of, rates
from .schema import known, of

_ASKED = ("metric", "n", "shots", "chat_template", "preset", "limit", "harness")
SAME, NOISE, OUTSIDE, UNKNOWN = "the same", "within noise", "outside noise", "no error known"


@dataclass(frozen=True)
class Change:
    """One figure in both profiles.

    Attributes:
        model, figure: whose, and of what. unit: of the numbers, may be empty.
        before, after: the figure. difference: after less before.
        interval: of the difference, 95%; None where an error is not known.
        words: `the same`, `within noise`, `outside noise`, or `no error known`.
    """

    model: str
    figure: str
    unit: str
    before: float
    after: float
    difference: float
    interval: tuple[float, float] | None
    words: str


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    conditions: `(what, before, after)` of machine, versions and protocol that differ.
    only_before, only_after: models and figures that one of the two lacks.
    changes: every figure of both, in order.
    """

    conditions: tuple[tuple[str, str, str], ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "conditions": [
                {"what": what, "before": before, "after": after}
                for what, before, after in self.conditions
            ],
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
            "changes": [asdict(change) for change in self.changes],
        }

    def render(self) -> str:
        """For a person; figures that are the same are only counted."""
        parts = []
        if self.conditions:
            told = [f"  {what}: {a} -> {b}" for what, a, b in self.conditions]
            parts.append("\n".join(["measured under other conditions:", *told]))
        for words, names in (("first", self.only_before), ("second", self.only_after)):
            if names:
                parts.append("\n".join([f"only in the {words}:", *(f"  {n}" for n in names)]))
        if shown := [c for c in self.changes if c.words != SAME]:
            parts.append(_table(shown).text())
        same = sum(c.words == SAME for c in self.changes)
        counts = [f"{same} the same"]
        counts += [
            f"{n} {words}"
            for words in (NOISE, OUTSIDE, UNKNOWN)
            if (n := sum(c.words == words for c in self.changes))
        ]
        parts.append(f"{len(self.changes)} figures in both: {', '.join(counts)}")
        return "\n\n".join(parts)


def _table(changes: list[Change]) -> Table:
    rows = []
    for c in changes:
        interval = "" if c.interval is None else f"[{c.interval[0]:+.4g}, {c.interval[1]:+.4g}]"
        figures = [f"{c.before:.6g}", f"{c.after:.6g}", f"{c.difference:+.4g}", interval]
        figure = f"{c.figure}, {c.unit}" if c.unit else c.figure
        rows.append(tuple(Cell(t) for t in (c.model, figure, *figures, c.words)))
    head = ("model", "figure", "before", "after", "difference", "95% interval", "in words")
    return Table("changes", "Changes", head, tuple(rows))


@dataclass(frozen=True)
class Figure:
    """One figure of a model.

    Attributes:
        name, unit: of what. value: the figure; low, high: its 95% interval or its spread.
        sample: the numbers it is the mean of, where they are known: one per question or row.
        asked: what they were asked or read; only figures of the same are compared one by one.
        parts: sizes of the parts whose means the figure is the mean of; none for one mean of all.
    """

    name: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    sample: tuple[float, ...] = ()
    asked: object = None
    parts: tuple[int, ...] = ()


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compares two profiles whose shape is known to be right (`schema`)."""
    before, after = known(before), known(after)
    names = [m for m in before["models"] if m in after["models"]]
    lacking: tuple[list[str], list[str]] = ([], [])
    for place, (one, other) in enumerate(((before, after), (after, before))):
        lacking[place].extend(m for m in one["models"] if m not in other["models"])
    changes = []
    for model in names:
        old = {f.name: f for f in figures(before["models"][model])}
        new = {f.name: f for f in figures(after["models"][model])}
        lacking[0].extend(f"{model}: {name}" for name in old if name not in new)
        lacking[1].extend(f"{model}: {name}" for name in new if name not in old)
        changes += [_change(model, old[name], new[name]) for name in old if name in new]
    conditions = (*_conditions(before, after), *_texts(before, after, names))
    return Comparison(conditions, tuple(lacking[0]), tuple(lacking[1]), tuple(changes))


def _conditions(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    sides = []
    for found in (before, after):
        told = {"reference": str(found.get("reference") or "none")}
        told |= dict(machine_rows(found)) | {f"protocol, {k}": v for k, v in protocol_rows(found)}
        sides.append(told)
    for what in dict.fromkeys([*sides[0], *sides[1]]):
        old, new = (side.get(what, "not there") for side in sides)
        if old != new and what != "date":
            yield what, old, new


def _texts(
    before: Mapping[str, Any], after: Mapping[str, Any], names: list[str]
) -> Iterator[tuple[str, str, str]]:
    """Per model: kernels, and how tasks were asked."""
    for model in names:
        one, other = before["models"][model], after["models"][model]
        for what, path in (("kernel", ("load", "kernel")), ("method", ("load", "method"))):
            old, new = of(one, *path), of(other, *path)
            if old != new:
                yield f"{model}, {what}", str(old), str(new)
        for task in sorted(set(of(one, "tasks") or {}) & set(of(other, "tasks") or {})):
            for key in (*_ASKED, "asked"):
                old, new = of(one, "tasks", task, key), of(other, "tasks", task, key)
                known_both = key != "asked" or (old and new)
                if old != new and known_both:
                    what = "questions (a hash)" if key == "asked" else key
                    yield f"{model}, {task_title(task)} {what}", str(old), str(new)
        texts = [of(entry, "accuracy", "domains") or {} for entry in (one, other)]
        for name in sorted(set(texts[0]) & set(texts[1])):
            old, new = (of(side, name, "sha256") for side in texts)
            if old and new and old != new:
                yield f"{model}, {name} (a hash)", str(old), str(new)


def _change(model: str, old: Figure, new: Figure) -> Change:
    difference = new.value - old.value
    interval = _paired(old, new, difference) or _independent(old, new, difference)
    if difference == 0:
        words = SAME
    elif interval is None:
        words = UNKNOWN
    else:
        words = NOISE if interval[0] <= 0 <= interval[1] else OUTSIDE
    return Change(model, new.name, new.unit, old.value, new.value, difference, interval, words)


def _paired(old: Figure, new: Figure, difference: float) -> tuple[float, float] | None:
    """From the same questions or rows, one by one."""
    n = len(new.sample)
    alike = old.asked is not None and old.asked == new.asked and old.parts == new.parts
    if n < 2 or len(old.sample) != n or not alike:
        return None
    if not new.parts:
        low, high = estimates.interval(estimates.differences(old.sample, new.sample))
        middle = (low + high) / 2
    elif sum(new.parts) != n or min(new.parts) < 2:
        return None
    else:
        found = lost(new.sample, old.sample, subjects=new.parts)
        assert found.interval is not None  # no part is of one question
        (low, high), middle = found.interval, found.value
    return difference + (low - middle), difference + (high - middle)


def _independent(old: Figure, new: Figure, difference: float) -> tuple[float, float] | None:
    """From each figure's own interval."""
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return None
    below = math.hypot(new.value - new.low, old.high - old.value)
    above = math.hypot(new.high - new.value, old.value - old.low)
    return difference - below, difference + above


def figures(entry: Mapping[str, Any]) -> Iterator[Figure]:
    """Every figure of a model that can be compared."""
    yield from _plain("files", "bytes", of(entry, "load", "file_bytes"))
    yield from _plain("weights in memory", "bytes", of(entry, "load", "weight_bytes"))
    for domain, got in (of(entry, "accuracy", "domains") or {}).items():
        read = _read(got)
        nll = of(got, "rows", "nll")
        if nll and None not in nll:
            told = f"{domain}: loss per token"
            yield Figure(told, "nats", fmean(nll), sample=tuple(nll), asked=read)
        for key, words, scale in (
            ("perplexity", "perplexity", 1.0),
            ("nll_lost", "loss added", 1.0),
            ("kl", "KL", 1.0),
            ("top1", "same top token", 100.0),
        ):
            name, unit = f"{domain}: {words}", "%" if scale > 1 else ""
            yield from _measured(name, unit, got.get(key), scale, of(got, "rows", key), read)
        for k, value in (got.get("topk") or {}).items():
            yield from _measured(f"{domain}: top-{k} overlap", "%", value, 100.0)
    for task, got in (of(entry, "tasks") or {}).items():
        scale = task_scale(got)
        unit = "points" if scale > 1 else ""
        score, questions, parts = got.get("score"), got.get("questions"), _parts(got)
        asked = got.get("asked")
        yield from _measured(task_title(task), unit, score, scale, questions, asked, parts)
    for row in of(entry, "long_context", "rows") or []:
        switches = [k for k in ("dynamic_ntk", "logn") if row.get(k)]
        name = f"perplexity at {row.get('length')} ({' + '.join(switches) or 'neither'})"
        yield from _measured(name, "", row.get("perplexity"), 1.0)
    linears = of(entry, "layers", "linears") or {}
    if errors := [e["relative_error"] for e in linears.values() if "relative_error" in e]:
        yield from _plain("largest error of a weight", "%", 100 * max(errors))
        yield from _plain("mean error of a weight", "%", 100 * sum(errors) / len(errors))
    for setting, got in (of(entry, "speed") or {}).items():
        if (rate := rates(got)) is not None:
            spread = rate[1:] if rate[1] != rate[2] else (None, None)
            yield Figure(f"{setting}: decode", "tokens/s", rate[0], *spread)
        yield from _plain(f"{setting}: Qwen's rate", "tokens/s", got.get("qwen_tokens_per_s"))
        first = got.get("ttft_s")
        yield from _plain(f"{setting}: first token", "s", first[0] if first else None)
    for setting, got in (of(entry, "memory") or {}).items():
        yield from _plain(f"{setting}: peak", "bytes", peak_of(got))


def _read(got: Mapping[str, Any]) -> object:
    """Which tokens of which text; None where the profile does not tell."""
    sha256 = got.get("sha256")
    return sha256 and [sha256, got.get("chat"), got.get("seqlen"), got.get("tokens")]


def _parts(got: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes of a benchmark's subjects, where its score is the mean of theirs."""
    if got.get("mean") != "subjects":
        return ()
    return tuple(int(size) for _, size in got.get("subjects") or ())


def _plain(name: str, unit: str, value: float | None) -> Iterator[Figure]:
    if value is not None:
        yield Figure(name, unit, value)


def _measured(
    name: str,
    unit: str,
    given: Any,
    scale: float,
    sample: Any = None,
    asked: object = None,
    parts: tuple[int, ...] = (),
) -> Iterator[Figure]:
    if given is None:
        return
    value, error = given[0] * scale, given[1]
    whole = sample and None not in sample
    taken = tuple(scale * v for v in sample) if whole else ()
    if error is None:
        yield Figure(name, unit, value, None, None, taken, asked, parts)
    else:
        half = NORMAL_95 * abs(error) * scale
        yield Figure(name, unit, value, value - half, value + half, taken, asked, parts)
