"""One door for every method: which run a spec asks for.

GPTQ's run and bitsandbytes' share the discipline of the directory and nothing of the arithmetic, so
they are two stories (`convert.py`, `bnb_convert.py`), and this is the choice between them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .bnb_spec import BnbSpec
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .errors import SpecError
from .events import Progress
from .world import ALONE

if TYPE_CHECKING:
    from .result import Result


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    quant: QuantSpec | BnbSpec | None = None,
    calib: CalibrationSpec | None = None,
    out: OutputSpec | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **more: Any,
) -> Result:
    """Quantizes the checkpoint directory `src` into the new directory `dst`.

    Args:
        quant: `QuantSpec` for GPTQ and round-to-nearest, `BnbSpec` for NF4, FP4 and Int8.
        calib: calibration data, which bitsandbytes does not read.
        more: as in `convert.quantize` or `bnb_convert.quantize_bnb`.

    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run failed; the target is as it was before.
    """
    if isinstance(quant, BnbSpec):
        from .bnb_convert import quantize_bnb

        if (world := more.pop("world", ALONE)).seat.size > 1:
            raise SpecError(
                f"method {quant.method}",
                expected="one process: it has neither sums nor solves to share out",
                got=f"{world.seat.size}, started by torchrun",
                cure="Give the same command without torchrun",
            )
        if calib is not None or more.get("tokens") is not None:
            raise SpecError(
                "calibration",
                expected=f"none with {quant.method}, which reads no data",
                got="some",
                cure="Leave it out, or use GPTQ",
            )
        return quantize_bnb(
            src, dst, quant, out, overwrite=overwrite, restart=restart, progress=progress, **more
        )
    from .convert import quantize as quantize_gptq

    return quantize_gptq(
        src,
        dst,
        quant,
        calib,
        out,
        overwrite=overwrite,
        restart=restart,
        progress=progress,
        **more,
    )
