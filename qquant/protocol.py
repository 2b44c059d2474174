"""Everything a profile measures, chosen in one frozen value: a field for each kind of measurement.

The order of the fields is that of the measurements of one kind of process. Kinds are added here
(see `parts.base`); each one's options are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from .errors import SpecError
from .parts.accuracy import AccuracyOptions
from .parts.base import Options, Part
from .parts.layers import LayersOptions
from .parts.load import LoadOptions
from .parts.long_context import LongContextOptions
from .parts.memory import MemoryOptions
from .parts.speed import SpeedOptions
from .parts.tasks import TaskOptions


@dataclass(frozen=True)
class Protocol:
    """What is measured, by kind."""

    speed: SpeedOptions = field(default_factory=SpeedOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    layers: LayersOptions = field(default_factory=LayersOptions)
    accuracy: AccuracyOptions = field(default_factory=AccuracyOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)
    long_context: LongContextOptions = field(default_factory=LongContextOptions)

    @classmethod
    def of(cls, **settings: Any) -> Protocol:
        """From flat settings, each given to every kind that has a field of its name.

        Raises:
            SpecError: no kind has such a setting, or its value cannot be used.
        """
        kinds, unknown = {}, set(settings)
        for kind in fields(cls):
            options: Any = kind.default_factory  # the kind's class
            own = [f.name for f in fields(options) if f.name in settings]
            kinds[kind.name] = options(**{key: settings[key] for key in own})
            unknown.difference_update(own)
        if unknown:
            raise SpecError("protocol", expected="known settings", got=", ".join(sorted(unknown)))
        return cls(**kinds)

    def kinds(self) -> Mapping[str, Options]:
        return {kind.name: cast(Options, getattr(self, kind.name)) for kind in fields(self)}

    def parts(self) -> tuple[Part, ...]:
        """Every measurement of a model, in order.

        Raises:
            InputError: an option names something that cannot be used.
        """
        return tuple(part for kind in self.kinds().values() for part in kind.parts())

    def public(self) -> dict[str, Any]:
        """As `profile.json` has it."""
        return {name: shown for name, kind in self.kinds().items() if (shown := kind.public())}
