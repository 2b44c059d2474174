"""What a run will take, said before it begins: sizes from headers, time from a quick measurement.

Sizes (tensors, bits per weight, disk) are exact: they follow from the headers and the settings.
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
import time
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
from .mixed import storage_bits
from .models.skeleton import Skeleton
from .plan import bytes_needed
from .report import human_bytes, human_seconds, text_table

_SIDE_BYTES = 16 << 20  # tokenizer, code, card: more than any Qwen has
_STOPS = 1.2  # what stopping, rounding and keeping adds to a plain forward; measured
_FLOPS = 6e10  # of the forward that is measured, at the most
_ROWS, _COLUMNS = 2048, 1536  # of the small solves, at the most


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes and seconds.

    Attributes:
        blocks, linears: to quantize.
        bits_per_weight: of the quantized linears, scales and zero points included.
        output_bytes: of all tensors written.
        unquantized_bytes: of those, what stays in 16 bits.
        calibration_tokens, widest: tokens read, inputs of the widest linear.
        waiting_bytes: activations that wait for a solve, at most.
        spill_bytes: of those, what will wait in a file.
        host_bytes, device_bytes: peak memory; of the device None on a CPU.
        disk_bytes: needed in all while the run lasts: output, kept activations, spill.
        seconds: by part; empty where it was not measured.
        notes: what a user should know.
    """

    blocks: int
    linears: int
    bits_per_weight: float
    output_bytes: int
    unquantized_bytes: int
    calibration_tokens: int
    widest: int
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

    def render(self) -> str:
        """For a person."""
        rows = [
            ("to quantize", f"{self.linears} linears in {self.blocks} blocks"),
            ("bits per weight", f"{self.bits_per_weight:.3f} in the quantized linears"),
            (
                "output",
                f"{human_bytes(self.output_bytes)}, "
                f"{human_bytes(self.unquantized_bytes)} of it in 16 bits",
            ),
            ("host memory", f"{human_bytes(self.host_bytes)} at the peak"),
        ]
        if self.device_bytes is not None:
            rows.append(("device memory", f"{human_bytes(self.device_bytes)} at the peak"))
        rows.append(("disk", f"{human_bytes(self.disk_bytes)} while it runs"))
        if self.calibration_tokens:
            per = self.calibration_tokens / self.widest
            rows += [
                ("spill", f"{human_bytes(self.spill_bytes)} of activations in files"),
                (
                    "calibration",
                    f"{self.calibration_tokens} tokens, {per:.1f} per input of the widest linear "
                    f"({self.widest})",
                ),
            ]
        if self.seconds:
            parts = ", ".join(f"{k} {human_seconds(v)}" for k, v in self.seconds.items())
            total = human_seconds(sum(self.seconds.values()))
            rows.append(("time", f"about {total} ({parts})"))
        lines = [text_table(("", ""), rows).split("\n", 2)[2]]
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
    layers = family.layers(source.config)
    groups = solve_groups(skeleton)
    shapes = [(n, g.inputs, g.times) for g in groups for n in g.outputs]
    weights = sum(n * k * times for n, k, times in shapes)
    bits = float(quant.target_bpw or 0)
    if not quant.target_bpw:
        sizes = (t * storage_bits(n, k, k // quant.group_of(k), quant.bits) for n, k, t in shapes)
        bits = sum(sizes) / weights
    output = bytes_needed(source, family, skeleton.parameters, quant, out)
    linears = family.linear_names(source.tensors)
    quantized = {f"{name}.weight" for name in linears}
    plain = [p for p in skeleton.parameters if p not in quantized]
    unquantized = sum(source.info(p).numel * getattr(torch, out.dtype).itemsize for p in plain)
    tokens = calib.samples * calib.seqlen if quant.method == "gptq" else 0
    widest = max(group.inputs for group in groups)
    waiting = needs.waiting
    on_device = min(waiting, holder.device_budget)
    spill = max(0, waiting - on_device - holder.host_budget)
    cpu = skeleton.device.type == "cpu"
    on_host = waiting - on_device - spill + (needs.at_work if cpu else needs.reading)
    notes = [t for t in (check_enough(tokens, widest) if tokens else None,) if t]
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
        blocks=layers,
        linears=len(linears),
        bits_per_weight=bits,
        output_bytes=output,
        unquantized_bytes=unquantized,
        calibration_tokens=tokens,
        widest=widest,
        waiting_bytes=waiting,
        spill_bytes=spill,
        host_bytes=resident_bytes() + on_host,
        device_bytes=None if cpu else needs.at_work + on_device,
        disk_bytes=output + _SIDE_BYTES + processes * spill + needs.kept,
        seconds=_seconds(skeleton, quant, calib, groups, layers, output, processes)
        if measure
        else {},
        notes=tuple(notes),
    )


def _seconds(
    skeleton: Skeleton,
    quant: QuantSpec,
    calib: CalibrationSpec,
    groups: Groups,
    layers: int,
    output: int,
    processes: int,
) -> dict[str, float]:
    """By part, of a process that shares calibration sequences and rows with others."""
    cost = _solve_cost(skeleton.device, quant, groups)
    solve = sum(g.times * cost(-(-g.rows // processes), g.inputs) for g in groups)
    write = output / 1e9
    if quant.method == "rtn":
        return {"solve": solve, "write and verify": write}
    tokens = -(-calib.samples // processes) * calib.seqlen
    share = quant.correct_share if quant.streams == 2 else 0
    forward = layers * tokens * (1 + share) * _forward_seconds(skeleton, calib.seqlen) * _STOPS
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
        return _best(lambda: block(x, **kwargs), skeleton.device, times=2) / (batch * seqlen)


def _hessian_seconds(device: torch.device, k: int, *, two: bool) -> tuple[float, float]:
    """Per token: of the Hessian, and of the streams' difference with it."""
    small, tokens = min(k, 2048), 512
    x = torch.ones(tokens, small, device=device)
    one, both = Hessian(small, device), Hessian(small, device, cross=True)
    scale = (k / small) ** 2 / tokens
    first = _best(lambda: one.add(x), device) * scale
    return first, _best(lambda: both.add(x, x), device) * scale - first if two else 0.0


def _solve_cost(
    device: torch.device, quant: QuantSpec, groups: Groups
) -> Callable[[int, int], float]:
    """Seconds of one solve by (outputs, inputs), from a few small ones."""
    rows, seconds = [], []
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
        seconds.append(_best(partial(gptq.solve, w, h, quant, **more), device))
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


def _best(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The faster of a few calls, after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    for _ in range(times + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return min(found[1:])
