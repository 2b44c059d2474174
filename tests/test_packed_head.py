"""The head in oneDNN's layout: the same logits, the same matrix, and when it is done at all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from test_convert import TOKENS
from test_vocabulary import quantized
from torch import Tensor
from torch.nn import functional as F

import qquant.packed_head as packed_head
from qquant.bandwidth import weights_read
from qquant.packed_head import NOTE, PackedHead
from qquant.products import has_onednn_layout
from qquant.runtime import load


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def states(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 64), (4, 1, 64), (2, 9, 64), (64,), (0, 64)])
def test_it_is_the_product(weight: Tensor, shape: tuple[int, ...]) -> None:
    x = states(*shape)
    with torch.inference_mode():
        found = PackedHead(weight)(x)
    want = F.linear(x.double(), weight.double())
    assert found.shape == want.shape and found.dtype == torch.bfloat16
    assert float((found.double() - want).norm()) <= 4e-3 * float(want.norm())


def test_gradients_and_other_dtypes_go_through_a_plain_product(weight: Tensor) -> None:
    head, x = PackedHead(weight), states(2, 1, 64).requires_grad_()
    head(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    exact = head(states(2, 64, dtype=torch.float64))
    assert torch.equal(exact, F.linear(states(2, 64, dtype=torch.float64), weight.double()))


def test_the_matrix_comes_back_as_it_was(weight: Tensor) -> None:
    head = PackedHead(weight)
    assert head.held.is_mkldnn is has_onednn_layout() and torch.equal(head.weight, weight)
    assert torch.equal(head.state_dict()["weight"], weight)
    wide = head.float()
    assert not wide.held.is_mkldnn and torch.equal(wide.weight, weight.float())
    assert torch.equal(wide(states(2, 64).float()), F.linear(states(2, 64).float(), weight.float()))
    back = wide.bfloat16()
    assert back.held.is_mkldnn is has_onednn_layout() and torch.equal(back.weight, weight)


def test_a_state_dict_loads_as_any_linear_s(weight: Tensor) -> None:
    head = PackedHead(torch.zeros_like(weight))
    assert not head.load_state_dict({"weight": weight}).missing_keys
    assert torch.equal(head.weight, weight) and head.held.is_mkldnn is has_onednn_layout()
    weight[0] = 0
    assert bool(head.weight[0].any()), "a copy"
    head.load_state_dict(head.state_dict())
    for wrong, said in (
        ({}, "Missing key"),
        ({"weight": weight, "bias": weight[0]}, "Unexpected key"),
        ({"weight": weight[1:]}, r"size mismatch for weight: \[2999, 64\]"),
    ):
        with pytest.raises(RuntimeError, match=said):
            head.load_state_dict(wrong)


def test_it_is_copied_and_pickled_as_a_plain_matrix(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch does neither with a tensor in oneDNN's layout, here one of any CPU: float32."""
    monkeypatch.setattr(packed_head, "has_onednn_layout", lambda: True)
    monkeypatch.setattr(packed_head, "onednn_layout", lambda w, _: w.float().to_mkldnn())
    head = PackedHead(weight)
    model = torch.nn.Sequential(head)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made[0].weight.bfloat16(), weight)
        assert made[0].out_features == 3000 and made[0].training is head.training
    assert head.held.is_mkldnn


def test_without_that_layout_it_is_a_plain_matrix(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_head, "has_onednn_layout", lambda: False)
    monkeypatch.setattr(packed_head, "WORTH", 0)
    monkeypatch.setattr(packed_head, "onednn", lambda *_: pytest.fail("a product in that layout"))
    assert not packed_head.worth_it(weight)
    head = PackedHead(weight)
    assert torch.equal(head.held, weight)
    assert torch.equal(head(states(3, 64)), F.linear(states(3, 64), weight))


@pytest.mark.skipif(
    not has_onednn_layout(), reason="oneDNN has no layout for bfloat16 on this CPU, or torch none"
)
def test_it_is_tried_and_small_ones_are_left(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not packed_head.worth_it(weight)
    monkeypatch.setattr(packed_head, "WORTH", 0)
    for seconds, worth in (((1.0, 2.0), True), ((2.0, 1.0), False)):
        answers = iter(seconds)  # of that layout, then of the plain one
        monkeypatch.setattr(packed_head, "fastest_of", lambda *_, answers=answers: next(answers))
        assert packed_head.worth_it(weight) is worth
    monkeypatch.setattr(packed_head, "fastest_of", lambda *_: pytest.fail("timed a wrong product"))
    monkeypatch.setattr(packed_head, "onednn", lambda x, _: F.linear(x, weight.flip(0)))
    assert not packed_head.worth_it(weight)


@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
def test_a_loaded_model_has_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qquant.devices.native_bfloat16", lambda _: True)
    directory = quantized(tmp_path, kind, False)
    plain = load(directory, device="cpu")
    assert NOTE not in str(plain.kernel)
    monkeypatch.setattr(packed_head, "worth_it", lambda _: True)
    packed = load(directory, device="cpu")
    assert NOTE in str(packed.kernel)
    assert isinstance(packed.model.get_output_embeddings(), PackedHead)
    assert packed.model.dtype == torch.bfloat16
    assert packed.kernel.weight_bytes == plain.kernel.weight_bytes
    assert weights_read(packed.model) == weights_read(plain.model)
    assert packed.model.state_dict().keys() == plain.model.state_dict().keys()
    with torch.inference_mode():
        one, other = (m(TOKENS[:2]).logits.float() for m in (packed.model, plain.model))
        assert float((one - other).norm()) <= 1e-2 * float(other.norm())
        made = packed.model.generate(TOKENS[:2], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (2, TOKENS.shape[1] + 4)


def test_where_it_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qquant.devices.native_bfloat16", lambda _: True)
    monkeypatch.setattr(packed_head, "worth_it", lambda _: True)
    directory = quantized(tmp_path / "apart", "qwen2", False)
    for more in ({"dtype": "float32"}, {"kernel": "dequantize"}):
        head = load(directory, device="cpu", **more).model.get_output_embeddings()
        assert not isinstance(head, PackedHead), more
    source = load(tmp_path / "apart" / "src", device="cpu", dtype="bfloat16").model
    assert not isinstance(source.get_output_embeddings(), PackedHead)
    tied = load(quantized(tmp_path / "tied", "qwen3", True), device="cpu").model
    assert not isinstance(tied.get_output_embeddings(), PackedHead)
