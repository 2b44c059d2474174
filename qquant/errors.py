"""The error tree: a caller can catch by kind, and the CLI can turn any into one line.

Every message is built from the same parts: what is wrong (naming the key, file or tensor), what was
expected, what came instead, and the cure. `InputError` and below mean that the user can mend it
before any work is lost (exit code 2); `RunError` and below mean that the run itself could not go on
or its result is not right (exit code 1). Standard library only.

What came may be anything that stands in a file from elsewhere, so every part goes through `shown`:
an error is one printable line of bounded length, whatever it is about.
"""

from __future__ import annotations

_MOST = 600  # characters of one part


def shown(value: object, most: int = _MOST) -> str:
    """`value` in one printable line: white space joined, what cannot be shown escaped, cut to size.

    Terminals obey control characters, and no stream can encode half a surrogate pair.
    """
    try:
        text = str(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, deep nesting
        return f"a {type(value).__name__} too large to show"
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable()
        else c.encode("ascii", "backslashreplace").decode()
        if ord(c) > 127
        else f"\\x{ord(c):02x}"
        for c in " ".join(text.split())
    )


def said_of(error: Exception) -> str:
    """The error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


class QQuantError(Exception):
    """Base of everything qquant raises on purpose.

    Args:
        what: what is wrong, naming the key, file or tensor.
        expected: what a right value would be.
        got: what came instead.
        cure: what the user can do about it, with its cost where it has one.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        cure: str | None = None,
    ) -> None:
        self.what, self.expected, self.got, self.cure = what, expected, got, cure
        parts = []
        if expected is not None:
            parts.append(f"expected {shown(expected)}")
        if got is not None:
            parts.append(f"got {shown(got)}")
        text = shown(what) + (": " + ", ".join(parts) if parts else "")
        if cure:
            text += f". {shown(cure)}"
        super().__init__(text)


class InputError(QQuantError):
    """Something the user gave cannot be used; nothing was written."""

    exit_code = 2


class SpecError(InputError):
    """A setting is out of range or contradicts another."""


class CheckpointError(InputError):
    """The source, or a directory to look at, is missing, broken or not supported."""


class CalibrationError(InputError):
    """Calibration data is missing, foreign, empty or too little."""


class TargetError(InputError):
    """The target cannot be written: it exists, is not writable, or does not fit the disk."""


class AlreadyDone(TargetError):
    """The target is there, made by the very same command: there is nothing left to do."""

    exit_code = 0


class MissingDependencyError(InputError):
    """An optional package is not installed; the message says what to install."""


class RunError(QQuantError):
    """The run could not go on."""


class RankLostError(RunError):
    """Another process of a distributed run has ended, or does not answer."""


class NumericsError(RunError):
    """A weight, activation or Hessian is not finite; the message names the layer."""


class VerifyError(RunError):
    """A written directory is not what it should be."""
