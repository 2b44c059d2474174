"""The front matter of a model card: what model hubs read of it, and of the source's.

The licence is the source's: from its README's front matter if it has one, else recognised from its
LICENSE file, else `other`. A licence is never made up. Of the front matter of others only plain
lines are understood, which is all that is wanted of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .directory import contained
from .errors import CheckpointError

_LICENCES = (
    (r"Tongyi\s+Qianwen\s+RESEARCH\s+LICENSE", "other", "tongyi-qianwen-research"),
    (r"Tongyi\s+Qianwen\s+LICENSE", "other", "tongyi-qianwen"),
    (r"Qwen\s+RESEARCH\s+LICENSE", "other", "qwen-research"),
    (r"Qwen\s+LICENSE\s+AGREEMENT", "other", "qwen"),
    (r"Apache\s+License,?\s+Version\s+2\.0", "apache-2.0", None),
    (r"\AMIT\s+License", "mit", None),
)


@dataclass(frozen=True)
class Licence:
    """As in a card's front matter: `id` (`other` if the hub has none), its name and link."""

    id: str = "other"
    name: str | None = None
    link: str | None = None


def base_model(path: Path) -> str:
    """The hub id where the path tells it (a hub cache's folder), else the directory's name."""
    for part in path.parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    return path.name


def front_matter(text: str) -> dict[str, str]:
    """Plain `key: value` lines of a README's front matter; anything nested is passed over."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|\Z)", text, re.DOTALL)
    found = {}
    for line in match[1].splitlines() if match else ():
        if len(line) > 1000:
            continue
        if pair := re.fullmatch(r"([A-Za-z_]+):\s*(\S.*?)\s*", line):
            found[pair[1]] = pair[2].strip("'\"")
    return found


def find_licence(path: Path) -> Licence:
    """The source's licence; see the module's opening."""
    given = front_matter(_beginning(path, "README.md"))
    if "license" in given:
        return Licence(given["license"], given.get("license_name"), given.get("license_link"))
    for file in sorted(path.glob("LICENSE*")):
        head = _beginning(path, file.name)[:4000].lstrip()
        for pattern, key, name in _LICENCES:
            if re.search(pattern, head, re.IGNORECASE):
                return Licence(key, name, file.name if key == "other" else None)
        return Licence(link=file.name)
    return Licence()


def _beginning(root: Path, name: str) -> str:
    """The first megabyte of a file of the directory, as text; nothing where it cannot be read."""
    try:
        with contained(root.resolve(), name).open("rb") as handle:
            return handle.read(1 << 20).decode("utf-8", "replace")
    except (CheckpointError, OSError):
        return ""


def _yaml(value: str) -> str:
    """A YAML scalar: plain where that is safe, else quoted (JSON strings are YAML)."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value)
    special = value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return value if plain and not special else json.dumps(value, ensure_ascii=False)


def front_lines(tags: Sequence[str], base: str, licence: Licence) -> list[str]:
    """The front matter, as hubs read it."""
    lines = ["---", f"base_model: {_yaml(base)}", "base_model_relation: quantized"]
    lines.append(f"license: {_yaml(licence.id)}")
    if licence.name:
        lines.append(f"license_name: {_yaml(licence.name)}")
    if licence.link:
        lines.append(f"license_link: {_yaml(licence.link)}")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {_yaml(tag)}" for tag in tags]
    return [*lines, "---", ""]


def licence_line(licence: Licence) -> str:
    """The sentence about the source's licence."""
    known = licence != Licence()
    text = (licence.name or licence.id) if known else "not stated in its directory"
    if licence.link and "://" not in licence.link:
        text += f" (see `{licence.link}`)"
    return f"Licence of the base model: {text}."
