"""What a run will take, said before it begins: sizes from headers, time from a quick measurement.

Sizes (tensors, bits per weight, disk) are exact: they follow from the headers and the settings
(`sizes.py`).
Memory is `budget.py`'s sum of what is alive at the widest moment. Time is measured on this machine
with this model's shapes and made-up numbers: one batch through one block, one Hessian's product,
and a few small solves, through which a cost in the shape's terms (k, nk, nk², k³) is fitted and
read off at the real shapes. Small solves, since a real one of a large model takes as long as a user
waits for the whole answer.

Left out on purpose: the time to read a source from a slow disk, and to make calibration text.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import gptq
from .batching import Batching
from .budget import Groups, MemoryNeeds, expert_share, solve_groups
from .calibration.hold import Holder
from .calibration.tokens import check_enough
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .devices import resident_bytes
from .hessian import Hessian
from .models.skeleton import Skeleton
from .report import human_bytes, human_seconds, labelled
from .sizes import Rows, Sizes, sizes
from .timings import fastest_of

_SIDE_BYTES = 16 << 20  # tokenizer, code, card: more than any Qwen has
_STOPS = 1.2  # what stopping, rounding and keeping adds to a plain forward; measured
_FLOPS = 6e10  # of the forward that is measured, at the most
_ROWS, _COLUMNS = 2048, 1536  # of the small solves, at the most


@dataclass(frozen=True)
class Estimate(Sizes):
    """What a run will take. Bytes and seconds.

    Attributes:
        waiting_bytes: activations that wait for a solve, at most.
        spill_bytes: of those, what will wait in a file.
        host_bytes, device_bytes: peak memory; of the device None on a CPU.
        disk_bytes: needed in all while the run lasts: output, kept activations, spill.
        seconds: by part; empty where it was not measured.
        notes: what a user should know.
    """

    waiting_bytes: int
    spill_bytes: int
    host_bytes: int
    device_bytes: int | None
    disk_bytes: int
    seconds: Mapping[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_seconds": sum(self.seconds.values())}

    def compare(self, seconds: float, peak_bytes: int) -> str:
        """What was said beforehand beside what happened."""
        said = sum(self.seconds.values())
        return (
            f"estimated {human_seconds(said)}, took {human_seconds(seconds)}; "
            f"estimated peak {human_bytes(self.host_bytes)}, was {human_bytes(peak_bytes)}"
        )

    def rows(self) -> Rows:
        rows = [*super().rows(), ("host memory", f"{human_bytes(self.host_bytes)} at the peak")]
        if self.device_bytes is not None:
            rows.append(("device memory", f"{human_bytes(self.device_bytes)} at the peak"))
        rows.append(("disk", f"{human_bytes(self.disk_bytes)} while it runs"))
        if self.calibration_tokens:
            rows.append(("spill", f"{human_bytes(self.spill_bytes)} of activations in files"))
        if self.seconds:
            parts = ", ".join(f"{k} {human_seconds(v)}" for k, v in self.seconds.items())
            total = human_seconds(sum(self.seconds.values()))
            rows.append(("time", f"about {total} ({parts})"))
        return rows

    def render(self, told: Sizes | None = None) -> str:
        """For a person.

        Args:
            told: what the person has been shown already; what is the same is left out.
        """
        shown = told.rows() if told else []
        lines = [labelled([row for row in self.rows() if row not in shown])]
        return "\n".join(lines + [f"note: {text}" for text in self.notes])


def estimate(
    skeleton: Skeleton,
    quant: QuantSpec,
    calib: CalibrationSpec,
    out: OutputSpec,
    *,
    holder: Holder,
    needs: MemoryNeeds,
    measure: bool = True,
    processes: int = 1,
) -> Estimate:
    """What quantizing the skeleton's checkpoint will take.

    Args:
        skeleton: on the run's device, in its compute dtype; no weight is read.
        holder, needs: where activations will wait, and how many (`budget.py`).
        measure: also the time, which takes a few seconds.
        processes: that share the run; `holder` and `needs` are then of one of them.
    """
    source, family = skeleton.checkpoint, skeleton.family
    found = sizes(source, family, quant, calib, out, skeleton.parameters)
    groups, tokens = solve_groups(skeleton), found.calibration_tokens
    waiting = needs.waiting
    on_device = min(waiting, holder.device_budget)
    spill = max(0, waiting - on_device - holder.host_budget)
    cpu = skeleton.device.type == "cpu"
    on_host = waiting - on_device - spill + (needs.at_work if cpu else needs.reading)
    notes = [t for t in (check_enough(tokens, found.widest) if tokens else None,) if t]
    least = quant.expert_tokens * int(skeleton.config.hidden_size)
    if tokens and (share := expert_share(skeleton)) * tokens < least:
        notes.append(
            f"An expert gets {share * tokens:.0f} tokens on the average, and needs {least:.0f} for "
            "a Hessian of its own: use more --samples."
        )
    if quant.target_bpw:
        notes.append("Measuring which linears need more bits takes about as long again.")
    if processes > 1:
        notes.append(
            f"Memory and spill are of each of {processes} processes. The time is as if they did "
            "not get in each other's way, without what they exchange."
        )
    return Estimate(
        **vars(found),
        waiting_bytes=waiting,
        spill_bytes=spill,
        host_bytes=resident_bytes() + on_host,
        device_bytes=None if cpu else needs.at_work + on_device,
        disk_bytes=found.output_bytes + _SIDE_BYTES + processes * spill + needs.kept,
        seconds=_seconds(skeleton, quant, calib, groups, found, processes) if measure else {},
        notes=tuple(notes),
    )


def _seconds(
    skeleton: Skeleton,
    quant: QuantSpec,
    calib: CalibrationSpec,
    groups: Groups,
    found: Sizes,
    processes: int,
) -> dict[str, float]:
    """By part, of a process that shares calibration sequences and rows with others."""
    cost = _solve_cost(skeleton.device, quant, groups)
    solve = sum(g.times * cost(-(-g.rows // processes), g.inputs) for g in groups)
    write = found.output_bytes / 1e9
    if quant.method == "rtn":
        return {"solve": solve, "write and verify": write}
    tokens = -(-calib.samples // processes) * calib.seqlen
    share = quant.correct_share if quant.streams == 2 else 0
    per_token = _forward_seconds(skeleton, calib.seqlen) * _STOPS
    forward = found.blocks * tokens * (1 + share) * per_token
    hessian = 0.0
    measured: dict[int, tuple[float, float]] = {}
    for group in groups:
        if group.inputs not in measured:
            measured[group.inputs] = _hessian_seconds(skeleton.device, group.inputs, two=share > 0)
        one, cross = measured[group.inputs]
        hessian += group.times * group.share * tokens * (one + share * cross)
    return {"forward": forward, "hessian": hessian, "solve": solve, "write and verify": write}


def _forward_seconds(skeleton: Skeleton, seqlen: int) -> float:
    """Per token, through one block with random weights, as many at once as the run takes."""
    largest = max(skeleton.blocks, key=lambda b: sum(p.numel() for p in b.parameters()))
    block = copy.deepcopy(largest).to(skeleton.dtype).to_empty(device=skeleton.device)
    weights = sum(p.numel() for p in block.parameters())
    most = max(1, int(_FLOPS / (2 * weights)) // seqlen)
    batch = min(Batching.of(skeleton.device.type, seqlen).batch, most)
    with torch.inference_mode():
        for p in block.parameters():
            p.fill_(0.01)
        x = torch.ones(
            batch, seqlen, skeleton.config.hidden_size, device=skeleton.device, dtype=skeleton.dtype
        )
        kwargs = skeleton.block_kwargs(batch, seqlen)[list(skeleton.blocks).index(largest)]
        seconds = fastest_of(lambda: block(x, **kwargs), 2, device=skeleton.device)
    return seconds / (batch * seqlen)


def _hessian_seconds(device: torch.device, k: int, *, two: bool) -> tuple[float, float]:
    """Per token: of the Hessian, and of the streams' difference with it."""
    small, tokens = min(k, 2048), 512
    x = torch.ones(tokens, small, device=device)
    one, both = Hessian(small, device), Hessian(small, device, cross=True)
    scale = (k / small) ** 2 / tokens
    first = fastest_of(lambda: one.add(x), 1, device=device) * scale
    if not two:
        return first, 0.0
    return first, fastest_of(lambda: both.add(x, x), 1, device=device) * scale - first


