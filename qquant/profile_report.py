"""A profile in words and pictures, made from `profile.json` alone.

What a table or chart says is decided in `reporting`; this module puts them in order and writes the
files. `REPORT.md` and the page need nothing but the standard library; the PNG charts need the extra
`plots`, and where it is not installed the report says that they are missing, and how to get them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import TargetError
from .reporting import accuracy, png, running
from .reporting.charts import charts
from .reporting.figures import Table, markdown_text
from .reporting.glance import glance, sentences
from .reporting.page import render_page
from .reporting.protocol import commands, failures, machine_rows, protocol_rows
from .reporting.schema import NAME, known
from .reporting.sections import sections

__all__ = ["NAME", "PAGE", "REPORT", "render_markdown", "render_text", "write_reports"]

REPORT, PAGE = "REPORT.md", "report.html"
NO_CHARTS = "The PNG charts are missing: `pip install 'qquant[plots]'`, then `qquant report`."
logger = logging.getLogger(__name__)


def render_text(found: Mapping[str, Any]) -> str:
    """For the terminal: the summary and what was lost; the rest is in the report."""
    found = known(found)
    tables = [accuracy.task_scores(found), accuracy.task_losses(found)]
    tables += [*accuracy.distribution(found), *accuracy.long_context(found)]
    tables += [running.speed_qwen(found), running.memory(found)]
    parts = [glance(found).text()]
    parts += [f"{table.title}\n{table.text()}" for table in tables if table.rows]
    parts += sentences(found)
    return "\n\n".join(parts)


def render_markdown(found: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """`REPORT.md`.

    Args:
        pictures: the charts whose PNG files lie beside it, by name.
    """
    found = known(found)
    lines = ["# Profile", ""]
    if found.get("reference"):
        lines += [f"Compared with {markdown_text(found['reference'])} on the same tokens.", ""]
    lines += [f"- {markdown_text(text)}" for text in sentences(found)]
    lines += ["", glance(found).markdown(), ""]
    for chart, heading, tables in sections(found):
        lines += [f"## {heading}", "", *body(chart, tables, pictures, "###")]
    lines += _conditions(found)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def body(
    chart: str, tables: Sequence[Table], pictures: Sequence[str], mark: str, folder: str = ""
) -> Iterator[str]:
    """A section's lines: its picture, then its tables under headings of `mark`."""
    if chart in pictures:
        yield from (f"![{chart} chart]({folder}{chart}.png)", "")
    for table in tables:
        yield from (f"{mark} {markdown_text(table.title)}", "", table.markdown(), "")


def _conditions(found: Mapping[str, Any]) -> Iterator[str]:
    if told := failures(found):
        yield from ("## Not measured", "", *(f"- {markdown_text(t)}" for t in told), "")
    if lines := commands(found):
        yield from (
            "## Command",
            "",
            "```sh",
            *(line.replace("`", "'") for line in lines),
            "```",
            "",
        )
    for heading, rows in (("Protocol", protocol_rows(found)), ("Machine", machine_rows(found))):
        yield from (f"## {heading}", "")
        yield from (f"- {markdown_text(key)}: {markdown_text(value)}" for key, value in rows)
        yield ""
    yield f"Every raw number is in `{NAME}`."


def write_reports(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Writes the PNG charts, the page and `REPORT.md` into `folder`, which is made if it is not
    there; gives what was written.

    Each file appears whole or not at all, the report, which shows the others, last.

    Raises:
        TargetError: the folder or a file in it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected = "a directory that can be written"
        raise TargetError(str(folder), expected=expected, got=error.strerror) from error
    contents: dict[str, bytes] = {}
    if png.available():
        contents = {f"{chart.name}.png": png.draw(chart) for chart in charts(known(found))}
    else:
        logger.warning(NO_CHARTS.replace("`", ""))
    pictures = [name.removesuffix(".png") for name in contents]
    text = render_markdown(found, pictures)
    if not contents:
        text += f"\n{NO_CHARTS}\n"
    contents[PAGE] = render_page(found).encode()
    contents[REPORT] = text.encode()
    for name, content in contents.items():
        replace_file(folder / name, content)
    return [folder / name for name in contents]


def replace_file(path: Path, content: bytes) -> None:
    """Writes the file beside its place and renames it there.

    Raises:
        TargetError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(content)
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise TargetError(str(path), expected="writable", got=error.strerror) from error
