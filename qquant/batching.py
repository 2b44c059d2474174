"""How calibration samples go through a block together, such that the result does not depend on it.

Batches are as large as the device likes them, and smaller where its memory turns out too short. A
product of more rows may be summed in another order, and a sum over batches is rounded between them,
so by themselves the bytes of a result would depend on the batch. What they depend on instead is the
unit: a few samples whose products are always made apart, however many units a batch has
(`calibration/walk.py` tiles by it). Everything else in a block is made for each token or each
sample by itself.

Several processes share out whole units, so that each unit's products are what they are in one
process; those of the second stream and the others apart, since they cost differently.

A second stream may leave units out. Those it takes come first, so that a batch is wholly in it or
wholly out of it, whatever its size.

How many there are of each is known without torch, so that `budget.py` can sum up memory at once.

Left out on purpose: mixtures of experts, whose products gather the tokens of a whole batch; their
batches keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .world import Seat, World

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_PER_UNIT = {"cpu": 1024, "cuda": 4096}
# On a GPU 16384 rows are enough for any matrix unit; with twice as many, Qwen-7B would need 6.1 GiB
# at work instead of 3.8 (`budget.memory_needs`).
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
# Times as many where there is one stream, in the memory that another one's activations would take:
# between products a CPU's other threads wait for what Python does.
_ONE_STREAM = {"cpu": 2, "cuda": 1}


def tokens_per_unit(device: str, streams: int) -> int:
    """Of a unit, where samples are shorter than that."""
    return TOKENS_PER_UNIT[device] * _times(device, streams)


def _times(device: str, streams: int) -> int:
    return _ONE_STREAM[device] if streams == 1 else 1


@dataclass(frozen=True)
class Batching:
    """Counts of samples.

    Attributes:
        unit: whose products are made apart.
        batch: that are forwarded together, whole units.
    """

    unit: int
    batch: int

    @classmethod
    def of(cls, device: str, seqlen: int, streams: int) -> Batching:
        """The largest batch for a device type (`cpu`, `cuda`) and samples of `seqlen` tokens."""
        unit = max(1, tokens_per_unit(device, streams) // seqlen)
        most = TOKENS_PER_BATCH[device] * _times(device, streams)
        return cls(unit, unit * max(1, most // (unit * seqlen)))

    def smaller(self) -> Batching | None:
        """Half of the batch; None where it is a unit already."""
        if self.batch == self.unit:
            return None
        return replace(self, batch=max(1, self.batch // self.unit // 2) * self.unit)

    def order(self, samples: int, share: float) -> tuple[Tensor, int]:
        """The order in which samples are taken: (their indices [samples], how many are paired).

        Args:
            share: of the units that a second stream takes, spread evenly; at least one.
        """
        import torch

        paired, others = self._units(samples, share)
        order = [sample for unit in (*paired, *others) for sample in unit]
        return torch.tensor(order, dtype=torch.int64), sum(map(len, paired))

    def _units(self, samples: int, share: float) -> tuple[list[range], list[range]]:
        """The samples of each unit: of those that a second stream takes, and of the others."""
        starts = range(0, max(1, samples), self.unit)
        units = [range(start, min(start + self.unit, samples)) for start in starts]
        taken = [int((u + 1) * share) > int(u * share) for u in range(len(units))]
        taken[-1] |= not any(taken)
        paired = [unit for unit, take in zip(units, taken, strict=True) if take]
        others = [unit for unit, take in zip(units, taken, strict=True) if not take]
        return paired, others

    def share(self, order: Tensor, paired: int, world: World) -> tuple[Tensor, int]:
        """This rank's units of what `order` gave, likewise; maybe none."""
        import torch

        inside = torch.split(order[:paired], self.unit) if paired else ()
        outside = torch.split(order[paired:], self.unit) if paired < len(order) else ()
        # From opposite ends: a rank that has one more of these has one less of those.
        paired_own = inside[world.share(len(inside))]
        own = [*paired_own, *outside[world.share(len(outside), back=True)]]
        return (torch.cat(own) if own else order[:0]), sum(map(len, paired_own))

    def most(self, samples: int, share: float, processes: int) -> int:
        """Samples of the process that has most of them, each counted in every stream it is in.

        Args:
            share: as for `order`; 0 for one stream.
        """
        units, part = -(-max(1, samples) // self.unit), share or 1.0
        whole = int(units * part)  # as `_units` counts them, without a list
        paired, last_is_paired = max(1, whole), whole == 0 or whole > int((units - 1) * part)
        short = units * self.unit - samples  # which the last unit lacks

        def taken(count: int, own: slice, has_last: bool) -> int:
            size = int(own.stop - own.start)
            return size * self.unit - (short if has_last and size and own.stop == count else 0)

        found = []
        for rank in range(processes):
            world = World(Seat(rank, processes))
            inside = taken(paired, world.share(paired), last_is_paired)
            rest = units - paired
            outside = taken(rest, world.share(rest, back=True), not last_is_paired)
            found.append(inside * (2 if share else 1) + outside)
        return max(found)

    def begin(self, samples: Tensor, paired: int | None) -> list[list[Tensor]]:
        """The batches of each stream, views of `samples` [n, ...] in the order of `order`.

        Args:
            paired: samples in the second stream; None for one stream.
        """
        import torch

        if paired is None:
            return [list(torch.split(samples, self.batch))]
        inside = torch.split(samples[:paired], self.batch) if paired else ()
        outside = torch.split(samples[paired:], self.batch) if paired < len(samples) else ()
        return [[*inside, *outside], [*inside, *(b[:0] for b in outside)]]

    def split(self, streams: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Batches that were made for a larger size, in parts of this one."""
        import torch

        found: list[list[Tensor]] = [[] for _ in streams]
        for batches in zip(*streams, strict=True):
            parts = [torch.split(b, self.batch) if b.numel() else None for b in batches]
            count = next(len(p) for p in parts if p is not None)
            for stream, batch, part in zip(found, batches, parts, strict=True):
                stream += part if part is not None else [batch] * count
        return found
