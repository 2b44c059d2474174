"""Which library multiplies on a CPU: chosen by the processor, and the sums are right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from qquant import products
from qquant.devices import native_bfloat16

NO_ONEDNN = not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available()


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    cached = (products.chosen, products._faster_without_rounding)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.skipif(NO_ONEDNN, reason="this torch has not both MKL and oneDNN")
@pytest.mark.parametrize(("intel", "library"), [(False, "onednn"), (True, "torch")])
def test_the_processor_decides(intel: bool, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_intel", lambda: intel)
    assert products.chosen() == library


@pytest.mark.skipif(NO_ONEDNN, reason="this torch has not both MKL and oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (3, 2, 4), (0, 4)])
def test_onednn_gives_the_sums_of_float64(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_intel", lambda: False)
    calls = []
    own = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(1) or own(*a)
    )
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(*shape, 96, generator=gen), torch.randn(40, 96, generator=gen)
    b = torch.randn(40, generator=gen) if bias else None
    got = products.linear(x, w, b)
    want = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert calls == [1]
    assert got.shape == want.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_intel", lambda: False)
    x, w = torch.ones(3, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype)
    assert torch.equal(products.linear(x, w), F.linear(x, w))


@pytest.mark.skipif(NO_ONEDNN, reason="this torch has not both MKL and oneDNN")
def test_operands_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_intel", lambda: False)
    x, w = torch.randn(96, 7).T, torch.randn(96, 40).T
    torch.testing.assert_close(products.linear(x, w), F.linear(x, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 512), (3, 70, 4), (0, 4)])
def test_a_packed_weight_changes_no_bit(shape: tuple[int, ...], bias: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 1408, generator=gen).bfloat16()
    w = torch.randn(520, 1408, generator=gen).bfloat16()
    b = torch.randn(520, generator=gen).bfloat16() if bias else None
    packed = products.packed(w)
    native = native_bfloat16(torch.device("cpu")) and products._packs_exactly()
    assert packed.is_mkldnn == native
    assert packed.shape == w.shape and packed.dtype == w.dtype
    got = products.linear(x, packed, b)
    assert torch.equal(got, F.linear(x, w, b))


def test_only_what_gains_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.ones(4, 8)
    assert products.packed(wide) is wide
    narrow = wide.bfloat16()
    monkeypatch.setattr(products, "native_bfloat16", lambda _: False)
    assert products.packed(narrow) is narrow
    monkeypatch.setattr(products, "native_bfloat16", lambda _: True)
    monkeypatch.setattr(products, "_packs_exactly", lambda: False)
    assert products.packed(narrow) is narrow


SETTING = getattr(torch.backends.mkldnn, "matmul", None)
WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512" and SETTING is not None


@pytest.mark.skipif(NO_ONEDNN or not WIDE, reason="no AVX-512, or no setting for its products")
@pytest.mark.parametrize("rounds", [False, True])
def test_a_library_that_would_round_is_not_asked(
    rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a trial, whose product is rounded here as matrix units for bfloat16 would round it."""
    monkeypatch.setattr(products, "_intel", lambda: False)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    if rounds:
        monkeypatch.setattr(torch, "mm", lambda a, b: a.bfloat16().float() @ b.bfloat16().float())
    before = SETTING.fp32_precision
    with products.in_float32():
        assert (SETTING.fp32_precision == "bf16") == (not rounds)
        got = x @ x
    assert SETTING.fp32_precision == before
    torch.testing.assert_close(got.double(), x.double() @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(NO_ONEDNN or not WIDE, reason="no AVX-512, or no setting for its products")
def test_the_setting_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_intel", lambda: False)
    before = SETTING.fp32_precision
    with pytest.raises(ZeroDivisionError), products.in_float32():
        raise ZeroDivisionError
    assert SETTING.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(NO_ONEDNN or not WIDE, reason="no AVX-512, or no setting for its products")
def test_threads_that_come_and_go_leave_the_setting_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that came first goes first: the other is still inside, and then nobody is."""
    monkeypatch.setattr(products, "_intel", lambda: False)
    before = SETTING.fp32_precision
    first, second = products.in_float32(), products.in_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert SETTING.fp32_precision == "bf16" and products.exact_in_float32()
    second.__exit__(None, None, None)
    assert SETTING.fp32_precision == before and products.exact_in_float32()
