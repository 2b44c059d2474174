"""The order of a report: which tables and which chart stand under which heading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import accuracy, running
from .charts import ACCURACY, LAYERS, MEMORY, SPEED
from .figures import Table


def sections(found: Mapping[str, Any]) -> list[tuple[str, str, list[Table]]]:
    """`(name of the chart, heading, tables)` of each part of the report that has figures."""
    measured = {table.id: table for table in [*accuracy.tables(found), *running.tables(found)]}

    def of(*beginnings: str) -> list[Table]:
        return [table for key, table in measured.items() if key.split("-")[0] in beginnings]

    made = [
        (ACCURACY, "Accuracy", of("tasks", "losses", "text", "position", "long")),
        (SPEED, "Speed", of("sizes", "speed")),
        (MEMORY, "Memory", of("memory")),
        (LAYERS, "Layers", of("layers")),
    ]
    return [(chart, heading, tables) for chart, heading, tables in made if tables]
