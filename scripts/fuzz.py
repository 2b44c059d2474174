"""Looks for input that breaks a parser: `python scripts/fuzz.py TARGET --seconds 60`.

Seeds of the target (`tests/fuzz_targets.py`) are spoiled at random and read, one after the other,
until the time is over or something happens that should not: an exception outside qquant's error
tree, an error that names nothing, more than ten seconds of computing, or more memory than any input
of this size is worth. Then the input is saved, its random seed printed, and the exit code is 1.
`--seed` repeats a run, `--input` reads a saved input, `all` takes every target in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz_target import attempt  # noqa: E402  (the tests' folder is no package)
from fuzz_targets import TARGETS  # noqa: E402

SLOW = 10  # seconds
ROOM = 3 << 30  # bytes of address space beyond what the imports took


class Slow(BaseException):
    """An input took too long; no parser may catch it."""


def _slow(number: int, frame: FrameType | None) -> None:
    raise Slow(f"more than {SLOW} seconds")


def watch(seconds: float) -> None:
    """Seconds of computing, and six times as many of waiting, until `Slow`; 0 for no watch."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def fuzz(name: str, seconds: float, seed: int, given: Path | None) -> bool:
    """Whether the target held."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            seeds, run = target.prepare(work)
        for data in seeds if given is None else ():
            attempt(target, run, data)
        end, count, refused = time.monotonic() + seconds, 0, 0
        while time.monotonic() < end:
            chance = random.Random(seed + count)
            data = chance.choice(seeds)
            for _ in range(chance.choice((1, 1, 2))):
                with contextlib.suppress(ValueError, RecursionError):  # spoiled beyond spoiling
                    data = target.mutator(chance, data)
            data = given.read_bytes() if given else data
            watch(SLOW)
            try:
                refused += attempt(target, run, data) is not None
            except (Exception, Slow):
                watch(0)
                saved = Path.cwd() / f"fuzz-{name}-{seed + count}"
                saved.write_bytes(data)
                traceback.print_exc()
                print(f"{name}: --seed {seed + count} broke it; input saved as {saved.name}")
                return False
            watch(0)
            count += 1
            if given:
                break
    print(f"{name}: {count} inputs, {refused} refused, none got through")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=("all", *TARGETS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    names = list(TARGETS) if args.target == "all" else [args.target]
    held = [fuzz(name, args.seconds, args.seed, args.input) for name in names]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
