"""What a result says about where it comes from, and how two results become one.

A result can be measured in parts (a candidate or a bit width at a time); the parts may be put
together only if they are about the same weights, tokens, settings and machine, and hashes in the
result decide that. Nothing here names a directory of the machine. Standard library only.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

from presets import ROOT
from report_table import IDLE_CORES, others_cores


def sha256(*files: Path) -> str:
    """Of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def revision() -> dict[str, str]:
    """The commit of qquant here, with a plus where its files differ; empty without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "qquant"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"qquant": head.stdout.strip() + ("+" if changed.returncode else "")}


def last_line(text: str) -> str:
    """The last line that says something, without the directories of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"(?:/[^\s/'\":,]+)+/([^\s/'\":,]+)", r"\1", lines[-1])[:300]


SAME = ("checkpoint", "config", "weights_sha256", "calibration", "heldout_sha256", "machine")


def merged(old: dict[str, Any], new: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """A new result with the rows of an old one that it did not measure again.

    Args:
        order: of the candidates; others come after them.

    Threads may differ where the rows together show no times, the machine having been busy.

    Raises:
        ValueError: they are of different checkpoints, tokens, settings or machines.
    """
    timed = others_cores([*old["rows"], *new["rows"]]) <= IDLE_CORES
    threads = sorted({*str(old.get("threads")).split(" or "), str(new["threads"])})
    for key in (*SAME, "threads", "group_size"):
        if old.get(key) != new[key] and (timed or key != "threads"):
            raise ValueError(f"--keep: the result kept differs in {key}; give another --name")
    measured = {(row["candidate"], row["bits"]) for row in new["rows"]}
    kept = [row for row in old["rows"] if (row["candidate"], row["bits"]) not in measured]
    rows = sorted(
        [*new["rows"], *kept],
        key=lambda row: (
            -row["bits"],
            order.index(row["candidate"]) if row["candidate"] in order else len(order),
        ),
    )
    commands = list(dict.fromkeys([*old["commands"], *new["commands"]]))
    together = " or ".join(threads) if len(threads) > 1 else new["threads"]
    return {**new, "commands": commands, "threads": together, "rows": rows}


LOCAL = ("--work", "--results", "--environments", "--second", "--python-")
"""Options that say where something lies on this machine, and nothing about what is measured."""


def command(script: str, arguments: list[str]) -> str:
    """The command to give elsewhere: without `LOCAL` options and this machine's directories."""
    kept: list[str] = []
    local = False
    for argument in arguments:
        if argument.startswith("--"):
            local = argument.startswith(LOCAL)
            if not local:
                kept.append(public(argument))
        elif not local:
            kept.append(public(argument))
    return " ".join([f"python benchmarks/{script}", *kept])


def public(argument: str) -> str:
    """A command-line argument without the directories of this machine."""
    key, equals, value = argument.rpartition("=")
    return key + equals + (Path(value).name if value.startswith(("/", "~", ".")) else value)
