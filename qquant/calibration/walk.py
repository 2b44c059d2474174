"""The walk through one block: every batch forward once, stopped in front of each unsolved linear.

GPTQ in true-sequential order needs, for each linear, the inputs it will really see: after
everything before it has been quantized. The usual tools replay the block for every group of
linears. Here each batch's forward is a greenlet. It runs up to the first linear whose quantized
weight is not known yet and stops there; when every batch has arrived, the inputs' Hessian is
complete, the linears sharing that input are solved together, and every batch goes on from where it
stood. One forward per batch, block and stream, in exact order.

The blocks are transformers' own (or ours for original Qwen) and stay untouched but for the
`forward` of their linears. Which linears share an input is not looked up: a short probe records who
is handed the same tensor object. A second, full-precision stream can run in lockstep through the
original weights, for the corrections in `gptq.py`.

A stopped frame keeps every local alive, needed or not (at the attention's output projection that is
queries, keys, values and more: several times what has to be kept). Which of them are dead is not
guessed: `droppable` runs the short input again with those tensors replaced by NaN and drops, in the
real run, only what left the output bit for bit the same.

Left out on purpose: solving, reading and writing weights (`convert.py`), and where held tensors
live (`hold.py`).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ..devices import Tidy
from ..errors import RunError
from ..hessian import AddUp, Hessian
from ..models.experts import Experts
from ..products import exact_in_float32, linear, packed
from .experts import ExpertsWalk, Places, Visit
from .hold import Held, Holder

Kwargs = Mapping[str, Any]


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


Solve = Callable[[Arrival], Mapping[str, Tensor]]


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear of that name inside the block.

    Raises:
        RunError: it is something else.
    """
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise RunError(name, expected="a linear", got=type(module).__name__)
    return module


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
        with torch.inference_mode():
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


Key = tuple[int, str]  # how many frames below the block's call, and the local's name
Drops = Mapping[int, frozenset[Key]]  # by the index of the stage a batch stands in front of
_INPUT: Key = (-1, "input")


