"""Attention in 16-bit integers: right, causal, the same for every number of threads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_runtime import needs_avx2
from torch import Tensor, nn
from torch.nn import functional as F

from qquant import attention, int16_attention, llvm_code
from qquant.attention import NAME_INT16, attend, use
from qquant.errors import RunError
from qquant.int16_attention import causal_attention, takes
from qquant.int16_ir import CHUNK, VNNI

CPU = torch.device("cpu")
pytestmark = needs_avx2
vnni = pytest.mark.skipif(llvm_code.against_vnni() is not None, reason="AVX-512 with VNNI")


def heads(n: int, own: int = 6, theirs: int = 6, batch: int = 2, width: int = 32) -> list[Tensor]:
    """Query, key and value as a block's linears give them: heads beside one another."""
    gen = torch.Generator().manual_seed(n + own)
    made = [torch.randn(batch, n, h, width, generator=gen) for h in (own, theirs, theirs)]
    return [t.transpose(1, 2) for t in made]


def exact(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    wide = (t.double() for t in (q, k, v))
    out = F.scaled_dot_product_attention(*wide, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 24, 25, 255, CHUNK, CHUNK + 1, 600])
@pytest.mark.parametrize(("own", "theirs"), [(6, 6), (8, 2), (3, 1)])
@pytest.mark.parametrize("width", [16, 128])
def test_it_is_attention(n: int, own: int, theirs: int, width: int) -> None:
    q, k, v = heads(n, own, theirs, width=width)
    got = causal_attention(q, k, v, 0.2)
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == (2, n, own, width)
    want = exact(q, k, v, 0.2)
    assert error(got, want) < 5e-4
    # Of every query by itself, the last ones of a block not less than the others.
    by_query = ((t.transpose(0, 1).flatten(1).norm(dim=1)) for t in (got.double() - want, want))
    each = next(by_query) / next(by_query)
    assert each.max() < 1e-3
    # In whatever order it lies in memory.
    assert torch.equal(causal_attention(*(t.contiguous() for t in (q, k, v)), 0.2), got)


def test_no_query_sees_a_later_key() -> None:
    q, k, v = heads(300)
    before = causal_attention(q, k, v, 0.2)
    k[:, :, 250:], v[:, :, 270:] = 9.0, -7.0
    after = causal_attention(q, k, v, 0.2)
    assert torch.equal(before[:, :250], after[:, :250])
    assert not torch.equal(before[:, 250:], after[:, 250:])
    k[:, :, 200] = float("nan")
    after = causal_attention(q, k, v, 0.2)
    assert after[:, :200].isfinite().all() and after[:, 200:].isnan().all()


def test_later_values_hardly_change_what_earlier_ones_are_rounded_to() -> None:
    """Values of 256 keys share a step, so that those to come are felt in the rounding."""
    q, k, v = heads(200)
    before = causal_attention(q, k, v, 0.2)[:, :150]
    v[:, :, 150:] *= 30
    after = causal_attention(q, k, v, 0.2)[:, :150]
    assert 0 < error(after, before) < 5e-3


def test_large_scores_are_sharp_and_small_ones_even() -> None:
    q, k, v = heads(200)
    sharp = causal_attention(100 * q, 100 * k, v, 1.0)
    assert error(sharp, exact(100 * q, 100 * k, v, 1.0)) < 5e-3
    even = causal_attention(1e-9 * q, k, v, 1.0)
    means = v.double().cumsum(2) / torch.arange(1, 201)[:, None]
    assert error(even, means.transpose(1, 2)) < 5e-4
    assert not causal_attention(q, k, torch.zeros_like(v), 1.0).any()


def test_one_key_above_all_others_loses_little() -> None:
    """As the first token of a text is for many a head: far from the others, hardly any value."""
    q, k, v = heads(300)
    k[:, :, 0] = 3 * k[:, :, 0] + 4 * q.mean(2)
    v[:, :, 0] *= 0.01
    assert error(causal_attention(q, k, v, 0.2), exact(q, k, v, 0.2)) < 5e-4


def test_neither_threads_nor_other_samples_count(threads: None) -> None:
    q, k, v = heads(300, 8, 2, batch=3)
    together = causal_attention(q, k, v, 0.2)
    for i in range(3):
        alone = causal_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 0.2)
        assert torch.equal(alone[0], together[i])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(causal_attention(q, k, v, 0.2), together)


def test_refusals() -> None:
    q, k, v = heads(40, 4, 2)
    assert takes(q, k, v)
    for wrong in (
        (q.double(), k, v),
        (q, k[:, :, :30], v),
        (q, k[..., :16], v[..., :16]),
        (q[:, :3], k, v),
        (q.transpose(2, 3), k, v),
        (q[0], k[0], v[0]),
        (q[..., :24], k[..., :24], v[..., :24]),
        (q.to("meta"), k.to("meta"), v.to("meta")),
        tuple(t.repeat(1, 1, 1, 9) for t in (q, k, v)),
    ):
        assert not takes(*wrong)
        with pytest.raises(RunError, match="16-bit integers"):
            causal_attention(*wrong, 0.2)


