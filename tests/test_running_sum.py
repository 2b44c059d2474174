"""Sums of products that come back rounded: as exact as float32's, whatever is added, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant import products
from qquant.hessian import Hessian
from qquant.running_sum import RunningSum

K = 320


pytestmark = pytest.mark.skipif(
    not products._rounds_last(), reason="torch rounds a bfloat16 product before adding, here"
)


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that only a processor with bfloat16 goes, here on any."""
    monkeypatch.setattr(products, "native_bfloat16", lambda device: True)


def batches(rows: list[int]) -> list[Tensor]:
    """bfloat16 inputs with large means, as activations have them."""
    gen = torch.Generator().manual_seed(0)
    mean, mix = 2 * torch.randn(K, generator=gen), torch.randn(K, K, generator=gen) / K**0.5
    return [(torch.randn(n, K, generator=gen) @ mix + mean).bfloat16() for n in rows]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rows", [[512] * 16, [512, 512, 300, 512, 300, 100, 512, 0, 512]])
def test_the_sum_is_close_to_float64s(rows: list[int]) -> None:
    given = batches(rows)
    want = sum((x.double().T @ x.double() for x in given), torch.zeros(K, K).double())
    rounded = sum(((x.T @ x).float() for x in given), torch.zeros(K, K))
    sums = RunningSum(torch.zeros(K, K))
    for x in given:
        laid_out = products.laid_out(x)
        assert laid_out.dtype == (torch.bfloat16 if len(x) >= 256 else torch.float32)
        sums.add(laid_out, laid_out)
    sums.settle()
    assert error(sums.out, want) < 5e-5 < 3e-4 < error(rounded, want)


def test_settling_twice_adds_nothing_and_more_can_come() -> None:
    first, second = batches([512] * 4), batches([512] * 2)
    sums = RunningSum(torch.zeros(K, K))
    for x in first:
        sums.add(x.T, x.T)
    sums.settle()
    once = sums.out.clone()
    sums.settle()
    assert torch.equal(sums.out, once)
    for x in second:
        sums.add(x.T, x.T)
    sums.settle()
    want = sum((x.double().T @ x.double() for x in first + second), torch.zeros(K, K).double())
    assert error(sums.out, want) < 2e-4


def test_a_hessian_of_bfloat16_inputs_is_that_of_float32_ones() -> None:
    """With the streams' difference by inputs and through outputs, and some rows of it only."""
    given = batches([512] * 8)
    for n, residual in ((2 * K, False), (K // 2, True)):
        weight = torch.randn(n, K, generator=torch.Generator().manual_seed(2)) / K**0.5
        narrow = Hessian(K, weights=[weight.bfloat16()], residual=residual)
        wide = Hessian(K, weights=[weight.bfloat16().float()], residual=residual)
        for i, x in enumerate(given):
            full = (x.float() * 1.05).bfloat16()
            h = torch.randn(len(x), n, generator=torch.Generator().manual_seed(i)).bfloat16()
            rows = torch.arange(400) if i == 3 else None
            full, h = (full, h) if rows is None else (full[rows], h[rows])
            narrow.add(x, full, h if residual else None, paired=rows)
            wide.add(x.float(), full.float(), h.float() if residual else None, paired=rows)
        assert narrow.flops == wide.flops
        assert narrow.paired_tokens == wide.paired_tokens
        for a, b, most in zip(narrow.result(), wide.result(), (5e-5, 5e-3, 5e-3), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert error(a, b.double()) < most


def test_differences_may_be_wider_than_the_inputs() -> None:
    """A linear of few inputs and many outputs: the residual's difference stays bfloat16, alone."""
    k, n = 128, 320
    given = [x[:, :k].contiguous() for x in batches([512] * 4)]
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(2)) / k**0.5
    narrow, wide = (Hessian(k, weights=[w], residual=True) for w in (weight.bfloat16(), weight))
    for i, x in enumerate(given):
        h = torch.randn(len(x), n, generator=torch.Generator().manual_seed(i)).bfloat16()
        assert products.laid_out(h).dtype != products.laid_out(x).dtype
        narrow.add(x, x * 2, h)
        wide.add(x.float(), x.float() * 2, h.float())
    for a, b in zip(narrow.result(), wide.result(), strict=True):
        assert a is not None and b is not None
        assert error(a, b.double()) < 1e-6


def test_a_library_that_rounds_first_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a trial; then bfloat16 inputs are multiplied in float32."""

    def rounds_first(c: Tensor, a: Tensor, b: Tensor, *, beta: float) -> Tensor:
        return c * beta + a @ b

    x = batches([512])[0]
    products._rounds_last.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "addmm", rounds_first)
            assert products.laid_out(x).dtype == torch.float32
        products._rounds_last.cache_clear()
        assert products.laid_out(x).dtype == torch.bfloat16
    finally:
        products._rounds_last.cache_clear()
