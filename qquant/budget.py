"""How much memory a run needs, and how a limit is kept.

What is alive at the widest moment adds up from the settings and the model's shapes: the process
as it is, one block, the solve of the widest group of linears, one batch's forward, and the
activations that wait for it. Only the last part can go elsewhere, so that is what a limit decides:
what is left of it after the rest is the host's budget for waiting activations, and beyond that they
go to files beside the target. Where they go never changes the result. A limit that the rest alone
would break is refused before the run, with the least that would do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .batching import Batching
from .blocks import hold_dtype_of
from .calibration.hold import Holder
from .config import QuantSpec
from .devices import available_memory, resident_bytes
from .errors import SpecError
from .headers import itemsize
from .models.skeleton import Skeleton
from .overlap import MOST, overlaps
from .report import human_bytes

SLACK = 160 << 20  # free heap that is not given back at once, and what no sum foresees
# Of one solve: matrices of the inputs' size (Hessian, factor, inverse, ...) and of the weight's.
_SQUARES, _WEIGHTS = 5, 7


@dataclass(frozen=True)
class Group:
    """Linears that are solved as one, and how often there are such.

    Attributes:
        outputs: of each.
        inputs: which they share.
        share: of the tokens that reach them; below 1 for experts.
        times: in the whole model.
    """

    outputs: tuple[int, ...]
    inputs: int
    share: float = 1.0
    times: int = 1

    @property
    def rows(self) -> int:
        """Outputs of all of them."""
        return sum(self.outputs)


Groups = Sequence[Group]


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes.

    Attributes:
        waiting: activations of all batches of a process at the block's widest stop.
        kept: the journal's on the disk, of all processes, those of two commits for a moment.
        at_work: everything else beside the process itself.
        reading: of that, what is on the host even where the work is on an accelerator: what is
            being read and written there, with the next block and the linears that wait to be
            written (`overlap.py`).
    """

    waiting: int
    kept: int
    at_work: int
    reading: int


def solve_groups(skeleton: Skeleton) -> list[Group]:
    """What is solved in a run, those alike counted together."""
    family, source = skeleton.family, skeleton.checkpoint
    whole = {part: name for name, parts in family.fused for part in parts}
    found: Counter[Group] = Counter()
    for i, names in enumerate(skeleton.linears):
        groups: dict[str, list[tuple[int, int, float]]] = {}
        for name in names:
            kind = family.kind_of(name)
            # An expert's number comes first in what its linears have in common.
            stem = name.rpartition(".")[0] if kind != name else ""
            n, k = source.info(f"{family.blocks}.{i}.{name}.weight").shape
            share = expert_share(skeleton) if kind != name else 1.0
            groups.setdefault(stem + whole.get(kind, kind), []).append((n, k, share))
        for parts in groups.values():
            found[Group(tuple(n for n, _, _ in parts), *parts[0][1:])] += 1
    return [replace(group, times=times) for group, times in found.items()]


def expert_share(skeleton: Skeleton) -> float:
    """The part of the tokens that one expert gets on the average; 1 without experts."""
    chosen = getattr(skeleton.config, "num_experts_per_tok", None)
    count = getattr(skeleton.config, "num_experts", None)
    return min(1.0, chosen / count) if skeleton.family.experts and chosen and count else 1.0


def memory_needs(
    skeleton: Skeleton,
    quant: QuantSpec,
    groups: Groups,
    samples: int,
    seqlen: int,
    processes: int = 1,
) -> MemoryNeeds:
    """What a process of a run needs.

    Args:
        groups: from `solve_groups`. samples: for calibration, 0 for none. seqlen: tokens of each.
        processes: that share them; the answer is of the one that has most.
    """
    hidden, item = int(skeleton.config.hidden_size), skeleton.dtype.itemsize
    held = (hold_dtype_of(skeleton) or skeleton.dtype).itemsize
    weights = max(sum(p.numel() for p in b.parameters()) for b in skeleton.blocks)
    block = weights * item
    largest = max(n * group.inputs for group in groups for n in group.outputs)
    reading, apart = 2 * largest, 0
    if overlaps(skeleton.device):
        # What is read ahead, as it is stored, and its pinned copy, which is rounded up; linears
        # that wait to be written, a byte per weight at the most.
        apart = MOST * largest
        reading += 2 * max(item, itemsize(skeleton.stored_dtype)) * weights + apart
    if not samples:
        return MemoryNeeds(0, 0, block + 4 * _WEIGHTS * largest + apart, reading)
    two = quant.streams == 2
    widest = max(group.inputs for group in groups)
    batching = Batching.of(skeleton.device.type, seqlen)
    batch = batching.batch * seqlen
    share = quant.correct_share if two else 0.0
    # In both streams together: of one process, and of all.
    tokens = seqlen * batching.most(samples, share, processes)
    whole = seqlen * batching.most(samples, share, 1)
    solve = 0
    for group in groups:
        n, k = group.rows, group.inputs
        solve = max(solve, 4 * ((_SQUARES + two) * k * k + _WEIGHTS * n * k))
    forward = (1 + two) * batch * (4 * hidden + 3 * widest) * item
    waiting = (2 * hidden + widest) * held
    beside = 0
    if skeleton.family.experts is not None:
        # In front of the experts: their input, the residual, the sum of their outputs and the
        # inside of one of them, on the average or helped out; and, in the stopped frames, what a
        # shared expert gave.
        helped = min(1.0, quant.expert_tokens * hidden / (samples * seqlen))
        inner = max((max(g.share, helped) * g.inputs for g in groups if g.share < 1), default=0)
        waiting = max(waiting, 2 * hidden * held + hidden * item + int(inner * held))
        shared = any("shared" in name for name in skeleton.linears[-1])
        beside = tokens * hidden * item if shared else 0
    return MemoryNeeds(
        waiting=tokens * waiting,
        kept=2 * whole * hidden * held,
        at_work=block + 2 * largest + solve + forward + beside + apart,
        reading=reading,
    )


def make_holder(
    needs: MemoryNeeds,
    device: torch.device,
    *,
    memory: int | None = None,
    gpu_memory: int | None = None,
    processes: int = 1,
) -> Holder:
    """Where activations wait, within the limits; without one half of what is free is taken.

    The holder's `spill_dir` is still to be set, once there is one.

    Args:
        memory, gpu_memory: bytes that the process may take on the host and on the accelerator.
        processes: of the run on this machine, each of which takes its part of what is free.

    Raises:
        SpecError: a limit is below what the run needs without any waiting activation.
    """
    on_host = needs.reading if device.type == "cuda" else needs.at_work
    host = available_memory() // 2 // processes
    if memory is not None:
        host = _left("--memory", memory, resident_bytes() + on_host + SLACK)
    on_device = 0
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] // 2
        if gpu_memory is not None:
            on_device = _left("--gpu-memory", gpu_memory, needs.at_work + SLACK)
    elif gpu_memory is not None:
        raise SpecError(
            "--gpu-memory",
            expected="nothing given on a run without a GPU",
            got=human_bytes(gpu_memory),
            cure="Use --memory, or --device cuda",
        )
    return Holder(
        host_budget=host,
        device_budget=on_device,
        device_outputs=on_device >= needs.waiting,
        spill_outputs=needs.waiting > host + on_device,
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
