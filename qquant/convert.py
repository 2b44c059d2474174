"""One run, as a story: a Qwen checkpoint directory goes in, a published Int4 directory comes out.

The order is the order of risk. What can be refused is refused before any weight is read (source,
family, divisions, target, disk, calibration data); then block after block is read, walked, solved,
packed and written at its final place in the shards; then the rest of the directory; then everything
is read back and verified; and only then the directory takes its name.

Several processes (`world.py`) tell the story together: all of them walk and solve, and the first
alone writes, shows and publishes. What it finds before the blocks is read from the journal by the
others, which wait for it at the end.

Memory is one block, its activations and one Hessian, whatever the depth. This module decides
nothing about numbers (`gptq.py`), order (`calibration/walk.py`), bits (`pack.py`) or bytes
(`shards.py`): it connects them, and says what happened through events and the manifest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import pool
from .already import check_not_done
from .batching import TOKENS_PER_BATCH
from .blocks import Blocks, hold_dtype_of
from .budget import MemoryNeeds, check_sampling, make_holder, memory_needs
from .calibration.enough import check_enough
from .calibration.hold import Holder
from .calibration.sources import SELF, is_hub, parse_sources
from .calibration.tokens import CalibrationTokens, calibration_tokens, given_tokens, ids_sha256
from .card import write_card
from .checkpoint import Checkpoint
from .config import CalibrationSpec, OutputSpec, QuantSpec
from .devices import choose_compute, choose_device, choose_dtype
from .directory import sha256_files
from .errors import CheckpointError, RankLostError
from .estimate import Estimate, check_before, estimate
from .events import Event, Kept, LinearDone, Planned, Progress, Resumed, Stage, Warned
from .export import write_side_files
from .host import peak_memory
from .identity import check_unchanged, run_identity
from .int16 import squaring
from .journal import Journal, agree
from .manifest import build_manifest, write_manifest
from .mixed import Mixed, mix
from .models.families import family_of
from .models.shapes import Shapes
from .models.skeleton import Skeleton
from .models.tokenizer import load_tokenizer
from .overlap import Aside, overlaps
from .pace import LONG, QUICK
from .place import Place
from .plan import bytes_needed, tensor_plan
from .publish import Guest, WorkDir
from .readback import check_written
from .result import Result
from .sensitivity import measure
from .shards import ShardWriter
from .sums import write_sums
from .timings import Clock, matmul_gflops
from .unquantized import begin_shards
from .world import ALONE, World

log = logging.getLogger(__name__)


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
    restart: bool = False,
    progress: Progress | None = None,
    tokens: Tensor | None = None,
    memory: int | None = None,
    gpu_memory: int | None = None,
    timings: bool = False,
    world: World = ALONE,
) -> Result:
    """Quantizes the checkpoint directory `src` into the new directory `dst`.

    Args:
        src: a Qwen checkpoint directory (`models/families.py` has the families) with safetensors
        weights. dst: must not exist, unless `overwrite`. quant, calib, out: what to do; defaults as
        in `config`. device: `auto`, `cpu`, `cuda`, `cuda:N`. compute_dtype: of the calibration
        forward: `auto`, `float32`, `bfloat16`, `float16`, `int16` (tensors of float32, products in
        16-bit integers: `int16.py`). overwrite: replace an existing model directory, once the new
        one is complete. restart: throw away what an earlier run for `dst` that ended early has
        kept, instead of going on with it. progress: called with each event.
        tokens: [samples, seqlen] int64, calibration ids to use instead of `calib`'s sources.
        memory, gpu_memory: bytes that the process may take on the host and on the accelerator; see
        `budget`. timings: measure what the machine's matrix product reaches and estimate the run
        beforehand, to compare with (a few seconds). world: from `world.join`, where several
        processes call this together with the same arguments; only the first one's `progress` is
        called, and limits of memory are of each.

    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run failed; the target is as it was before.
    """
    quant, calib, out = quant or QuantSpec(), calib or CalibrationSpec(), out or OutputSpec()
    run = world.every(
        lambda: _Run(src, quant, calib, out, device, compute_dtype, memory, gpu_memory, progress)
    )
    run.share(world)
    return run(dst, overwrite, restart, tokens, timings)


class _Run:
    """The state of one run; `__call__` is the story."""

    def __init__(
        self,
        src: str | os.PathLike[str],
        quant: QuantSpec,
        calib: CalibrationSpec,
        out: OutputSpec,
        device: str,
        compute_dtype: str,
        memory: int | None,
        gpu_memory: int | None,
        progress: Progress | None,
    ) -> None:
        self.memory, self.gpu_memory = memory, gpu_memory
        self.quant, self.calib, self.out = quant, calib, out
        self.tell: Callable[[Event], None] = progress or (lambda _: None)
        self.clock = Clock()
        self.device = choose_device(device)
        self.compute = choose_compute(compute_dtype, self.device)
        self.dtype = self.compute.dtype
        self.place = Place.of(self.device, *self.compute)
        self.source = Checkpoint.open(src)
        self.family = family_of(self.source.config)
        self.layers: list[LinearDone] = []
        self.spilled_bytes, self.recomputed = 0, 0.0
        self.columns = ""
        self.mixed: Mixed | None = None
        self.bits: dict[str, int] = {}  # by linear, where they differ
        self.resumed = 0  # blocks that an earlier run had done
        self.source_sha256 = Aside(self.source.sha256)  # of every byte, for the manifest
        self.world, self.seat = ALONE, ALONE.seat

    def share(self, world: World) -> None:
        """Before the run: it is done together with other processes."""
        self.world, self.seat = world, world.seat
        if not world.leads:
            self.tell = lambda _: None

    def __call__(
        self,
        dst: str | os.PathLike[str],
        overwrite: bool,
        restart: bool,
        tokens: Tensor | None,
        timings: bool,
    ) -> Result:
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.tell(Stage("read"))
        if not overwrite:
            self.world.every(lambda: self._check_not_done(dst, tokens))
        with self.clock("set-up"):
            skeleton, needs, holder = self.world.every(lambda: self._prepared(tokens))
        foreseen = None
        if timings or self.place.plain:  # elsewhere it takes as long as a small run
            with self.clock("estimate"):
                foreseen = self._estimate(holder, needs, tokens, LONG if timings else QUICK)
        need = bytes_needed(self.source, self.family, skeleton.parameters, self.quant, self.out)
        need += needs.kept + self.seat.size * needs.beyond(holder)
        identity = run_identity(
            self.source,
            self.quant,
            self.calib,
            self.out,
            device=self.device,
            compute=self.compute.name,
            tokens=tokens,
            seat=self.seat,
        )
        agree(identity, self.world)

        def make() -> WorkDir:
            return WorkDir(
                dst,
                source=self.source.path,
                need_bytes=need,
                overwrite=overwrite,
                resumable=True,
                restart=restart,
            )

        with self._work(make) as work, self.source_sha256:
            holder.spill_dir = work.scratch
            journal = Journal.open(work.state, identity, self.world)
            try:
                self._convert(skeleton, work, holder, journal, tokens)
                path, size = self._publish(work)
            except BaseException as error:
                # A source that is wrong has to be mended first, and is another one then; one that
                # could not be read for a moment has lost nothing.
                wrong = isinstance(error, CheckpointError)
                mend = wrong and not isinstance(error.__cause__, OSError)
                if self._worth_keeping(journal, tokens) and not mend and work.keep():
                    assert journal.block is not None
                    root = str(work.state.parent)
                    self.tell(Kept(root, journal.block, len(skeleton.blocks)))
                raise
        seconds = time.perf_counter() - start
        on_host = self.device.type == "cpu"
        parts = dict(self.clock.parts)
        parts["other"] = seconds - sum(parts.values())
        rate = None
        if timings and on_host:
            int16 = squaring if self.compute.int16 else None
            rate = matmul_gflops(self.device, self.dtype, int16)
            pool.trim()
        return Result(
            path=Path(path),
            seconds=seconds,
            layers=tuple(self.layers),
            size_bytes=size,
            timings=parts,
            flops=dict(self.clock.flops) if on_host else {},
            matmul_gflops=rate,
            mixed=self.mixed,
            foreseen=foreseen,
            resumed=self.resumed,
            peak_bytes=peak_memory(),
            spilled_bytes=self.spilled_bytes,
            recomputed=self.recomputed,
            device=str(self.device),
            compute_dtype=self.compute.name,
            threads=torch.get_num_threads(),
            columns=self.columns,
            device_peak_bytes=None if on_host else torch.cuda.max_memory_allocated(self.device),
        )

    def _worth_keeping(self, journal: Journal, tokens: Tensor | None) -> bool:
        """Blocks, or what took long before the first: ids sampled or fetched, bits measured."""
        if journal.block != 0:
            return journal.block is not None
        given = tokens is not None or self.quant.method == "rtn"
        sources = () if given else parse_sources(self.calib.sources)
        dear = any(s.name == SELF or is_hub(s.name) for s in sources)
        return dear or self.quant.target_bpw is not None

    @contextlib.contextmanager
    def _work(self, make: Callable[[], WorkDir]) -> Iterator[WorkDir | Guest]:
        """The work directory, entered by the rank that leads."""
        with contextlib.ExitStack() as stack:
            entered: list[WorkDir] = []

            def enter() -> tuple[str, str]:
                entered.append(stack.enter_context(make()))
                return entered[0].invitation

            invitation = self.world.first(enter)
            yield self.world.every(lambda: entered[0] if entered else Guest(invitation))

    def _publish(self, work: WorkDir | Guest) -> tuple[str, int]:
        """Gives the target its name; path and bytes. From then on it stands, whoever is lost."""
        done: list[tuple[str, int]] = []

        def publish() -> tuple[str, int]:
            assert isinstance(work, WorkDir)
            self.tell(Stage("publish"))
            size = sum(f.stat().st_size for f in work.path.iterdir() if f.is_file())
            done.append((str(work.publish()), size))
            return done[0]

        try:
            return self.world.first(publish)
        except RankLostError:
            if not done:
                raise
            return done[0]

    def _convert(
        self,
        skeleton: Skeleton,
        work: WorkDir | Guest,
        holder: Holder,
        journal: Journal,
        tokens: Tensor | None,
    ) -> None:
        """From the first calibration token to a verified directory in `work.path`."""
        calibration = self._settle(skeleton, holder, journal, tokens)
        self.tell(Stage("quantize"))
        with contextlib.ExitStack() as stack:
            writers: list[ShardWriter] = []  # the first rank's
            shards = Aside(lambda stop: sha256_files(sorted(work.path.glob("*.safetensors")), stop))
            stack.enter_context(shards)

            def solved() -> None:
                if self.world.leads:
                    self.source_sha256.begin()
                    shards.begin()

            def begin() -> None:
                if overlaps(self.device.type):
                    self.source_sha256.begin()
                writers.append(stack.enter_context(self._writer(skeleton, work.path, journal)))

            self.world.first(begin)
            blocks = Blocks(
                skeleton,
                writers[0] if writers else None,
                self.quant,
                self.out,
                bits=self.bits,
                journal=journal,
                clock=self.clock,
                tell=self.tell,
                warn=self._warn,
                world=self.world,
                solved=solved,
            )
            self.layers = blocks.layers
            if journal.block:
                self.resumed = journal.block
                self.tell(Resumed(journal.block, len(skeleton.blocks), len(blocks.layers)))
            if calibration is None:
                blocks.round()
            else:
                blocks.walk(calibration.ids, holder)
            self.spilled_bytes, self.columns = blocks.spilled_bytes, blocks.columns
            self.recomputed = blocks.recomputed
            self.tell(Stage("write"))
            if not self.world.leads:
                return
            with self.clock("write"):
                hashes = shards.take()
        with self.clock("write"):
            rules = self.mixed.rules(self.family) if self.mixed else {}
            write_side_files(self.source, work.path, self.family, self.quant, self.out, rules)
            self._report(work.path, calibration, hashes)
        self.tell(Stage("verify"))
        with self.clock("verify"):
            check_unchanged(self.source, journal.identity)
            check_written(work.path, blocks.written, hashes)

    def _settle(
        self, skeleton: Skeleton, holder: Holder, journal: Journal, tokens: Tensor | None
    ) -> CalibrationTokens | None:
        """What is found before the first block, by the rank that leads; the others read it."""
        calibration: CalibrationTokens | None = None

        def choose() -> None:
            if self.quant.target_bpw is not None and calibration is not None:
                self._choose_bits(skeleton, calibration.ids, holder, journal)

        def settle() -> dict[str, Any]:
            nonlocal calibration
            calibration = self._calibration(tokens, journal)
            self._announce(calibration)
            if journal.block is None:
                journal.begin(self._found(calibration), calibration.ids if calibration else None)
            choose()
            if self.mixed is not None and "bits" not in journal.facts:
                journal.begin(self._found(calibration), None)
            return journal.kept()

        kept = self.world.first(settle)
        if not self.world.leads:
            journal.adopt(kept)
            calibration = self._calibration(None, journal)
            choose()
        return calibration

    def _writer(self, skeleton: Skeleton, path: Path, journal: Journal) -> ShardWriter:
        """Of all shards, with everything in them that is not quantized."""
        plan, kept = tensor_plan(
            self.source, self.family, skeleton.parameters, self.quant, self.out, self.bits
        )
        done = journal.facts["written"] if journal.block else None
        with self.clock("write"):  # first, so that a damaged head is refused before the long part
            return begin_shards(path, plan, self.source, kept, self.out, done)

    def _prepared(self, tokens: Tensor | None) -> tuple[Skeleton, MemoryNeeds, Holder]:
        """Everything that can be refused before any weight is read, and what was made for that."""
        check_before(self.source, self.family, self.quant, self.out)
        skeleton = Skeleton(self.source, self.family, self.device, *self.compute)
        needs = self._needs(tokens)
        holder = make_holder(
            needs,
            self.place,
            memory=self.memory,
            gpu_memory=self.gpu_memory,
            processes=self.seat.local_size,
            model=self.source.nbytes,
        )
        return skeleton, needs, holder

    def _calib(self, tokens: Tensor | None) -> CalibrationSpec:
        """The spec's, in the shape that given tokens have."""
        if tokens is None or tokens.dim() != 2 or not tokens.numel():
            return self.calib
        return replace(self.calib, samples=tokens.shape[0], seqlen=tokens.shape[1])

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes.of(self.source, self.family)

    def _needs(self, tokens: Tensor | None) -> MemoryNeeds:
        calib = self._calib(tokens)
        samples = 0 if self.quant.method == "rtn" else calib.samples
        return memory_needs(
            self._shapes, self.quant, self.place, samples, calib.seqlen, self.seat.size
        )

    def _estimate(
        self, holder: Holder, needs: MemoryNeeds, tokens: Tensor | None, seconds: float
    ) -> Estimate:
        return estimate(
            self.source,
            self.family,
            self.quant,
            self._calib(tokens),
            self.out,
            shapes=self._shapes,
            place=self.place,
            room=holder,
            needs=needs,
            processes=self.seat.size,
            seconds=seconds,
            begun=True,
        )

    def _found(self, calibration: CalibrationTokens | None) -> dict[str, Any]:
        """What is known before the first block, for whoever goes on with this run."""
        found: dict[str, Any] = {}
        if calibration is not None:
            found["calibration"] = {
                "sha256": calibration.sha256,
                "sources": list(calibration.sources),
                "notes": list(calibration.notes),
            }
        if self.mixed is not None:
            found["bits"] = self.mixed.measured()
        return found

    def _choose_bits(
        self, skeleton: Skeleton, ids: Tensor, holder: Holder, journal: Journal
    ) -> None:
        """Measures every linear at every width and settles `mixed`, `bits` and the base width."""
        self.tell(Stage("sensitivity"))
        with self.clock("sensitivity"):
            if "bits" in journal.facts:
                self.mixed = Mixed.again(journal.facts["bits"], self.quant)
            else:
                hold_dtype = hold_dtype_of(skeleton)
                if self.dtype == torch.float16:  # gradients do not fit
                    skeleton = Skeleton(self.source, self.family, self.device, torch.float32)
                found = measure(
                    skeleton,
                    ids,
                    self.quant,
                    batch_tokens=TOKENS_PER_BATCH[self.device.type],
                    holder=holder,
                    hold_dtype=hold_dtype,
                    progress=lambda _: self.world.tick(),
                )
                self.mixed = mix(
                    found.units,
                    self.quant,
                    tokens=found.tokens,
                    gradient_tokens=found.gradient_tokens,
                )
        self.bits = self.mixed.bits(self.family)
        self.quant = replace(self.quant, bits=self.mixed.base)

    def _calibration(self, tokens: Tensor | None, journal: Journal) -> CalibrationTokens | None:
        if self.quant.method == "rtn":
            return None
        self.tell(Stage("calibrate"))
        with self.clock("calibrate"):
            if (ids := journal.ids()) is not None:
                record = journal.facts["calibration"]
                return CalibrationTokens(
                    ids, record["sha256"], tuple(record["sources"]), tuple(record["notes"])
                )
            if tokens is not None:
                return given_tokens(tokens)
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

        linear = next(iter(self.family.linear_names(self.source.tensors)))
        stored = self.source.info(f"{linear}.weight").torch_dtype
        place = Place.of(self.device, choose_dtype(None, self.device, stored))  # as `load` does
        limits = self.memory, self.gpu_memory
        check_sampling(self.source.nbytes, self._shapes, place, *limits)
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
        names = self.family.linear_names(self.source.tensors)
        self.tell(
            Planned(
                blocks=self.family.layers(self.source.config),
                linears=len(names),
                calibration_tokens=count,
                device=f"{self.device} ({str(self.dtype).removeprefix('torch.')})",
                notes=calibration.notes if calibration else (),
            )
        )
        if calibration:
            widest = max(self.source.info(f"{name}.weight").shape[1] for name in names)
            if text := check_enough(count, widest):
                self._warn(text)

    def _warn(self, text: str) -> None:
        """Something that does not stop the run, for the watcher and for whoever reads the log."""
        if self.world.leads:
            log.warning("%s", text)
        self.tell(Warned(text))

    def _check_not_done(self, dst: str | os.PathLike[str], tokens: Tensor | None) -> None:
        """Should the command be given again after it was done, that is what it says."""
        check_not_done(
            dst,
            self.source,
            self.quant,
            lambda: self._manifest(None, self.source.sha256()),
            None if self.quant.method == "rtn" else self.calib,
            None if tokens is None else ids_sha256(tokens),
            clear=self.world.leads,
        )

    def _manifest(
        self, calibration: CalibrationTokens | None, source_sha256: str
    ) -> dict[str, Any]:
        return build_manifest(
            source=self.source,
            quant=self.quant,
            calib=self.calib if calibration else None,
            tokens=calibration,
            out=self.out,
            layers=self.layers,
            device=str(self.device),
            compute_dtype=self.compute.name,
            threads=torch.get_num_threads(),
            mixed=self.mixed,
            processes=self.seat.size,
            source_sha256=source_sha256,
        )

    def _report(
        self, path: Path, calibration: CalibrationTokens | None, hashes: Mapping[Path, str]
    ) -> None:
        manifest = self._manifest(calibration, self.source_sha256.take())
        write_manifest(path, manifest, hashes)
        write_card(path, manifest, self.source)
        write_sums(path, manifest["files"])
