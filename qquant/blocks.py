"""The long part of a run: block after block is read, walked, solved, packed, written and committed.

One block's weights, its activations and one Hessian are in memory at a time (on a GPU the next
block's weights, too, on the host: `overlap.py`). After each block its tensors are at their final
place in the shards and the activations that the next one begins with are all that is needed to go
on; the journal keeps both (`journal.py`), so a run that ended early begins here again with the
first block that is not done.

Several processes share the work: each walks its own units of samples and solves its own rows, and
both are put together by `World`, which is handed in.

Left out on purpose: order within a block (`calibration/walk.py`), numbers (`gptq.py`), bits
(`pack.py`), and everything before and after the blocks (`convert.py`).
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import compressed, compressed_layout, gptq, pool
from .batching import Batching
from .calibration.experts import Places
from .calibration.hold import Holder
from .calibration.probe import droppable, recomputable, shared_inputs
from .calibration.walk import Arrival, BlockWalk, linear_of
from .checkpoint import tensor_sha256
from .columns import choose
from .config import OutputSpec, QuantSpec
from .errors import RunError
from .events import BlockDone, Event, LinearDone
from .grid import Quantized
from .heap import Tidy
from .journal import Journal
from .models.shapes import held_dtype
from .models.skeleton import Skeleton
from .overlap import Ahead, Later, overlaps
from .pack import V1, pack
from .report import flag_rows, human_bytes
from .shards import ShardWriter
from .timings import Clock, attention_flops
from .unquantized import cast
from .world import ALONE, World

_BEGUN = ("residual", False)  # to the holder, as `Batch.kind` says it
_PROBE = 16  # tokens that show which linears share an input


class Blocks:
    """The blocks of one run.

    Args:
        skeleton: of the source, whose blocks it loads one by one.
        writer: gets every tensor of the blocks' linears, packed; None in a rank that does not
            write.
        quant, out: what to do.
        bits: of the linears that do not have the spec's, by full name.
        journal: keeps what is done; says where to begin.
        clock, tell, warn: time, events and what a user should know go there.
        world: the processes that share the work.
        solved: called once all tensors are written and nothing is left to compute, before the last
            of them are durable.

    Attributes:
        layers: one entry per quantized linear, in the order they were solved.
        written: hashes of the packed tensors, to read them back by.
        spilled_bytes: most activations that were in spill files at one time.
        recomputed: of the inputs of the blocks' last linears, the part made again instead of kept.
        columns: the form of the solver's column loop (see `columns`); "" before a walk.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        writer: ShardWriter | None,
        quant: QuantSpec,
        out: OutputSpec,
        *,
        bits: Mapping[str, int],
        journal: Journal,
        clock: Clock,
        tell: Callable[[Event], None],
        warn: Callable[[str], None],
        world: World = ALONE,
        solved: Callable[[], None] = lambda: None,
    ) -> None:
        self._solved = solved
        self.skeleton, self.writer, self.quant, self.out = skeleton, writer, quant, out
        self.source, self.family = skeleton.checkpoint, skeleton.family
        self.bits, self.journal, self.clock = bits, journal, clock
        self.tell, self.warn, self.world = tell, warn, world
        self.layers = [_layer(row) for row in journal.facts.get("layers", ())]
        self.written: dict[str, str] = dict(journal.facts.get("written", {}))
        self.spilled_bytes, self.recomputed = 0, 0.0
        self.columns = ""
        self._joining = 0.0  # seconds of exchanges within solves
        self._count = len(skeleton.blocks)
        apart = overlaps(skeleton.device.type)
        self._read, self._later = Ahead(skeleton.read, threaded=apart), Later(threaded=apart)
        self._probed: dict[Any, dict[str, Any]] = {}  # of a block's form, for `BlockWalk`

    def walk(self, ids: Tensor, holder: Holder) -> None:
        """Quantizes all blocks, calibrated with `ids` [samples, seqlen] int64.

        Where the memory of an accelerator runs out, goes on from the last block that was kept, with
        smaller batches and nothing waiting on the device; the result is the same.

        Args:
            holder: where activations wait.

        Raises:
            RunError: the smallest batch does not fit either.
        """
        self.columns, why = choose(self.skeleton.device)
        if why:
            self.warn(f"The solver's column loop runs without its kernel, slower: {why}")
        try:
            kind, seqlen = self.skeleton.device.type, ids.shape[1]
            self._walk(ids, holder, Batching.of(kind, seqlen, self.quant.streams))
        finally:
            self._end()

    def _walk(self, ids: Tensor, holder: Holder, batching: Batching) -> None:
        while True:
            try:
                return self._walk_from(self.journal.block or 0, ids, holder, batching)
            except torch.OutOfMemoryError as error:
                said = str(error).partition(". ")[0]
            if self.world.seat.size > 1:  # the others stand in the middle of the block
                raise RunError(
                    f"memory of {self.skeleton.device}",
                    expected=f"room for batches of {batching.batch * ids.shape[1]} tokens",
                    got=said,
                    cure="Several processes do not make them smaller by themselves: free memory "
                    "there, use a shorter --seqlen, or one process",
                )
            # A mixture's products gather the tokens of a whole batch: its size is kept.
            smaller = None if self.family.experts else batching.smaller()
            if smaller is None and not (holder.device_budget or holder.device_outputs):
                raise RunError(
                    f"memory of {self.skeleton.device}",
                    expected="room for the smallest batch, with nothing waiting there",
                    got=said,
                    cure="Free memory there, use a shorter --seqlen, or --device cpu",
                )
            batching = smaller or batching
            self._give_up(holder, batching, ids.shape[1])

    def _give_up(self, holder: Holder, batching: Batching, seqlen: int) -> None:
        """Back to what the journal has; nothing that a walk left in memory is used again."""
        self._later.drop()
        self._read.forget()
        holder.leave_device()
        gc.collect()
        if self.skeleton.device.type == "cuda":
            torch.cuda.empty_cache()
        facts = self.journal.facts
        self.layers[:] = [_layer(row) for row in facts.get("layers", ())]
        kept = dict(facts.get("written", {}))
        if self.writer is not None:
            self.writer.again(self.written.keys() - kept.keys())
        self.written = kept
        self.warn(
            f"Out of memory on {self.skeleton.device}: going on from block "
            f"{self.journal.block or 0} with batches of {batching.batch * seqlen} tokens, and "
            "activations wait in host memory. This is slower and changes nothing in the result."
        )

    def _walk_from(self, first: int, ids: Tensor, holder: Holder, batching: Batching) -> None:
        hold_dtype = hold_dtype_of(self.skeleton)
        with self.clock("read"):
            streams = self._begin(ids, hold_dtype or self.skeleton.dtype, holder, batching)
            probe = self.skeleton.embed(ids[:1, :_PROBE]).to(self.skeleton.device)
        places = self._places(len(ids), streams[0], batching)
        tidy = Tidy()
        for index in range(first, self._count):
            start = time.perf_counter()
            shapes = [b.shape[:2] for b in streams[0]]
            kwargs = [self.skeleton.block_kwargs(*shape)[index] for shape in shapes]
            with self.clock("read"):
                block = self._load(index)
            try:
                form = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
                if form not in self._probed:  # blocks of one shape run the same code
                    short = self.skeleton.block_kwargs(*probe.shape[:2])[index]
                    groups = shared_inputs(block, self.skeleton.linears[index], probe, short)
                    self._probed[form] = {
                        "groups": groups,
                        "drops": droppable(block, groups, probe, short),
                        "again": recomputable(block, groups, probe, short),
                    }
                walk = BlockWalk(
                    block,
                    **self._probed[form],
                    residual=self.family.residual,
                    residual_share=self.quant.correct_residual,
                    holder=holder,
                    hold_dtype=hold_dtype,
                    expert_tokens=self.quant.expert_tokens,
                    add_up=self.world.add_up,
                    places=places,
                    unit=batching.unit,
                    tidy=tidy,
                    int16=self.skeleton.int16,
                )
                self._walk_one(walk, block, index, streams, kwargs)
            finally:
                self.skeleton.drop(index)
            tidy(0)
            if holder.spilled_bytes and not self.spilled_bytes:
                self.warn(
                    f"The activations do not fit in memory: {human_bytes(holder.spilled_bytes)} of "
                    "them wait in a file beside the target, which is slower. Use fewer --samples "
                    "or more --memory to avoid it."
                )
            self.spilled_bytes = holder.spilled_bytes
            self.recomputed = holder.recomputed_share
            self._done(index, start, streams)
        self.clock.parts.pop("solving", None)

    def round(self) -> None:
        """Rounds all blocks to nearest: no calibration, no forward."""
        try:
            for index in range(self.journal.block or 0, self._count):
                start = time.perf_counter()
                block = self._load(index)
                for name in self.skeleton.linears[index]:
                    nothing = Arrival((name,), torch.empty(0), None, None, 0)
                    self._solve_and_write(block, index, nothing)
                self.skeleton.drop(index)
                self._done(index, start, [])
        finally:
            self._end()

    def _load(self, index: int) -> nn.Module:
        block = self.skeleton.load(index, self._read.take(index))
        if index + 1 < self._count:
            self._read.prepare(index + 1)
        return block

    def _end(self) -> None:
        pool.trim()
        try:
            self._read.close()
        finally:
            self._later.close()

    def _begin(
        self, ids: Tensor, dtype: torch.dtype, holder: Holder, batching: Batching
    ) -> list[list[Tensor]]:
        """The streams' batches in front of the first block to do."""
        place = self.skeleton.device if holder.device_outputs else "cpu"
        if self.journal.block:
            kept = batching.split(self.journal.streams(holder.output))
            kept += [[] for _ in range(self.quant.streams - len(kept))]  # where no batch is here
            return [[batch.to(place) for batch in stream] for stream in kept]
        two = self.quant.streams == 2
        order, paired = self._order(len(ids), batching)
        order, paired = batching.share(order, paired, self.world)
        if not len(order):
            return [[] for _ in range(self.quant.streams)]
        width = int(self.skeleton.config.hidden_size)
        all_ids = batching.begin(ids[order], paired if two else None)
        embedded = [holder.empty((*b.shape, width), dtype, _BEGUN) for b in all_ids[0]]
        self.skeleton.embed_into(all_ids[0], embedded)
        embedded = [batch.to(place) for batch in embedded]
        # Both streams begin with the same tensors.
        return [
            [e if b.numel() else e.new_empty(0) for e, b in zip(embedded, stream, strict=True)]
            for stream in all_ids
        ]

    def _order(self, samples: int, batching: Batching) -> tuple[Tensor, int]:
        share = self.quant.correct_share if self.quant.streams == 2 else 1.0
        return batching.order(samples, share)

    def _places(self, samples: int, stream: Sequence[Tensor], batching: Batching) -> Places:
        """Where a stream's batches are in the order of all samples."""
        _, paired = self._order(samples, batching)
        own, _ = batching.share(torch.arange(samples), paired, self.world)
        starts = itertools.accumulate((len(batch) for batch in stream), initial=0)
        return Places([int(own[at]) for at, _ in zip(starts, stream, strict=False)], samples)

    def _walk_one(
        self, walk: BlockWalk, block: nn.Module, index: int, streams: list[Any], kwargs: list[Any]
    ) -> None:
        def solve(arrival: Arrival) -> Mapping[str, Quantized]:
            with self.clock("solving"):
                return self._solve_and_write(block, index, arrival)

        attended = sum(
            attention_flops(self.skeleton.config, *b.shape[:2])
            for stream in streams
            for b in stream
            if b.numel()
        )
        solving = self.clock.parts.get("solving", 0.0)
        exchanging, joining = self.world.seconds, self._joining
        with self.clock("walking"):
            walk.run(streams, kwargs, solve, last=index == self._count - 1)
        walked = self.clock.parts.pop("walking")
        solved = self.clock.parts["solving"] - solving
        self.clock.add("hessian", walk.hessian_seconds, walk.hessian_flops)
        rest = walked - solved - walk.hessian_seconds
        if exchanged := self.world.seconds - exchanging:
            self.clock.add("exchange", exchanged)
            rest -= exchanged - (self._joining - joining)
        self.clock.add("forward", rest, walk.linear_flops + attended)

    def _done(self, index: int, start: float, streams: list[Any]) -> None:
        """The block is written: commits it, unless that would take too much of the time."""
        last = index == self._count - 1
        if last or self.world.first(lambda: self.journal.due(streams)):
            with self.clock("write"):
                self._later.settle()
            if last:
                self._solved()
            with self.clock("commit"):
                facts = {"layers": [asdict(r) for r in self.layers], "written": dict(self.written)}
                self.journal.commit(index + 1, facts, self.writer, [] if last else streams)
        for name, text in flag_rows(row for row in self.layers if row.block == index):
            self.warn(f"{name}: {text}")
        self.tell(BlockDone(index, self._count, time.perf_counter() - start))

    def _solve_and_write(
        self, block: nn.Module, index: int, arrival: Arrival
    ) -> dict[str, Quantized]:
        """Solves the linears of one arrival as one matrix and writes each."""
        started = time.perf_counter()
        linears = [linear_of(block, n) for n in arrival.names]
        rows = [int(m.weight.shape[0]) for m in linears]
        prefix = f"{self.family.blocks}.{index}."
        w = gptq.stacked([m.weight for m in linears])
        spec = replace(self.quant, bits=self._bits_of(prefix + arrival.names[0]))
        # A rank without a row would have nothing to solve; so few are no work to share out either.
        shared = w.shape[0] >= self.world.seat.size
        mine = self.world.share(w.shape[0]) if shared else slice(None)
        with self.clock("solve"):
            solution = gptq.solve(
                w[mine],
                arrival.h if arrival.tokens else None,
                spec,
                cross=arrival.cross,
                pull=None if arrival.pull is None else arrival.pull[mine],
                name=" and ".join(prefix + n for n in arrival.names),
            )
        if shared:
            solution = self._join(solution, w.shape[0])
        seconds = time.perf_counter() - started
        made = dict(zip(arrival.names, solution.split(rows), strict=True))
        losses, norms = (torch.split(t, rows) for t in (solution.row_loss, solution.row_norm))
        for (name, part), loss, norm in zip(made.items(), losses, norms, strict=True):
            self._write_linear(prefix + name, part)
            total, scale = float(loss.sum()), float(norm.sum())
            layer = LinearDone(
                block=index,
                name=prefix + name,
                loss=total,
                rel_error=total / scale if scale > 0 else 0.0,
                damp=solution.damp,
                flags=arrival.flags + solution.flags,
                seconds=seconds * len(part.codes) / sum(rows),
            )
            self.layers.append(layer)
            self.tell(layer)
        return made

    def _join(self, part: gptq.Solution, rows: int) -> gptq.Solution:
        """The solution of all `rows`, from each rank its own.

        Raises:
            RunError: the same Hessian was factored in another way elsewhere.
        """
        before = self.world.seconds
        ways = self.world.collect([part.damp, *part.flags])
        if any(way != ways[0] for way in ways):
            raise RunError(
                "the ranks' processors",
                expected="the same factor of the same Hessian",
                got=f"damping and flags {ways}",
                cure="Run all ranks on machines of one kind",
            )
        solution = replace(
            part,
            codes=self.world.join_rows(part.codes, rows),
            scales=self.world.join_rows(part.scales, rows),
            zeros=self.world.join_rows(part.zeros, rows),
            row_loss=self.world.join_rows(part.row_loss, rows),
            row_norm=self.world.join_rows(part.row_norm, rows),
        )
        self._joining += self.world.seconds - before
        return solution

    def _bits_of(self, name: str) -> int:
        return self.bits.get(name, self.quant.bits)

    def _write_linear(self, name: str, part: Quantized) -> None:
        writer = self.writer
        if writer is None:
            return
        bits, group_size = self._bits_of(name), self.quant.group_size
        with self.clock("pack"):
            packed = pack(*part, bits=bits, group_size=group_size)
        tensors = dict(packed._asdict())
        plain = self.out.format != compressed_layout.METHOD
        if not plain:
            tensors = compressed.parts_of(packed, bits=bits, zero_offset=V1, sym=self.quant.sym)
        dtype = getattr(torch, self.out.dtype)
        if f"{name}.bias" in self.source.tensors:
            tensors["bias"] = cast(f"{name}.bias", self.source.read(f"{name}.bias"), dtype)
        elif plain and self.family.all_biases:
            tensors["bias"] = torch.zeros(len(part.codes), dtype=dtype)

        def write() -> None:
            for kind, tensor in tensors.items():
                here = tensor.cpu()
                self.written[f"{name}.{kind}"] = tensor_sha256(here)
                writer.write(f"{name}.{kind}", here)

        with self.clock("write"):
            self._later(write)


def _layer(row: Mapping[str, Any]) -> LinearDone:
    return LinearDone(**{**row, "flags": tuple(row["flags"])})


def hold_dtype_of(skeleton: Skeleton) -> torch.dtype | None:
    """What activations are rounded to while they wait; None keeps them as they are."""
    held = held_dtype(str(skeleton.dtype).removeprefix("torch."), skeleton.stored_dtype)
    return getattr(torch, held) if held else None
