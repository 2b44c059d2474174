"""Under what a profile was measured: the protocol, the machine, the command. Text only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def commands(found: Mapping[str, Any]) -> list[str]:
    """The command lines that measured it, where the profile kept them."""
    kept = found.get("commands") or []
    return [line for line in kept if isinstance(line, str)] if isinstance(kept, list) else []


def shown(value: Any) -> str:
    """A setting as a person reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value):
        return ", ".join(map(shown, value)) or "none"
    return json.dumps(value, ensure_ascii=False)


def protocol_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every option of the protocol, and every seed."""
    return [*_flat(found["protocol"], ""), *_flat(found.get("seeds") or {}, "seed of ")]


def _flat(given: Mapping[str, Any], before: str) -> Iterator[tuple[str, str]]:
    for key, value in given.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, shown(value)


def failures(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each measurement that failed."""
    kept = found.get("failed")
    return [
        ": ".join(str(row.get(key, "")) for key in ("model", "part", "error"))
        for row in (kept if isinstance(kept, list) else [])
        if isinstance(row, dict)
    ]


def machine_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Device, driver, threads, versions, date."""
    rows = []
    for key, value in found["machine"].items():
        if key == "versions":
            rows += [(f"version of {package}", shown(v)) for package, v in (value or {}).items()]
        elif isinstance(value, dict):
            rows += [(f"{key} {inner}".replace("_", " "), shown(v)) for inner, v in value.items()]
        elif value is not None:
            rows.append((key, shown(value)))
    return rows


def public(found: Mapping[str, Any]) -> str:
    """The profile as a file that goes out with a model."""
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
