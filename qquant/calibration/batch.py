"""One batch of one stream on its way through a block, and what stops it.

A batch is a greenlet that runs the block's forward. In front of a linear (or experts) whose
quantized weight is not known yet it stops, gives up what it keeps alive, and later goes on from
there. The hooks here run inside that forward and find their batch as the current greenlet.

In front of a block's last linear it may give up even that linear's input, several times as wide as
all else it keeps, and make it again from the residual stream (`Recompute`): the same operations on
the same numbers, so the same bits.

Left out on purpose: who runs when, and what is gathered at a stop (`walk.py`); when there is too
little room to keep an input (`hold.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from .. import fused, pool
from ..errors import RunError
from ..scratch import scratch
from .hold import Held, Holder

Kwargs = Mapping[str, Any]
Key = tuple[int, str]  # how many frames below the block's call, and the local's name
Drops = Mapping[int, frozenset[Key]]  # by the index of the stage a batch stands in front of
INPUT: Key = (-1, "input")


@dataclass(frozen=True)
class Home:
    """What all batches on their way through one block share.

    Attributes:
        block: whose forward they run, on `device` in `dtype`.
        holder: where they wait. hold_dtype: what is kept is rounded to it; None for `dtype`.
    """

    block: nn.Module
    device: torch.device
    dtype: torch.dtype
    holder: Holder
    hold_dtype: torch.dtype | None


@dataclass(frozen=True)
class Recompute:
    """How the input of a block's last linear follows from the residual stream.

    Attributes:
        norm: the block's norm that reads the residual.
        inner: the module that is handed what the norm gives, and calls the linear.
        linear: that linear.
    """

    norm: str
    inner: str
    linear: str


class Batch(greenlet):  # type: ignore[misc, unused-ignore]
    """One batch of one stream on its way through the block."""

    def __init__(self, home: Home, full: bool, hidden: Tensor, kwargs: Kwargs) -> None:
        super().__init__(self._forward)
        self.home, self.full = home, full
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
        self.again: Recompute | None = None  # how x, which was given up, is made again

    def _forward(self) -> Tensor:
        assert self.hidden is not None
        # An object of its own, whose storage can be swapped: the streams begin with the same ones.
        self.input = pool.moved(self.hidden, self.home.device, self.home.dtype).detach()
        self.hidden = None
        out = self.home.block(self.input, **self.kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def advance(self) -> Tensor | None:
        """Runs to the next unsolved linear (None) or to the end (the block's output)."""
        for held in self.held:
            held.restore()
        self.held, self.locals = [], {}
        if self.again is not None:
            assert self.x is not None
            self.x.data = self._recomputed(self.again)
            self.again = None
        self.x = self.rounded = self.routing = None
        out = self.switch()
        return out if self.dead else None

    def _recomputed(self, how: Recompute) -> Tensor:
        assert self.residual is not None
        side = _Recomputing(self, how)
        side.switch()
        side.throw()
        if side.x is None:
            raise RunError("walk", expected=f"{how.inner} to call {how.linear}", got="its end")
        return side.x

    def meet(self, linear: str, x: Tensor) -> None:
        """Called in front of each group's first linear, with what it is handed."""

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
        found = {INPUT: self.input} if self.input is not None else {}
        frame: FrameType | None = sys._getframe(frames)
        depth = 0
        while frame is not None and frame.f_code is not Batch._forward.__code__:
            for name, value in frame.f_locals.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    found[depth, name] = value
            frame, depth = frame.f_back, depth + 1
        return {k: t for k, t in found.items() if id(t) not in needed | shared}

    def kind(self, what: str) -> tuple[str, bool]:
        """For the holder: a residual outlives the inputs beside it, and streams differ, too."""
        return what, self.full

    def round_input(self, dtype: torch.dtype) -> None:
        """Rounds the linear's input, in place for whoever else holds the tensor."""
        assert self.x is not None
        if self.x.device.type == "cpu":
            self.rounded = self.home.holder.round(self.x, dtype, self.kind("input"))
            return
        self.rounded = self.x.to(dtype)
        if self.x.dtype != dtype:
            self.x.copy_(self.rounded)

    def rest(self, dead: frozenset[Key], again: Recompute | None = None) -> None:
        """Drops what nothing needs any more and puts on hold what this batch keeps alive.

        Args:
            again: how the input it stands with can be made again, where there is no room for it.
        """
        for key in dead & self.locals.keys():
            self.locals[key].data = self.locals[key].new_empty(0)
        self.locals = {}
        holder, dtype = self.home.holder, self.home.hold_dtype
        if self.x is not None:
            size = self.x.numel() * (dtype or self.x.dtype).itemsize
            placed = self.rounded is not None and self.rounded.device.type == "cpu"
            if again is not None and not holder.has_room(size, 0 if placed else size):
                self.again = again
                self.x.data = self.x.new_empty(0)
            else:
                self.held.append(holder.hold(self.x, self.rounded, kind=self.kind("input")))
            self.rounded = None
        if self.residual is not None and self.residual is not self.x:
            # Rounded when it was remembered, so that the smaller dtype loses nothing.
            kind = self.kind("residual")
            self.held.append(holder.hold(self.residual, dtype=dtype, kind=kind))


class _Recomputing(Batch):
    """Runs the end of another batch's forward once more, up to the block's last linear."""

    def __init__(self, batch: Batch, how: Recompute) -> None:
        assert batch.residual is not None
        super().__init__(batch.home, batch.full, batch.residual, {})
        self.how = how

    def _forward(self) -> Tensor:
        block, residual = self.home.block, self.hidden
        normed = block.get_submodule(self.how.norm)(residual)
        inside: Tensor = block.get_submodule(self.how.inner)(normed)
        return inside

    def meet(self, linear: str, x: Tensor) -> None:
        dtype = self.home.hold_dtype
        if dtype is not None:  # as `round_input` did
            _round(x, dtype, move=False)
        if linear == self.how.linear:
            self.x = x
            assert self.parent is not None
            self.parent.switch()  # and never comes back

    def stop(self, x: Tensor, frames: int = 2) -> None:
        raise RunError("walk", expected="the weights in front of the last linear", got="none")


def _round(x: Tensor, dtype: torch.dtype, *, move: bool = True) -> None:
    """Rounds it for whoever holds the tensor.

    Args:
        move: into other storage, where that is made in the same pass: out of glibc's heap, in whose
            holes nothing should lie for long (`pool.py`).
    """
    if fused.narrows(x, dtype) and not fused.unavailable():
        wide = pool.empty(*x.shape) if move else x
        fused.narrow(x, scratch("rounded", dtype, x.numel()), wide)
        x.data = wide
    elif x.dtype != dtype:
        x.copy_(x.to(dtype))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []


def remember_residual(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
    batch = getcurrent()
    if isinstance(batch, Batch):
        batch.residual = args[0]
        # The block's input is rounded already: it was kept that way.
        if batch.home.hold_dtype is not None and args[0] is not batch.input:
            _round(args[0], batch.home.hold_dtype)


def round_in_place(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """What router and experts are handed: the router is to choose by what the experts get."""
    batch = getcurrent()
    if isinstance(batch, Batch) and batch.home.hold_dtype is not None:
        _round(args[0], batch.home.hold_dtype)


def stop_at_experts(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    batch = getcurrent()
    assert isinstance(batch, Batch)
    return batch.stop_at_experts(x, index, weights)
