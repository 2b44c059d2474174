"""One run, as a story: a Qwen checkpoint directory goes in, a published Int4 directory comes out.

The order is the order of risk. What can be refused is refused before any weight is read (source,
family, divisions, target, disk, calibration data); then block after block is read, walked, solved,
packed and written at its final place in the shards; then the rest of the directory; then everything
is read back and verified; and only then the directory takes its name.

Memory is one block, its activations and one Hessian, whatever the depth. This module decides
nothing about numbers (`gptq.py`), order (`calibration/walk.py`), bits (`pack.py`) or bytes
(`shards.py`): it connects them, and says what happened through events and the manifest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import gptq
from .calibration.hold import default_holder
from .calibration.tokens import CalibrationTokens, calibration_tokens, check_enough, ids_sha256
from .calibration.walk import Arrival, BlockWalk, droppable, linear_of, shared_inputs
from .card import write_card
from .checkpoint import Checkpoint, tensor_memory
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .devices import Tidy, choose_device, choose_dtype, peak_memory
from .errors import CalibrationError, CheckpointError, VerifyError
from .events import BlockDone, Event, LinearDone, Planned, Progress, Stage, Warned
from .export import check_side_files, write_side_files
from .manifest import build_manifest, write_manifest
from .models.families import family_of
from .models.skeleton import Skeleton, need_finite
from .models.tokenizer import load_tokenizer
from .pack import pack
from .plan import check_source, tensor_plan
from .publish import WorkDir
from .report import flag_line, human_bytes
from .shards import ShardWriter
from .verify import verify

log = logging.getLogger(__name__)

_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 32768}
_PROBE = 16  # tokens that show which linears share an input
_ROW_BYTES = 64 << 20  # of an unquantized tensor, converted at a time


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: the published directory.
        seconds: wall time of the whole run.
        layers: one entry per quantized linear, in the order they were solved.
        size_bytes: of all files in the directory.
        timings: seconds by part: read, forward, hessian, solve, pack, write, other.
        peak_bytes: peak resident memory of the process, in bytes.
        spilled_bytes: most activations that were in spill files at one time.
        device, compute_dtype, threads: what ran.
    """

    path: Path
    seconds: float
    layers: tuple[LinearDone, ...]
    size_bytes: int
    timings: dict[str, float]
    peak_bytes: int
    spilled_bytes: int
    device: str
    compute_dtype: str
    threads: int


