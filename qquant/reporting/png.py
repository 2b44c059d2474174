"""Charts as PNG files, for `REPORT.md` and model cards, by matplotlib (the extra `plots`).

Drawn from the same data as the page's (`charts`). matplotlib's own state is left alone: a figure is
made and saved without pyplot, and settings hold within a `with`. The same profile gives the same
bytes with the same matplotlib: no dates go into the files.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from typing import Any

from ..errors import MissingDependencyError
from .charts import Chart, Panel
from .svg import short

_INK, _SOFT, _LINE = "#1d2733", "#5c6876", "#d9dee4"
_ACCENT, _QUIET, _LOUD = "#2f6690", "#9aa5b1", "#c2512f"
_SETTINGS: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that bytes do not depend on fonts
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _INK,
    "text.parse_math": False,  # a `$` in a name is a dollar
}
_INCH = 4.6  # width of a panel of rows
_DPI = 144
_NOTE = 60  # characters of a line below a panel of rows


def available() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(chart: Chart) -> bytes:
    """The chart as a PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "charts", expected="matplotlib", got="none", cure="pip install 'qquant[plots]'"
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        wide = any(panel.form == "columns" for panel in chart.panels)
        across = 1 if wide or len(chart.panels) == 1 else 2
        down = math.ceil(len(chart.panels) / across)
        heights = [
            max(_height(p) for p in chart.panels[row * across : (row + 1) * across])
            for row in range(down)
        ]
        figure = Figure(
            figsize=(_INCH * (2 if wide else across), sum(heights)),
            dpi=_DPI,
            layout="constrained",
            facecolor="white",
        )
        grid = figure.add_gridspec(down, across, height_ratios=heights)
        for number, panel in enumerate(chart.panels):
            axes = figure.add_subplot(grid[number // across, number % across])
            (_columns if panel.form == "columns" else _rows)(axes, panel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _height(panel: Panel) -> float:
    return 2.4 if panel.form == "columns" else 0.85 + 0.34 * len(panel.marks)


def _colour(mark: Any) -> str:
    return _LOUD if mark.loud else _QUIET if mark.quiet else _ACCENT


def _frame(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    if panel.note:
        line = _NOTE * (2 if panel.form == "columns" else 1)
        axes.set_xlabel("\n".join(textwrap.wrap(panel.note, line)), loc="left", fontsize=8)


def _rows(axes: Any, panel: Panel) -> None:
    places = list(range(len(panel.marks)))
    for y, mark in zip(places, panel.marks, strict=True):
        colour = _colour(mark)
        if panel.form == "bars":
            axes.barh(y, mark.value, height=0.5, color=colour)
        else:
            axes.plot([mark.value], [y], "o", color=colour, markersize=6)
        if mark.low is not None and mark.high is not None:
            reach = [[max(0.0, mark.value - mark.low)], [max(0.0, mark.high - mark.value)]]
            axes.errorbar([mark.value], [y], xerr=reach, color=_INK, capsize=3, linewidth=1)
        at = max(
            v
            for v in (mark.value, mark.high, 0.0 if panel.form == "bars" else None)
            if v is not None
        )
        axes.annotate(
            mark.text,
            (at, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_SOFT,
        )
    low, high = panel.span()
    axes.set_xlim(low, high + 0.28 * (high - low))  # room for the figures
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high])
    if panel.line is not None:
        axes.axvline(panel.line, color=_SOFT, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(places, [short(m.label, 34) for m in panel.marks])
    axes.set_ylim(len(panel.marks) - 0.4, -0.6)
    axes.grid(axis="x", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    _frame(axes, panel)


def _columns(axes: Any, panel: Panel) -> None:
    axes.bar(
        range(len(panel.marks)),
        [m.value for m in panel.marks],
        width=0.8,
        color=[_colour(m) for m in panel.marks],
    )
    axes.set_ylim(*panel.span())
    axes.set_xticks([place for place, _ in panel.ticks], [text for _, text in panel.ticks])
    axes.margins(x=0.005)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    _frame(axes, panel)
