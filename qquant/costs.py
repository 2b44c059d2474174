"""Seconds that a run's parts cost on this machine, however they were found out.

Two modules find them: `pace.py` in a moment, without torch, where the run computes on a CPU in
float32; `measured.py` with torch elsewhere. `estimate.py` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .models.shapes import Group


@dataclass(frozen=True)
class Costs:
    """Seconds.

    Attributes:
        measured_with: for people: what measured this machine.
        set_up: before the first block.
        forward: of one token through all blocks, stopping, rounding and keeping included.
        hessian: by group, of one token: of the Hessian, and of the streams' difference beside it.
        solve: of one matrix, by (outputs, inputs).
        writing: of a byte of the output, written and read back.
        quantized: as `forward`, through quantized weights; None where those take as long.
    """

    measured_with: str
    set_up: float
    forward: float
    hessian: Callable[[Group], tuple[float, float]]
    solve: Callable[[int, int], float]
    writing: float = 1e-9
    quantized: float | None = None
