"""Lets norms, gated layers and RoPE of a model's blocks compute in one pass (`fused.py`).

For the walk, whose blocks are transformers' own (or ours for original Qwen) and else stay as they
are: their arithmetic is known by their classes. Where the code is not made for what it is given
(gradients, another dtype, odd strides), plain torch computes, as the classes do.

RoPE is a function that an attention calls by its name, so its `forward` is run with another one
under that name; where a version of transformers has none, nothing is changed.

Left out on purpose: experts, whose tokens are gathered first (`experts.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .. import fused

_NORMS = ("QWenRMSNorm", *(f"Qwen{name}RMSNorm" for name in ("2", "3", "2Moe", "3Moe")))
_GATED = tuple(f"Qwen{name}MLP" for name in ("2", "3", "2Moe", "3Moe"))
_OWN = "QWenMLP"  # names its linears otherwise
_TURNS = ("QWenAttention", *(f"Qwen{name}Attention" for name in ("2", "3", "2Moe", "3Moe")))
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
        elif kind in _TURNS:
            _use_rotation(module)


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


def _use_rotation(module: nn.Module) -> None:
    own: Any = type(module).forward
    for name, made in (("rotate", _rotate), ("apply_rotary_pos_emb", _rotate_both)):
        known = isinstance(own, FunctionType) and name in own.__code__.co_names
        if known and name in own.__globals__:
            names = {**own.__globals__, name: partial(made, own.__globals__[name])}
            forward = FunctionType(
                own.__code__, names, own.__name__, own.__defaults__, own.__closure__
            )
            forward.__kwdefaults__ = own.__kwdefaults__
            module.__dict__["forward"] = partial(forward, module)


def _rotate(
    plain: Callable[..., Tensor],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    if scale is None and fused.turns(x, cos, sin):
        return fused.rotated(x, cos, sin)
    return plain(x, cos, sin, scale)


def _rotate_both(
    plain: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *more: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    if not more and not named and all(fused.turns(x, cos, sin) for x in (query, key)):
        return fused.rotated(query, cos, sin), fused.rotated(key, cos, sin)
    return plain(query, key, cos, sin, *more, **named)
