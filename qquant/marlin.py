"""Kernel `marlin`: gptqmodel's build of the Marlin int4 and int8 product, where that is installed.

Marlin (Frantar et al., arXiv 2408.11743; this build comes from vLLM's) reads a packing of its own,
so a linear holds its codes twice. It takes any number of rows; scales, and inputs that are not of
16 bits, are rounded to the 16-bit dtype. What is used of gptqmodel is one class, `MarlinLinear`,
filled as gptqmodel's own loader fills it (7.6.0): the file's tensors, then `post_init`, which
repacks them on the GPU. Its kernels are compiled when they are first used, for minutes, unless
gptqmodel finds them built.

Importing gptqmodel replaces functions of safetensors, triton and transformers in the process, so it
is imported only where this kernel is tried. What it does to the environment is undone, and what it
prints goes to stderr.

Only the filling is tested without a GPU, against a class of the same signature; not yet run on one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .kernels import QuantLinear

BITS = (4, 8)
GROUPS = (32, 64, 128)  # or one group of all inputs
_MODULE = "gptqmodel.nn_modules.qlinear.marlin"


def misfit(linear: QuantLinear) -> str | None:
    """Why Marlin cannot run this linear where it is, or None."""
    if linear.bits not in BITS:
        return f"{linear.bits} bits, Marlin takes 4 and 8"
    if not linear.group:
        return "g_idx is not trivial (activation order, or a short last group)"
    if linear.group not in GROUPS and linear.group != linear.in_features:
        return f"group size {linear.group}, Marlin takes {', '.join(map(str, GROUPS))} and all"
    if not linear.symmetric:
        return "zero points that are not the middle, Marlin takes a symmetric grid"
    if linear.device.type != "cuda":
        return f"device {linear.device.type}, the kernel is for cuda"
    if importlib.util.find_spec("gptqmodel") is None:
        return "gptqmodel is not installed"
    if torch.version.hip is not None:
        return "a ROCm build, the kernel is CUDA's"
    if torch.cuda.get_device_capability(linear.device) < (8, 0):
        return "a GPU before compute capability 8.0, which has no bfloat16"
    return None


def product(linear: QuantLinear, dtype: torch.dtype) -> nn.Module:
    """A module that multiplies by the linear's weights, without its bias.

    Args:
        linear: that `misfit` finds nothing against, holding the file's `qweight`.
        dtype: float16 or bfloat16, of the inputs and outputs; scales are rounded to it.

    Raises:
        Exception: whatever gptqmodel, a compiler or a driver raises.
    """
    with torch.device(linear.device):
        made: nn.Module = _imported().MarlinLinear(
            bits=linear.bits,
            group_size=-1 if linear.group == linear.in_features else linear.group,
            desc_act=False,
            sym=True,
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=False,
            dtype=dtype,
        )
    assert linear.qweight is not None
    parts = {
        "qweight": linear.qweight,
        "qzeros": linear.qzeros,
        "scales": linear.scales.to(dtype),
        "g_idx": linear.g_idx,
    }
    own = dict(made.named_parameters())
    for name, part in parts.items():
        own[name].data = part.clone()  # `post_init` changes them in place
    made.post_init()  # type: ignore[operator]
    return made.eval()


def _imported() -> Any:
    """gptqmodel's module."""
    before = dict(os.environ)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(_MODULE)
    finally:
        os.environ.clear()
        os.environ.update(before)


def held(made: nn.Module) -> list[Tensor]:
    """The tensors that it holds."""
    return [*made.parameters(), *made.buffers()]
