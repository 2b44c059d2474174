"""How much memory a run needs, and how a limit is kept.

What is alive at the widest moment adds up from the settings and the model's shapes: the process
as it is, one block, the solve of the widest group of linears, one batch's forward, and the
activations that wait for it. Only the last part can be less, so that is what a limit decides: what
is left of it after the rest is the host's budget for waiting activations. Where bits are shared
out, the pass that measures what they are worth (`sensitivity.py`) is over before the walk begins;
it has sums of its own, and the rest is the larger of the two. Beyond that the inputs of
a block's last linear, the widest, are made again instead of kept (`calibration/batch.py`), and what
is still too much goes to files beside the target. Neither changes the result. A limit that the rest
alone would break is refused before the run, with the least that would do.

Without a limit, a CPU keeps as many activations as loading the whole checkpoint would take, which
is what other tools do first, or `KEPT`, or what waits in front of the other linears, whichever is
most.

A run and its dry run take the same sums, and the dry run has no torch: nothing here imports it, but
to ask an accelerator for its memory. What the process itself takes is then a figure (`PROCESS`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from .batching import TOKENS_PER_BATCH, Batching
from .config import QuantSpec
from .errors import SpecError
from .headers import dtype_name, itemsize
from .heap import heap_slack
from .host import available_memory, imports_hqq, resident_bytes, torch_for_cuda
from .models.shapes import Shapes, held_dtype
from .overlap import MOST, overlaps
from .place import Place
from .report import human_bytes

if TYPE_CHECKING:
    from .calibration.hold import Holder

SLACK = 64 << 20  # what no sum foresees
KEPT = 768 << 20  # of waiting activations are kept on the host whatever the size of the model
# Python with torch and transformers loaded, before any weight, and what hqq and a build of torch
# for CUDA add: see `process_bytes`.
PROCESS, _HQQ, _CUDA = 340 << 20, 160 << 20, 350 << 20
# Of one solve: matrices of the inputs' size (Hessian, in order, factor) and of the weight's; inputs
# whose changes are carried on together (`gptq._span`); and of a rounding without a Hessian.
_SQUARES, _WEIGHTS, _SPAN = 3, 6, 512
_ROUNDING = 4
_OPEN = 80 << 20  # slabs that are being filled, one for each kind (`calibration/hold.py`)
# Of the sensitivity pass, as `sensitivity.py` has them: tokens of Hessians and of gradients; rows
# of the head, and tokens, multiplied together. Slabs of three kinds are being filled.
_TOKENS, _GRADIENT_TOKENS, _HEAD_ROWS, _TOGETHER = 16384, 4096, 4096, 256
_MEASURING_OPEN = 48 << 20
_LEFT = 24 << 20  # of it stays in the process: torch's autograd, libraries' buffers (seen: 18 MB)
_TABLE_ROWS = 16384  # of the embedding, read at a time (`models/skeleton.py`)
# Tokens that go backward through a block together; what that takes, in bytes per byte that its
# linears read and write of them (2.9 where it is large; holes that small tensors leave in the heap
# are in `heap_slack` and `SLACK`); matrices of one head's scores.
_BACK, _WAY_BACK, _SCORES = 512, 3, 6


class RoomLike(Protocol):
    """A `Room`, or a `Holder`."""

    @property
    def host_budget(self) -> int: ...
    @property
    def device_budget(self) -> int: ...
    @property
    def device_outputs(self) -> bool: ...
    @property
    def recompute_from(self) -> int: ...


@dataclass(frozen=True)
class MeasuringNeeds:
    """Bytes that measuring the linears' sensitivity takes, before the walk.

    Attributes:
        at_work, reading: as in `MemoryNeeds`.
        waiting: activations between blocks, and inputs of all blocks for the way back.
        batch: of these, what is put away at a time.
    """

    at_work: int
    reading: int
    waiting: int
    batch: int

    def beyond(self, room: RoomLike) -> int:
        """What of it goes to files: whole batches."""
        over = max(0, self.waiting - room.host_budget - room.device_budget)
        return min(self.waiting, over + 2 * self.batch) if over else 0


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes.

    Attributes:
        waiting: activations of all batches of a process at the block's widest stop, the last but
            for mixtures.
        kept: the journal's on the disk, of all processes, those of two commits for a moment.
        at_work: everything else beside the process itself.
        reading: of that, what is on the host even where the work is on an accelerator: what is
            being read and written there, with the next block and the linears that wait to be
            written (`overlap.py`).
        inputs: of what is waiting, the block's last inputs, which can be made again.
        before: activations at the widest stop before that.
        outputs: of all that waits, what waits from block to block.
        measuring: of the sensitivity pass; None where bits are not shared out. All the others are
            of the walk.
    """

    waiting: int
    kept: int
    at_work: int
    reading: int
    inputs: int = 0
    before: int = 0
    outputs: int = 0
    measuring: MeasuringNeeds | None = None

    @property
    def least_at_work(self) -> int:
        """`at_work` of what the run does, whichever has most."""
        return max(self.at_work, self.measuring.at_work if self.measuring else 0)

    @property
    def least_reading(self) -> int:
        """`reading`, likewise."""
        return max(self.reading, self.measuring.reading if self.measuring else 0)

    def recomputed(self, room: RoomLike) -> int:
        """Waiting bytes that are made again instead of kept, but for slabs that are not full."""
        kept = min(room.recompute_from, room.host_budget + room.device_budget)
        return min(self.inputs, max(0, self.waiting - kept))

    def waits(self, room: RoomLike) -> int:
        """Waiting bytes that are left then."""
        return max(self.before, self.waiting - self.recomputed(room))

    def spilled(self, room: RoomLike) -> int:
        """Of those, what goes to files: all outputs, where there is no room for everything."""
        over = max(0, self.waits(room) - room.host_budget - room.device_budget)
        if room.device_budget and not room.device_outputs:  # then outputs wait on the host
            over = max(over, self.outputs - room.host_budget)
        return max(over, self.outputs) if over else 0

    def beyond(self, room: RoomLike) -> int:
        """What is in files at one time, at most: of the walk, or of the pass before it."""
        return max(self.spilled(room), self.measuring.beyond(room) if self.measuring else 0)

    def peaks(self, room: RoomLike, kind: str) -> tuple[int, int]:
        """(On the host, beside the process itself, on the accelerator) at the widest moment.

        Args:
            kind: of the device that is worked on.
        """
        cpu = kind == "cpu"
        waiting = self.waits(room)
        on_device = min(waiting, room.device_budget)
        waits = min(waiting - on_device, room.host_budget)
        if not (cpu or room.device_outputs or self.spilled(room)):
            waits = max(waits, self.outputs)
        host, device = (self.at_work if cpu else self.reading) + waits, self.at_work + on_device
        if (own := self.measuring) is not None:
            on_device = min(own.waiting, room.device_budget)
            waits = min(own.waiting - on_device, room.host_budget)
            host = max(host, (own.at_work if cpu else own.reading) + waits)
            device = max(device, own.at_work + on_device)
        return host, device


