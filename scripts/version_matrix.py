"""Runs the tests in one environment per combination of versions: `make test-matrix`.

The rows stand at the corners of the range that pyproject.toml promises, not at every point of it:
the oldest and the newest Python, torch and transformers that go together. Each has an environment
of its own in the user's cache directory (up to 8 GB where the index gives a CUDA build of torch),
with the pins of constraints.txt except those that the row changes. It is made once; the install is
repeated only when pyproject.toml or the pins changed. torch goes first and by itself, as in
`make setup`.

Interpreters are looked for on PATH (`python3.10`, ...) or named with `--python 3.10=PATH`. A row
whose interpreter is missing is named and makes the run fail: it was not tested. Everything after
`--` goes to pytest. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = "dev,readers,bnb,compressed,eval,plots,kv,serve"  # as in the Makefile
# transformers before 5.20 wants an older huggingface_hub than the pinned one; each
# CUDA build of torch wants one version of triton.
FREED = ("torch", "transformers", "huggingface_hub", "triton")


@dataclass(frozen=True)
class Row:
    python: str
    torch: str
    transformers: str

    def __str__(self) -> str:
        return f"Python {self.python}, torch {self.torch}, transformers {self.transformers}"

    @property
    def name(self) -> str:
        return f"py{self.python}-torch{self.torch}-transformers{self.transformers}"


ROWS = (
    Row("3.10", "2.12.0", "5.18.0"),
    Row("3.10", "2.13.0", "5.20.2"),  # 5.21 and later need Python 3.11
    Row("3.11", "2.13.0", "5.17.0"),
    Row("3.11", "2.13.0", "5.23.0"),  # what constraints.txt pins
    Row("3.12", "2.11.0", "5.17.0"),
    Row("3.13", "2.13.0", "5.23.0"),
)


def cache_dir() -> Path:
    """Where environments are kept: `qquant-matrix` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qquant-matrix"


def interpreter(version: str, given: dict[str, str]) -> str | None:
    """A Python that says it is `version`; a shim for one that is not installed fails to say so."""
    found = given.get(version) or shutil.which(f"python{version}")
    if found is None:
        return None
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    said = subprocess.run([found, "-c", script], capture_output=True, text=True, check=False)
    return found if said.stdout.strip() == version else None


def constraints(row: Row) -> str:
    """The pins of constraints.txt, with the row's own in place of those that it changes."""
    pinned = re.compile(rf"(?:{'|'.join(FREED)})==", re.IGNORECASE)
    kept = [line for line in CONSTRAINTS.read_text().splitlines() if not pinned.match(line)]
    return "\n".join([*kept, f"torch=={row.torch}", f"transformers=={row.transformers}", ""])


def ensure(row: Row, python: str, cache: Path) -> Path:
    """The python of the row's environment, made or brought up to date first (minutes).

    Raises:
        subprocess.CalledProcessError: pip failed; what it said is on the terminal.
    """
    home = cache / row.name
    inside, pins, stamp = home / "bin" / "python", home / "constraints.txt", home / "installed"
    made_from = constraints(row) + (ROOT / "pyproject.toml").read_text()
    wanted = hashlib.sha256(made_from.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([python, "-m", "venv", str(home)], check=True)
        pins.write_text(constraints(row))
        pip = [str(inside), "-m", "pip", "install", "--quiet", "-c", str(pins)]
        subprocess.run([*pip, f"torch=={row.torch}"], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[{EXTRAS}]"], check=True)
        stamp.write_text(wanted)
    return inside


def run(row: Row, python: str, cache: Path, pytest: list[str]) -> tuple[bool, str]:
    """Whether the row's tests passed, and pytest's closing line."""
    try:
        inside = ensure(row, python, cache)
    except subprocess.CalledProcessError as error:
        return False, f"no environment: {error}"
    command = [str(inside), "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        last = ""
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            last = line.strip(" =\n") or last
    return tests.returncode == 0, last


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--only", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument("--make", action="store_true", help="make the environments, run no tests")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="default: %(default)s")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="3.10=PATH",
        help="the interpreter for a version; repeatable",
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    given = dict(item.split("=", 1) for item in options.python)

    rows = [row for row in ROWS if (options.only or "") in row.name]
    if options.list or not rows:
        print("\n".join(row.name for row in ROWS))
        sys.exit(not options.list)
    results: list[tuple[Row, bool, str]] = []
    for row in rows:
        print(f"\n== {row}", flush=True)
        python = interpreter(row.python, given)
        if python is None:
            results.append((row, False, f"not run: no python{row.python} on PATH"))
        elif options.make:
            results.append((row, True, str(ensure(row, python, options.cache))))
        else:
            results.append((row, *run(row, python, options.cache, options.pytest)))
    print()
    for row, passed, said in results:
        print(f"{'ok    ' if passed else 'FAILED'}  {row}: {said}")
    sys.exit(not all(passed for _, passed, _ in results))


if __name__ == "__main__":
    main()
