"""Experts as transformers' fused parameters hide them: one linear each, under the names of files.

transformers keeps the experts of a block in two parameters, `gate_up_proj` [E, 2I, H] and
`down_proj` [E, H, I]; checkpoints, quantized directories and other readers have
`experts.{e}.gate_proj`, `up_proj` and `down_proj`. `split_experts` puts an `Experts` module in the
fused one's place that computes the same: each expert on the rows routed to it, in the order of the
experts, the rows of one expert in the order of its rank in the token's choice and then of the
tokens, scaled by the router's weight and added up in that order (transformers' eager code, 5.17 to
5.23). Gate and up are two products where the fused code has one, so results agree to rounding.

Left out on purpose: transformers' grouped kernels, which need the fused parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .families import Family


def routed(index: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Which tokens go to each expert: (tokens, ranks), each [n] int64, by expert.

    Args:
        index: [tokens, k] int64, the experts chosen by each token, by rank.
        experts: how many there are.
    """
    nothing = index.new_empty(0)
    if index.is_meta:  # a rehearsal without values
        return [(nothing, nothing)] * experts
    by_rank = index.T.reshape(-1)
    order = torch.argsort(by_rank, stable=True)
    counts = torch.bincount(by_rank, minlength=experts).tolist()
    parts = torch.split(order, counts)[:experts]
    return [(part % index.shape[0], part // index.shape[0]) for part in parts]


class Expert(nn.Module):
    """One expert: `down(act(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, inner: int, act: Any, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, device=device)
        self.up_proj = nn.Linear(hidden, inner, bias=False, device=device)
        self.down_proj = nn.Linear(inner, hidden, bias=False, device=device)
        self.act = act

    def inner(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, inner], the input of `down_proj`."""
        gated: Tensor = self.act(self.gate_proj(x)) * self.up_proj(x)
        return gated

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.inner(x))
        return down


class Experts(nn.ModuleList):
    """The experts of one block; takes and gives what transformers' module does.

    Args:
        config: of the model.
        device: where its weights are, which are yet to be given.
        visit_all: also call experts that no token goes to, with no rows, so that whoever watches
            the linears sees all of them whatever the routing.

    Attributes:
        hidden: inputs of an expert.
    """

    def __init__(self, config: Any, device: torch.device, visit_all: bool = False) -> None:
        from transformers.activations import ACT2FN

        act = ACT2FN[config.hidden_act]
        self.hidden = int(config.hidden_size)
        super().__init__(
            Expert(self.hidden, config.moe_intermediate_size, act, device)
            for _ in range(config.num_experts)
        )
        self.visit_all = visit_all

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] of each token's experts, weighted and summed.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index, top_k_weights: [tokens, k], from the router.
        """
        out = torch.zeros_like(hidden_states)
        for expert, (tokens, ranks) in zip(self, routed(top_k_index, len(self)), strict=True):
            if tokens.numel() or self.visit_all:
                rows = expert(hidden_states[tokens]) * top_k_weights[tokens, ranks, None]
                out.index_add_(0, tokens, rows.to(out.dtype))
        return out


def split_experts(model: nn.Module, family: Family, *, visit_all: bool = False) -> None:
    """Puts `Experts` (without weights, on the fused ones' device) into every block that has any.

    Args:
        model: of transformers, before its weights are read.
        visit_all: as for `Experts`.
    """
    if family.experts is None:
        return
    parent, _, leaf = family.experts.rpartition(".")
    blocks: Any = model.get_submodule(family.blocks)
    for block in blocks:
        owner = block.get_submodule(parent)
        if hasattr(owner, leaf):
            device = next(getattr(owner, leaf).parameters()).device
            setattr(owner, leaf, Experts(model.config, device, visit_all))
