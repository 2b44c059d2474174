"""What was written, read back before it gets its name: the last thing that every run does.

The directory is checked by itself (`verify.py`) and its tensors against what was meant. How far
weights moved is not judged here: with few tokens or few bits the Hessian may permit a lot.
`qquant verify --against` reports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .checkpoint import Checkpoint
from .directory import in_threads
from .errors import VerifyError
from .verify import examine


def check_written(
    path: Path, written: Mapping[str, str], hashes: Mapping[Path, str] | None = None
) -> None:
    """Checks the directory, then each tensor's bytes.

    Args:
        written: the SHA-256 (`checkpoint.tensor_sha256`) of tensors by name.
        hashes: of files, taken since they were last written to; the others are read.

    Raises:
        VerifyError: something is not what was meant.
    """
    report = examine(path, hashes=hashes)
    problems = [str(p) for p in report.problems]
    if report.ok:
        stored = Checkpoint.open(path)

        def same(name: str) -> bool:
            return stored.tensor_sha256(name) == written[name]

        found = zip(written, in_threads(same, written), strict=True)
        problems = [f"{name} is not what was written" for name, right in found if not right]
    refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    """Ends the run where there is a problem, naming the first three.

    Raises:
        VerifyError: there is one.
    """
    if problems:
        raise VerifyError(
            "the written directory",
            expected="what was meant",
            got="; ".join(problems[:3]),
            cure="This is a bug or a failing disk; the target was not touched",
        )
