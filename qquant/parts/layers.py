"""How far each linear's weights moved from the reference's: the directories alone, nothing runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint import Checkpoint
from .base import Model, Options, Part, Subject


@dataclass(frozen=True)
class LayersPart(Part):
    """`layers` of every model but the reference."""

    @property
    def place(self) -> tuple[str, ...]:
        return ("layers",)

    @property
    def compared(self) -> bool:
        return True

    def applies(self, model: Model, reference: Model | None) -> bool:
        return reference is not None and model != reference

    def measure(self, subject: Subject) -> dict[str, Any]:
        from ..dense import DenseReader, relative_errors

        assert subject.reference is not None  # see `applies`
        theirs, ours = (
            DenseReader(Checkpoint.open(model.path), model.method)
            for model in (subject.reference, subject.model)
        )
        found: dict[str, Any] = {}
        for name, error in relative_errors(theirs, ours):
            found[name] = {"relative_error": error}
            subject.advance(len(found), len(theirs.names))
        return {"linears": found}

    def headline(self, found: Mapping[str, Any]) -> str:
        errors = {name: row["relative_error"] for name, row in found["linears"].items()}
        worst = max(errors, key=errors.__getitem__, default=None)
        return f"worst {errors[worst]:.2%} {worst}" if worst is not None else "no linears"


@dataclass(frozen=True)
class LayersOptions(Options):
    """Nothing to choose."""

    def parts(self) -> tuple[Part, ...]:
        return (LayersPart(),)
