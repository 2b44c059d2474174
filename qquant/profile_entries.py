"""A model's entry in `profile.json`, taken apart by what its results were measured of.

A result is what has a `key`: an object of its own, or a row of a list. Beside the key stands what
has to be the same for figures to stand side by side, each as a short hash: `of` the model's files,
`on` what machine and versions, `against` which reference. `split` parts the results that still hold
from those that do not, whatever was measured; `merge` puts entries together. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Entry = dict[str, Any]
Result = Mapping[str, Any]


def holds(result: Result, now: Mapping[str, str]) -> bool:
    """Whether a result was measured of what `now` says; what it does not tell is no matter."""
    return all(result.get(name, value) == value for name, value in now.items())


def split(entry: Mapping[str, Any], good: Callable[[Result], bool]) -> tuple[Entry, Entry]:
    """The entry with its good results and all that is no result, and one with the other results."""
    kept: Entry = {}
    rest: Entry = {}
    for name, value in entry.items():
        one: Any = value
        other: Any = None
        if _is_result(value):
            one, other = (value, None) if good(value) else (None, value)
        elif isinstance(value, dict):
            one, other = split(value, good)
            if other and not any(_results(one)):
                one = None  # what stood beside the results told of them
        elif isinstance(value, list):
            other = [row for row in value if _is_result(row) and not good(row)]
            one = [row for row in value if row not in other]
        if other:
            rest[name] = other
        if one or not other:
            kept[name] = one
    return kept, rest


def merge(entry: Mapping[str, Any], more: Mapping[str, Any]) -> Entry:
    """Both; where both have a result of one place (or of one `length`), that of `entry`."""
    whole = dict(entry)
    for name, value in more.items():
        there = whole.get(name)
        if there is None:
            whole[name] = value
        elif isinstance(there, dict) and isinstance(value, dict) and not _is_result(there):
            whole[name] = merge(there, value)
        elif isinstance(there, list) and isinstance(value, list):
            lengths = [row["length"] for row in there if _is_result(row) and "length" in row]
            whole[name] = there + [row for row in value if row.get("length") not in lengths]
    return whole


def places(entry: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Where results stand: `speed qwen-1-2048`."""
    for name, value in entry.items():
        if _is_result(value):
            yield before + name
        elif isinstance(value, dict):
            yield from places(value, f"{before}{name} ")
        elif isinstance(value, list) and any(map(_is_result, value)):
            yield before.strip()


def keys(entry: Mapping[str, Any]) -> Iterator[str]:
    """Of all results."""
    return (result["key"] for result in _results(entry))


def compared(entry: Mapping[str, Any]) -> bool:
    """Whether any result was measured against a reference."""
    return any("against" in r or r.get("lost") is not None for r in _results(entry))


def _results(entry: Mapping[str, Any]) -> Iterator[Result]:
    for value in entry.values():
        for inner in value if isinstance(value, list) else [value]:
            if _is_result(inner):
                yield inner
            elif isinstance(inner, dict):
                yield from _results(inner)


def _is_result(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("key"), str)  # not a text called `key`
