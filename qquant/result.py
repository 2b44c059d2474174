"""What a finished run says of itself, whichever method it was.

Apart from the runs (`convert.py`, `bnb_convert.py`), so that whoever shows one imports neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .events import LinearDone

if TYPE_CHECKING:
    from .estimate import Estimate
    from .mixed import Mixed


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: the published directory.
        seconds: wall time of the whole run.
        layers: one entry per quantized linear, in the order they were solved.
        size_bytes: of all files in the directory.
        timings: seconds by part, as in `timings.ORDER`.
        peak_bytes: peak resident memory of the process, in bytes.
        spilled_bytes: most activations that were in spill files at one time.
        recomputed: as in `blocks.Blocks`, of the blocks that this run did.
        device, compute_dtype, threads: what ran.
        flops: operations of the parts that count theirs (forward, hessian); none on an accelerator.
        resumed: blocks that an earlier run, which ended early, had done; `seconds` and `timings`
            are of this one.
        foreseen: what the run was estimated to take; None where that was not asked for and would
            take torch some seconds to measure.
        matmul_gflops: what the machine reaches in one large product; None where not asked for.
        mixed: the choice of bits per linear; None where all have the same.
        columns: the form of the solver's column loop that ran (see `columns`); "" without one.
        device_peak_bytes: most that torch held on the accelerator; None on a CPU.
    """

    path: Path
    seconds: float
    layers: tuple[LinearDone, ...]
    size_bytes: int
    timings: dict[str, float]
    peak_bytes: int
    spilled_bytes: int
    device: str
    compute_dtype: str
    threads: int
    flops: dict[str, int] = field(default_factory=dict)
    matmul_gflops: float | None = None
    mixed: Mixed | None = None
    resumed: int = 0
    foreseen: Estimate | None = None
    columns: str = ""
    device_peak_bytes: int | None = None
    recomputed: float = 0.0