def module() -> Any:
    found = nn.Module()
    found.config = SimpleNamespace(_attn_implementation="sdpa")
    found.is_causal = True
    return found


def test_a_model_attends_so_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    block, (q, k, v) = module(), heads(40)
    called = []
    monkeypatch.setattr(
        int16_attention,
        "causal_attention",
        lambda *given: called.append(1) or causal_attention(*given),
    )
    use(block.config, CPU, torch.float32, int16=True)
    assert block.config._attn_implementation == NAME_INT16
    out, _ = attend(block, q, k, v, None)
    assert called and error(out, exact(q, k, v, 32**-0.5)) < 5e-4
    called.clear()
    # What it is not made for is torch's.
    mask = torch.zeros(1, 1, 40, 40)
    for more in ({"attention_mask": mask}, {"is_causal": False}, {"dropout": 0.5}):
        attend(block, q, k, v, more.pop("attention_mask", None), **more)  # type: ignore[arg-type]
    attend(block, q[:, :, :1], k, v, None)
    attend(block, q.clone().requires_grad_(), k, v, None)
    attend(block, q.double(), k.double(), v.double(), None)
    monkeypatch.setattr(int16_attention, "unavailable", lambda dtype: "left out")
    attend(block, q, k, v, None)
    assert not called


def test_another_attention_is_left_as_it_is() -> None:
    for config, device, told in (
        (SimpleNamespace(_attn_implementation="eager"), CPU, True),
        (SimpleNamespace(_attn_implementation="sdpa"), torch.device("meta"), True),
        (SimpleNamespace(_attn_implementation="sdpa"), CPU, False),
    ):
        before = config._attn_implementation
        use(config, device, torch.float32, told)
        assert config._attn_implementation == before
    assert attention.NAME != NAME_INT16


def narrow(n: int, own: int = 6, theirs: int = 6, width: int = 32) -> list[Tensor]:
    return [t.bfloat16() for t in heads(n, own, theirs, width=width)]


@vnni
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 47, 48, 49, 255, CHUNK, CHUNK + 1, 600])
@pytest.mark.parametrize(("own", "theirs"), [(6, 6), (8, 2), (3, 1)])
@pytest.mark.parametrize("width", [32, 128])
def test_of_bfloat16_it_is_attention_with_one_rounding(
    n: int, own: int, theirs: int, width: int
) -> None:
    q, k, v = narrow(n, own, theirs, width)
    got = causal_attention(q, k, v, 0.2)
    assert got.dtype == torch.bfloat16 and got.is_contiguous() and got.shape == (2, n, own, width)
    want = exact(q, k, v, 0.2)
    rounded = error(want.bfloat16(), want)
    assert error(got, want) < rounded + 2e-4
    by_query = ((t.transpose(0, 1).flatten(1).norm(dim=1)) for t in (got.double() - want, want))
    each = next(by_query) / next(by_query)
    assert each.max() < 3.5e-3
    assert torch.equal(causal_attention(*(t.contiguous() for t in (q, k, v)), 0.2), got)


@vnni
def test_of_bfloat16_no_query_sees_a_later_key(threads: None) -> None:
    q, k, v = narrow(300)
    before = causal_attention(q, k, v, 0.2)
    k[:, :, 250:], v[:, :, 270:] = 9.0, -7.0
    after = causal_attention(q, k, v, 0.2)
    assert torch.equal(before[:, :250], after[:, :250])
    assert not torch.equal(before[:, 250:], after[:, 250:])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(causal_attention(q, k, v, 0.2), after)
    k[:, :, 200] = float("nan")
    after = causal_attention(q, k, v, 0.2)
    assert after[:, :200].isfinite().all() and after[:, 200:].isnan().all()


@vnni
def test_bfloat16_attends_so_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = narrow(40)
    want, _ = attend(module(), q, k, v, None, scaling=0.2)
    assert torch.equal(want, causal_attention(q, k, v, 0.2))
    odd = [t[..., :16] for t in (q, k, v)]  # no whole vectors: torch's products
    assert not takes(*odd)
    got, _ = attend(module(), *odd, None, scaling=0.2)
    assert error(got, exact(*odd, 0.2)) < 5e-3
    monkeypatch.setattr(int16_attention, "unavailable", lambda dtype: "left out")
    got, _ = attend(module(), q, k, v, None, scaling=0.2)
    assert not torch.equal(got, want) and error(got, exact(q, k, v, 0.2)) < 5e-3


def test_bfloat16_needs_more_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm_code, "against_vnni", lambda: "no VNNI")
    assert int16_attention._FORMS[torch.bfloat16] is VNNI
    assert int16_attention.unavailable.__wrapped__(torch.bfloat16) == "no VNNI"
    assert int16_attention.unavailable.__wrapped__(torch.float32) is None
