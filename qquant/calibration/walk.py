"""The walk through one block: every batch forward once, stopped in front of each unsolved linear.

GPTQ in true-sequential order needs, for each linear, the inputs it will really see: after
everything before it has been quantized. The usual tools replay the block for every group of
linears. Here each batch's forward is a greenlet. It runs up to the first linear whose quantized
weight is not known yet and stops there; when every batch has arrived, the inputs' Hessian is
complete, the linears sharing that input are solved together, and every batch goes on from where it
stood. One forward per batch, block and stream, in exact order; where memory is short, of some
batches gate and up once more (`batch.py`).

The blocks are transformers' own (or ours for original Qwen) and stay untouched but for the
`forward` of their linears. A second, full-precision stream can run in lockstep through the original
weights, for the corrections in `gptq.py`.

Left out on purpose: which linears share an input and what a stopped batch need not keep
(`probe.py`), how a batch stops (`batch.py`), solving, reading and writing weights (`convert.py`),
and where held tensors live (`hold.py`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from ..errors import RunError
from ..grid import Quantized
from ..heap import Tidy, heap_slack
from ..hessian import AddUp, Hessian
from ..models.experts import Experts
from ..pool import less
from ..products import Laid, exact_in_float32, integers, linear, packed, packed_codes
from .batch import (
    Batch,
    Drops,
    Home,
    Kwargs,
    Recompute,
    remember_residual,
    round_in_place,
    stop_at_experts,
)
from .experts import ExpertsWalk, Places, Visit
from .hold import Holder


@dataclass(frozen=True)
class Arrival:
    """What the solver is handed when every batch stands in front of a group of linears.

    Attributes:
        names: the linears that share the input, in the order they are called.
        h: [K, K] float32.
        cross, pull: see `hessian.Hessian`; None with one stream or where not asked for.
        tokens: rows that went into h.
        flags: what to note of these linears beside the solver's own, as in `gptq.Solution`.
    """

    names: tuple[str, ...]
    h: Tensor
    cross: Tensor | None
    pull: Tensor | None
    tokens: int
    flags: tuple[str, ...] = ()


Solve = Callable[[Arrival], Mapping[str, Tensor | Quantized]]


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear of that name inside the block.

    Raises:
        RunError: it is something else.
    """
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise RunError(name, expected="a linear", got=type(module).__name__)
    return module


