"""What the walk does at a block's experts: each is solved on the tokens that are routed to it.

All batches stand in front of the experts at once, each with its input, the router's choice and its
weights. Experts do not depend on each other, so they are solved one after another and only one has
its Hessians in memory: its rows are picked out of every batch, gate and up are solved on them, the
rows go through the quantized gate and up, down is solved on the result, and what comes out is added
to each batch's sum, in the order that the block itself would. When the last expert is done the
batches go on with their sums.

Experts that see few tokens. A Hessian of fewer rows than inputs says nothing about most directions,
so an expert with fewer tokens of its own than `expert_tokens` times the block's hidden size is
given other tokens of the same batches to make up the number, evenly spread over those that were not
routed to it: the layer's own distribution fills in what the expert's tokens leave open, and weighs
the less the more of its own the expert has. Such an expert is named (`few-tokens:N` in its flags).
Its output in the run is of its own tokens only.

With a full-precision stream beside the quantized one, either routes by its own router. An expert's
corrections are gathered from the tokens that both streams send to it, and left out where these are
fewer than the same number. One with enough tokens of its own is then named (`correction-skipped`).

A walk may have a part of the batches only, and others the rest (`walk.BlockWalk`). Whatever depends
on a number of tokens goes by that of all walks, and the tokens that help out are spread over all:
so how many each batch sends to each expert is exchanged first. Then every walk goes through every
expert, with or without tokens for it.

Left out on purpose: the residual's correction. An expert's output reaches the residual stream only
by its weight, next to the others'; what the stream lacks is not any one expert's to give back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..hessian import AddUp, Hessian
from ..models.experts import Expert, Experts, routed
from .hold import Held, Holder

_ROWS = 4096  # of one expert, gathered over batches before they are multiplied

# Rows [n, K] of one batch; the full-precision stream's for some of them; which those are.
Rows = tuple[Tensor, Tensor | None, Tensor | None]
Solve = Callable[[tuple[str, ...], Hessian, tuple[str, ...]], Mapping[str, Tensor]]


@dataclass
class Visit:
    """One batch in front of the experts.

    Attributes:
        x: [tokens, hidden], wherever it is held.
        index, weights: [tokens, k], the router's.
        out: [tokens, hidden], the sum of the experts so far; None where nobody needs it.
    """

    x: Tensor
    index: Tensor
    weights: Tensor
    out: Tensor | None = None
    held: Held | None = None
    routes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def chosen(self, experts: int) -> Tensor:
        """[tokens, experts] bool: which go where."""
        none = torch.zeros(len(self.index), experts, dtype=torch.bool, device=self.index.device)
        return none.scatter_(1, self.index, True)

    def take(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Those rows of `x`, on the device and in the dtype of `like`."""
        return self.x[tokens.to(self.x.device)].to(like.device, like.dtype)

    def add(self, tokens: Tensor, ranks: Tensor, rows: Tensor) -> None:
        """Adds an expert's output, [n, hidden], for those tokens."""
        if self.out is not None:
            rows = (rows * self.weights[tokens, ranks, None]).to(self.out)
            self.out.index_add_(0, tokens.to(self.out.device), rows)


@dataclass(frozen=True)
class Places:
    """Where a walk's batches are among those of all walks through the same block.

    Attributes:
        first: by batch, the number of its first sample.
        samples: of all.
    """

    first: Sequence[int]
    samples: int


