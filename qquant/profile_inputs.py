"""What a profile begins with: its models, what an earlier run left, and a folder to itself."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, RunError, SpecError, TargetError
from .parts.base import Model
from .reporting.schema import read_profile


def wanted_models(models: Sequence[str], against: str | None) -> list[Model]:
    """The models, the reference first, each once however its path is spelled.

    Raises:
        SpecError: there is none, or none to compare; two have one name.
    """
    given = [Model.parse(text) for text in ([against] if against else []) + list(models)]
    places: dict[tuple[Path, str | None], Model] = {}
    for model in given:
        places.setdefault((Path(model.path).resolve(), model.method), model)
    wanted = list(places.values())
    if not wanted:
        raise SpecError("models", expected="at least one", got="none")
    if against and len(wanted) == 1:
        raise SpecError(
            "models",
            expected="one beside the reference to compare with it",
            got=f"{against} alone",
            cure="Leave --against out to measure it by itself",
        )
    named: dict[str, Model] = {}
    for model in wanted:
        if (other := named.setdefault(model.name, model)) != model:
            raise SpecError(
                "models",
                expected="directories of different names",
                got=f"{other.path} and {model.path}",
                cure="Rename one: in the report they could not be told apart",
            )
    return wanted


@contextmanager
def alone(states: Path) -> Iterator[None]:
    """Makes the folder, and holds it against other runs.

    Raises:
        TargetError: it cannot be made.
        RunError: another run has it.
    """
    try:
        states.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(
            str(states.parent),
            expected="a directory that can be written",
            got=error.strerror,
            cure="Give another one with -o",
        ) from error
    with (states / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                str(states.parent),
                expected="one profile at a time",
                got="another one that is running",
                cure="Wait for it, or give another directory with -o",
            ) from error
        yield


def earlier(path: Path) -> dict[str, Any]:
    """The profile that is gone on with; an empty one where there is none.

    Raises:
        InputError: what is there cannot be gone on with.
    """
    if not path.exists():
        return {"models": {}}
    try:
        return read_profile(path)
    except InputError as error:
        cure = "Give another directory with -o, or remove the file and measure again"
        raise InputError(error.what, expected=error.expected, got=error.got, cure=cure) from error
