"""What `verify` found, as data: problems, warnings, one row per linear; as JSON or plain text.

Standard library only. Deciding what is a problem is `verify.py` and `compare.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from .errors import CheckpointError, shown


@dataclass(frozen=True)
class Problem:
    """One finding: what is wrong, what it should be, what it is, what to do."""

    key: str
    expected: object = None
    got: object = None
    cure: str | None = None

    @classmethod
    def of(cls, error: CheckpointError) -> Problem:
        return cls(error.what, error.expected, error.got, error.cure)

    def __str__(self) -> str:
        parts = [f"expected {shown(self.expected)}"] if self.expected is not None else []
        parts += [f"got {shown(self.got)}"] if self.got is not None else []
        text = shown(self.key) + (": " + ", ".join(parts) if parts else "")
        return f"{text}. {self.cure}" if self.cure else text


@dataclass(frozen=True)
class LayerRow:
    """One quantized linear.

    Attributes:
        name: the module's.
        inputs, outputs, bits, group_size: as stored.
        zeros: the word that all zero points are stored as, or `varied`.
        relative_error: ||W - Wq|| / ||W||; None without a source, or where sampling left it out.
        rounding_error: the same for rounding to nearest on such a grid, on a sample of outputs.
    """

    name: str
    inputs: int
    outputs: int
    bits: int
    group_size: int
    zeros: str
    relative_error: float | None = None
    rounding_error: float | None = None


@dataclass
class VerifyReport:
    """What was found.

    Attributes:
        path: the directory.
        against: the source compared with, if any.
        problems: what makes the directory wrong or unreadable for some reader.
        warnings: what is odd, and may be meant.
        layers: the quantized linears that could be read.
    """

    path: str
    against: str | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON: values that are not plain become text."""

        def plain(found: Problem) -> dict[str, Any]:
            return {k: v if v is None else shown(v) for k, v in asdict(found).items()}

        def finite(row: LayerRow) -> dict[str, Any]:  # JSON has no infinity and no NaN
            values = asdict(row).items()
            return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values}

        return {
            "path": self.path,
            "against": self.against,
            "ok": self.ok,
            "problems": [plain(p) for p in self.problems],
            "warnings": [plain(w) for w in self.warnings],
            "layers": [finite(row) for row in self.layers],
        }

    def render(self, most: int = 20) -> str:
        """Plain text: the verdict, then at most `most` findings of each kind, then the errors."""
        lines = [f"{self.path}: {'ok' if self.ok else 'NOT OK'}, {len(self.layers)} linears"]
        for title, found in (("problem", self.problems), ("warning", self.warnings)):
            lines += [f"  {title}: {item}" for item in found[:most]]
            if len(found) > most:
                lines.append(f"  and {len(found) - most} more {title}s")
        measured = [r for r in self.layers if r.relative_error is not None]
        if measured:
            errors = [r.relative_error or 0.0 for r in measured]
            worst = measured[max(range(len(errors)), key=errors.__getitem__)]
            lines.append(
                f"  dequantized error against {self.against}: "
                f"mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f} "
                f"({shown(worst.name)}), {len(errors)} linears compared"
            )
        return "\n".join(lines)

    def problem(self, key: str, expected: object, got: object, cure: str | None = None) -> None:
        self.problems.append(Problem(key, expected, got, cure))

    def warn(self, key: str, expected: object, got: object, cure: str | None = None) -> None:
        self.warnings.append(Problem(key, expected, got, cure))


def some(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
