"""One bitsandbytes run, as a story: a Qwen checkpoint goes in, an NF4, FP4 or Int8 directory comes
out.

The discipline is `convert`'s: what can be refused is refused before any weight is read, the
directory is built beside the target, verified, and takes its name by a rename. The work is less:
no calibration and no forward, so one weight at a time is read, rounded by bitsandbytes, written at
its final place in the shards and dropped. Peak memory is one weight and bitsandbytes' temporaries
for a slice of it, whatever the model's size.

Which tensors are written, and under what names, is `bnb_layout.py`; the rounding is `bnb_state.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .already import check_not_done
from .bnb import compute_dtype, compute_notes
from .bnb_card import render_bnb_card
from .bnb_layout import quantization_config
from .bnb_spec import BnbSpec, nothing_left, refuse_tied_head, skipped
from .bnb_state import left_in_16_bit, linear_plan, need_bitsandbytes, quantize_weight
from .card import write_card
from .checkpoint import Checkpoint, tensor_sha256
from .config import OutputSpec
from .devices import choose_device
from .errors import CheckpointError, SpecError
from .events import BlockDone, Event, LinearDone, Planned, Progress, Stage, Warned
from .export import check_side_files, write_common_files
from .findings import some
from .finite import all_finite
from .headers import TensorPlan, dtype_name
from .heap import Tidy
from .host import peak_memory
from .layout import block_of
from .manifest import build_manifest, write_manifest
from .models.families import check_config, family_of
from .models.skeleton import Skeleton
from .plan import check_unquantized
from .publish import WorkDir
from .readback import check_written
from .result import Result
from .shards import ShardWriter
from .sums import write_sums
from .unquantized import cast, copy_tensors


def source_dtype(source: Checkpoint, name: str) -> str:
    """The 16-bit dtype nearest to the one that the tensor `name` is stored in."""
    return "float16" if source.info(name).dtype == "F16" else "bfloat16"


def quantize_bnb(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    spec: BnbSpec | None = None,
    out: OutputSpec | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    dtype: str | None = None,
) -> Result:
    """Quantizes the checkpoint directory `src` into the new bitsandbytes directory `dst`.

    Args:
        src, dst, overwrite, restart, progress, device: as in `convert.quantize`; the device is
            where bitsandbytes rounds.
        spec: what to do; NF4 by default.
        out: how to write it; its dtype is also the dtype that weights are rounded in.
        dtype: instead of `out`'s; `auto`, or neither given, is the source's own 16-bit dtype.

    Raises:
        InputError: something given cannot be used, or bitsandbytes is missing; nothing was written.
        RunError: the run failed; the target is as it was before.
    """
    need_bitsandbytes()
    return _Run(src, dst, spec or BnbSpec(), out, dtype, device, overwrite, restart, progress)()


class _Run:
    """The state of one run; `__call__` is the story."""

    def __init__(
        self,
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        spec: BnbSpec,
        out: OutputSpec | None,
        dtype: str | None,
        device: str,
        overwrite: bool,
        restart: bool,
        progress: Progress | None,
    ) -> None:
        self.dst, self.overwrite, self.restart = Path(dst), overwrite, restart
        self.spec = spec
        self.tell: Callable[[Event], None] = progress or (lambda _: None)
        self.device = choose_device(device)
        self.source = Checkpoint.open(src)
        _refuse_mixture(self.source)
        self.family = family_of(self.source.config)
        if dtype == "auto" or (dtype is None and out is None):
            first = self.family.first_linear(self.source.tensors)
            dtype = source_dtype(self.source, f"{first}.weight")
        self.out = out or OutputSpec()
        if self.out.format != OutputSpec.format:
            raise SpecError(
                "format",
                expected=f"none with {spec.method}, which has its own",
                got=repr(self.out.format),
                cure="Leave it out, or use GPTQ",
            )
        if dtype is not None:
            self.out = replace(self.out, dtype=dtype)
        self.dtype: torch.dtype = getattr(torch, self.out.dtype)
        self.compute = compute_dtype(spec, self.out.dtype, self.device)
        self.layers: list[LinearDone] = []
        self.written: dict[str, str] = {}
        self.timings: dict[str, float] = {}

    def __call__(self) -> Result:
        start = time.perf_counter()
        self.tell(Stage("read"))
        if not self.overwrite:
            check_not_done(self.dst, self.source, self.spec, self._manifest)
        check_config(self.source.config, self.family, self.source.tensors)
        check_unquantized(self.source, self.family.linear_names(self.source.tensors))
        check_side_files(self.source)
        skeleton = Skeleton(self.source, self.family, torch.device("cpu"), torch.float32)
        linears, skip = self._linears(skeleton)
        check_unquantized(self.source, linears)
        plan, kept = self._plan(skeleton, linears)
        notes = self._notes(linears, skip, kept)
        need = sum(p.nbytes for p in plan)
        with WorkDir(
            self.dst,
            source=self.source.path,
            need_bytes=need,
            overwrite=self.overwrite,
            restart=self.restart,
        ) as work:
            blocks = len(skeleton.blocks)
            self.tell(Planned(blocks, len(linears), 0, str(self.device)))
            for note in notes:
                self.tell(Warned(note))
            self.tell(Stage("quantize"))
            with ShardWriter(work.path, plan, self.out.shard_size) as writer:
                with self._clock("write"):
                    copy_tensors(self.source, kept, writer, self.dtype)
                self._quantize(linears, blocks, writer)
                self.tell(Stage("write"))
            with self._clock("write"):
                quant = quantization_config(self.spec, self.compute, skip)
                write_common_files(self.source, work.path, self.family, quant, self.out)
                self._report(work.path)
            self.tell(Stage("verify"))
            with self._clock("verify"):
                check_written(work.path, self.written)
            self.tell(Stage("publish"))
            size = sum(f.stat().st_size for f in work.path.iterdir() if f.is_file())
            path = work.publish()
        seconds = time.perf_counter() - start
        return Result(
            path=path,
            seconds=seconds,
            layers=tuple(self.layers),
            size_bytes=size,
            timings={**self.timings, "other": seconds - sum(self.timings.values())},
            peak_bytes=peak_memory(),
            spilled_bytes=0,
            device=str(self.device),
            compute_dtype=self.compute,
            threads=torch.get_num_threads(),
        )

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[part] = self.timings.get(part, 0.0) + time.perf_counter() - start

    def _linears(self, skeleton: Skeleton) -> tuple[list[str], list[str]]:
        """(linears to quantize, in the model's order; names left out), as transformers will choose:
        every plain `nn.Linear` of the model that is not left out by name."""
        names = [n for n, m in skeleton.model.named_modules() if type(m) is nn.Linear]
        skip = skipped(names, self.spec.skip)
        refuse_tied_head(skeleton.tied, skip)
        left = set(skip)
        if not (linears := [name for name in names if name not in left]):
            raise nothing_left(self.spec)
        return linears, skip

    def _plan(
        self, skeleton: Skeleton, linears: Sequence[str]
    ) -> tuple[list[TensorPlan], list[str]]:
        """Every tensor of the directory in the order of the model, and those kept in 16 bits."""
        chosen = set(linears)
        plan: list[TensorPlan] = []
        kept: list[str] = []
        for parameter in skeleton.parameters:
            name, _, kind = parameter.rpartition(".")
            shape = self.source.info(parameter).shape
            if kind == "weight" and name in chosen:
                n, k = shape
                plan += linear_plan(name, (n, k), self.spec, self.dtype)
            else:
                plan.append(TensorPlan(parameter, dtype_name(self.dtype), shape))
                kept.append(parameter)
        return plan, kept

    def _notes(self, linears: list[str], skip: list[str], kept: list[str]) -> tuple[str, ...]:
        """What stays in 16 bits without having been left out by name, and a dtype not asked for."""
        shapes = {name: self.source.info(name).shape for name in kept}
        apart = {f"{name}.weight" for name in skip} | {self.family.embedding}
        stay = left_in_16_bit(shapes, set(linears), apart)
        notes = compute_notes(self.spec, self.out.dtype, self.device)
        if stay:
            notes += (f"{len(stay)} matrices stay in 16 bits: {some(stay)}",)
        return notes

    def _quantize(self, linears: Sequence[str], blocks: int, writer: ShardWriter) -> None:
        """Every linear: read, round, write; a block is told when its last one is done."""
        start = time.perf_counter()
        tidy = Tidy()
        for at, name in enumerate(linears):
            place = block_of(f"{name}.")
            index = place[1] if place else blocks - 1
            self._quantize_one(name, index, writer)
            tidy(32 << 20)
            after = block_of(f"{linears[at + 1]}.") if at + 1 < len(linears) else None
            if place is not None and after != place:
                self.tell(BlockDone(index, blocks, time.perf_counter() - start))
                start = time.perf_counter()

    def _quantize_one(self, name: str, index: int, writer: ShardWriter) -> None:
        started = time.perf_counter()
        with self._clock("read"):
            weight = cast(f"{name}.weight", self.source.read(f"{name}.weight"), self.dtype)
            if self.spec.method == "int8":
                _need_half(f"{name}.weight", weight)
        with self._clock("solve"):
            done = quantize_weight(weight, self.spec, self.device)
        with self._clock("write"):
            for part, tensor in done.parts.items():
                self.written[f"{name}.{part}"] = tensor_sha256(tensor)
                writer.write(f"{name}.{part}", tensor)
        relative = done.loss / done.norm if done.norm > 0 else 0.0
        seconds = time.perf_counter() - started
        self.layers.append(LinearDone(index, name, done.loss, relative, 0.0, (), seconds))
        self.tell(self.layers[-1])

    def _manifest(self) -> dict[str, Any]:
        return build_manifest(
            source=self.source,
            source_sha256=self.source.sha256(),
            quant=self.spec,
            calib=None,
            tokens=None,
            out=self.out,
            layers=self.layers,
            device=str(self.device),
            compute_dtype=self.compute,
            threads=torch.get_num_threads(),
            packages=("bitsandbytes",),
        )

    def _report(self, path: Path) -> None:
        manifest = self._manifest()
        write_manifest(path, manifest)
        write_card(path, manifest, self.source, render_bnb_card)
        write_sums(path, manifest["files"])


def _refuse_mixture(source: Checkpoint) -> None:
    """Mixtures of experts have no way to a directory yet, nor has linear attention.

    Raises:
        CheckpointError: it is one.
    """
    family = family_of(source.config)
    if family.varied:
        raise CheckpointError(
            "config.json: model_type",
            expected="a dense Qwen",
            got=f"{family.model_type!r}, "
            + (
                "whose experts bitsandbytes leaves in 16 bits"
                if family.experts
                else "whose linear attention has not been tried with bitsandbytes"
            ),
            cure='Load it on the fly: qquant.load(SRC, method="nf4") names what stays',
        )


def _need_half(name: str, weight: Tensor) -> None:
    """bitsandbytes takes float16 to 8 bits, so the weight has to fit that.

    Raises:
        CheckpointError: it does not.
    """
    if not all_finite(weight.to(torch.float16)):
        raise CheckpointError(
            name,
            expected="values that fit float16, from which bitsandbytes makes 8 bits",
            got=f"a largest magnitude of {float(weight.abs().max()):.3g}",
            cure=f"Use --method nf4, or leave it out: --skip-module {name.removesuffix('.weight')}",
        )