class ExpertsWalk:
    """Solves the experts of one block.

    Args:
        experts: the module; its weights are replaced by the solved ones and then dropped.
        prefix: its name inside the block.
        quantized: of every batch.
        full: of the full-precision stream, None where it leaves a batch out; empty for one stream.
        least: tokens that an expert needs, see above.
        holder, hold_dtype: as for `walk.BlockWalk`.
        solve: gets linears' names inside the block, what was gathered of their input, and flags;
            returns the quantized weights.
        outputs: whether somebody needs the experts' output.
        add_up, places: as for `walk.BlockWalk`.

    Attributes:
        total: tokens of all walks.
        hessian_seconds, linear_flops: as in `walk.BlockWalk`.
    """

    def __init__(
        self,
        experts: Experts,
        prefix: str,
        quantized: Sequence[Visit],
        full: Sequence[Visit | None],
        *,
        least: int,
        holder: Holder,
        hold_dtype: torch.dtype | None,
        solve: Solve,
        outputs: bool,
        add_up: AddUp = lambda _: None,
        places: Places | None = None,
    ) -> None:
        self.experts, self.prefix = experts, prefix
        self.quantized, self.full = quantized, full or [None] * len(quantized)
        self.holder, self.hold_dtype, self.solve = holder, hold_dtype, solve
        self.hessian_seconds = 0.0
        self.linear_flops = 0
        for visit in (*quantized, *(v for v in self.full if v is not None)):
            visit.routes = routed(visit.index, len(experts))
            if outputs:
                like = next(experts.parameters())
                visit.out = torch.zeros(visit.x.shape, dtype=like.dtype, device=like.device)
                visit.held = holder.hold(visit.out)
        self.places = places or Places(range(len(quantized)), len(quantized))
        self._count(add_up)
        self.least = min(least, self.total)

    def run(self) -> None:
        """Every expert in turn; `out` of every visit is then its sum, where it was computed."""
        for number, expert in enumerate(self.experts):
            assert isinstance(expert, Expert)
            self._one(number, expert)
        for visit in (*self.quantized, *(v for v in self.full if v is not None)):
            if visit.held is not None:
                visit.held.restore()
                visit.held = None

    def _count(self, add_up: AddUp) -> None:
        """How many tokens go where, of all walks."""
        count = len(self.experts)
        # By place: sent to each expert, and not sent there. Where no batch begins there are none.
        self._sent = torch.zeros(self.places.samples, count, dtype=torch.int32)
        self._free = torch.zeros_like(self._sent)
        both = torch.zeros(count, dtype=torch.int64)
        for place, visit, other in zip(self.places.first, self.quantized, self.full, strict=True):
            self._sent[place] = torch.tensor([tokens.numel() for tokens, _ in visit.routes])
            self._free[place] = visit.x.shape[0] - self._sent[place]
            if other is not None:
                both += (visit.chosen(count) & other.chosen(count)).sum(0).cpu()
        add_up([self._sent, self._free, both])
        self.total = int(self._sent[:, 0].sum() + self._free[:, 0].sum())
        self._both: list[int] = both.tolist()

    def _one(self, number: int, expert: Expert) -> None:
        routes = [visit.routes[number] for visit in self.quantized]
        own = int(self._sent[:, number].sum())
        few = own < self.least
        others = self._others(number, self.least - own) if few else []
        twins = self._full_stream(number, expert)
        correct = not few and self._both[number] >= max(1, self.least)
        if few:
            flags: tuple[str, ...] = (f"few-tokens:{own}",)
        elif not own:
            flags = ("no-tokens",)
        else:
            flags = ("correction-skipped",) if any(self._both) and not correct else ()
        like = expert.gate_proj.weight

        def inputs() -> Iterator[Rows]:
            for visit, (tokens, _), other, twin in zip(
                self.quantized, routes, self.full, twins, strict=True
            ):
                x = visit.take(tokens, like)
                if correct and other is not None and twin is not None:
                    yield x, other.take(tokens[twin.mine], like), twin.mine
                else:
                    yield x, None, None
            for visit, tokens in zip(self.quantized, others, strict=False):
                yield visit.take(tokens, like), None, None

        self._solve(number, expert, ("gate_proj", "up_proj"), inputs(), correct, flags)
        inner = [
            self._inner(expert, visit.take(tokens, like))
            for visit, (tokens, _) in zip(self.quantized, routes, strict=True)
        ]
        more = [
            self._inner(expert, visit.take(tokens, like))
            for visit, tokens in zip(self.quantized, others, strict=False)
        ]

        def inners() -> Iterator[Rows]:
            for held, twin in zip(inner, twins, strict=True):
                y = _back(held, like)
                if correct and twin is not None:
                    yield y, _back(twin.inner, like)[twin.its], twin.mine
                else:
                    yield y, None, None
            for held in more:
                yield _back(held, like), None, None

        self._solve(number, expert, ("down_proj",), inners(), correct, flags)
        for visit, (tokens, ranks), held in zip(self.quantized, routes, inner, strict=True):
            if visit.out is not None:
                visit.add(tokens, ranks, self._down(expert, _back(held, like)))
        for held in (*inner, *more, *(twin.inner for twin in twins if twin is not None)):
            held.forget()
        expert.to_empty(device="meta")

    def _others(self, number: int, count: int) -> list[Tensor]:
        """Those of `count` tokens of all walks that are here, by batch.

        The tokens are not the expert's, and evenly spread over all that are not.
        """
        picked = []
        ends = self._free[:, number].cumsum(0).tolist()
        every = ends[-1]
        for place, visit in zip(self.places.first, self.quantized, strict=True):
            mask = torch.ones(visit.x.shape[0], dtype=torch.bool, device=visit.index.device)
            mask[visit.routes[number][0]] = False
            tokens, after = mask.nonzero().squeeze(1), ends[place]
            before = after - tokens.numel()
            start, stop = -(-before * count // every), -(-after * count // every)
            at = torch.arange(start, stop, device=tokens.device) * every // count
            picked.append(tokens[at - before])
        return picked

    def _full_stream(self, number: int, expert: Expert) -> list[_Twin | None]:
        """The expert on the full-precision stream's own rows, its output added where needed."""
        twins: list[_Twin | None] = []
        like = expert.gate_proj.weight
        for visit, other in zip(self.quantized, self.full, strict=True):
            if other is None:
                twins.append(None)
                continue
            tokens, ranks = other.routes[number]
            held = self._inner(expert, other.take(tokens, like))
            if other.out is not None:
                other.add(tokens, ranks, self._down(expert, _back(held, like)))
            place = torch.full((other.x.shape[0],), -1, device=tokens.device)
            place[tokens] = torch.arange(tokens.numel(), device=tokens.device)
            at = place[visit.routes[number][0]]
            mine = (at >= 0).nonzero().squeeze(1)
            twins.append(_Twin(held, mine, at[mine]))
        return twins

    def _inner(self, expert: Expert, x: Tensor) -> Held:
        """What `down_proj` is handed for rows `x`, rounded and put where it can wait."""
        self.linear_flops += 2 * x.numel() * 2 * expert.gate_proj.out_features
        return self.holder.hold(expert.inner(x), dtype=self.hold_dtype)

    def _down(self, expert: Expert, y: Tensor) -> Tensor:
        self.linear_flops += 2 * y.numel() * expert.down_proj.out_features
        out: Tensor = expert.down_proj(y)
        return out

    def _solve(
        self,
        number: int,
        expert: Expert,
        leaves: tuple[str, ...],
        rows: Iterable[Rows],
        correct: bool,
        flags: tuple[str, ...],
    ) -> None:
        """Gathers the Hessian of the linears' input, has them solved and gives them the result."""
        weights = [getattr(expert, leaf).weight for leaf in leaves]
        inputs = int(weights[0].shape[1])
        stats = Hessian(inputs, weights[0].device, weights=weights if correct else ())
        waiting: list[Rows] = []

        def flush() -> None:
            started = time.perf_counter()
            for pair in (True, False):
                group = [r for r in waiting if (r[2] is not None) == pair]
                if group:
                    x, full, paired = _joined(group)
                    stats.add(x, full, paired=paired)
            waiting.clear()
            self.hessian_seconds += time.perf_counter() - started

        for part in rows:
            waiting.append(part)
            if sum(x.shape[0] for x, _, _ in waiting) >= _ROWS:
                flush()
        flush()
        names = tuple(f"{self.prefix}.{number}.{leaf}" for leaf in leaves)
        solved = self.solve(names, stats, flags)
        for name, leaf in zip(names, leaves, strict=True):
            expert.get_submodule(leaf).weight = nn.Parameter(solved[name], requires_grad=False)


@dataclass(frozen=True)
class _Twin:
    """The full-precision stream's rows of an expert, in one batch.

    Attributes:
        inner: [n, I], what its `down_proj` is handed.
        mine: which of the quantized stream's rows are of the same tokens.
        its: which of its own rows those are.
    """

    inner: Held
    mine: Tensor
    its: Tensor


def _back(held: Held, like: Tensor) -> Tensor:
    """The values on hold, on the device and in the dtype of `like`; they stay on hold."""
    return held.tensor.to(like.device, like.dtype)


def _joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several batches as one: all paired, or none."""
    x = torch.cat([p[0] for p in parts])
    full = [p[1] for p in parts if p[1] is not None]
    if not full:
        return x, None, None
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part[0].shape[0])
    at = [p[2] + start for p, start in zip(parts, starts, strict=False) if p[2] is not None]
    return x, torch.cat(full), torch.cat(at)