@dataclass(frozen=True)
class Room:
    """How many bytes of waiting activations stay where; what is beyond waits in files.

    Attributes:
        host_budget, device_budget, device_outputs, spill_outputs, recompute_from: as in
            `hold.Holder`.
    """

    host_budget: int
    device_budget: int = 0
    device_outputs: bool = False
    spill_outputs: bool = False
    recompute_from: int = 2**62


def process_bytes() -> int:
    """What a run's process takes beside everything that is summed up here.

    In a process that has loaded torch and transformers it is measured; before that it is what was
    measured once on Linux with torch 2.13 and transformers 5.23: 336 MB, and 494 MB where hqq is
    installed, of all extras the one that transformers imports; with torch 2.11 for CUDA 13.0, on a
    machine without a GPU, 852 MB. `benchmarks/estimate.py` and a test hold it against real
    processes.
    """
    more = (_HQQ if imports_hqq() else 0) + (_CUDA if torch_for_cuda() else 0)
    return max(resident_bytes(), PROCESS + more)


def memory_needs(
    shapes: Shapes,
    quant: QuantSpec,
    place: Place,
    samples: int,
    seqlen: int,
    processes: int = 1,
) -> MemoryNeeds:
    """What a process of a run needs.

    Args:
        samples: for calibration, 0 for none. seqlen: tokens of each.
        processes: that share them; the answer is of the one that has most.
    """
    hidden, item, groups = shapes.hidden, itemsize(dtype_name(place.dtype)), shapes.groups
    held = itemsize(dtype_name(held_dtype(place.dtype, shapes.stored) or place.dtype))
    block = shapes.weights * item
    largest = max(n * group.inputs for group in groups for n in group.outputs)
    reading, apart = 2 * largest, 0
    if overlaps(place.kind):
        # What is read ahead, as it is stored, and its pinned copy, which is rounded up; linears
        # that wait to be written, a byte per weight at the most.
        apart = MOST * largest
        reading += 2 * max(item, itemsize(shapes.stored)) * shapes.weights + apart
    if not samples:
        alone = block + 4 * _ROUNDING * largest + apart + heap_slack()
        return MemoryNeeds(0, 0, alone, reading + heap_slack())
    two, widest = quant.streams == 2, shapes.widest
    batching = Batching.of(place.kind, seqlen, quant.streams)
    batch = batching.batch * seqlen
    share = quant.correct_share if two else 0.0
    # In both streams together: of one process, and of all.
    tokens = seqlen * batching.most(samples, share, processes)
    whole = seqlen * batching.most(samples, share, 1)
    solve = sums = 0
    squares = _SQUARES + (two and quant.correct_damp != quant.damp)  # a factor for each
    for group in groups:
        n, k = group.rows, group.inputs
        differ = k * min(n, k) if len(group.outputs) == 1 else k * k
        # What the refinement works with: matrices of a group, and the changes of a span.
        step = quant.group_of(k)
        worked = n * (6 * step + min(k, max(_SPAN, step))) if quant.sweeps else 0
        solve = max(solve, 4 * (squares * k * k + two * differ + _WEIGHTS * n * k + worked))
        sums = max(sums, 4 * (k * k + two * differ))
    forward = batch * (4 * hidden + 3 * widest) * item
    if place.int16:  # inputs as integers, once for linears and twice for sums
        forward += batch * 3 * widest * 2
    elif place.kind == "cpu" and item == 2:  # of 8 bits: for sums, and for products
        forward += batch * 4 * widest
    if place.kind == "cpu":
        # What one stream's forward leaves is kept for the other's, and there is heap that is free.
        streams, free = (1 + two) * forward, heap_slack(batch * widest * item)
        if place.int16:  # the one is `pool.py`'s, beside a solve, which takes of the other
            both = streams + max(free, solve + heap_slack())
        else:  # mostly heap: in front of a solve no more than one is left (`heap.Tidy` looks)
            both = max(streams + free, solve + max(streams, free))
    else:
        # The full-precision stream's input and residual wait for the other's; then they differ.
        forward += two * batch * (hidden + 2 * widest) * item
        both = max(solve, sums + forward)
    # In front of the last linear, where the full-precision stream is through the block; and before:
    # the residual, and beside it the norm's output or that of all heads.
    inputs = seqlen * batching.most(samples, 0.0, processes) * widest * held
    before = tokens * (hidden + max(hidden, shapes.heads)) * held
    waiting, beside = max(before, tokens * hidden * held + inputs), 0
    if shapes.expert_share < 1:
        # In front of the experts: their input, the residual, the sum of their outputs and the
        # inside of one of them, on the average or helped out; and, in the stopped frames, what a
        # shared expert gave.
        helped = min(1.0, quant.expert_tokens * hidden / (samples * seqlen))
        inner = max((max(g.share, helped) * g.inputs for g in groups if g.share < 1), default=0)
        most = max(
            (2 * hidden + widest) * held, 2 * hidden * held + hidden * item + int(inner * held)
        )
        waiting, inputs = tokens * most, 0
        beside = tokens * hidden * item if shapes.shared_expert else 0
    slabs = min(waiting, _OPEN)
    if place.int16:  # what each stream multiplies by, laid out, beside the weights
        beside += (1 + two) * 2 * largest
    left = _LEFT if quant.target_bpw is not None else 0
    resting = left + (slabs if place.kind == "cpu" else apart)
    return MemoryNeeds(
        waiting=waiting,
        kept=2 * whole * hidden * held,
        at_work=block + 2 * largest + both + beside + resting,
        reading=reading + slabs + heap_slack() + left,
        inputs=inputs,
        before=before,
        outputs=tokens * hidden * held,
        measuring=_measuring(shapes, quant, place, samples, seqlen)
        if quant.target_bpw is not None
        else None,
    )


