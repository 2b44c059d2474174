"""What a run has finished, on the disk, so that the same command goes on from there.

The work directory of a run (`publish.py`) has a folder `state/` for this:

    journal.json   what decides the result, the blocks that are done, and what is known of them
    ids/           the calibration ids, so that nothing is downloaded or sampled twice
    block-7/       the activations that block 7 begins with, one tensor per stream and batch

The packed tensors of the finished blocks are not here: they are at their final place in the shards.
A commit makes them durable in an order that a power cut cannot turn round: shards flushed, then the
activations, then the journal, which is renamed into place and alone says what counts. Whatever was
written after it is written again. There is no random state to keep: after calibration a run draws
no numbers.

**Nothing is mixed.** The journal names everything that the bytes of the result depend on
(`identity.py`), and a run with anything else is refused with the difference. Activations, packed
tensors and the journal itself carry hashes, which are compared before going on. So the directory
that results is the one that an uninterrupted run writes, byte for byte.

**Several processes** (`world.py`) keep one journal. Each writes the activations of its own batches
(`block-7-rank-1/`), and only when all of them are on the disk does the first rank write the
journal, with everybody's hashes. So there is one commit, and no rank can be ahead of another.

**A commit costs** a write of the activations (2 bytes per token, feature and stream, as a rule). If
that would take more than `_SHARE` of the run's time, as it may on a fast accelerator, commits come
less often: then a few seconds of work are done again, not lost.

Left out on purpose: the formats of the tensors (safetensors, `shards.py`) and which folder this is
(`publish.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, tensor_sha256
from .directory import WEIGHTS
from .errors import CheckpointError, RunError, SpecError, TargetError
from .headers import TensorPlan, dtype_name, read_header
from .publish import JOURNAL as NAME
from .shards import ShardWriter
from .world import ALONE, World

FORMAT = 1
_SHARE = 0.02  # of the run's time, spent on commits at the most
_BYTES_PER_SECOND = 1e9  # of a commit, before the first one was timed
_ANEW = "Use --restart to begin anew"

Streams = Sequence[Sequence[Tensor]]


@dataclass
class Journal:
    """The state of one run; make one with `open`.

    Attributes:
        folder: `state/` of the work directory.
        identity: what the result depends on, by name.
        facts: what earlier stages found (calibration, the choice of bits, finished linears): JSON.
        block: the first block that is not done; None before anything is kept.
        world: the processes that keep it together.
    """

    folder: Path
    identity: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    block: int | None = None
    world: World = ALONE
    _hidden: str | None = None
    _hashes: dict[str, str] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], world: World = ALONE) -> Journal:
        """What an earlier run left in `folder`, or an empty journal.

        Args:
            identity: values that JSON can hold.

        Raises:
            TargetError: the run that left it was another; the difference is named.
            RunError: the journal is damaged.
        """
        now = json.loads(json.dumps(dict(identity)))
        journal = cls(folder, now, world=world)
        if (kept := world.first(lambda: cls._look(folder, now))) is not None:
            journal.adopt(kept)
        return journal

    @staticmethod
    def _look(folder: Path, now: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `kept` gave when the journal was written, if it is of this run; None without one."""
        if not os.path.lexists(folder / NAME):
            return None
        try:
            digest, _, text = (folder / NAME).read_text(encoding="utf-8").partition("\n")
        except (OSError, ValueError) as error:
            raise _damaged(folder / NAME, f"{type(error).__name__}: {error}") from error
        if digest != _digest(text):
            raise _damaged(folder / NAME, "other bytes")
        kept: dict[str, Any] = json.loads(text)  # as `_save` wrote it
        before = kept["identity"] if kept["format"] == FORMAT else {}
        if difference := differences(before, now):
            raise TargetError(
                f"an unfinished run in {folder.parent}, {kept['block']} blocks done",
                expected="the same settings, source and versions",
                got="; ".join(difference),
                cure="Use what it was begun with to go on, or --restart to begin anew",
            )
        return {key: kept[key] for key in ("block", "facts", "hidden", "hashes")}

    def kept(self) -> dict[str, Any]:
        """What another process needs to know of it; values that JSON can hold."""
        return {
            "block": self.block,
            "facts": self.facts,
            "hidden": self._hidden,
            "hashes": self._hashes,
        }

    def adopt(self, kept: Mapping[str, Any]) -> None:
        """Goes on from what `kept` gave."""
        self.block, self.facts = kept["block"], kept["facts"]
        self._hidden, self._hashes = kept["hidden"], kept["hashes"]

    def begin(self, facts: Mapping[str, Any], ids: Tensor | None) -> None:
        """Keeps what is known before the first block; for the rank that leads.

        Args:
            facts: JSON.
            ids: [samples, seqlen] int64 calibration ids; None where there are none.
        """
        self.facts = dict(facts)
        if ids is not None:
            self._hashes |= self._write("ids", {"ids": ids})
        self._save(0, None)

    def ids(self) -> Tensor | None:
        """The calibration ids kept, [samples, seqlen] int64.

        Raises:
            RunError: they are not what was kept.
        """
        return self._read("ids")["ids"] if "ids/ids" in self._hashes else None

    def due(self, streams: Streams) -> bool:
        """Whether a commit would now take no more than its share of the time."""
        nbytes = sum(t.numel() * t.element_size() for batches in streams for t in batches)
        cost = self._cost or nbytes / _BYTES_PER_SECOND
        return time.monotonic() - self._last >= cost / _SHARE

    def commit(
        self, block: int, facts: Mapping[str, Any], writer: ShardWriter | None, streams: Streams
    ) -> None:
        """Makes durable that the blocks before `block` are done; for all ranks at once.

        Args:
            block: the next one.
            facts: added to those kept.
            writer: has their tensors; None in a rank that does not write.
            streams: the batches that `block` begins with, by stream; empty where nothing follows.
                A stream without batches is one that has none in this rank.

        Raises:
            TargetError: the disk refuses; what was kept before still counts.
        """
        start = time.monotonic()
        if writer is not None:
            writer.flush()
        name = f"block-{block}" if streams else None
        tensors = {
            f"{s}.{b}": t for s, batches in enumerate(streams) for b, t in enumerate(batches)
        }
        written = self._write(self._own(name), tensors) if name and tensors else {}
        for hashes in self.world.collect(written):
            self._hashes |= hashes
        self.facts |= facts
        before = self._hidden
        self.world.first(lambda: self._save(block, name))
        self.block, self._hidden = block, name
        if before is not None and before != name:
            shutil.rmtree(self.folder / self._own(before), ignore_errors=True)
            old = (f"{before}/", f"{before}-")
            self._hashes = {k: v for k, v in self._hashes.items() if not k.startswith(old)}
        self._last = time.monotonic()
        self._cost = self._last - start

    def streams(self, place: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
        """The batches that block `block` begins with, by stream.

        Args:
            place: takes each batch, on the CPU, to where it can wait.

        Raises:
            RunError: they are not what was kept.
        """
        if self._hidden is None or not any(_of(k, self._own(self._hidden)) for k in self._hashes):
            return []
        tensors = self._read(self._own(self._hidden), place)
        found: list[list[Tensor]] = []
        for key in sorted(tensors, key=lambda k: tuple(map(int, k.split(".")))):
            stream = int(key.partition(".")[0])
            found += [[] for _ in range(stream + 1 - len(found))]
            found[stream].append(tensors.pop(key))
        return found

    def _own(self, name: str) -> str:
        """The folder of this rank's part."""
        return name if self.world.leads else f"{name}-rank-{self.world.seat.rank}"

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of a commit that did not get to its end
        folder.mkdir()
        plan = [TensorPlan(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()]
        with ShardWriter(folder, plan, 1 << 62) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        sync_folder(folder)
        return {f"{name}/{key}": tensor_sha256(tensor) for key, tensor in tensors.items()}

    def _read(
        self, name: str, place: Callable[[Tensor], Tensor] = lambda t: t
    ) -> dict[str, Tensor]:
        path = (self.folder / name).resolve()
        expected = {k.partition("/")[2]: v for k, v in self._hashes.items() if _of(k, name)}
        found: dict[str, Tensor] = {}
        try:
            header = read_header(path / WEIGHTS, WEIGHTS)
            infos = {t.name: t for t in header.tensors}
            kept = Checkpoint(path, {}, infos, {WEIGHTS: header}, None)
            for key in sorted(expected.keys() | infos.keys()):
                tensor = kept.read(key)
                if tensor_sha256(tensor) != expected.get(key):
                    raise _damaged(path, f"tensor {key} is not what was kept")
                found[key] = place(tensor)
        except CheckpointError as error:
            raise _damaged(path, str(error)) from error
        return found

    def _save(self, block: int, hidden: str | None) -> None:
        """Replaces the journal; from its rename on the new one counts."""
        kept = self.kept() | {"block": block, "hidden": hidden}
        text = json.dumps({"format": FORMAT, "identity": self.identity, **kept})
        fresh = self.folder / f"{NAME}.new"
        try:
            with fresh.open("w", encoding="utf-8") as out:
                out.write(f"{_digest(text)}\n{text}")
                out.flush()
                os.fsync(out.fileno())
            os.replace(fresh, self.folder / NAME)
            self.block, self._hidden = block, hidden
            sync_folder(self.folder)
        except OSError as error:
            raise TargetError(
                f"cannot write {fresh}", got=error.strerror, cure="Check the target's disk"
            ) from error


def agree(identity: Mapping[str, Any], world: World) -> None:
    """Refuses a run whose processes are not about to do the same.

    Args:
        identity: of this process; values that JSON can hold.

    Raises:
        SpecError: in every rank; names the rank and the difference.
    """
    for rank, other in enumerate(found := world.collect(dict(identity))):
        if difference := differences(found[0], other, ("in rank 0", f"in rank {rank}")):
            raise SpecError(
                f"rank {rank} of {world.seat.size}",
                expected="the settings, source and versions of rank 0",
                got="; ".join(difference),
                cure="Start all ranks by one command, on files that all of them see",
            )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], when: tuple[str, str] = ("then", "now")
) -> list[str]:
    """What differs, in words: `quant.bits: 4 then, 3 now`."""
    return [
        f"{key}: {_short(before.get(key))} {when[0]}, {_short(now.get(key))} {when[1]}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _of(key: str, name: str) -> bool:
    return key.startswith(name + "/")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _damaged(where: Path, got: str) -> RunError:
    return RunError(
        f"what an unfinished run kept in {where}",
        expected="what was written there",
        got=got,
        cure=f"The disk may be failing. {_ANEW}",
    )
