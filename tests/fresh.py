"""Fresh processes for tests, without the seconds that imports take: see `fresh_process.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """A process that has ended; `code` is minus the signal where one ended it."""

    code: int
    out: str
    err: str


class Interpreter:
    """Runs scripts in fresh processes that have their imports behind them (`fresh_process.py`)."""

    def __init__(self) -> None:
        # Freed blocks go back to the system at once, which makes peaks of memory repeat themselves.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fresh_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, script: str, *words: str, seconds: float | None = None) -> Ended:
        """As `python -c SCRIPT WORDS...`, with one thread; killed with -9 after `seconds`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"script": script, "words": words, "seconds": seconds}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        self._process.kill()  # an end of its own would take seconds
        self._process.communicate()
