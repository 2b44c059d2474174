"""What is not finite is seen, whatever the dtype and wherever it stands."""

from __future__ import annotations

import pytest
import torch

from qquant.finite import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 4_999, 9_999])
def test_one_number_of_many(dtype: torch.dtype, value: float, at: int) -> None:
    numbers = torch.full((10_000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(numbers), "however large they are together"
    numbers[at] = value
    assert not all_finite(numbers)
    assert not all_finite(numbers.view(100, 100).T)


def test_numbers_of_one_byte() -> None:
    numbers = torch.ones(8).to(torch.float8_e5m2)
    assert all_finite(numbers)
    numbers[3] = float("inf")
    assert not all_finite(numbers)
    assert all_finite(torch.ones(8).to(torch.float8_e4m3fn))
    assert not all_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))

    assert all_finite(torch.tensor([2.0**100]).to(torch.float8_e8m0fnu)), (
        "more than a float16 holds"
    )


def test_nothing_and_integers_are_finite() -> None:
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.tensor([1, 2], dtype=torch.uint16))
