"""Attention on a CPU with bfloat16: right, taken where it is made for, left to torch elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qquant import attention, fused, int16_attention
from qquant.attention import NAME, attend, causal_attention, use

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16 and has no VNNI (`test_int16_attention.py`)."""
    monkeypatch.setattr(int16_attention, "unavailable", lambda dtype: "left out")


def heads(n: int, own: int = 6, theirs: int = 6, batch: int = 2, width: int = 32) -> list[Tensor]:
    """Query, key and value as a block's linears give them: bfloat16, heads beside one another."""
    gen = torch.Generator().manual_seed(n + own)
    made = [torch.randn(batch, n, h, width, generator=gen) for h in (own, theirs, theirs)]
    return [t.bfloat16().transpose(1, 2) for t in made]


def exact(q: Tensor, k: Tensor, v: Tensor, scaling: float | None = None) -> Tensor:
    wide = (t.double() for t in (q, k, v))
    out = F.scaled_dot_product_attention(*wide, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("n", [2, 127, 128, 129, 300, 512])
@pytest.mark.parametrize(("own", "theirs"), [(6, 6), (8, 2), (3, 1)])
def test_it_is_attention(n: int, own: int, theirs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(n, own, theirs)
    got = causal_attention(q, k, v, 0.3)
    assert got.dtype == torch.bfloat16 and got.is_contiguous() and got.shape == (2, n, own, 32)
    assert error(got, exact(q, k, v, 0.3)) < 4e-3  # one rounding of probabilities, one of results
    monkeypatch.setattr(fused, "unavailable", lambda: "left out")
    assert error(causal_attention(q, k, v, 0.3), exact(q, k, v, 0.3)) < 4e-3


def test_no_query_sees_a_later_key() -> None:
    q, k, v = heads(200)
    before = causal_attention(q, k, v)
    k[:, :, 150:], v[:, :, 150:] = 9.0, -7.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])


def test_a_sample_does_not_depend_on_the_others() -> None:
    q, k, v = heads(300, batch=3)
    together = causal_attention(q, k, v)
    for i in range(3):
        assert torch.equal(
            causal_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1])[0], together[i]
        )


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        ({}, True),
        ({"mask": True}, False),
        ({"dtype": torch.float32}, False),
        ({"keys": 40}, False),
        ({"is_causal": False}, False),
        ({"gradient": True}, False),
    ],
)
def test_what_it_is_not_made_for_goes_to_torch(
    change: dict[str, Any], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    own = causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *a: taken.append(1) or own(*a))
    q, k, v = (t.to(change.get("dtype", torch.bfloat16)) for t in heads(30))
    if "keys" in change:
        k, v = (F.pad(t, (0, 0, 0, change["keys"] - 30)) for t in (k, v))
    if "gradient" in change:
        q.requires_grad_()
    mask = torch.ones(30, 30, dtype=torch.bool).tril()[None, None] if "mask" in change else None
    module = nn.Module()
    module.is_causal = change.get("is_causal", True)  # type: ignore[assignment]
    got, nothing = attend(module, q, k, v, mask, scaling=32**-0.5)
    assert nothing is None and bool(taken) == ours and got.shape == (2, 30, 6, 32)
    if change.get("is_causal", True):
        assert error(got.detach(), exact(q.detach(), k[:, :, :30], v[:, :, :30])) < 5e-3


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("asked", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_a_bfloat16_models_sdpa_is_replaced(
    native: bool, asked: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "native_bfloat16", lambda device: native)
    config = SimpleNamespace(_attn_implementation=asked)
    use(config, CPU, dtype)
    replaced = native and asked == "sdpa" and dtype == torch.bfloat16
    assert config._attn_implementation == (NAME if replaced else asked)


def test_a_model_gives_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    monkeypatch.setattr(attention, "native_bfloat16", lambda device: True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 128, (2, 200))
    with torch.no_grad():
        want = model(ids).logits
        use(model.config, CPU, torch.bfloat16)
        assert model.config._attn_implementation == NAME
        got = model(ids).logits
        padded = torch.ones_like(ids)
        padded[0, :50] = 0  # needs a mask, and so torch's
        masked = model(ids, attention_mask=padded).logits
        model.config._attn_implementation = "sdpa"
        assert torch.equal(model(ids, attention_mask=padded).logits, masked)
    assert not torch.equal(got, want)
    assert error(got, want.double()) < 0.02
