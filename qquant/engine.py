"""Which of several forms the engine computes in: those that may differ in the last bits of a sum.

A manifest says what ran; `reproduce` compares that with what runs here. Each part knows its own
forms and why it takes one (`products.py`, `columns.py`, `fused.py`, `int8_weight.py`,
`int16_attention.py`).

Left out on purpose: what every operation of torch does by the processor's instructions, which a
manifest names beside these.
"""

from __future__ import annotations

import torch

from . import columns, fused, int8_weight, int16_attention, products
from .config import QuantSpec
from .devices import INT16, native_bfloat16


def forms(device: str, compute_dtype: str, quant: QuantSpec) -> dict[str, str]:
    """Of a run on that device in that dtype, by part.

    `columns` is that of the search for scales, too, which is all that rounding to nearest has.
    """
    found = {"columns": str(columns.choose(torch.device(device)).form)}
    if device == "cpu" and quant.method == "gptq":
        dtype = "float32" if compute_dtype == INT16 else compute_dtype
        found["elementwise"] = "llvm" if fused.serves(dtype) else "torch"
        if dtype == "float32":
            found["products"] = products.chosen()
        found |= in_integers(device, dtype, quant)
    return found


def in_integers(device: str, dtype: str, quant: QuantSpec) -> dict[str, str]:
    """Of a run in that dtype what a processor may make of bfloat16 or of integers.

    Not all of a run has the sizes for that, see docs/KERNELS.md.
    """
    if device != "cpu" or dtype != "bfloat16":
        return {}
    place = torch.device(device)
    few = quant.bits <= int8_weight.BITS or quant.target_bpw is not None  # of some, at least
    codes = few and not int8_weight.unavailable()
    sums = products.integers(place, torch.bfloat16) is not None
    attends = native_bfloat16(place) and not int16_attention.unavailable(torch.bfloat16)
    return {
        "hessians": "int8" if sums else dtype,
        "quantized_weights": "int8" if codes else dtype,
        "attention": "int16" if attends else dtype,
    }
