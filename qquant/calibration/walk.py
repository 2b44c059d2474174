"""The walk through one block: every batch forward once, stopped in front of each unsolved linear.

GPTQ in true-sequential order needs, for each linear, the inputs it will really see: after everything
before it has been quantized. The usual tools replay the block for every group of linears. Here each
batch's forward is a greenlet. It runs up to the first linear whose quantized weight is not known yet
and stops there; when every batch has arrived, the inputs' Hessian is complete, the linears sharing
that input are solved together, and every batch goes on from where it stood. One forward per batch,
block and stream, in exact order.

The blocks are transformers' own (or ours for original Qwen) and stay untouched but for the `forward`
of their linears. Which linears share an input is not looked up: a short probe records who is handed
the same tensor object. A second, full-precision stream can run in lockstep through the original
weights, for the corrections in `gptq.py`.

Left out on purpose: solving, reading and writing weights (`convert.py`), and where held tensors live
(`hold.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RunError
from ..gptq import Hessian
from .hold import Held, Holder

Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Arrival:
    """What the solver is handed when every batch stands in front of a group of linears.

    Attributes:
        names: the linears that share the input, in the order they are called.
        h: [K, K] float32.
        cross, residual: see `gptq.Hessian`; None with one stream or where not asked for.
        tokens: rows that went into h.
    """

    names: tuple[str, ...]
    h: Tensor
    cross: Tensor | None
    residual: Tensor | None
    tokens: int


Solve = Callable[[Arrival], Mapping[str, Tensor]]


def shared_inputs(
    block: nn.Module, names: Sequence[str], hidden: Tensor, kwargs: Kwargs
) -> list[tuple[str, ...]]:
    """Runs a short input through the block and groups the linears by the tensor they are handed.

    Args:
        block: one decoder block with its weights.
        names: the linears' names inside the block.
        hidden: [1, t, hidden], any short t; kwargs: what the block takes beside it.

    Returns:
        Groups in the order of their first call.

    Raises:
        RunError: a linear is called twice or never.
    """
    seen: dict[int, list[str]] = {}
    alive: list[Tensor] = []

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])  # keeps the object, so that its id stays its own
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    hooks = [block.get_submodule(n).register_forward_pre_hook(record(n)) for n in names]
    try:
        with torch.no_grad():
            block(hidden, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    called = [n for group in seen.values() for n in group]
    if sorted(called) != sorted(names):
        raise RunError(
            "linears of a block",
            expected=f"each of {sorted(names)} called once",
            got=sorted(called),
            cure="This block's structure is not supported",
        )
    return [tuple(group) for group in seen.values()]


class _Batch(greenlet):
    """One batch of one stream on its way through the block."""

    def __init__(self, walk: BlockWalk, full: bool, hidden: Tensor, kwargs: Kwargs) -> None:
        super().__init__(self._forward)
        self.walk, self.full = walk, full
        self.hidden: Tensor | None = hidden
        self.kwargs = kwargs
        self.x: Tensor | None = None
        self.residual: Tensor | None = None
        self.held: list[Held] = []

    def _forward(self) -> Tensor:
        hidden, self.hidden = self.hidden, None  # the block's frame alone keeps it alive
        out = self.walk.block(hidden, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self) -> Tensor | None:
        """Runs to the next unsolved linear (None) or to the end (the block's output)."""
        for held in self.held:
            held.restore()
        self.held = []
        self.x = None
        out = self.switch()
        return out if self.dead else None

    def rest(self, holder: Holder, dtype: torch.dtype | None) -> None:
        """Puts on hold what this batch keeps alive while the others run."""
        if self.x is not None:
            self.held.append(holder.hold(self.x, dtype))
        if self.residual is not None and self.residual is not self.x:
            self.held.append(holder.hold(self.residual))


class BlockWalk:
    """Walks batches through one block, stopping at each group of linears to have it solved.

    Args:
        block: one decoder block; its linears' `forward` is replaced while `run` lasts.
        groups: from `shared_inputs`.
        residual: linears that write to the residual stream: with two streams the difference of the
            residual they are added to is gathered too. That residual is the input of the block's
            last norm before the linear, for every Qwen.
        holder: where suspended activations live.
        hold_dtype: linear inputs are rounded to this dtype (what a 16-bit model would see), which
            also halves what is held in float32; None keeps them as they are.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[tuple[str, ...]],
        *,
        residual: frozenset[str] = frozenset(),
        holder: Holder | None = None,
        hold_dtype: torch.dtype | None = None,
    ) -> None:
        self.block, self.groups = block, list(groups)
        self._residual = residual
        self._holder = holder or Holder(host_budget=2**62)
        self._hold_dtype = hold_dtype
        self._group_of = {n: i for i, group in enumerate(self.groups) for n in group}
        self._solved: dict[str, Tensor] = {}

    def run(
        self,
        hidden: Sequence[list[Tensor]],
        kwargs: Sequence[Kwargs],
        solve: Solve,
    ) -> None:
        """One forward of every batch.

        Args:
            hidden: per stream (the quantized one first, then, if any, the full-precision one) the
                list of batches [b, t, hidden]; each entry is replaced by the block's output.
            kwargs: per batch, what the block takes beside the hidden states.
            solve: gets an `Arrival`, returns the quantized weight of each of its linears in the
                compute dtype.
        """
        undo = self._replace_forwards()
        try:
            with torch.no_grad():
                batches = [
                    [_Batch(self, s == 1, h, k) for h, k in zip(stream, kwargs, strict=True)]
                    for s, stream in enumerate(hidden)
                ]
                for stream in hidden:
                    stream[:] = [torch.empty(0)] * len(stream)
                for i, group in enumerate(self.groups):
                    self._arrive(batches, group)
                    if i:
                        self._forget(self.groups[i - 1])
                    arrival = Arrival(group, *self._stats.result(), self._stats.tokens)
                    del self._stats
                    self._solved.update(solve(arrival))
                for s, stream in enumerate(batches):
                    for b, batch in enumerate(stream):
                        out = batch.advance()
                        if out is None:
                            raise self._unexpected(batch)
                        hidden[s][b] = out
                self._forget(self.groups[-1])
        finally:
            undo()

    def _arrive(self, batches: list[list[_Batch]], group: tuple[str, ...]) -> None:
        """Brings every batch to the group's first linear, adding each input as it comes."""
        linear = self.block.get_submodule(group[0])
        two = len(batches) == 2
        wants_residual = two and self._residual.issuperset(group)
        width = sum(int(self.block.get_submodule(n).weight.shape[0]) for n in group)
        self._stats = Hessian(
            int(linear.weight.shape[1]),
            linear.weight.device,
            cross=two,
            residual=width if wants_residual else 0,
        )
        for pair in zip(*reversed(batches), strict=True):  # full precision first, if any
            for batch in pair:
                if batch.advance() is not None or batch.x is None:
                    raise RunError(
                        "walk", expected=f"the block to call {group[0]}", got="the block's end"
                    )
                if self._hold_dtype is not None:
                    batch.x.data = batch.x.data.to(self._hold_dtype).to(batch.x.dtype)
            quantized = pair[-1]
            assert quantized.x is not None
            difference = None
            if wants_residual:
                difference = pair[0].residual - quantized.residual
            self._stats.add(quantized.x, pair[0].x if two else None, difference)
            for batch in pair:
                batch.rest(self._holder, self._hold_dtype)

    def _forget(self, group: tuple[str, ...]) -> None:
        """Every batch is past the group: its weights are not needed any more."""
        for name in group:
            self._solved.pop(name, None)
            linear = self.block.get_submodule(name)
            linear.weight = nn.Parameter(
                torch.empty(linear.weight.shape, device="meta"), requires_grad=False
            )

    def _unexpected(self, batch: _Batch) -> RunError:
        return RunError("walk", expected="the block to end", got="a linear called once more")

    def _replace_forwards(self) -> Callable[[], None]:
        undo: list[Callable[[], None]] = []
        for name in self._group_of:
            linear = self.block.get_submodule(name)
            linear.forward = self._stopping_forward(name, linear)
            undo.append(lambda module=linear: module.__dict__.pop("forward", None))
        for child in self.block.children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:  # the block's own norms
                undo.append(child.register_forward_pre_hook(_remember_residual).remove)

        def run_all() -> None:
            for step in undo:
                step()

        return run_all

    def _stopping_forward(self, name: str, linear: nn.Module) -> Callable[[Tensor], Tensor]:
        leader = self.groups[self._group_of[name]][0]

        def forward(x: Tensor) -> Tensor:
            batch = getcurrent()
            assert isinstance(batch, _Batch)
            if name not in self._solved:
                if name != leader:
                    raise RunError(
                        "walk", expected=f"{leader} to be called before {name}", got=name
                    )
                batch.x = x
                assert batch.parent is not None
                batch.parent.switch()
                if name not in self._solved:
                    raise RunError("walk", expected=f"a solved weight for {name}", got="none")
            weight = linear.weight if batch.full else self._solved[name]
            return F.linear(x, weight, linear.bias)

        return forward


def _remember_residual(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
    batch = getcurrent()
    if isinstance(batch, _Batch):
        batch.residual = args[0]
