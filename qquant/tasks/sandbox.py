"""Code that a model wrote, run where it can do little harm: the parent's half.

Every program gets a process of its own, which `sandbox_child.py` locks in before the first line of
the program runs:

- no network: a network namespace of its own, and `socket` is refused;
- no files: every file system is read-only, but for an empty one in memory, which is the working
  directory, of `disk_bytes` at the most, and files in it of `file_bytes` at the most;
- no processes: `fork` and its like are refused, so a fork bomb ends at its first fork (threads are
  bounded by `memory_bytes`, which their stacks count towards); other processes are out of sight;
- `seconds` of wall time, after which it is killed; `memory_bytes` of address space;
- no environment, no input; output goes nowhere.

This takes what Linux gives an ordinary user: user, mount, PID, IPC and network namespaces, seccomp,
a kernel from 5.12 on, on x86-64 or aarch64. Where one of them is missing (other systems, containers
that forbid namespaces) nothing is run: `check` says what is missing. There is no weaker fallback.

Not guaranteed: files that the user can read can be read by the program, and devices and FIFOs that
the user may write to can be written to; memory that it holds in anonymous files (memfd) or System V
segments is not bounded in sum, and gone with it; a hole in the kernel is a hole here; and a
program that sets out to look as if it had passed can. It is a fence against code that is wrong, not
a prison for code that is hostile.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError, SpecError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_GRACE = 20.0  # seconds for starting up, beyond the program's own time
_PROBE = "import math, re\nassert math.isqrt(16) == len(re.findall('a', 'aaaa'))"


@dataclass(frozen=True)
class Limits:
    """What a program may use: wall time, address space, one file, all files."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for key, least in (("seconds", 0.1), ("memory_bytes", 64 << 20), ("disk_bytes", 1 << 12)):
            if getattr(self, key) < least:
                raise SpecError(key, expected=f"at least {least}", got=getattr(self, key))


@dataclass(frozen=True)
class Verdict:
    """How a program ended: `passed`, or why not (`AssertionError: ...`, `timed out`, `killed`)."""

    passed: bool
    why: str = ""


def run_code(program: str, limits: Limits | None = None) -> Verdict:
    """Runs `program` in a sandbox to its end; an exception, also `SystemExit`, is a failure.

    Raises:
        InputError: there is no sandbox to be had here; nothing was run.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="qquant-sandbox-") as folder:
        order = {"program": program, "folder": folder, "token": token, **asdict(limits)}
        # -I: neither the environment nor the user's own modules have a say, nor this folder.
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(order).encode(), limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Verdict(False, "timed out")
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    try:
        found = json.loads(out)
        kind, text = found["kind"], str(found["text"])
    except (ValueError, KeyError, TypeError):
        return Verdict(False, "the sandbox itself was ended")
    if kind == "unavailable":
        raise InputError(
            "sandbox for code that a model wrote",
            expected="Linux namespaces and seccomp for ordinary users",
            got=text,
            cure="Run it on a machine or in a container that allows them, or leave the task out",
        )
    if kind == "passed":
        return Verdict(secrets.compare_digest(text, token), "")
    return Verdict(False, text)


def check() -> None:
    """Runs a harmless program, so that what is missing is told before anything is loaded.

    Raises:
        InputError: there is no sandbox to be had here.
    """
    if not (verdict := run_code(_PROBE, Limits(seconds=60))).passed:
        raise InputError(
            "sandbox for code that a model wrote",
            expected="a harmless program to pass",
            got=verdict.why,
            cure="Leave the task out",
        )
