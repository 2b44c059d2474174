"""Memory of large tensors: whose it is, when it is the next one's, and that it goes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qquant import pool

LARGE = (512, 1024)  # 2 MiB of float32
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    pool.trim()
    yield
    pool.trim()


def test_tensors_that_are_there_have_memory_of_their_own() -> None:
    made = [pool.empty(*LARGE).fill_(i) for i in range(8)]
    assert len({t.data_ptr() for t in made}) == 8
    assert all(bool((t == i).all()) for i, t in enumerate(made))


def test_memory_is_the_next_ones_when_nothing_refers_to_it() -> None:
    first = pool.empty(*LARGE)
    place, view = first.data_ptr(), first[7:].t()
    del first
    other = pool.empty(*LARGE)
    assert other.data_ptr() != place  # the view is still there
    del view
    assert pool.empty(*LARGE).data_ptr() == place
    swapped = pool.empty(*LARGE)
    place = swapped.data_ptr()
    swapped.data = torch.empty(0)
    assert pool.empty(1 << 20, dtype=torch.int16).data_ptr() == place


def test_memory_serves_tensors_of_about_its_size_alone() -> None:
    place = pool.empty(*LARGE).data_ptr()
    assert pool.empty(400, 1024).data_ptr() != place  # less than four fifths of it
    assert pool.empty(513, 1024).data_ptr() != place
    assert pool.empty(411, 1024).data_ptr() == place


def test_the_smallest_that_is_large_enough_is_taken_and_of_those_the_last_used() -> None:
    large, first, last = pool.empty(600, 1024), pool.empty(*LARGE), pool.empty(*LARGE)
    place = last.data_ptr()
    del first, last, large
    assert pool.empty(500, 1024).data_ptr() == place


def test_threads_do_not_get_the_same_memory() -> None:
    def use(number: int) -> bool:
        right = True
        for i in range(200):
            mine = pool.empty(128 + 8 * (i % 4), 1024).fill_(number)
            right = right and bool((mine == number).all())
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(4)))


def test_small_tensors_are_torchs() -> None:
    pool.empty(16, 16)
    assert not pool._rooms


def test_what_is_free_goes_back_and_what_is_in_use_stays() -> None:
    kept, gone = pool.empty(*LARGE).fill_(3), pool.empty(*LARGE)
    del gone
    assert len(pool._rooms) == 1
    pool.trim()
    assert not pool._rooms and bool((kept == 3).all())
    del kept
    gc.collect()
    assert len(pool._rooms) == 1


def test_differences_and_conversions_are_those_of_torch() -> None:
    a, b = torch.randn(*LARGE), torch.randn(*LARGE).t().reshape(*LARGE)
    assert torch.equal(pool.less(a, b), a - b)
    assert torch.equal(pool.less(a[:2], b[:2]), a[:2] - b[:2])
    half = a.bfloat16()
    assert torch.equal(pool.moved(half, CPU, torch.float32), half.float())
    assert pool.moved(a, CPU, torch.float32) is a
    meta = torch.device("meta")
    assert pool.moved(half, meta, torch.float32).device == meta
    assert pool.less(a.to(meta), b.to(meta)).device == meta