class _Batch(greenlet):  # type: ignore[misc, unused-ignore]
    """One batch of one stream on its way through the block."""

    def __init__(self, walk: BlockWalk, full: bool, hidden: Tensor, kwargs: Kwargs) -> None:
        super().__init__(self._forward)
        self.walk, self.full = walk, full
        self.free = False  # runs on without stopping
        self.hidden: Tensor | None = hidden
        self.input: Tensor | None = None
        self.kwargs = kwargs
        self.x: Tensor | None = None
        self.rounded: Tensor | None = None
        self.residual: Tensor | None = None
        self.routing: tuple[Tensor, Tensor] | None = None  # in front of experts: theirs
        self.answer: Tensor | None = None  # of the experts
        self.output: Tensor | None = None  # of the linear it stands in front of, where known
        self.locals: dict[Key, Tensor] = {}
        self.held: list[Held] = []

    def _forward(self) -> Tensor:
        assert self.hidden is not None
        # An object of its own, whose storage can be swapped: the streams begin with the same ones.
        self.input = self.hidden.to(self.walk.device, self.walk.dtype).detach()
        self.hidden = None
        out = self.walk.block(self.input, **self.kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def advance(self) -> Tensor | None:
        """Runs to the next unsolved linear (None) or to the end (the block's output)."""
        for held in self.held:
            held.restore()
        self.held, self.locals = [], {}
        self.x = self.routing = None
        out = self.switch()
        return out if self.dead else None

    def stop(self, x: Tensor, frames: int = 2) -> None:
        """Called in front of an unsolved linear: goes back to the walk until it is solved."""
        self.x = x
        self.locals = self._frame_locals(frames)
        assert self.parent is not None
        self.parent.switch()

    def stop_at_experts(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Called in place of the experts: goes back to the walk until it has their output."""
        self.routing = index, weights
        self.stop(x, 3)
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer

    def _frame_locals(self, frames: int) -> dict[Key, Tensor]:
        """Tensors that the stopped frames alone keep alive, beside what is needed on resuming."""
        needed = {id(t) for t in (self.x, self.residual, *(self.routing or ()))}
        shared = {id(t) for v in self.kwargs.values() for t in _tensors(v)}
        found = {_INPUT: self.input} if self.input is not None else {}
        frame: FrameType | None = sys._getframe(frames)
        depth = 0
        while frame is not None and frame.f_code is not _Batch._forward.__code__:
            for name, value in frame.f_locals.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    found[depth, name] = value
            frame, depth = frame.f_back, depth + 1
        return {k: t for k, t in found.items() if id(t) not in needed | shared}

    def _kind(self, what: str) -> tuple[str, bool]:
        """For the holder: a residual outlives the inputs beside it, and streams differ, too."""
        return what, self.full

    def round_input(self, dtype: torch.dtype) -> None:
        """Rounds the linear's input, in place for whoever else holds the tensor."""
        assert self.x is not None
        on_host = self.x.device.type == "cpu"
        self.rounded = (
            self.walk.holder.settle(self.x, dtype, self._kind("input"))
            if on_host
            else self.x.to(dtype)
        )
        if self.x.dtype != dtype:
            self.x.copy_(self.rounded)

    def rest(self, dead: frozenset[Key]) -> None:
        """Drops what nothing needs any more and puts on hold what this batch keeps alive."""
        for key in dead & self.locals.keys():
            self.locals[key].data = self.locals[key].new_empty(0)
        self.locals = {}
        holder, dtype = self.walk.holder, self.walk.hold_dtype
        if self.x is not None:
            self.held.append(holder.hold(self.x, self.rounded, kind=self._kind("input")))
            self.rounded = None
        if self.residual is not None and self.residual is not self.x:
            # Rounded when it was remembered, so that the smaller dtype loses nothing.
            kind = self._kind("residual")
            self.held.append(holder.hold(self.residual, dtype=dtype, kind=kind))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []


def droppable(
    block: nn.Module, groups: Sequence[tuple[str, ...]], hidden: Tensor, kwargs: Kwargs
) -> dict[int, frozenset[Key]]:
    """Which locals of the stopped frames are dead at each stop, found by trying.

    The block runs on a short input with those tensors replaced by NaN; a key is kept only if the
    output stays bit for bit the same. Control flow of a block does not depend on values (which
    experts run does, but no stopped frame is theirs), so what is dead for this input is dead for
    every input of the same number of dimensions.

    Args:
        block, groups: as for `BlockWalk`.
        hidden: [1, t, hidden], any short t; kwargs: what the block takes beside it.
    """

    def output(stop: int, keys: Collection[Key] | None) -> tuple[Tensor, set[Key]]:
        """The block's output with `keys` (all, if None) poisoned at a stop, and the keys there."""
        walk = BlockWalk(block, groups)
        batch = _Batch(walk, False, hidden.clone(), kwargs)
        undo = walk._replace_forwards()
        there: set[Key] = set()
        try:
            with torch.inference_mode():
                for i, stage in enumerate(walk.stages):
                    batch.advance()
                    if i == stop:
                        there = set(batch.locals)
                        for key in there if keys is None else keys:
                            batch.locals[key].data = torch.full_like(batch.locals[key], torch.nan)
                    batch.locals = {}
                    if stage.experts is not None:
                        assert batch.x is not None and batch.routing is not None
                        batch.answer = Experts.forward(stage.experts, batch.x, *batch.routing)
                    for name in stage.names:
                        walk._solved[name] = linear_of(block, name).weight
                out = batch.advance()
        finally:
            undo()
        assert out is not None
        return out, there

    want, _ = output(-1, ())
    dead = {}
    for stop in range(len(BlockWalk(block, groups).stages)):
        got, keys = output(stop, None)
        if not torch.equal(got, want):
            keys = {k for k in keys if torch.equal(output(stop, [k])[0], want)}
        dead[stop] = frozenset(keys)
    return dead


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
        groups: from `shared_inputs`.
        residual: linears that write to the residual stream: with two streams the difference of the
            residual they are added to is gathered too. That residual is the input of the block's
            last norm before the linear, for every Qwen.
        residual_share: of that difference, what counts.
        holder: where suspended activations live.
        hold_dtype: linear inputs, the residual stream (the inputs of the block's own norms) and
            the outputs are rounded to this dtype, as in a model of that dtype, which also halves
            what is held in float32; None keeps them as they are.
        drops: from `droppable`; without it stopped frames keep all their locals.
        expert_tokens: per input of an expert, what it needs for a Hessian of its own (`experts`).
        add_up: adds what other walks through the same block have of it, each with its own part of
            the batches; all of them call it for the same things in the same order.
        places: where the batches are among those of all walks (for experts); None where all are
            here.
        unit: samples whose products are made apart, so that the size of a batch changes no bit
            (`batching.py`); None multiplies a batch as a whole.

    Attributes:
        stages: where batches stop, in order.
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
        expert_tokens: float = 1.0,
        add_up: AddUp = lambda _: None,
        places: Places | None = None,
        unit: int | None = None,
    ) -> None:
        self.block, self.groups = block, list(groups)
        self.stages = stages_of(block, groups)
        self._expert_tokens = expert_tokens
        self._residual, self._residual_share = residual, residual_share
        self.holder = holder or Holder(host_budget=2**62)
        self.hold_dtype = hold_dtype
        self._drops = drops or {}
        self._add_up, self._places = add_up, places
        first = linear_of(block, self.groups[0][0]).weight
        self.dtype, self.device = first.dtype, first.device
        self.unit = unit
        self._group_of = {n: i for i, group in enumerate(self.groups) for n in group}
        self._tidy = Tidy()
        self._solved: dict[str, Tensor] = {}
        self._original: dict[str, Tensor] = {}  # what the full-precision stream multiplies by
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
            solve: gets an `Arrival`, returns the quantized weight of each of its linears in the
                compute dtype.
            last: nobody needs the outputs: what follows the last linear's input is not computed
                and `hidden` is left empty.
        """
        undo = self._replace_forwards()
        batches: list[list[_Batch | None]] = []
        try:
            with torch.inference_mode():
                batches += [
                    [
                        _Batch(self, s == 1, h, k) if h.numel() else None
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
                        self._forget(self.stages[i - 1].names)
                    if stage.experts is None:
                        solved = solve(self._gathered(stage.names, self._stats))
                        self._solved.update({name: packed(w) for name, w in solved.items()})
                        del self._stats, solved
                        if len(hidden) == 2 and not end:
                            self._pack_originals(stage.names)
                    self._tidy()
                for b, batch in enumerate(batches[0] if not last else ()):
                    assert batch is not None
                    hidden[0][b] = self._finish(batch)
                self._forget(self.stages[-1].names)
        finally:
            for stopped in (batch for stream in batches for batch in stream if batch):
                stopped.throw()  # ends it: frames that nobody resumes are never collected
            undo()

    def _gathered(
        self, names: tuple[str, ...], stats: Hessian, flags: tuple[str, ...] = ()
    ) -> Arrival:
        self.holder.trim()
        self.hessian_flops += stats.flops
        stats.add_up(self._add_up)
        return Arrival(names, *stats.result(), stats.tokens, flags)

    def _at_experts(
        self,
        batches: list[list[_Batch | None]],
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
            solved = solve(self._gathered(names, stats, flags))
            self._tidy()
            return solved

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

    def _visit(self, batch: _Batch, index: int) -> Visit:
        """Brings one batch to the experts, where it waits."""
        self._advance(batch, self.stages[index].prefix)
        assert batch.x is not None and batch.routing is not None
        visit = Visit(batch.x, *batch.routing)
        batch.rest(self._drops.get(index, frozenset()))
        self._tidy()
        return visit

    def _advance(self, batch: _Batch, to: str) -> None:
        if batch.advance() is not None or batch.x is None:
            raise RunError("walk", expected=f"the block to call {to}", got="the block's end")
        if self.hold_dtype is not None:
            batch.round_input(self.hold_dtype)

    def _arrive(
        self,
        batches: list[list[_Batch | None]],
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
        if finished is not None:
            self._pack_originals(group)
        ahead = finished is not None and self._known_ahead(group)
        self._stats = Hessian(
            int(weights[0].shape[1]),
            weights[0].device,
            weights=weights if two else (),
            residual=wants_residual,
            outputs=ahead,
        )
        # The full-precision stream goes first, if there is one.
        for b, both in enumerate(zip(*reversed(batches), strict=True)):
            pair = [batch for batch in both if batch is not None]
            for batch in pair:
                self._advance(batch, group[0])
            quantized = pair[-1]
            assert quantized.x is not None
            difference = None
            if wants_residual and len(pair) == 2:
                difference = pair[0].residual - quantized.residual
                if self._residual_share != 1:
                    difference = difference * self._residual_share
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
                    batch.rest(dead)
            del both, pair, batch, quantized, full, difference  # what is dropped here is free
            self._tidy()
        started = time.perf_counter()
        self._stats.settle()
        self.hessian_seconds += time.perf_counter() - started

    def _known_ahead(self, group: tuple[str, ...]) -> bool:
        """Whether the full-precision stream's output serves the sums too (see `Hessian`).

        Only in float32 that is not rounded: what counts is the small difference of two large sums.
        """
        first = linear_of(self.block, group[0])
        return (
            len(group) == 1
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

    def _finish(self, batch: _Batch) -> Tensor:
        """Runs a batch to the end of the block; its output, where outputs wait for the next."""
        out = batch.advance()
        if out is None:
            raise RunError("walk", expected="the block to end", got="a linear called again")
        batch.input = batch.residual = None
        self._tidy()
        dtype = self.hold_dtype or out.dtype
        return self.holder.output(out, dtype, batch._kind("residual"))

    def _pack_originals(self, group: tuple[str, ...]) -> None:
        """Before the full-precision stream goes through a group."""
        for name in group:
            self._original[name] = packed(linear_of(self.block, name).weight)

    def _forget(self, group: tuple[str, ...]) -> None:
        """Every batch is past the group: its weights are not needed any more."""
        for name in group:
            self._original.pop(name, None)
            if self._solved.pop(name, None) is None:
                continue  # an expert's, which is gone already
            linear = linear_of(self.block, name)
            linear.weight = nn.Parameter(
                torch.empty(linear.weight.shape, device="meta"), requires_grad=False
            )

    def _replace_forwards(self) -> Callable[[], None]:
        undo: list[Callable[[], None]] = []
        for stage in self.stages:
            if stage.experts is not None:
                stage.experts.__dict__["forward"] = _stop_at_experts
                undo.append(partial(stage.experts.__dict__.pop, "forward", None))
                owner = self.block.get_submodule(stage.prefix.rpartition(".")[0])
                undo.append(owner.register_forward_pre_hook(_round_in_place).remove)
                continue
            for name in stage.names:
                linear = linear_of(self.block, name)
                linear.__dict__["forward"] = self._stopping_forward(name, linear)
                undo.append(partial(linear.__dict__.pop, "forward", None))
        for child in self.block.children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:  # the block's own norms
                undo.append(child.register_forward_pre_hook(_remember_residual).remove)

        def run_all() -> None:
            for step in undo:
                step()

        return run_all

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
            assert isinstance(batch, _Batch)
            if name not in self._solved and not batch.free:
                if name != leader:
                    raise RunError(
                        "walk", expected=f"{leader} to be called before {name}", got=name
                    )
                batch.stop(x)
                if name not in self._solved and not batch.free:
                    raise RunError("walk", expected=f"a solved weight for {name}", got="none")
            if batch.output is not None:
                out, batch.output = batch.output, None
                return out
            if batch.full:
                weight = self._original.get(name, linear.weight)
            else:
                weight = self._solved[name]
            self.linear_flops += 2 * x.numel() * weight.shape[0]
            return self._product(x, weight, linear.bias)

        return forward


def _remember_residual(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
    batch = getcurrent()
    if isinstance(batch, _Batch):
        batch.residual = args[0]
        # The block's input is rounded already: it was kept that way.
        if batch.walk.hold_dtype is not None and args[0] is not batch.input:
            args[0].copy_(args[0].to(batch.walk.hold_dtype))


def _round_in_place(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """What router and experts are handed: the router is to choose by what the experts get."""
    batch = getcurrent()
    if isinstance(batch, _Batch) and batch.walk.hold_dtype is not None:
        args[0].copy_(args[0].to(batch.walk.hold_dtype))


def _stop_at_experts(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    batch = getcurrent()
    assert isinstance(batch, _Batch)
    return batch.stop_at_experts(x, index, weights)
