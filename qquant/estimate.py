"""What a run will take, said before it begins: sizes from headers, time from a quick measurement.

Sizes (tensors, bits per weight, disk) are exact: they follow from the headers and the settings
(`sizes.py`). Memory is `budget.py`'s sum of what is alive at the widest moment. Time is what the
parts of a run cost on this machine: on a CPU in float32 `pace.py` tells in a moment, without torch,
so that the whole answer takes about a second; elsewhere `measured.py` asks torch, in some seconds.
A real run that is asked for its timings makes the same estimate and is compared with it.

Left out on purpose: the time to read a source from a slow disk, and to make calibration text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .budget import (
    SLACK,
    MemoryNeeds,
    RoomLike,
    check_sampling,
    find_room,
    memory_needs,
    process_bytes,
)
from .calibration.enough import check_enough
from .calibration.sources import SELF, find_source, parse_sources
from .checkpoint import Checkpoint
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .costs import Costs
from .export import check_side_files
from .models.families import Family, family_of
from .models.shapes import Shapes, check_shapes
from .pace import QUICK, numpy_costs
from .place import Place, find_place
from .plan import check_format, check_source
from .report import human_bytes, human_seconds, labelled
from .sizes import Rows, Sizes, sizes
from .world import ALONE, Seat

_SIDE_BYTES = 16 << 20  # tokenizer, code, card: more than any Qwen has


@dataclass(frozen=True)
class Estimate(Sizes):
    """What a run will take. Bytes and seconds.

    Attributes:
        waiting_bytes: activations that wait for a solve, at most.
        spill_bytes: of those, what will wait in a file.
        recomputed_bytes: activations that would wait, too, but are made again instead.
        host_bytes, device_bytes: peak memory; of the device None on a CPU.
        disk_bytes: needed in all while the run lasts: output, kept activations, spill.
        seconds: by part; empty where it was not measured.
        measured_with: what measured this machine for them (`costs.Costs`).
        notes: what a user should know.
    """

    waiting_bytes: int
    spill_bytes: int
    recomputed_bytes: int
    host_bytes: int
    device_bytes: int | None
    disk_bytes: int
    seconds: Mapping[str, float]
    measured_with: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_seconds": sum(self.seconds.values())}

    def compare(self, seconds: float, peak_bytes: int) -> str:
        """What was said beforehand beside what happened.

        Args:
            seconds: of the run, without what no estimate has: making the model and calibration
                data, measuring which linears need more bits, and the estimate itself.
        """
        said = sum(self.seconds.values())
        return (
            f"estimated {human_seconds(said)} after set-up and calibration, "
            f"took {human_seconds(seconds)}; "
            f"estimated peak {human_bytes(self.host_bytes)}, was {human_bytes(peak_bytes)}"
        )

    def rows(self) -> Rows:
        rows = [*super().rows(), ("host memory", f"{human_bytes(self.host_bytes)} at the peak")]
        if self.device_bytes is not None:
            rows.append(("device memory", f"{human_bytes(self.device_bytes)} at the peak"))
        rows.append(("disk", f"{human_bytes(self.disk_bytes)} while it runs"))
        if self.calibration_tokens:
            rows.append(("spill", f"{human_bytes(self.spill_bytes)} of activations in files"))
        if self.recomputed_bytes:
            again = f"{human_bytes(self.recomputed_bytes)} of activations, not kept"
            rows.append(("made again", f"{again}; more --memory keeps them"))
        if self.seconds:
            parts = ", ".join(f"{k} {human_seconds(v)}" for k, v in self.seconds.items())
            total = human_seconds(sum(self.seconds.values()))
            measured = f"measured with {self.measured_with}"
            rows.append(("time", f"about {total} ({parts}; {measured})"))
        return rows

    def render(self, told: Sizes | None = None) -> str:
        """For a person.

        Args:
            told: what the person has been shown already; what is the same is left out.
        """
        shown = told.rows() if told else []
        lines = [labelled([row for row in self.rows() if row not in shown])]
        return "\n".join(lines + [f"note: {text}" for text in self.notes])


def dry_run(
    src: str | os.PathLike[str],
    quant: QuantSpec | None = None,
    calib: CalibrationSpec | None = None,
    out: OutputSpec | None = None,
    *,
    device: str = "auto",
    compute_dtype: str = "auto",
    memory: int | None = None,
    gpu_memory: int | None = None,
    seat: Seat = ALONE.seat,
) -> Estimate:
    """What `quantize` with the same arguments would take; reads headers and writes nothing.

    Args:
        seat: of one of several processes, of whose share the answer is then.

    Raises:
        InputError: as in `quantize`, as far as it can be told from headers and settings. What only
            the model's class finds wrong in config.json is left to the run (`check_shapes`).
        CalibrationError: a calibration source is not there; none is read.
    """
    quant, calib, out = quant or QuantSpec(), calib or CalibrationSpec(), out or OutputSpec()
    if quant.method != "rtn":
        for given in parse_sources(calib.sources):
            find_source(given.name)
    source = Checkpoint.open(src)
    family = family_of(source.config)
    check_before(source, family, quant, out)
    place, shapes = find_place(device, compute_dtype), Shapes.of(source, family)
    samples = 0 if quant.method == "rtn" else calib.samples
    needs = memory_needs(shapes, quant, place, samples, calib.seqlen, seat.size)
    room = find_room(
        needs,
        place,
        memory=memory,
        gpu_memory=gpu_memory,
        processes=seat.local_size,
        model=source.nbytes,
    )
    if samples and samples_itself(calib):
        check_sampling(source.nbytes, shapes, find_place(device, "auto"), memory, gpu_memory)
    return estimate(
        source,
        family,
        quant,
        calib,
        out,
        shapes=shapes,
        place=place,
        room=room,
        needs=needs,
        processes=seat.size,
    )


def samples_itself(calib: CalibrationSpec) -> bool:
    """Whether calibration text is sampled from the model, which is loaded whole for it."""
    return any(given.name == SELF for given in parse_sources(calib.sources))


def check_before(source: Checkpoint, family: Family, quant: QuantSpec, out: OutputSpec) -> None:
    """Refuses what can be refused without torch.

    Raises:
        InputError: names what.
    """
    check_format(quant, out, family)
    check_source(source, family, quant)
    check_side_files(source)
    check_shapes(source, family)


def estimate(
    source: Checkpoint,
    family: Family,
    quant: QuantSpec,
    calib: CalibrationSpec,
    out: OutputSpec,
    *,
    shapes: Shapes,
    place: Place,
    room: RoomLike,
    needs: MemoryNeeds,
    processes: int = 1,
    seconds: float = QUICK,
    begun: bool = False,
) -> Estimate:
    """What quantizing a checkpoint will take; no weight is read.

    Args:
        source: as `check_before` found it right. shapes: its own.
        place: where the run computes.
        room, needs: where activations will wait, and how many (`budget.py`).
        processes: that share the run; `room` and `needs` are then of one of them.
        seconds: how long to measure, where numpy does.
        begun: the run asks for what is left of it, its packages imported and the model made.
    """
    found = sizes(source, family, quant, calib, out)
    tokens, waiting = found.calibration_tokens, needs.waits(room)
    spill, again = needs.beyond(room), needs.recomputed(room)
    on_host, on_device = needs.peaks(room, place.kind)
    notes = [t for t in (check_enough(tokens, found.widest) if tokens else None,) if t]
    least = quant.expert_tokens * shapes.hidden
    if tokens and (share := shapes.expert_share) * tokens < least:
        notes.append(
            f"An expert gets {share * tokens:.0f} tokens on the average, and needs {least:.0f} for "
            "a Hessian of its own: use more --samples."
        )
    if quant.target_bpw:
        notes.append(
            "Measuring which linears need more bits takes about as long again, which the time has "
            "not."
        )
    if tokens and samples_itself(calib):
        notes.append(
            "Sampling calibration text from the model loads it whole "
            f"({human_bytes(source.nbytes)} in the checkpoint); neither that memory nor its "
            "time is in these figures."
        )
    if processes > 1:
        notes.append(
            f"Memory and spill are of each of {processes} processes. The time is as if they did "
            "not get in each other's way, without what they exchange."
        )
    again_share = again / max(1, needs.inputs)
    if place.plain:
        costs = numpy_costs(shapes, quant, calib.seqlen, seconds, int16=place.int16, begun=begun)
    else:
        from . import pool
        from .heap import trim_heap
        from .measured import torch_costs

        costs = torch_costs(source, family, shapes, quant, place, calib.seqlen)
        pool.trim()
        trim_heap()  # what was measured with is no part of the process whose memory is foreseen
    return Estimate(
        **vars(found),
        waiting_bytes=waiting,
        spill_bytes=spill,
        recomputed_bytes=again,
        host_bytes=process_bytes() + on_host + SLACK,
        device_bytes=None if place.kind == "cpu" else on_device,
        disk_bytes=found.output_bytes + _SIDE_BYTES + processes * spill + needs.kept,
        seconds=_seconds(costs, shapes, quant, calib, found, processes, again_share),
        measured_with=costs.measured_with,
        notes=tuple(notes),
    )


def _seconds(
    costs: Costs,
    shapes: Shapes,
    quant: QuantSpec,
    calib: CalibrationSpec,
    found: Sizes,
    processes: int,
    again: float,
) -> dict[str, float]:
    """By part, of a process that shares calibration sequences and rows with others.

    Args:
        again: the part of the last linears' inputs that is made again.
    """
    rows = ((g, -(-g.rows // processes)) for g in shapes.groups)
    solve = sum(g.times * costs.solve(n, g.inputs) for g, n in rows)
    last = {"solve": solve, "write and verify": found.output_bytes * costs.writing}
    if quant.method == "rtn":
        return {"set-up": costs.set_up, **last}
    tokens = -(-calib.samples // processes) * calib.seqlen
    share = quant.correct_share if quant.streams == 2 else 0
    hessian = 0.0
    for group in shapes.groups:
        one, both = costs.hessian(group)
        hessian += group.times * group.share * tokens * (one + share * both)
    linears = sum(g.times * g.share * g.rows * g.inputs for g in shapes.groups)
    twice = 2 * shapes.blocks * shapes.hidden * shapes.widest / linears  # gate and up
    quantized = costs.forward if costs.quantized is None else costs.quantized
    forward = tokens * ((1 + again * twice) * quantized + share * costs.forward)
    return {"set-up": costs.set_up, "forward": forward, "hessian": hessian, **last}