def is_norm(child: nn.Module) -> bool:
    """Whether a block's own child is a norm: all else there has matrices or nothing."""
    weight = getattr(child, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


@dataclass(frozen=True)
class Stage:
    """Where every batch stops once.

    Attributes:
        names: of the linears that share the input there; of all the experts' linears.
        experts: the module whose call it is, and its name inside the block; None for linears.
    """

    names: tuple[str, ...]
    experts: Experts | None = None
    prefix: str = ""


def stages_of(block: nn.Module, groups: Sequence[tuple[str, ...]]) -> list[Stage]:
    """The groups as the walk stops at them: all of a block's experts are one stop."""
    modules = {name: m for name, m in block.named_modules() if isinstance(m, Experts)}
    stages: list[Stage] = []
    for group in groups:
        prefix = next((name for name in modules if group[0].startswith(f"{name}.")), "")
        if prefix and stages and stages[-1].prefix == prefix:
            stages[-1] = Stage(stages[-1].names + group, modules[prefix], prefix)
        else:
            stages.append(Stage(group, modules.get(prefix), prefix))
    return stages


class BlockWalk:
    """Walks batches through one block, stopping at each group of linears to have it solved.

    Args:
        block: one decoder block; its linears' `forward` is replaced while `run` lasts.
        groups: from `probe.shared_inputs`.
        residual: linears that write to the residual stream: with two streams the difference of the
            residual they are added to is gathered too. That residual is the input of the block's
            last norm before the linear, for every Qwen.
        residual_share: of that difference, what counts.
        holder: where suspended activations live.
        hold_dtype: linear inputs, the residual stream (the inputs of the block's own norms) and
            the outputs are rounded to this dtype, as in a model of that dtype, which also halves
            what is held in float32; None keeps them as they are.
        drops: from `probe.droppable`; without it stopped frames keep all their locals.
        again: from `probe.recomputable`; without it the last linear's inputs are kept, however
            little room the holder has.
        expert_tokens: per input of an expert, what it needs for a Hessian of its own (`experts`).
        add_up: adds what other walks through the same block have of it, each with its own part of
            the batches; all of them call it for the same things in the same order.
        places: where the batches are among those of all walks (for experts); None where all are
            here.
        unit: samples whose products are made apart, so that the size of a batch changes no bit
            (`batching.py`); None multiplies a batch as a whole.
        tidy: knows how much was resident in earlier walks; None for one of its own.
        int16: linears and their Hessians are multiplied in 16-bit integers, where their sizes are
            such; not those of experts.

    Attributes:
        stages: where batches stop, in order.
        home: what all its batches share.
        solved: the quantized weights that batches now go through, by name.
        hessian_seconds: host wall time of the Hessians' products so far (on an accelerator: of
            launching them).
        linear_flops, hessian_flops: operations of the linears' and the Hessians' products so far.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[tuple[str, ...]],
        *,
        residual: frozenset[str] = frozenset(),
        residual_share: float = 1.0,
        holder: Holder | None = None,
        hold_dtype: torch.dtype | None = None,
        drops: Drops | None = None,
        again: Recompute | None = None,
        expert_tokens: float = 1.0,
        add_up: AddUp = lambda _: None,
        places: Places | None = None,
        unit: int | None = None,
        tidy: Tidy | None = None,
        int16: bool = False,
    ) -> None:
        self.block, self.groups = block, list(groups)
        self.stages = stages_of(block, groups)
        self._expert_tokens = expert_tokens
        self._residual, self._residual_share = residual, residual_share
        self._drops, self._again = drops or {}, again
        self._add_up, self._places = add_up, places
        first = linear_of(block, self.groups[0][0]).weight
        self.holder, self.hold_dtype = holder or Holder(host_budget=2**62), hold_dtype
        self.home = Home(block, first.device, first.dtype, self.holder, hold_dtype)
        self.unit, self._tidy, self._int16 = unit, tidy or Tidy(), int16
        self._slack = 0  # of the heap, once there are batches
        self._widest = max(max(p.shape[-2:]) for p in block.parameters() if p.dim() > 1)
        self._group_of = {n: i for i, group in enumerate(self.groups) for n in group}
        self.solved: dict[str, Tensor | Laid] = {}
        # What the full-precision stream multiplies by.
        self._original: dict[str, Tensor | Laid] = {}
        self.hessian_seconds = 0.0
        self.linear_flops = self.hessian_flops = 0

    def run(
        self,
        hidden: Sequence[list[Tensor]],
        kwargs: Sequence[Kwargs],
        solve: Solve,
        *,
        last: bool = False,
    ) -> None:
        """One forward of every batch.

        Args:
            hidden: per stream (the quantized one first, then, if any, the full-precision one) the
                list of batches [b, t, hidden]; used up (storage and all) and replaced by the
                outputs. The full-precision stream may leave batches out (an empty tensor at their
                place): the corrections are then gathered from the others.
            kwargs: per batch, what the block takes beside the hidden states.
            solve: gets an `Arrival`, returns the quantized weight of each of its linears, as it is
                stored or in the compute dtype.
            last: nobody needs the outputs: what follows the last linear's input is not computed
                and `hidden` is left empty.
        """
        self._slack = heap_slack(self._largest(hidden[0]))
        undo = self.replace_forwards()
        batches: list[list[Batch | None]] = []
        try:
            with torch.inference_mode():
                batches += [
                    [
                        Batch(self.home, s == 1, h, k) if h.numel() else None
                        for h, k in zip(stream, kwargs, strict=True)
                    ]
                    for s, stream in enumerate(hidden)
                ]
                for stream in hidden:
                    stream[:] = [torch.empty(0)] * len(stream)
                for i, stage in enumerate(self.stages):
                    # Past the last inputs the full-precision stream has nothing to wait for.
                    end = i == len(self.stages) - 1
                    done = hidden[-1] if len(hidden) == 2 and end and not last else None
                    if stage.experts is not None:
                        outputs = not (end and last)
                        self._at_experts(batches, i, stage.experts, solve, outputs, done)
                    else:
                        self._arrive(batches, i, stage.names, done, ends=end and last)
                    if i:
                        again = any(b.again for b in batches[0] if b is not None)
                        self._forget(self.stages[i - 1].names, but_solved=again)
                    if stage.experts is None:
                        self.holder.trim()
                        self._tidy(self._slack, need=self._slack)
                        solved = solve(self._gathered(stage.names, self._stats))
                        self.solved.update({n: self._laid(w) for n, w in solved.items()})
                        del self._stats, solved
                    self._tidy(self._slack)
                for b, batch in enumerate(batches[0] if not last else ()):
                    assert batch is not None
                    hidden[0][b] = self._finish(batch)
                for stage in self.stages[-2:]:
                    self._forget(stage.names)
        finally:
            for stopped in (batch for stream in batches for batch in stream if batch):
                stopped.throw()  # ends it: frames that nobody resumes are never collected
            undo()

    def _largest(self, stream: Sequence[Tensor]) -> int:
        """Bytes of the largest activation that comes and goes on the host."""
        if self.home.device.type != "cpu":
            return 0
        tokens = max((b.shape[0] * b.shape[1] for b in stream), default=0)
        return tokens * self._widest * self.home.dtype.itemsize

    def _gathered(
        self, names: tuple[str, ...], stats: Hessian, flags: tuple[str, ...] = ()
    ) -> Arrival:
        self.hessian_flops += stats.flops
        stats.add_up(self._add_up)
        return Arrival(names, *stats.result(), stats.tokens, flags)

    def _at_experts(
        self,
        batches: list[list[Batch | None]],
        index: int,
        experts: Experts,
        solve: Solve,
        outputs: bool,
        finished: list[Tensor] | None,
    ) -> None:
        """Brings every batch to the experts and has each of them solved (see `experts`)."""
        visits: list[list[Visit | None]] = []
        for stream in reversed(batches):
            visits.insert(0, [self._visit(b, index) if b else None for b in stream])

        def solve_one(
            names: tuple[str, ...], stats: Hessian, flags: tuple[str, ...]
        ) -> Mapping[str, Tensor]:
            # Slabs, not the heap as before a linear's solve: the next expert asks for its pages.
            self.holder.trim()
            solved = solve(self._gathered(names, stats, flags))
            self._tidy(self._slack)
            return {name: self._plain(weight) for name, weight in solved.items()}

        walk = ExpertsWalk(
            experts,
            self.stages[index].prefix,
            [v for v in visits[0] if v is not None],
            visits[1] if len(visits) == 2 else (),
            least=round(self._expert_tokens * experts.hidden),
            holder=self.holder,
            hold_dtype=self.hold_dtype,
            solve=solve_one,
            outputs=outputs,
            add_up=self._add_up,
            places=self._places,
        )
        walk.run()
        self.hessian_seconds += walk.hessian_seconds
        self.linear_flops += walk.linear_flops
        for stream, seen in zip(batches, visits, strict=True):
            for batch, visit in zip(stream, seen, strict=True):
                if batch is not None and visit is not None:
                    batch.answer = visit.out
        if finished is not None:
            for b, batch in enumerate(batches[-1]):
                if batch is not None:
                    batch.free = True
                    finished[b] = self._finish(batch)

    def _visit(self, batch: Batch, index: int) -> Visit:
        """Brings one batch to the experts, where it waits."""
        self._advance(batch, self.stages[index].prefix)
        assert batch.x is not None and batch.routing is not None
        visit = Visit(batch.x, *batch.routing)
        batch.rest(self._drops.get(index, frozenset()))
        self._tidy(self._slack)
        return visit

    def _advance(self, batch: Batch, to: str) -> None:
        if batch.advance() is not None or batch.x is None:
            raise RunError("walk", expected=f"the block to call {to}", got="the block's end")
        if self.hold_dtype is not None:
            batch.round_input(self.hold_dtype)

    def _arrive(
        self,
        batches: list[list[Batch | None]],
        index: int,
        group: tuple[str, ...],
        finished: list[Tensor] | None,
        *,
        ends: bool,
    ) -> None:
        """Brings every batch to the group's first linear, adding each input as it comes.

        With `finished`, the full-precision stream's batches then run to the end of the block, and
        their outputs go there. Where a batch `ends` here, nothing of it is kept.
        """
        weights = [linear_of(self.block, n).weight for n in group]
        two = len(batches) == 2
        wants_residual = two and self._residual_share > 0 and self._residual.issuperset(group)
        dead = self._drops.get(index, frozenset())
        again = self._again if index == len(self.stages) - 1 else None
        ahead = finished is not None and self._known_ahead(group)
        self._stats = Hessian(
            int(weights[0].shape[1]),
            weights[0].device,
            weights=weights if two else (),
            residual=wants_residual,
            outputs=ahead,
            integers=integers(weights[0].device, weights[0].dtype, self._int16),
        )
        # The full-precision stream goes first, if there is one.
        for b in range(len(batches[0])):
            pair = [batch for stream in reversed(batches) if (batch := stream[b]) is not None]
            for batch in pair:
                self._advance(batch, group[0])
            quantized = pair[-1]
            assert quantized.x is not None
            difference = None
            if wants_residual and len(pair) == 2:
                assert pair[0].residual is not None and quantized.residual is not None
                difference = less(pair[0].residual, quantized.residual)
                if self._residual_share != 1:
                    difference *= self._residual_share
            full = pair[0].x if len(pair) == 2 else None
            if ahead and full is not None:
                pair[0].output = self._product(full, weights[0], None)
                self.linear_flops += 2 * full.numel() * weights[0].shape[0]
            started = time.perf_counter()
            tiles = (
                self._tiles(t) if t is not None else itertools.repeat(None)
                for t in (quantized.x, full, difference, pair[0].output)
            )
            for tile in zip(*tiles, strict=False):
                self._stats.add(*tile)
            del tile  # keeps a batch's tensors
            self.hessian_seconds += time.perf_counter() - started
            if finished is not None and len(pair) == 2:
                pair[0].free = True
                finished[b] = self._finish(pair[0])
                pair = pair[1:]
            for batch in pair:
                if ends:
                    batch.throw()
                    batches[batch.full][b] = None
                else:
                    batch.rest(dead, again)
            del pair, batch, quantized, full, difference  # what is dropped here is free
            self._tidy(self._slack)
        if finished is not None:
            self._original.clear()  # that stream is through the block
        started = time.perf_counter()
        self._stats.settle()
        self.hessian_seconds += time.perf_counter() - started

    def _known_ahead(self, group: tuple[str, ...]) -> bool:
        """Whether the full-precision stream's output serves the sums too (see `Hessian`).

        Only in float32 that is not rounded: what counts is the small difference of two large sums,
        of which integers' rounding would be a part.
        """
        first = linear_of(self.block, group[0])
        return (
            len(group) == 1
            and not self._int16
            and "bias" not in dict(first.named_parameters())
            and first.weight.dtype == torch.float32
            and exact_in_float32()
            and first.out_features <= first.in_features
        )

    def _tiles(self, x: Tensor) -> Sequence[Tensor]:
        """`x` [samples, ...] in the parts that are multiplied by themselves."""
        if self.unit is None or x.dim() < 3:
            return (x,)
        return torch.split(x, self.unit)

    def _finish(self, batch: Batch) -> Tensor:
        """Runs a batch to the end of the block; its output, where outputs wait for the next."""
        out = batch.advance()
        if out is None:
            raise RunError("walk", expected="the block to end", got="a linear called again")
        batch.input = batch.residual = None
        self._tidy(self._slack)
        dtype = self.hold_dtype or out.dtype
        return self.holder.output(out, dtype, batch.kind("residual"))

    def _forget(self, group: tuple[str, ...], but_solved: bool = False) -> None:
        """Every batch is past the group: its weights are not needed any more.

        Args:
            but_solved: but the quantized ones, to make inputs of the next group again.
        """
        for name in group:
            self._original.pop(name, None)
            if name not in self.solved:
                continue  # an expert's, which is gone already
            if not but_solved:
                del self.solved[name]
            linear = linear_of(self.block, name)
            linear.weight = nn.Parameter(
                torch.empty(linear.weight.shape, device="meta"), requires_grad=False
            )

    def replace_forwards(self) -> Callable[[], None]:
        """Makes the block's linears, norms and experts those of the walk; what puts them back."""
        undo: list[Callable[[], None]] = []
        for stage in self.stages:
            if stage.experts is not None:
                stage.experts.__dict__["forward"] = stop_at_experts
                undo.append(partial(stage.experts.__dict__.pop, "forward", None))
                owner = self.block.get_submodule(stage.prefix.rpartition(".")[0])
                undo.append(owner.register_forward_pre_hook(round_in_place).remove)
                continue
            for name in stage.names:
                linear = linear_of(self.block, name)
                linear.__dict__["forward"] = self._stopping_forward(name, linear)
                undo.append(partial(linear.__dict__.pop, "forward", None))
        for child in self.block.children():
            if is_norm(child):
                undo.append(child.register_forward_pre_hook(remember_residual).remove)

        def run_all() -> None:
            for step in undo:
                step()

        return run_all

    def _full_weight(self, name: str) -> Tensor | Laid:
        """What the full-precision stream multiplies by."""
        if name not in self._original:
            self._original[name] = packed(linear_of(self.block, name).weight, self._int16)
        return self._original[name]

    def _laid(self, weight: Tensor | Quantized) -> Tensor | Laid:
        """What the quantized stream multiplies by."""
        if isinstance(weight, Quantized) and (laid := packed_codes(*weight, self.home.dtype)):
            return laid
        return packed(self._plain(weight), self._int16)

    def _plain(self, weight: Tensor | Quantized) -> Tensor:
        return weight.weight(self.home.dtype) if isinstance(weight, Quantized) else weight

    def _product(self, x: Tensor, weight: Tensor | Laid, bias: Tensor | None) -> Tensor:
        tiles = self._tiles(x)
        if len(tiles) == 1:
            return linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        for part, tile in zip(self._tiles(out), tiles, strict=True):
            part.copy_(linear(tile, weight, bias))
        return out

    def _stopping_forward(self, name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        leader = self.groups[self._group_of[name]][0]

        def forward(x: Tensor) -> Tensor:
            batch = getcurrent()
            assert isinstance(batch, Batch)
            if name == leader:
                batch.meet(name, x)
            if name not in self.solved and not batch.free:
                if name != leader:
                    raise RunError(
                        "walk", expected=f"{leader} to be called before {name}", got=name
                    )
                batch.stop(x)
                if name not in self.solved and not batch.free:
                    raise RunError("walk", expected=f"a solved weight for {name}", got="none")
            if batch.output is not None:
                out, batch.output = batch.output, None
                return out
            weight = self._full_weight(name) if batch.full else self.solved[name]
            self.linear_flops += 2 * x.numel() * weight.shape[0]
            return self._product(x, weight, linear.bias)

        return forward
