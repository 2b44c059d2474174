"""Panels as inline SVG, for the HTML page: no library, no script, no request.

Text is laid out above the bars, so that a long name needs no room beside them and nothing depends
on a font's widths. Colours are CSS variables of the page, which knows light and dark. Every mark
carries its label and its figures as `data-` attributes and as a `<title>`, for people who point at
it and for tests. Everything that comes from a profile is escaped.
"""

from __future__ import annotations

from html import escape

from .charts import Mark, Panel

_WIDTH, _ROW, _BAR, _TOP = 360, 38, 10, 4
_COLUMNS = (760, 150)
_AXIS = 52  # left of the columns, for the figures of the axis
_LABEL = 44  # characters of a label; the rest is in the title
Shape = tuple[float, float]


def draw(panel: Panel) -> str:
    """The panel as an `<svg>` element; its title is the caller's to write."""
    return _columns(panel) if panel.form == "columns" else _rows(panel)


def short(text: str, most: int = _LABEL) -> str:
    """`text`, its middle left out where it is too long."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"


def _open(width: int, height: int, panel: Panel) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_spoken(panel))}" '
        f'class="{panel.form}">'
    )


def _spoken(panel: Panel) -> str:
    """What a screen reader says: the figures, at most a dozen."""
    told = [f"{m.label} {m.text}" for m in panel.marks[:12]]
    more = f"; {len(panel.marks) - 12} more" if len(panel.marks) > 12 else ""
    return f"{panel.title}: {'; '.join(told)}{more}. {panel.note}".strip()


def _data(mark: Mark) -> str:
    ends = "" if mark.low is None else f' data-low="{mark.low!r}" data-high="{mark.high!r}"'
    return f'data-label="{escape(mark.label)}" data-value="{mark.value!r}"{ends}'


def _look(mark: Mark) -> str:
    return " loud" if mark.loud else " quiet" if mark.quiet else ""


def _rows(panel: Panel) -> str:
    low, high = panel.span()

    def x(value: float) -> float:
        return round(_WIDTH * (value - low) / (high - low), 2)

    height = _TOP + _ROW * len(panel.marks)
    parts = [_open(_WIDTH, height, panel)]
    for number, mark in enumerate(panel.marks):
        y = _TOP + _ROW * number
        middle = y + 21 + _BAR / 2
        parts.append(f'<g class="mark{_look(mark)}" {_data(mark)}>')
        parts.append(f"<title>{escape(f'{mark.label}: {mark.text}')}</title>")
        parts.append(f'<text class="name" x="0" y="{y + 13}">{escape(short(mark.label))}</text>')
        parts.append(f'<text class="figure" x="{_WIDTH}" y="{y + 13}">{escape(mark.text)}</text>')
        if panel.form == "bars":
            parts.append(
                f'<rect class="track" x="0" y="{y + 21}" width="{_WIDTH}" height="{_BAR}" rx="2"/>'
            )
            start, end = sorted((x(0), x(mark.value)))
            parts.append(
                f'<rect class="bar" x="{start}" y="{y + 21}" width="{round(end - start, 2)}" '
                f'height="{_BAR}" rx="2"/>'
            )
        else:
            parts.append(f'<line class="rail" x1="0" x2="{_WIDTH}" y1="{middle}" y2="{middle}"/>')
            if panel.line is not None:
                at, ends = x(panel.line), f'y1="{middle - 7}" y2="{middle + 7}"'
                parts.append(f'<line class="zero" x1="{at}" x2="{at}" {ends}/>')
        if mark.low is not None and mark.high is not None:
            parts.append(_whisker(x(mark.low), x(mark.high), middle))
        if panel.form == "points":
            parts.append(f'<circle class="dot" cx="{x(mark.value)}" cy="{middle}" r="4.5"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _whisker(left: float, right: float, y: float) -> str:
    ends = "".join(f'<line x1="{at}" x2="{at}" y1="{y - 4}" y2="{y + 4}"/>' for at in (left, right))
    return f'<g class="whisker"><line x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>{ends}</g>'


def _columns(panel: Panel) -> str:
    width, height = _COLUMNS
    _, high = panel.span()
    step = (width - _AXIS) / len(panel.marks)
    gap = min(2.0, step / 4)
    parts = [_open(width, height + 24, panel)]
    for share in (0.5, 1.0):
        y = round(height * (1 - share) + 5, 2)
        parts.append(f'<line class="rail" x1="{_AXIS}" x2="{width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="0" y="{y + 4}">{high * share:.3g}%</text>')
    for number, mark in enumerate(panel.marks):
        tall = round(height * mark.value / high, 2)
        parts.append(
            f'<g class="mark{_look(mark)}" {_data(mark)}>'
            f"<title>{escape(f'{mark.label}: {mark.text}')}</title>"
            f'<rect class="bar" x="{round(_AXIS + number * step + gap / 2, 2)}" '
            f'y="{round(height - tall + 5, 2)}" width="{round(step - gap, 2)}" '
            f'height="{tall}"/></g>'
        )
    y = height + 5
    parts.append(f'<line class="base" x1="{_AXIS}" x2="{width}" y1="{y}" y2="{y}"/>')
    for number, (place, text) in enumerate(panel.ticks):
        label = text if number else f"block {text}"
        at = round(_AXIS + place * step, 2)
        parts.append(f'<text class="tick" x="{at}" y="{height + 18}">{escape(label)}</text>')
    return "".join([*parts, "</svg>"])