def _measuring(
    shapes: Shapes, quant: QuantSpec, place: Place, samples: int, seqlen: int
) -> MeasuringNeeds:
    """Of `sensitivity.measure`, one sum for each of its widest moments."""
    cpu, hidden, widest = place.kind == "cpu", shapes.hidden, shapes.widest
    # Gradients do not fit float16: it measures in float32 then, and so its activations wait.
    compute = "float32" if place.dtype == "float16" else place.dtype
    item = itemsize(dtype_name(compute))
    held = itemsize(dtype_name(held_dtype(place.dtype, shapes.stored) or compute))
    stored = itemsize(shapes.stored)
    taken = len(range(0, samples, max(1, -(-samples * seqlen // _TOKENS))))
    few = len(range(0, taken, max(1, -(-taken * seqlen // _GRADIENT_TOKENS))))
    per_batch = min(taken, max(1, TOKENS_PER_BATCH[place.kind] // seqlen))
    batch, whole = per_batch * seqlen, taken * seqlen * hidden
    graded = few * seqlen * hidden

    # Of one block: Hessians of all inputs, and what its linears read and write per token.
    each = [(g, -(-g.times // shapes.blocks)) for g in shapes.groups]
    sums = sum(times * 4 * g.inputs**2 for g, times in each)
    if cpu and item == 2:
        sums += sums // 2  # what the next batch is expected to add (`running_sum.py`)
    through = int(sum(times * g.share * (g.rows + g.inputs) for g, times in each))
    solve = max(4 * (_SQUARES * g.inputs**2 + _WEIGHTS * g.rows * g.inputs) for g, _ in each)
    forward = batch * (4 * hidden + 3 * widest) * item
    behind = seqlen * (max(1, min(few, _BACK // seqlen)) if cpu else 1)
    back = behind * _WAY_BACK * through * max(item, 3)  # in bfloat16 a part is float32
    back += 4 * graded + (0 if cpu else 4 * _SCORES * seqlen**2)
    block = shapes.weights * item + sums
    # The last hidden states, the norm's output, gradients by it and by its input; a part of the
    # head as it is stored and in float32; its products with tokens, twice, and what they become.
    together = min(few * seqlen, _TOGETHER) if cpu else few * seqlen
    head = graded * (held + 12) + _HEAD_ROWS * (hidden * (stored + 4) + 16 * together)
    head += 16 * min(batch * hidden, graded)
    table = whole * held + _TABLE_ROWS * hidden * stored
    found = sum(8 * g.times * g.rows for g in shapes.groups) * len(quant.bit_choices)
    largest = max(n * group.inputs for group in shapes.groups for n in group.outputs)
    waiting = (whole + shapes.blocks * graded) * held
    slabs, free = min(waiting, _MEASURING_OPEN), heap_slack()
    at_work = max(block + forward, block + solve, shapes.weights * item + back, head)
    if cpu:
        at_work = max(at_work + 2 * largest + free, table) + found + slabs
    load = 2 * stored * shapes.weights + 2 * largest  # as it is stored, and pinned
    return MeasuringNeeds(
        at_work=at_work,
        reading=max(load, table, _HEAD_ROWS * hidden * stored) + found + slabs + free,
        waiting=waiting,
        batch=batch * hidden * held,
    )


def find_room(
    needs: MemoryNeeds,
    place: Place,
    *,
    memory: int | None = None,
    gpu_memory: int | None = None,
    processes: int = 1,
    model: int = 2**62,
) -> Room:
    """Where activations wait, within the limits; without one half of what is free is taken.

    Args:
        model: bytes of the whole checkpoint.
        memory, gpu_memory: bytes that the process may take on the host and on the accelerator.
        processes: of the run on this machine, each of which takes its part of what is free.

    Raises:
        SpecError: a limit is below what the run needs without any waiting activation.
    """
    on_host = needs.least_reading if place.kind == "cuda" else needs.least_at_work
    host = available_memory() // 2 // processes
    if memory is not None:
        host = _left("--memory", memory, process_bytes() + on_host + SLACK)
    on_device = 0
    if place.kind == "cuda":
        import torch

        on_device = torch.cuda.mem_get_info(place.device)[0] // 2
        if gpu_memory is not None:
            on_device = _left("--gpu-memory", gpu_memory, needs.least_at_work + SLACK)
    elif gpu_memory is not None:
        raise SpecError(
            "--gpu-memory",
            expected="nothing given on a run without a GPU",
            got=human_bytes(gpu_memory),
            cure="Use --memory, or --device cuda",
        )
    kept = host + on_device
    if memory is None and place.kind == "cpu":
        # Less than what waits before the last linears would save nothing.
        kept = min(kept, max(model // processes, KEPT, needs.before))
    room = Room(host, on_device, on_device >= needs.waiting, recompute_from=kept)
    return replace(room, spill_outputs=needs.spilled(room) > 0)


def make_holder(needs: MemoryNeeds, place: Place, **limits: Any) -> Holder:
    """Keeps waiting activations where `find_room` finds room, which takes the same arguments.

    The holder's `spill_dir` is still to be set, once there is one.
    """
    from .calibration.hold import Holder

    return Holder(**vars(find_room(needs, place, **limits)))


def check_sampling(
    stored: int, shapes: Shapes, place: Place, memory: int | None, gpu_memory: int | None
) -> None:
    """The source `self` loads the whole model.

    Args:
        stored: bytes in files. place: whose dtype is the one that it is loaded in.

    Raises:
        SpecError: a limit is below what that takes.
    """
    wider = itemsize(dtype_name(place.dtype)) / itemsize(shapes.stored)
    nbytes = int(stored * max(1.0, wider))
    limits = {"--memory": (memory, process_bytes() + nbytes + SLACK)}
    if place.kind == "cuda":
        limits = {"--gpu-memory": (gpu_memory, nbytes + SLACK)}
    for option, (limit, least) in limits.items():
        if limit is not None and limit < least:
            raise SpecError(
                option,
                expected=f"at least {least / 2**30:.2f} GiB to load the whole model, from which "
                "--calib self samples",
                got=f"{limit / 2**30:.2f} GiB",
                cure="Give more, or other calibration data",
            )


def _left(option: str, limit: int, least: int) -> int:
    if limit < least:
        raise SpecError(
            option,
            expected=f"at least {least / 2**30:.2f} GiB for this model and these settings",
            got=f"{limit / 2**30:.2f} GiB",
            cure="Give more, or use --recipe fast, which needs less",
        )
    return limit - least