def _solve_cost(
    device: torch.device, quant: QuantSpec, groups: Groups
) -> Callable[[int, int], float]:
    """Seconds of one solve by (outputs, inputs), from a few small ones."""
    rows: list[list[float]] = []
    seconds: list[float] = []
    unit = max(1, quant.group_size)
    wide = min(_COLUMNS, max(g.inputs for g in groups))
    tall = min(_ROWS, max(g.rows for g in groups))
    for n, k in ((64, 256), (512, 256), (64, wide), (512, wide), (tall, 384)):
        k = -(-k // unit) * unit
        gen = torch.Generator().manual_seed(0)
        w = torch.randn(n, k, generator=gen).to(device)
        x = torch.randn(2 * k, k, generator=gen).to(device)
        h = x.T @ x if quant.method == "gptq" else None
        more: dict[str, Any] = {}
        if quant.streams == 2 and h is not None:
            more = {"cross": 0.01 * h, "residual": None}
        rows.append(_terms(n, k))
        solve = partial(gptq.solve, w, h, quant, **more)
        seconds.append(fastest_of(solve, 1, device=device, warm=not seconds))
    fit = _fit(np.array(rows), np.array(seconds))
    return lambda n, k: float(np.dot(_terms(n, k), fit))


def _terms(n: int, k: int) -> list[float]:
    return [k / 1e3, n * k / 1e6, n * k * k / 1e9, k**3 / 1e9]


def _fit(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares, relative, with no negative cost: the best over all choices of terms."""
    a, one = a / b[:, None], np.ones(len(b))
    best, least = np.zeros(a.shape[1]), np.inf
    for count in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), count):
            found = np.linalg.lstsq(a[:, chosen], one, rcond=None)[0]
            error = float(np.square(a[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(a.shape[1]), error
                best[list(chosen)] = found
    return best
