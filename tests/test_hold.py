"""Where held tensors live in host memory: slabs, and rooms that are used again."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qquant import fused
from qquant.calibration import batch
from qquant.calibration.hold import SLAB, Holder
from qquant.errors import TargetError


def numbers(size: int) -> torch.Tensor:
    """`size` bytes of bfloat16."""
    return torch.randn(size // 2, generator=torch.Generator().manual_seed(size)).bfloat16()


def test_held_tensors_come_back_bit_for_bit() -> None:
    holder = Holder(host_budget=1 << 30)
    for size in (2, SLAB // 8, SLAB // 2, SLAB // 2 + 2, SLAB + 2):
        t = numbers(size)
        want, elsewhere = t.clone(), t.data_ptr()
        held = holder.hold(t)
        assert t.data_ptr() != elsewhere
        assert torch.equal(held.restore(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_rounded_is_so_for_all_who_hold_it(dtype: torch.dtype) -> None:
    holder = Holder(host_budget=1 << 30)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    alias, want = x.view(-1), x.to(dtype)
    kept = holder.round(x, dtype)
    assert kept.dtype == dtype and torch.equal(kept, want)
    assert torch.equal(x, want.float()) and torch.equal(alias, x.view(-1))
    assert kept.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("move", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_is_rounded_where_its_holders_see_it(dtype: torch.dtype, move: bool) -> None:
    with torch.inference_mode():
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        holders, place, want = [x], x.data_ptr(), x.to(dtype).float()
        batch._round(x, dtype, move=move)
        assert torch.equal(holders[0], want) and torch.equal(x.view(-1), want.view(-1))
    in_code = dtype == torch.bfloat16 and not fused.unavailable()
    assert (x.data_ptr() != place) is (move and in_code)


def test_a_slab_is_used_again_when_its_last_tensor_is_gone() -> None:
    holder = Holder(host_budget=1 << 30)
    first, second = (holder.settle(numbers(SLAB // 2)) for _ in range(2))
    room = first.untyped_storage().data_ptr()
    assert second.untyped_storage().data_ptr() == room
    third = holder.settle(numbers(SLAB // 2))
    assert third.untyped_storage().data_ptr() != room
    del first
    fourth = holder.settle(numbers(SLAB // 2))  # fills the third's
    fifth = holder.settle(numbers(SLAB // 2))
    assert fifth.untyped_storage().data_ptr() != room  # half of that is in use
    want = second.clone()
    del third, fourth, fifth
    assert torch.equal(second, want)
    del second
    again = [holder.settle(numbers(SLAB // 2)) for _ in range(6)]
    assert room in {t.untyped_storage().data_ptr() for t in again}


def test_trimming_gives_back_what_is_free_and_nothing_else() -> None:
    holder = Holder(host_budget=1 << 30)
    large = SLAB + 2
    kept, gone = holder.settle(numbers(large)), holder.settle(numbers(large))
    want = kept.clone()
    address = gone.untyped_storage().data_ptr()
    del gone
    assert address in holder._rooms
    holder.trim()
    assert address not in holder._rooms and not any(holder._free.values())
    assert kept.untyped_storage().data_ptr() in holder._rooms
    assert torch.equal(kept, want)
    del kept  # returns to a list that is still there
    assert len(holder._free[large]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")
def test_the_end_of_a_full_slab_is_given_back() -> None:
    """Five tensors of a little less than a fifth leave room that nobody will use."""
    holder = Holder(host_budget=1 << 30)
    large = holder.settle(numbers(SLAB))
    address = large.untyped_storage().data_ptr()
    assert resident(address) == SLAB
    del large
    size = SLAB // 5 - (1 << 18)
    held = [holder.settle(numbers(size)) for _ in range(5)]
    assert {t.untyped_storage().data_ptr() for t in held} == {address}
    assert resident(address) == SLAB, "the slab may still be filled"
    want = [t.clone() for t in held]
    holder.settle(numbers(size))
    assert 0 <= resident(address) - 5 * size < 1 << 16
    assert all(torch.equal(a, b) for a, b in zip(held, want, strict=True))


def resident(address: int) -> int:
    """Bytes of a slab at this address that memory is behind."""
    pages = (ctypes.c_ubyte * (SLAB // mmap.PAGESIZE))()
    found = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(SLAB), pages
    )
    assert found == 0, os.strerror(ctypes.get_errno())
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


def test_tensors_outlive_their_holder() -> None:
    holder = Holder(host_budget=1 << 30)
    t = holder.settle(numbers(SLAB // 4))
    want = t.clone()
    del holder
    torch.full((SLAB // 4,), 7, dtype=torch.uint8)
    assert torch.equal(t, want)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_spill_folder_that_is_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The rank that leads removes it when it ends, whatever the others are about."""
    folder, map_file = tmp_path / "scratch", torch.from_file
    holder = Holder(host_budget=0, spill_dir=folder)

    def late(*args: Any, **more: Any) -> torch.Tensor:
        shutil.rmtree(folder)
        return map_file(*args, **more)

    if when == "between":
        folder.mkdir()
        monkeypatch.setattr(torch, "from_file", late)
    with pytest.raises(TargetError, match=r"spill file in .*folder was removed.*rank 0"):
        holder.hold(numbers(64))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TargetError, match=r"64 bytes.*No space left.*Free disk room"):
        Holder(host_budget=0, spill_dir=tmp_path).hold(numbers(64))
    assert not list(tmp_path.iterdir())


def test_a_room_of_another_size_takes_the_place_of_free_ones() -> None:
    """They would stay resident beside it."""
    holder = Holder(host_budget=1 << 30)
    gone = [holder.settle(numbers(SLAB // 2)) for _ in range(4)]
    del gone
    assert len(holder._free[SLAB]) == 1  # the other one is still being filled
    holder.settle(numbers(SLAB + 2))
    assert not holder._free[SLAB]
