"""What a run tells whoever watches it: frozen values handed to a `progress` callable, one by one.

The library never draws or prints; it says what happened, and the watcher (the command line, a
notebook, a test) decides what to show. The order of a run: `Stage` and `Planned` before any weight
is read, then `LinearDone` for each linear in the order they are solved and `BlockDone` after the
last of its block, `Stage` again for what follows. A run that goes on with an earlier one's work
says `Resumed` after `Planned`; one that ends early and leaves work to go on with says `Kept` last.
`Warned` may come at any time. A watcher that raises stops the run as any other error does. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A part of the run begins: `read`, `calibrate`, `sensitivity` (only with a target of bits per
    weight), `quantize`, `write`, `verify`, `publish`; of a profile, `plan`: texts are read,
    benchmarks looked up, models checked."""

    name: str


@dataclass(frozen=True)
class Planned:
    """All checks that need no weights have passed; this is what the run will do.

    Attributes:
        blocks: transformer blocks.
        linears: linears to quantize, over all blocks.
        calibration_tokens: tokens the model reads; 0 where the method needs none.
        device: the device chosen, as torch spells it.
        notes: what happened to the calibration data on its way; nothing to worry about.
    """

    blocks: int
    linears: int
    calibration_tokens: int
    device: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearDone:
    """One linear is quantized.

    Attributes:
        block: index of its block, from 0.
        name: its tensor name without `.weight`, such as `transformer.h.0.attn.c_attn`.
        loss: tr(D H Dᵀ), the summed squared output error over the calibration data (see `gptq`);
            without such data, the summed squared error of the weight.
        rel_error: `loss` over the same sum for the unquantized weight, both of squares; no unit.
            (`report.relative_error` is its root, which people are shown.)
        damp: the damping used, as a share of the mean of the Hessian's diagonal.
        flags: what went other than planned, such as `more damping` or `rounded`; mostly empty.
        seconds: wall time of its solve; of linears solved as one matrix, its share by rows.
    """

    block: int
    name: str
    loss: float
    rel_error: float
    damp: float
    flags: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class BlockDone:
    """Block number `block` (from 0) of `blocks` is quantized and written, after `seconds`."""

    block: int
    blocks: int
    seconds: float


@dataclass(frozen=True)
class Resumed:
    """An earlier run of the same command had ended early; this one goes on after its last commit.

    Attributes:
        block: the first block to do, from 0.
        blocks: of the model.
        linears: that are done.
    """

    block: int
    blocks: int
    linears: int


@dataclass(frozen=True)
class Kept:
    """The run ends early, and the same command will go on with block `block` (from 0) of `blocks`.

    Attributes:
        path: the folder that holds what is done.
    """

    path: str
    block: int
    blocks: int


@dataclass(frozen=True)
class Warned:
    """Something the user should know that does not stop the run.

    Too little calibration data, a linear that did not go as configured (its `LinearDone` comes just
    before), activations that went to disk.
    """

    text: str


@dataclass(frozen=True)
class ProfilePlanned:
    """A profile begins: `Measuring`, then `Measured` or `MeasureFailed`, follow for each part left.

    Attributes:
        models: names, in the order they are measured.
        parts: labels of the measurements of each model.
        left: (model, part) of every measurement to be made, in order.
        known: (model, part, headline, seconds it took) of what an earlier run has measured.
    """

    models: tuple[str, ...]
    parts: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    known: tuple[tuple[str, str, str, float], ...] = ()


@dataclass(frozen=True)
class Measuring:
    """A measurement begins; with `total`, it has come to `done` of `total` of what it counts."""

    model: str
    part: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Measured:
    """A measurement is done and saved.

    Attributes:
        headline: the result in a few words.
        seconds: wall time, the loading of the model included where it was the first to need it.
    """

    model: str
    part: str
    headline: str
    seconds: float


@dataclass(frozen=True)
class MeasureFailed:
    """A measurement failed; the others go on."""

    model: str
    part: str
    error: str


ProfileEvent = ProfilePlanned | Measuring | Measured | MeasureFailed
Event = Stage | Planned | Resumed | LinearDone | BlockDone | Kept | Warned | ProfileEvent
Progress = Callable[[Event], None]

_NAMES: dict[type, str] = {
    Stage: "stage",
    Planned: "planned",
    Resumed: "resumed",
    LinearDone: "linear_done",
    BlockDone: "block_done",
    Kept: "kept",
    Warned: "warned",
    ProfilePlanned: "profile_planned",
    Measuring: "measuring",
    Measured: "measured",
    MeasureFailed: "measure_failed",
}


def event_dict(event: Event) -> dict[str, Any]:
    """The event as a JSON object: `{"event": "linear_done", ...}` with its fields as they are."""
    return {"event": _NAMES[type(event)], **asdict(event)}
