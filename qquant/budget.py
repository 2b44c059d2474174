"""How much memory a run needs, and how a limit is kept.

What is alive at the widest moment adds up from the settings and the model's shapes: the process
as it is, one block, the solve of the widest group of linears, one batch's forward, and the
activations that wait for it. Only the last part can be less, so that is what a limit decides: what
is left of it after the rest is the host's budget for waiting activations. Beyond that the inputs of
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

from .batching import Batching
from .config import QuantSpec
from .errors import SpecError
from .headers import dtype_name, itemsize
from .host import available_memory, heap_slack, imports_hqq, resident_bytes
from .models.shapes import Shapes, held_dtype
from .overlap import MOST, overlaps
from .place import Place
from .report import human_bytes

if TYPE_CHECKING:
    from .calibration.hold import Holder

SLACK = 64 << 20  # what no sum foresees
KEPT = 768 << 20  # of waiting activations are kept on the host whatever the size of the model
# Python with torch and transformers loaded, before any weight, and what hqq adds: see
# `process_bytes`.
PROCESS, _HQQ = 340 << 20, 160 << 20
# Of one solve: matrices of the inputs' size (Hessian, in order, factor) and of the weight's; inputs
# whose changes are carried on together (`gptq._span`); and of a rounding without a Hessian.
_SQUARES, _WEIGHTS, _SPAN = 3, 6, 512
_ROUNDING = 4
_OPEN = 80 << 20  # slabs that are being filled, one for each kind (`calibration/hold.py`)


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
    """

    waiting: int
    kept: int
    at_work: int
    reading: int
    inputs: int = 0
    before: int = 0
    outputs: int = 0

    def recomputed(self, room: RoomLike) -> int:
        """Waiting bytes that are made again instead of kept, but for slabs that are not full."""
        kept = min(room.recompute_from, room.host_budget + room.device_budget)
        return min(self.inputs, max(0, self.waiting - kept))

    def waits(self, room: RoomLike) -> int:
        """Waiting bytes that are left then."""
        return max(self.before, self.waiting - self.recomputed(room))

    def beyond(self, room: RoomLike) -> int:
        """Of those, what goes to files: all outputs, where there is no room for everything."""
        over = max(0, self.waits(room) - room.host_budget - room.device_budget)
        if room.device_budget and not room.device_outputs:  # then outputs wait on the host
            over = max(over, self.outputs - room.host_budget)
        return max(over, self.outputs) if over else 0


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
    installed, of all extras the one that transformers imports. `benchmarks/estimate.py` and a test
    hold it against real processes.
    """
    return max(resident_bytes(), PROCESS + (_HQQ if imports_hqq() else 0))


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
    batching = Batching.of(place.kind, seqlen)
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
    if place.kind == "cpu":
        # The heap keeps what one stream's forward leaves for the other's, and more that is free. In
        # front of a solve no more than one of the two is left (`walk.py` lets `devices.Tidy` look).
        streams, free = (1 + two) * forward, heap_slack(batch * widest * item)
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
    return MemoryNeeds(
        waiting=waiting,
        kept=2 * whole * hidden * held,
        at_work=block + 2 * largest + both + beside + (slabs if place.kind == "cpu" else apart),
        reading=reading + slabs + heap_slack(),
        inputs=inputs,
        before=before,
        outputs=tokens * hidden * held,
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
    on_host = needs.reading if place.kind == "cuda" else needs.at_work
    host = available_memory() // 2 // processes
    if memory is not None:
        host = _left("--memory", memory, process_bytes() + on_host + SLACK)
    on_device = 0
    if place.kind == "cuda":
        import torch

        on_device = torch.cuda.mem_get_info(place.device)[0] // 2
        if gpu_memory is not None:
            on_device = _left("--gpu-memory", gpu_memory, needs.at_work + SLACK)
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
    return replace(room, spill_outputs=needs.beyond(room) > 0)


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
