"""What a fuzz target is, and how one input is tried (`fuzz_targets.py` lists them all)."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutate import MUTATORS, Mutator

from qquant.errors import QQuantError

Run = Callable[[bytes], object]
LONGEST = 5000  # characters of an error


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        kind: of mutation, a key of `mutate.MUTATORS`.
        words: one of them is in every error: the file, key or option.
        prepare: fills an empty folder and gives seeds and a function that puts bytes in the file's
            place and reads them.
    """

    kind: str
    words: tuple[str, ...]
    prepare: Callable[[Path], tuple[list[bytes], Run]]

    @property
    def mutator(self) -> Mutator:
        return MUTATORS[self.kind]


def attempt(target: Target, run: Run, data: bytes) -> QQuantError | None:
    """The error that the data are refused with, if they are; anything else is let through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages', about what they were given
            run(data)
    except QQuantError as error:
        text = str(error)
        assert any(word in text for word in target.words), f"names nothing: {text!r}"
        assert len(text) <= LONGEST and text.isprintable(), f"cannot be shown: {text[:200]!r}"
        return error
    return None


def value_of(data: bytes) -> dict[str, Any]:
    """The JSON object in the data, or an empty one: for what takes values and no text."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        return value if isinstance(value, dict) else {}
    return {}
