"""What every worker shares: the job it is given, the clock of its parts, the result it leaves.

A worker is one process that quantizes one checkpoint with one tool and ends. It is given the path
of a JSON job and writes a JSON result; the process around it measures wall time and memory.
Standard library only, so that nothing is loaded before a worker's own clock of its imports
starts.

Job: `checkpoint` (directory), `tokens` (safetensors file, `tokens` int64 [n, seq]), `out`
(directory to write), `result` (file to write), `bits`, `group_size`, `threads`, `dtype` (of the
tool's compute), `options` (the tool's own settings; {} for its defaults).

Result: `seconds` of `import`, `load`, `quantize`, `save` (a tool that does several at once
reports them under the widest name, see each worker), `peak_kib` when the tool was done,
`versions`, `settings`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


class Job:
    """The job of this process and the result it collects."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.checkpoint = Path(values["checkpoint"])
        self.tokens = Path(values["tokens"])
        self.out = Path(values["out"])
        self.bits = int(values["bits"])
        self.group_size = int(values["group_size"])
        self.threads = int(values["threads"])
        self.dtype = str(values["dtype"])
        self.options: dict[str, Any] = dict(values.get("options", {}))
        self._result = Path(values["result"])
        self._seconds: dict[str, float] = {}

    @classmethod
    def from_argv(cls) -> Job:
        """The job named by the only argument."""
        if len(sys.argv) != 2:
            raise SystemExit(f"usage: {sys.argv[0]} JOB.json")
        return cls(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Adds the wall time of the block to `part`."""
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def read_tokens(self) -> Any:
        """The calibration ids, torch int64 [n, seq]."""
        from safetensors.torch import load_file

        return load_file(str(self.tokens))["tokens"]

    def finish(self, packages: tuple[str, ...], settings: dict[str, Any]) -> None:
        """Write the result. `packages` are those whose versions matter beside Python's."""
        result = {
            "seconds": self._seconds,
            "peak_kib": peak_kib(),
            "versions": {"python": sys.version.split()[0], **versions(packages)},
            "settings": settings,
        }
        self._result.write_text(json.dumps(result, indent=1, default=str) + "\n")


def peak_kib() -> int:
    """This process's largest resident set so far, in KiB (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status: this needs Linux")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by distribution name; `-` where one is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found
