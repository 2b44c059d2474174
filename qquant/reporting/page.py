"""The profile as one HTML page that needs nothing else: no request leaves it.

Style and script are files beside this module and go into the page whole. The page can be read
without its script; what the script adds is sorting (`page.js`). The whole profile travels in the
page as JSON, so that every figure's raw number is at hand: beside each cell, below each section,
and as a file to save. A content security policy forbids everything else, so that even a mistake in
escaping could not run what stands in a profile.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from . import svg
from .charts import Chart, charts
from .figures import Cell, Table, models_of
from .glance import glance, sentences
from .protocol import commands, failures, machine_rows, protocol_rows
from .schema import known
from .sections import sections

_LONG = 40  # numbers of a list, from which on it is left out where raw numbers are shown
_WRAP = 36  # characters of a cell, from which on its text may take several lines


def render_page(found: Mapping[str, Any]) -> str:
    """The page's text, from a profile whose shape is known to be right (`schema`)."""
    whole, found = found, known(found)
    style, script = _part("page.css"), _part("page.js")
    drawn = {chart.name: chart for chart in charts(found)}
    parts = [("glance", "At a glance", _glance(found))]
    parts += [
        (name, heading, _section(found, drawn.get(name), tables))
        for name, heading, tables in sections(found)
    ]
    parts.append(("protocol", "Protocol and machine", _protocol(found)))
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in parts)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{text}</section>'
        for key, title, text in parts
    )
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_title(found))}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n'
        f"<header><h1>{escape(_title(found))}</h1>"
        f'<p>{escape(_subtitle(found))}</p><nav aria-label="Sections">{links}</nav></header>\n'
        f"<main>{body}</main>\n"
        "<footer><p>Every figure's raw number is in this page: point at a figure, open “Raw "
        'numbers”, or <button type="button" id="save" hidden>save profile.json</button>'
        "</p></footer>\n"
        f'<script type="application/json" id="profile">{_json(whole)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _title(found: Mapping[str, Any]) -> str:
    others = [m for m in models_of(found) if m != found.get("reference")]
    return (
        "Profile of "
        + (", ".join(others[:3]) or str(found.get("reference") or "nothing"))
        + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    )


def _subtitle(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    parts = [f"Against {found['reference']}"] if found.get("reference") else []
    parts += [str(machine[key]) for key in ("device", "date") if machine.get(key)]
    return " · ".join(parts)


def _glance(found: Mapping[str, Any]) -> str:
    told = "".join(f"<p>{escape(text)}</p>" for text in sentences(found))
    return f'<div class="told">{told}</div>{table_html(glance(found))}'


_PARTS = {
    "tasks": ("tasks",),
    "losses": ("tasks",),
    "text": ("accuracy",),
    "position": ("accuracy",),
    "long": ("long_context",),
    "layers": ("layers",),
    "sizes": ("load",),
    "speed": ("speed",),
    "memory": ("memory",),
}


def _section(found: Mapping[str, Any], chart: Chart | None, tables: Sequence[Table]) -> str:
    parts = [_chart(chart)] if chart else []
    parts += [table_html(table) for table in tables]
    wanted = dict.fromkeys(p for t in tables for p in _PARTS[t.id.split("-")[0]])
    return "".join(parts) + (_raw(found, wanted) if parts else "")


def _chart(chart: Chart) -> str:
    panels = []
    for panel in chart.panels:
        note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
        panels.append(
            f"<figure><figcaption>{escape(panel.title)}</figcaption>{svg.draw(panel)}{note}"
            "</figure>"
        )
    return f'<div class="chart" id="chart-{chart.name}">{"".join(panels)}</div>'


def table_html(table: Table) -> str:
    """A table whose heads the script turns into buttons that sort."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
    rows = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<h3 id="h-{table.id}">{escape(table.title)}</h3>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="h-{table.id}">'
        f'<table id="t-{table.id}" class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{notes}"
    )


def _cells(row: Sequence[Cell]) -> Iterable[str]:
    for number, cell in enumerate(row):
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        raw = f' title="{escape(cell.raw)}"' if cell.raw else ""
        words = ["num"] if cell.value is not None else ["long"] if len(cell.text) > _WRAP else []
        kind = " ".join([*words, *([cell.tone] if cell.tone else [])])
        look = f' class="{kind}"' if kind else ""
        text = escape(cell.text)
        if number == 0:
            yield f'<th scope="row"{look}{value}{raw}>{text}</th>'
        else:
            yield f"<td{look}{value}{raw}>{text}</td>"


def _raw(found: Mapping[str, Any], parts: Iterable[str]) -> str:
    """The raw numbers of a section; long lists are named by their length, the file has them."""
    shown = {
        model: {part: _shortened(entry[part]) for part in parts if part in entry}
        for model, entry in found["models"].items()
    }
    shown = {model: entry for model, entry in shown.items() if entry}
    lines = "".join(f"<pre>{escape(line)}</pre>" for line in commands(found))
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    return (
        "<details><summary>Raw numbers and command</summary>"
        f"{lines}<pre>{escape(text)}</pre></details>"
    )


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) > _LONG and not any(isinstance(item, dict) for item in value):
            return f"{len(value)} numbers, in profile.json"
        return [_shortened(item) for item in value]
    return value


def _protocol(found: Mapping[str, Any]) -> str:
    lines = "".join(f"<pre>{escape(line)}</pre>" for line in commands(found))
    failed = "".join(f"<li>{escape(text)}</li>" for text in failures(found))
    made = f"<h3>Not measured</h3><ul>{failed}</ul>" if failed else ""
    made += f"<h3>Command</h3>{lines}" if lines else ""
    for title, rows in (
        ("Protocol", protocol_rows(found)),
        ("Machine and versions", machine_rows(found)),
    ):
        body = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
            for key, value in rows
        )
        made += f'<h3>{title}</h3><div class="scroll"><table class="facts">{body}</table></div>'
    return made
