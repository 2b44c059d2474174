"""A bitsandbytes model that has run is not to be saved: how it shows, and what stands in the way.

bitsandbytes 0.50.2 repacks a 4-bit weight at its first forward on a CPU with AVX512-BF16. Its way
back, which any `state_dict` takes, leaves the scales rounded to bfloat16 and, without double
quantization, transposed: in what is written, and in the model that runs on. So `guard` puts on a
model that `load` made

- a mark on every quantized linear that runs, in a forward of the model or of a part of it;
- a `save_pretrained` that refuses once there is a mark. An adapter may be saved (peft's models have
  a `save_pretrained` of their own), since the base is not written then;
- scales put back in order after a `state_dict`, so that saving an adapter, which takes one, leaves
  the base as it was but for the rounding.

`save_pretrained` is replaced by giving the model a class of the same name below its own, as torch's
`fully_shard` does: nothing is patched for others, copies of the model are guarded, and the model
holds no reference to itself. What the guard cannot see: a model that plain `from_pretrained` loaded
(`save` and `verify` still find what a forward changed in it), and `torch.save` of a `state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .errors import RunError

_RAN = "_qquant_has_run"


def bnb_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The bitsandbytes linears of a model, by name."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            yield name, module


def guard(model: Any) -> None:
    """From now on a forward leaves marks, and `save_pretrained` refuses where there is one."""
    for _, linear in bnb_linears(model):
        linear.register_forward_pre_hook(_mark)
        if hasattr(linear.weight, "quant_state"):
            linear.register_state_dict_post_hook(_straighten)
    kind: Any = type(model)
    model.__class__ = _guarded(kind)


def has_run(model: nn.Module) -> str | None:
    """By what it shows that a model has run, or None where nothing does.

    A model that is not guarded shows it only where the forward changed its state, which is where
    saving it would do harm.
    """
    for name, module in bnb_linears(model):
        if getattr(module, _RAN, False):
            return f"{name} was run since it was loaded"
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            if getattr(state, "packing_format_for_cpu", False):
                return f"{name} is packed for this CPU"
            nested = bool(getattr(state, "nested", False))
            right = torch.uint8 if nested else torch.float32
            if state.absmax.dtype != right or state.absmax.dim() != 1:
                return f"the scales of {name} are {state.absmax.dtype} {list(state.absmax.shape)}"
        elif getattr(getattr(module, "state", None), "CB", None) is not None:
            return f"{name} holds its codes where a forward puts them"
    return None


def refuse_if_run(model: nn.Module) -> None:
    """Stands before everything that writes a model's weights.

    Raises:
        RunError: it has run.
    """
    if why := has_run(model):
        raise RunError(
            "model",
            expected="one that has not run yet",
            got=why,
            cure="Load it again and save it before any forward: bitsandbytes 0.50.2 writes damaged "
            "scales after one, on CPUs with AVX512-BF16",
        )


def _mark(module: nn.Module, args: Any) -> None:
    setattr(module, _RAN, True)


def _straighten(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Scales as bitsandbytes' way back from the packed weight leaves them, put in order."""
    state = getattr(module.weight, "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", False)
    if state is not None and not packed and state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
        state_dict[f"{prefix}weight.absmax"] = state.absmax


@lru_cache
def _guarded(cls: Any) -> Any:
    """A class like `cls`, by name too, that does not save what has run."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "_hf_peft_config_loaded", False):  # else the adapter alone is written
            refuse_if_run(self)
        return cls.save_pretrained(self, *args, **kwargs)

    members = {
        "save_pretrained": save_pretrained,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), members)
