"""Where held tensors live in host memory: slabs, and rooms that are used again."""

from __future__ import annotations

import torch

from qquant.calibration.hold import SLAB, Holder


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


def test_tensors_outlive_their_holder() -> None:
    holder = Holder(host_budget=1 << 30)
    t = holder.settle(numbers(SLAB // 4))
    want = t.clone()
    del holder
    torch.full((SLAB // 4,), 7, dtype=torch.uint8)
    assert torch.equal(t, want)
