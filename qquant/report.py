"""Values to text: sizes, times, tables, and the closing words of a run.

Everything here takes plain values and returns strings; what is printed where is decided by the
command line. A figure keeps its unit in the text (`5.86 GB`, `12 m 03 s`), decimal units throughout
because that is how disks and model hubs count. Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class LayerLike(Protocol):
    """What a report needs to know about one quantized linear (see `events.LinearDone`)."""

    @property
    def name(self) -> str: ...
    @property
    def loss(self) -> float: ...
    @property
    def rel_error(self) -> float: ...
    @property
    def damp(self) -> float: ...
    @property
    def flags(self) -> tuple[str, ...]: ...


def human_bytes(count: int | float) -> str:
    """`5860000000` -> `5.86 GB`; below 1 kB the plain number of bytes."""
    units = ("B", "kB", "MB", "GB", "TB")
    value, power = float(count), 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}"


def human_seconds(seconds: float) -> str:
    """`0.42 s`, `38 s`, `12 m 03 s`, `2 h 05 m`: two parts at the most."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def text_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = ()
) -> str:
    """Aligned columns: the first one and `words` to the left, the others (figures) to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def render(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if place and place not in words else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])


def labelled(rows: Iterable[tuple[str, str]]) -> str:
    """Lines of a short label and its text, aligned also with those of another call."""
    return "\n".join(f"{label:<15}  {text}" for label, text in rows)


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = ()
) -> str:
    """A GitHub table: the first column and `words` to the left, the others to the right."""
    rule = ["---:" if place and place not in words else "---" for place in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kind_of(name: str) -> str:
    """The linear's name without its block: `transformer.h.3.attn.c_attn` -> `attn.c_attn`.

    All experts are one kind: `mlp.experts.*.up_proj`.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join("*" if p.isdigit() else p for p in parts[i + 1 :])
    return name


def relative_error(layer: LayerLike) -> float:
    """The root of `rel_error`, which is a share of squares: ‖error‖ / ‖what was meant‖, as `verify`
    has it for weights."""
    return float(max(layer.rel_error, 0.0) ** 0.5)


def losses_by_kind(layers: Iterable[LayerLike]) -> list[tuple[str, int, float, float, str]]:
    """`(kind, count, mean relative error, worst relative error, worst linear)`, in model order."""
    found: dict[str, list[LayerLike]] = {}
    for layer in layers:
        found.setdefault(kind_of(layer.name), []).append(layer)
    rows = []
    for kind, members in found.items():
        errors = [relative_error(m) for m in members]
        worst = max(members, key=relative_error)
        mean = sum(errors) / len(errors)
        rows.append((kind, len(members), mean, relative_error(worst), worst.name))
    return rows


# The solver's flags in words (see `gptq.Solution.flags`); `{damp}` is the damping it ended with.
_WORDS = {
    "damp-raised": "needed more damping ({damp} of the mean diagonal)",
    "rtn-fallback": "fell back to rounding to nearest",
    "correction-skipped": "solved without the input correction",
    "correct-damp-raised": "the input correction needed more damping ({count} of the mean "
    "diagonal)",
    "no-tokens": "an expert that no calibration token went to, solved without data",
    "few-tokens": "an expert with {count} tokens of its own, helped out with others",
}
_COMMON = "dead-columns"  # inputs that never fire: harmless and frequent, in the manifest only
_ONE_BY_ONE = 3  # linears with the same to say


def flag_text(*layers: LayerLike) -> str:
    """What did not go as configured, in words; empty where everything did.

    Args:
        layers: of which the same can be said; figures that differ are told as `LEAST to MOST`.
    """
    told = [_told(layer) for layer in layers]
    damp = _span([f"{layer.damp:.3g}" for layer in layers])
    texts = []
    for place, (kind, _) in enumerate(told[0]):
        if words := _WORDS.get(kind):
            count = _span([flags[place][1] for flags in told])
            texts.append(words.format(damp=damp, count=count))
        else:
            texts.append(kind)
    return ", ".join(texts)


def _told(layer: LayerLike) -> list[tuple[str, str]]:
    """The flags that are told, each as its kind and its figure."""
    flags = [flag.partition(":") for flag in layer.flags]
    return [(kind, figure) for kind, _, figure in flags if kind != _COMMON]


def _span(figures: Sequence[str]) -> str:
    if len(set(figures)) == 1:
        return figures[0]
    ordered = sorted(figures, key=float)
    return f"{ordered[0]} to {ordered[-1]}"


def flagged(layers: Iterable[LayerLike]) -> list[str]:
    """Names of the linears that did not go as configured."""
    return [layer.name for layer in layers if _told(layer)]


def flag_rows(layers: Iterable[LayerLike]) -> list[tuple[str, str]]:
    """`(name, what happened)` for what did not go as configured.

    Linears of one kind with the same to say, when there are more than three, are one row: a mixture
    has thousands of experts, and hundreds of them few tokens. Which they are is in the manifest.
    """
    alike: dict[tuple[str, ...], list[LayerLike]] = {}
    counted: dict[str, int] = {}
    for layer in layers:
        kind = kind_of(layer.name)
        counted[kind] = counted.get(kind, 0) + 1
        if told := _told(layer):
            alike.setdefault((kind, *(flag for flag, _ in told)), []).append(layer)
    rows = []
    for (kind, *_), members in alike.items():
        if len(members) <= _ONE_BY_ONE:
            rows += [(m.name, f"{flag_text(m)} ({_error(m)})") for m in members]
            continue
        name = _in_one_block(members, kind)
        worst = max(members, key=relative_error)
        error = _error(worst, "at most ")
        rows.append((name, f"{len(members)} of {counted[kind]}: {flag_text(*members)} ({error})"))
    return rows


def _in_one_block(members: Sequence[LayerLike], kind: str) -> str:
    """The kind, behind the name of the block where that is the same one for all."""
    words = len(kind.split("."))
    blocks = {m.name.rsplit(".", words)[0] for m in members}
    return f"{blocks.pop()}.{kind}" if len(blocks) == 1 else kind


def _error(layer: LayerLike, bound: str = "") -> str:
    return f"relative error {bound}{relative_error(layer):.2%}"


def closing_lines(
    *,
    target: str,
    size_bytes: int,
    seconds: float,
    peak_bytes: int,
    layers: Sequence[LayerLike],
) -> list[str]:
    """What a person reads when a quantization is done: size, time, error by kind, exceptions."""
    lines = [
        f"{target}: {human_bytes(size_bytes)}, {len(layers)} linears quantized in "
        f"{human_seconds(seconds)}, peak memory {human_bytes(peak_bytes)}"
    ]
    kinds = losses_by_kind(layers)
    if kinds:
        rows = [(k, str(n), f"{mean:.2%}", f"{worst:.2%}") for k, n, mean, worst, _ in kinds]
        lines += text_table(("linear", "count", "mean error", "worst"), rows).splitlines()
    if exceptions := flagged(layers):
        lines.append(f"{len(exceptions)} not as configured:")
        lines += [f"  {name}: {text}" for name, text in flag_rows(layers)]
    return lines
