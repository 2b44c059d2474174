"""The head of a bfloat16 model in oneDNN's own layout, for a CPU that multiplies bfloat16.

Of a 4-bit model the head is the largest thing that is read for a token. Torch hands oneDNN the
matrix as it lies, for which it has no quick product of one row: on two cores of an AMD EPYC (Zen 5)
18,992 x 4,096 took 7.0 ms, 22 GB/s, and a third of a token's time. Laid out once as the library
likes it, the same product takes 1.9 ms, and is the faster one for every number of rows (8: 6.9 and
2.8 ms; 512: 93 and 84), with the same result. It takes no more memory: only that layout is kept.
Whether it is faster, and right, is tried at load on a part of the matrix.

Left out on purpose: the quantized linears, whose products are `kernels.py`'s; heads that share
their matrix with the embedding, which looks up rows that this layout does not have; models that are
not quantized, which are what others are measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import Checkpoint
from .models.families import Family
from .products import has_onednn_layout, onednn, onednn_layout
from .timings import fastest_of
from .vocabulary import SAMPLE, WORTH, as_bfloat16, fits, stored_weights

NOTE = "head in oneDNN's layout"
_NEAR = 1e-2  # of the norm: results are rounded to bfloat16, a relative 2e-3


class PackedHead(nn.Module):
    """`x @ W.T` with `W` bfloat16 [V, K] in oneDNN's layout.

    Moved or made another dtype of, it is a plain matrix from then on, unless that is bfloat16 on a
    CPU again; and it is one from the start where oneDNN has no such layout. In a state dict it is
    `weight`, as of any linear; loading one lays it out anew, as a copy does, or one from a pickle.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._hold(weight)

    @property
    def weight(self) -> Tensor:
        """[V, K], a copy."""
        return self.held.to_dense() if self.held.is_mkldnn else self.held

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., V], the same dtype."""
        if not self.held.is_mkldnn or x.dtype != self.held.dtype or x.requires_grad:
            return F.linear(x, self.weight.to(x.dtype))
        return onednn(x.contiguous(), self.held)

    def _hold(self, weight: Tensor) -> None:
        narrow = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self.held = onednn_layout(weight, 1) if narrow and has_onednn_layout() else weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": self.weight}  # that layout is neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        self._hold(state["held"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedHead:
        self._hold(fn(self.weight))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Lays the given matrix out anew, on the device and in the dtype of the one held."""
        name = prefix + "weight"
        given = state_dict.get(name)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k != name]
        if given is None:
            missing_keys += [name] if strict else []
        elif tuple(given.shape) != (self.out_features, self.in_features):
            held = [self.out_features, self.in_features]
            error_msgs.append(f"size mismatch for {name}: {list(given.shape)}, held are {held}")
        else:
            copied = given.detach().to(self.held.device, self.held.dtype, copy=True)
            self._hold(copied)


def held_weights(module: nn.Module) -> list[Tensor]:
    """The matrix of the vocabulary that a module holds, to be counted; nothing of others."""
    if isinstance(module, PackedHead):
        size = module.out_features, module.in_features
        return [torch.empty(size, dtype=module.held.dtype, device="meta")]
    return stored_weights(module)


def pack_head(model: nn.Module, family: Family, checkpoint: Checkpoint) -> set[str]:
    """Puts the head into a bfloat16 model on the CPU in that layout, where that is faster.

    Args:
        model: its head still on meta.

    Returns:
        Names of the checkpoint's tensors that were used; none where the model was left as it is.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied or not fits(model, checkpoint, family.head):
        return set()
    weight = as_bfloat16(checkpoint.read(family.head))
    if weight is None or not worth_it(weight):
        return set()
    model.set_submodule(family.head.removesuffix(".weight"), PackedHead(weight))
    return {family.head}


def worth_it(weight: Tensor) -> bool:
    """Whether a product of one row is right and faster in oneDNN's layout, by trying a part.

    Args:
        weight: bfloat16 [V, K].
    """
    if weight.numel() < WORTH or not has_onednn_layout():
        return False
    part = weight[:SAMPLE]
    x = torch.randn(1, part.shape[1], generator=torch.Generator().manual_seed(0)).to(part.dtype)
    with torch.inference_mode():
        try:
            packed = onednn_layout(part, 1)
            got = onednn(x, packed).float()
        except RuntimeError:  # what is large may fail where the trial did not
            return False
        want = F.linear(x.float(), part.float())
        if not float((got - want).norm()) <= _NEAR * float(want.norm()):
            return False
        ours = fastest_of(lambda: onednn(x, packed), 5)
        return ours < fastest_of(lambda: F.linear(x, part), 5)