@dataclass
class _Clock:
    """Wall seconds by part."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    quant: QuantSpec | None = None,
    calib: CalibrationSpec | None = None,
    out: OutputSpec | None = None,
    *,
    device: str = "auto",
    compute_dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    tokens: Tensor | None = None,
) -> Result:
    """Quantizes the checkpoint directory `src` into the new directory `dst`.

    Args:
        src: a Qwen checkpoint directory (original Qwen, Qwen1.5, 2, 2.5, 3) with safetensors
        weights. dst: must not exist, unless `overwrite`. quant, calib, out: what to do; defaults as
        in `config`. device: `auto`, `cpu`, `cuda`, `cuda:N`. compute_dtype: of the calibration
        forward: `auto`, `float32`, `bfloat16`, `float16`. overwrite: replace an existing model
        directory, once the new one is complete. progress: called with each event. tokens: [samples,
        seqlen] int64, calibration ids to use instead of `calib`'s sources.

    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run failed; the target is as it was before.
    """
    quant, calib, out = quant or QuantSpec(), calib or CalibrationSpec(), out or OutputSpec()
    return _Run(src, dst, quant, calib, out, device, compute_dtype, overwrite, progress)(tokens)


class _Run:
    """The state of one run; `__call__` is the story."""

    def __init__(
        self,
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        quant: QuantSpec,
        calib: CalibrationSpec,
        out: OutputSpec,
        device: str,
        compute_dtype: str,
        overwrite: bool,
        progress: Progress | None,
    ) -> None:
        self.dst, self.overwrite = Path(dst), overwrite
        self.quant, self.calib, self.out = quant, calib, out
        self.tell: Callable[[Event], None] = progress or (lambda _: None)
        self.clock = _Clock()
        self.device = choose_device(device)
        self.dtype = choose_dtype(compute_dtype, self.device)
        self.source = Checkpoint.open(src)
        self.family = family_of(self.source.config)
        self.layers: list[LinearDone] = []
        self.spilled_bytes = 0
        self.written: dict[str, str] = {}  # hashes of the packed tensors, to read them back by

    def __call__(self, tokens: Tensor | None) -> Result:
        start = time.perf_counter()
        self.tell(Stage("read"))
        check_source(self.source, self.family, self.quant)
        check_side_files(self.source)
        skeleton = Skeleton(self.source, self.family, self.device, self.dtype)
        plan, kept = tensor_plan(
            self.source, self.family, skeleton.parameters, self.quant, self.out
        )
        need = sum(p.nbytes for p in plan)
        with WorkDir(
            self.dst, source=self.source.path, need_bytes=need, overwrite=self.overwrite
        ) as work:
            calibration = self._calibration(tokens)
            self._announce(calibration)
            self.tell(Stage("quantize"))
            with ShardWriter(work.path, plan, self.out.shard_size) as writer:
                with self.clock("write"):
                    # First, so that a damaged head is refused before the long part.
                    self._copy_rest(kept, writer)
                if calibration is None:
                    self._round_all(skeleton, writer)
                else:
                    self._walk_all(skeleton, writer, calibration.ids, work.scratch)
                self.tell(Stage("write"))
            with self.clock("write"):
                write_side_files(self.source, work.path, self.family, self.quant, self.out)
                self._report(work.path, calibration)
            self.tell(Stage("verify"))
            with self.clock("verify"):
                self._verify(work.path)
            self.tell(Stage("publish"))
            size = sum(f.stat().st_size for f in work.path.iterdir() if f.is_file())
            path = work.publish()
        seconds = time.perf_counter() - start
        parts = dict(self.clock.parts)
        parts["other"] = seconds - sum(parts.values())
        return Result(
            path=path,
            seconds=seconds,
            layers=tuple(self.layers),
            size_bytes=size,
            timings=parts,
            peak_bytes=peak_memory(),
            spilled_bytes=self.spilled_bytes,
            device=str(self.device),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )

    def _verify(self, path: Path) -> None:
        """Reads everything back: the directory by itself, and each packed tensor as it was solved.

        How far weights moved is not judged here: with few tokens or few bits the Hessian may permit
        a lot. `qquant verify --against` reports it.

        Raises:
            VerifyError: something is not what was meant.
        """
        report = verify(path)
        problems = [str(p) for p in report.problems]
        if report.ok:
            stored = Checkpoint.open(path)
            problems = [
                f"{name} is not what was written"
                for name, digest in self.written.items()
                if tensor_sha256(stored.read(name)) != digest
            ]
        if problems:
            raise VerifyError(
                "the written directory",
                expected="what was meant",
                got="; ".join(problems[:3]),
                cure="This is a bug or a failing disk; the target was not touched",
            )

    def _calibration(self, tokens: Tensor | None) -> CalibrationTokens | None:
        if self.quant.method == "rtn":
            return None
        self.tell(Stage("calibrate"))
        with self.clock("calibrate"):
            if tokens is not None:
                if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
                    raise CalibrationError(
                        "tokens",
                        expected="[samples, seqlen] int64",
                        got=f"{list(tokens.shape)} {tokens.dtype}",
                    )
                record = {"name": "tokens", "tokens": tokens.numel(), "rows": tokens.shape[0]}
                return CalibrationTokens(tokens, ids_sha256(tokens), (record,))
            return calibration_tokens(
                load_tokenizer(self.source),
                self.calib,
                model_type=self.family.model_type,
                generate=self._sample,
            )

    def _sample(self, tokens: int, seed: int) -> Tensor:
        """The source `self`: ids sampled from the model itself, loaded whole for the purpose."""
        from .calibration.tokens import sample_from_model
        from .runtime import load

        loaded = load(self.source.path, device=str(self.device))
        return sample_from_model(
            loaded.model,
            loaded.tokenizer,
            samples=-(-tokens // self.calib.seqlen),
            seqlen=self.calib.seqlen,
            seed=seed,
            device=self.device,
        )

    def _announce(self, calibration: CalibrationTokens | None) -> None:
        count = calibration.ids.numel() if calibration else 0
        layers = self.family.layers(self.source.config)
        self.tell(
            Planned(
                blocks=layers,
                linears=layers * len(self.family.linears),
                calibration_tokens=count,
                device=f"{self.device} ({str(self.dtype).removeprefix('torch.')})",
                notes=calibration.notes if calibration else (),
            )
        )
        if calibration:
            names = self.family.linear_names(layers)
            widest = max(self.source.info(f"{name}.weight").shape[1] for name in names)
            if text := check_enough(count, widest):
                self._warn(text)

    def _warn(self, text: str) -> None:
        """Something that does not stop the run, for the watcher and for whoever reads the log."""
        log.warning("%s", text)
        self.tell(Warned(text))

    def _walk_all(
        self, skeleton: Skeleton, writer: ShardWriter, ids: Tensor, spill_dir: Path
    ) -> None:
        """Every block: read, walk, solve, pack, write."""
        per_batch = max(1, _TOKENS_PER_BATCH[self.device.type] // ids.shape[1])
        hold_dtype = None
        if self.dtype == torch.float32 and self._stored_dtype() == "BF16":
            hold_dtype = torch.bfloat16
        with self.clock("read"):
            embedded = skeleton.embed(ids)
        probe = embedded[:1, :_PROBE].clone().to(self.device)
        if hold_dtype is not None:  # as every block's input will be
            embedded = embedded.to(hold_dtype)
        batches = [b.to(self.device) for b in torch.split(embedded, per_batch)]
        del embedded
        streams = [batches]
        if self.quant.streams == 2:
            share = self.quant.correct_share
            pick = [int((b + 1) * share) > int(b * share) for b in range(len(batches))]
            pick[-1] |= not any(pick)
            streams.append([b if p else b[:0] for b, p in zip(batches, pick, strict=True)])
        holder = default_holder(self.device, spill_dir)
        blocks = len(skeleton.blocks)
        tidy = Tidy(slack=0)
        probed: dict[Any, tuple[list[tuple[str, ...]], dict[int, frozenset[Any]]]] = {}
        for index in range(blocks):
            start = time.perf_counter()
            kwargs = [skeleton.block_kwargs(*b.shape[:2])[index] for b in batches]
            with self.clock("read"):
                block = skeleton.load(index)
            try:
                shapes = tuple(tuple(p.shape) for p in block.parameters())
                if shapes not in probed:  # blocks of one shape run the same code
                    short = skeleton.block_kwargs(*probe.shape[:2])[index]
                    groups = shared_inputs(block, self.family.linears, probe, short)
                    probed[shapes] = groups, droppable(block, groups, probe, short)
                groups, drops = probed[shapes]
                walk = BlockWalk(
                    block,
                    groups,
                    residual=self.family.residual,
                    holder=holder,
                    hold_dtype=hold_dtype,
                    drops=drops,
                )

                def solve(arrival: Arrival, block: nn.Module = block, index: int = index) -> Any:
                    with self.clock("solving"):
                        return self._solve_group(block, index, arrival, writer)

                solving = self.clock.parts.get("solving", 0.0)
                with self.clock("walking"):
                    walk.run(streams, kwargs, solve, last=index == blocks - 1)
                walked = self.clock.parts.pop("walking")
                solved = self.clock.parts["solving"] - solving
                parts = self.clock.parts
                parts["hessian"] = parts.get("hessian", 0.0) + walk.hessian_seconds
                parts["forward"] = (
                    parts.get("forward", 0.0) + walked - solved - walk.hessian_seconds
                )
            finally:
                skeleton.drop(index)
            tidy()
            if holder.spilled_bytes and not self.spilled_bytes:
                self._warn(
                    f"The activations do not fit in memory: {human_bytes(holder.spilled_bytes)} of "
                    "them wait in a file beside the target, which is slower. Use fewer --samples "
                    "to avoid it."
                )
            self.spilled_bytes = holder.spilled_bytes
            self.tell(BlockDone(index, blocks, time.perf_counter() - start))
        self.clock.parts.pop("solving", None)

    def _stored_dtype(self) -> str:
        name = f"{self.family.linear_names(1)[0]}.weight"
        return self.source.info(name).dtype

    def _round_all(self, skeleton: Skeleton, writer: ShardWriter) -> None:
        """Round to nearest: no calibration, no forward."""
        blocks = len(skeleton.blocks)
        for index in range(blocks):
            start = time.perf_counter()
            block = skeleton.load(index)
            for name in self.family.linears:
                nothing = Arrival((name,), torch.empty(0), None, None, 0)
                self._solve_group(block, index, nothing, writer)
            skeleton.drop(index)
            self.tell(BlockDone(index, blocks, time.perf_counter() - start))

    def _solve_group(
        self, block: nn.Module, index: int, arrival: Arrival, writer: ShardWriter
    ) -> Mapping[str, Tensor]:
        """Solves the linears of one arrival as one matrix and writes them; their new weights."""
        started = time.perf_counter()
        linears = [linear_of(block, n) for n in arrival.names]
        rows = [int(m.weight.shape[0]) for m in linears]
        prefix = f"{self.family.blocks}.{index}."
        w = torch.cat([m.weight for m in linears]).float()
        with self.clock("solve"):
            solution = gptq.solve(
                w,
                arrival.h if arrival.tokens else None,
                self.quant,
                cross=arrival.cross,
                residual=arrival.residual,
                name=" and ".join(prefix + n for n in arrival.names),
            )
            weights = torch.split(solution.weight().to(self.dtype), rows)
        seconds = time.perf_counter() - started
        parts = zip(
            arrival.names,
            torch.split(solution.codes, rows),
            torch.split(solution.scales, rows),
            torch.split(solution.zeros, rows),
            torch.split(solution.row_loss, rows),
            torch.split(solution.row_norm, rows),
            strict=True,
        )
        for name, codes, scales, zeros, loss, norm in parts:
            self._write_linear(prefix + name, codes, scales, zeros, writer)
            total, scale = float(loss.sum()), float(norm.sum())
            layer = LinearDone(
                block=index,
                name=prefix + name,
                loss=total,
                rel_error=total / scale if scale > 0 else 0.0,
                damp=solution.damp,
                flags=solution.flags,
                seconds=seconds * codes.shape[0] / sum(rows),
            )
            self.layers.append(layer)
            self.tell(layer)
            if text := flag_line(layer):
                self._warn(text)
        return dict(zip(arrival.names, weights, strict=True))

    def _write_linear(
        self,
        name: str,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        writer: ShardWriter,
    ) -> None:
        with self.clock("pack"):
            packed = pack(
                codes, scales, zeros, bits=self.quant.bits, group_size=self.quant.group_size
            )
        dtype = getattr(torch, self.out.dtype)
        with self.clock("write"):
            for kind, tensor in packed._asdict().items():
                self.written[f"{name}.{kind}"] = tensor_sha256(tensor)
                writer.write(f"{name}.{kind}", tensor.cpu())
            if f"{name}.bias" in self.source.tensors:
                bias = self.source.read(f"{name}.bias")
                writer.write(f"{name}.bias", cast(f"{name}.bias", bias, dtype))
            elif self.family.all_biases:
                writer.write(f"{name}.bias", torch.zeros(codes.shape[0], dtype=dtype))

    def _copy_rest(self, names: Sequence[str], writer: ShardWriter) -> None:
        """Embedding, norms, head: cast in slices of rows, never copied whole."""
        dtype = getattr(torch, self.out.dtype)
        for name in names:
            info = self.source.info(name)
            rows = max(1, _ROW_BYTES * info.shape[0] // max(1, info.nbytes)) if info.shape else 1
            for start in range(0, info.shape[0], rows):
                part = self.source.read_rows(name, start, min(start + rows, info.shape[0]))
                writer.write_rows(name, start, cast(name, part, dtype))

    def _report(self, path: Path, calibration: CalibrationTokens | None) -> None:
        manifest = build_manifest(
            source=self.source,
            quant=self.quant,
            calib=self.calib if calibration else None,
            tokens=calibration,
            out=self.out,
            layers=self.layers,
            device=str(self.device),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
        write_manifest(path, manifest)
        write_card(path, manifest, self.source)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, refusing what would become infinite or is not finite already.

    Raises:
        CheckpointError: names the tensor.
    """
    need_finite(name, tensor)
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise CheckpointError(
            name,
            expected=f"values that fit {str(dtype).removeprefix('torch.')}",
            got=f"a largest magnitude of {float(tensor.abs().max()):.3g}",
            cure="Use --dtype bfloat16",
        )
    return result


def tensor_sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(tensor_memory(flat, 0, flat.numel())).hexdigest()
