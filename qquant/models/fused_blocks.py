"""Lets norms and gated layers of a model's blocks compute in one pass (`fused.py`).

For the walk, whose blocks are transformers' own (or ours for original Qwen) and else stay as they
are: their arithmetic is known by their classes. Where the code is not made for what it is given
(gradients, another dtype, odd strides), plain torch computes, as the classes do.

Left out on purpose: experts, whose tokens are gathered first (`experts.py`); RoPE.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import fused

_NORMS = ("QWenRMSNorm", *(f"Qwen{name}RMSNorm" for name in ("2", "3", "2Moe", "3Moe")))
_GATED = tuple(f"Qwen{name}MLP" for name in ("2", "3", "2Moe", "3Moe"))
_OWN = "QWenMLP"  # names its linears otherwise
_SILU = ("SiLU", "SiLUActivation")


def use(model: nn.Module, device: torch.device) -> None:
    """Changes the model's modules, where its blocks compute on a CPU that runs `fused.py`."""
    if device.type != "cpu" or fused.unavailable():
        return
    for module in model.modules():
        kind = type(module).__name__
        if kind in _NORMS:
            module.__dict__["forward"] = partial(_norm, module)
        elif kind == _OWN:
            module.__dict__["forward"] = partial(_own_gated, module)
        elif kind in _GATED and type(module.act_fn).__name__ in _SILU:
            module.__dict__["forward"] = partial(_gated, module)


def _norm(module: Any, x: Tensor) -> Tensor:
    if not fused.takes(x, module.weight):
        out: Tensor = type(module).forward(module, x)
        return out
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return fused.norm(x, module.weight, eps)


# Linears in the order of the classes; nothing is given a name, which a stopped batch would keep.


def _gated(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(_through(gate=module.gate_proj(x), up=module.up_proj(x)))
    return out


def _own_gated(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.c_proj(_through(up=module.w1(x), gate=module.w2(x)))
    return out


def _through(*, gate: Tensor, up: Tensor) -> Tensor:
    if fused.takes(gate, up):
        return fused.gated(gate, up)
    return nn.functional.silu(gate) * up
