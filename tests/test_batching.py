"""The size of a batch is a matter of memory: it never changes a bit of the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_convert import make
from test_resume import SPEC, run, same
from torch import Tensor

from qquant import batching, blocks
from qquant.batching import Batching
from qquant.calibration.hold import Holder
from qquant.calibration.walk import BlockWalk
from qquant.errors import RunError
from qquant.events import Event, Warned
from qquant.world import Seat, World

SEQLEN = 24  # of test_resume's calibration data, 16 samples


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("samples", [1, 5, 16, 23])
def test_streams_are_the_same_at_every_batch_size(samples: int, share: float) -> None:
    """What is multiplied together, and in which order, whatever the batch."""
    sizes = [Batching(2, size) for size in (2, 4, 8, 64)]
    seen = []
    for sizing in sizes:
        order, paired = sizing.order(samples, share)
        assert sorted(order.tolist()) == list(range(samples))
        ids = torch.arange(samples)[order][:, None]
        first, second = sizing.begin(ids, paired)
        assert [len(a) for a, b in zip(first, second, strict=True) if b.numel()] == [
            len(b) for b in second if b.numel()
        ]
        assert max(map(len, first)) <= sizing.batch
        units = [u.tolist() for b in first for u in torch.split(b, sizing.unit)]
        pairs = [u.tolist() for b in second if b.numel() for u in torch.split(b, sizing.unit)]
        assert sum(map(len, pairs)) == paired >= 1
        seen.append((units, pairs))
        smaller = sizing.smaller()
        if smaller is not None:  # parts of what was begun are what it would have begun with
            parts = smaller.split([first, second])
            want = smaller.begin(ids, paired)
            assert [[t.tolist() for t in s] for s in parts] == [
                [t.tolist() for t in s] for s in want
            ]
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("samples", [1, 5, 16, 23])
def test_the_most_of_a_process_is_what_it_takes(samples: int, share: float) -> None:
    sizing = Batching(2, 4)
    for processes in (1, 2, 3):
        order, paired = sizing.order(samples, share or 1.0)
        taken = []
        for rank in range(processes):
            own, twice = sizing.share(order, paired, World(Seat(rank, processes)))
            taken.append(len(own) + (twice if share else 0))
        assert sizing.most(samples, share, processes) == max(taken)


def test_a_billion_samples_are_counted_at_once() -> None:
    started = time.process_time()
    assert Batching(2, 4).most(10**12 + 1, 0.5, 2) == 750_000_000_001
    assert time.process_time() - started < 1


def test_batches_become_smaller_until_they_are_a_unit() -> None:
    sizing: Batching | None = Batching.of("cuda", 2048, 1)
    assert sizing == Batching(2, 8)
    sizes = []
    while sizing is not None:
        sizes.append(sizing.batch)
        sizing = sizing.smaller()
    assert sizes == [8, 4, 2]
    assert Batching.of("cuda", 2048, 2) == Batching(2, 8)
    assert Batching.of("cuda", 100_000, 2) == Batching(1, 1)
    assert Batching.of("cpu", 512, 2) == Batching(2, 2)
    assert Batching.of("cpu", 512, 1) == Batching(4, 4)  # of both streams together as many
    assert Batching.of("cpu", 2048, 1) == Batching.of("cpu", 2048, 2) == Batching(1, 1)
    assert Batching(2, 6).smaller() == Batching(2, 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("batching") / "src")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Units of two samples, batches of eight."""
    monkeypatch.setitem(batching.TOKENS_PER_UNIT, "cpu", 2 * SEQLEN)
    monkeypatch.setitem(batching.TOKENS_PER_BATCH, "cpu", 8 * SEQLEN)
    yield


@pytest.fixture
def smallest(source: Path, tmp_path: Path, units: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result with every batch a unit."""
    with monkeypatch.context() as patch:
        patch.setitem(batching.TOKENS_PER_BATCH, "cpu", 2 * SEQLEN)
        return run(source, tmp_path / "smallest")[0].path


class Device:
    """A CPU that has too little memory for products of more than `samples`, from a call on."""

    def __init__(self, samples: int, calls: int, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        original = BlockWalk._product

        def product(walk: BlockWalk, x: Tensor, *more: Tensor | None) -> Tensor:
            if len(x) > 1:  # a batch, not the probe
                self.seen.append(len(x))
            if len(x) > samples and len(self.seen) > calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(walk, x, *more)

        patch.setattr(BlockWalk, "_product", product)


def test_the_batch_never_changes_the_bytes(source: Path, tmp_path: Path, smallest: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        device = Device(8, 0, patch)
        result, _ = run(source, tmp_path / "dst")
    assert max(device.seen) == 8
    assert same(result.path, smallest)


# Of thirty products in all, the 5th is in the first block, the 20th in the second, one block kept.
# With threads beside it, as on a GPU, and without.
@pytest.mark.parametrize(
    ("samples", "calls", "apart"), [(4, 5, True), (2, 5, False), (2, 20, True)]
)
def test_out_of_memory_steps_the_batch_down(
    source: Path, tmp_path: Path, smallest: Path, samples: int, calls: int, apart: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "overlaps", lambda _: apart)
        device = Device(samples, calls, patch)
        result, events = run(source, tmp_path / "dst")
    assert len(device.seen) > calls and 8 in device.seen  # it did run out
    assert same(result.path, smallest)
    told = [e.text for e in events if isinstance(e, Warned) and "Out of memory" in e.text]
    assert len(told) == (1 if samples == 4 else 2)
    assert f"batches of {samples * SEQLEN} tokens" in told[-1]
    assert ("block 1" in told[0]) == (calls == 20)
    assert len(result.layers) == 10  # none twice


def test_too_little_memory_for_a_unit_ends_the_run_and_keeps_what_is_done(
    source: Path, tmp_path: Path, smallest: Path
) -> None:
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        Device(1, 20, patch)
        with pytest.raises(RunError, match=r"memory of cpu.*smallest batch.*--device cpu"):
            run(source, tmp_path / "dst", watch=events.append)
    assert not (tmp_path / "dst").exists()
    result, _ = run(source, tmp_path / "dst")
    assert result.resumed == 1
    assert same(result.path, smallest)


def test_nothing_waits_on_the_device_after_it_ran_out() -> None:
    holder = Holder(host_budget=1 << 30, device_budget=1 << 20, device_outputs=True)
    assert holder._place(torch.empty(1, device="meta"), 1) == "device"
    assert holder.output(torch.empty(1, device="meta")).device.type == "meta"
    holder.leave_device()
    assert holder._place(torch.empty(1, device="meta"), 1) == "host"
    assert not holder.device_outputs


class Lost(RuntimeError):
    """Stands in for what torch raises when a device is gone."""


@pytest.mark.parametrize("error", [getattr(torch, "AcceleratorError", Lost), Lost])
def test_a_lost_device_loses_nothing(
    source: Path, tmp_path: Path, smallest: Path, error: type[RuntimeError]
) -> None:
    calls = 0
    original = BlockWalk._product

    def product(walk: BlockWalk, x: Tensor, *more: Tensor | None) -> Tensor:
        nonlocal calls
        calls += len(x) > 1
        if calls > 20:
            raise error("CUDA error: unspecified launch failure")
        return original(walk, x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWalk, "_product", product)
        with pytest.raises(RuntimeError, match="launch failure"):
            run(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    result, _ = run(source, tmp_path / "dst")
    assert result.resumed == 1 and same(result.path, smallest)


def test_specs_here_carry_two_streams_on_half_of_the_units() -> None:
    assert SPEC.streams == 2 and SPEC.correct_share == 0.5  # or the tests above show less
