"""Embedding and head held as stored: what is exact, what is near, and when it is done at all."""

from __future__ import annotations

from pathlib import Path

import handmade
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import SPEC, TOKENS, make, native_checkpoint
from torch import Tensor
from torch.nn import functional as F

import qquant.packed_head as packed_head
import qquant.vocabulary as vocabulary
from qquant import kernels, quantize
from qquant.bandwidth import weights_read
from qquant.kernels import QuantLinear
from qquant.runtime import load
from qquant.vocabulary import EXACT, FEW, StoredEmbedding, StoredHead, exact_logits


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_rows_are_looked_up_exactly(weight: Tensor) -> None:
    ids = torch.tensor([[0, 2999], [7, 7]])
    found = StoredEmbedding(weight)(ids)
    assert found.dtype == torch.float32 and torch.equal(found, weight.float()[ids])


@pytest.mark.parametrize("shape", [(1, 5, 64), (5, 64), (FEW + 1, 1, 64), (1, 64), (0, 64)])
def test_everything_but_decoding_is_exact(weight: Tensor, shape: tuple[int, ...]) -> None:
    x = states(*shape)
    found = StoredHead(weight)(x)
    assert found.shape == (*shape[:-1], 3000) and found.dtype == torch.float32
    assert torch.allclose(found, F.linear(x, weight.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequences", [1, FEW])
def test_decoding_is_exact_at_the_top_and_near_below(weight: Tensor, sequences: int) -> None:
    x = states(sequences, 1, 64)
    found, exact = StoredHead(weight)(x)[:, 0], F.linear(x, weight.float())[:, 0]
    rounded = F.linear(x.to(weight.dtype), weight).float()[:, 0]
    # Rounding alone is not enough: it makes different logits equal.
    assert not torch.allclose(rounded, exact, rtol=1e-4, atol=1e-4)
    top = exact.topk(EXACT // 2).indices
    assert torch.allclose(found.gather(1, top), exact.gather(1, top), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argsort(descending=True)[:, :8], exact.argsort(descending=True)[:, :8])
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_what_measures_by_decoding_gets_exact_logits(weight: Tensor) -> None:
    x, head = states(1, 1, 64), StoredHead(weight)
    exact = F.linear(x, weight.float())
    model = torch.nn.Sequential(head)
    with pytest.raises(KeyError), exact_logits(model):
        assert torch.allclose(model(x), exact, rtol=1e-5, atol=1e-5)
        raise KeyError
    assert not torch.allclose(model(x), exact, rtol=1e-4, atol=1e-4)


def test_gradients_and_other_dtypes_go_through_a_plain_product(weight: Tensor) -> None:
    head, x = StoredHead(weight), states(2, 1, 64).requires_grad_()
    head(x).sum().backward()
    assert torch.allclose(x.grad, weight.float().sum(0).expand(2, 1, 64), rtol=1e-4, atol=1e-3)
    for dtype in (torch.float64, torch.bfloat16):
        found = head(states(2, 1, 64).to(dtype))
        assert found.dtype == dtype and found.shape == (2, 1, 3000)


def test_float16_is_taken_where_it_holds_bfloat16(weight: Tensor) -> None:
    small = weight.clone()
    small[5] = torch.tensor([2.0**-i for i in range(64)])  # down to what float16 rounds to 0
    half = small.half()
    held = vocabulary.as_bfloat16(half)
    assert held is not None and torch.equal(held.half(), half)
    half[-1, -1] = 1 + 2**-10
    assert vocabulary.as_bfloat16(half) is None
    assert vocabulary.as_bfloat16(weight) is weight


def test_a_small_vocabulary(weight: Tensor) -> None:
    few, x = weight[:10], states(1, 1, 64)
    assert torch.allclose(StoredHead(few)(x), F.linear(x, few.float()), atol=1e-5)


def test_it_is_timed_and_small_ones_are_left(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not vocabulary.worth_it(weight)
    monkeypatch.setattr(vocabulary, "WORTH", 0)
    for seconds, worth in (((1.0, 2.0), True), ((2.0, 1.0), False)):
        answers = iter(seconds)  # of bfloat16, then of float32
        monkeypatch.setattr(vocabulary, "fastest_of", lambda *_, answers=answers: next(answers))
        assert vocabulary.worth_it(weight) is worth


def quantized(path: Path, kind: str, tied: bool) -> Path:
    if kind == "qwen":
        file = make(kind, path / "src") / "model.safetensors"
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    else:
        native_checkpoint(path / "src", kind, tie_word_embeddings=tied)
    return quantize(path / "src", path / "dst", SPEC, tokens=TOKENS, device="cpu").path


@pytest.mark.parametrize(("kind", "tied"), [("qwen", False), ("qwen2", False), ("qwen3", True)])
def test_a_loaded_model_holds_them_so(
    kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU that multiplies bfloat16 the whole model is in it.
    monkeypatch.setattr("qquant.devices.native_bfloat16", lambda _: False)
    directory = quantized(tmp_path, kind, tied)
    plain = load(directory, device="cpu")
    assert "embedding" not in str(plain.kernel)
    monkeypatch.setattr(vocabulary, "worth_it", lambda _: True)
    kept = load(directory, device="cpu")
    assert vocabulary.STORED_NOTE in str(kept.kernel)
    embedding, head = kept.model.get_input_embeddings(), kept.model.get_output_embeddings()
    assert isinstance(embedding, StoredEmbedding) and isinstance(head, StoredHead)
    assert (head.weight is embedding.weight) is tied
    assert kept.model.dtype == torch.float32
    size = embedding.weight.numel()
    assert plain.kernel.weight_bytes - kept.kernel.weight_bytes == 2 * size * (1 if tied else 2)
    saved = weights_read(plain.model) - weights_read(kept.model)
    assert saved == 2 * (size + embedding.weight.shape[1])
    with torch.inference_mode():
        ids = TOKENS[:2]
        assert torch.allclose(kept.model(ids).logits, plain.model(ids).logits, atol=1e-5)
        words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        made = [m.generate(ids, **words) for m in (kept.model, plain.model)]
    assert torch.equal(*made)


def test_who_asks_for_float32_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = quantized(tmp_path, "qwen2", False)
    monkeypatch.setattr(vocabulary, "worth_it", lambda _: True)
    for more in ({"dtype": "float32"}, {"kernel": "dequantize"}, {"dtype": "bfloat16"}):
        model = load(directory, device="cpu", **more).model
        assert not isinstance(model.get_output_embeddings(), StoredHead), more
    source = load(tmp_path / "src", device="cpu").model
    assert not isinstance(source.get_output_embeddings(), StoredHead)


@pytest.mark.parametrize(("tied", "native"), [(False, False), (False, True), (True, False)])
def test_a_quantized_head_is_left_alone(
    tied: bool, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPTQModel writes them where it is asked to."""
    monkeypatch.setattr("qquant.devices.native_bfloat16", lambda _: native)
    for module in (vocabulary, packed_head):
        monkeypatch.setattr(module, "worth_it", lambda _: True)
    model = handmade.tiny_qwen2(layers=1, tie_word_embeddings=tied)
    path, _ = handmade.make_pair(model, tmp_path, blocks="model.layers")
    head, weight = handmade.random_linear(320, 128, group_size=32)
    state = load_file(path / "model.safetensors") | {f"lm_head.{k}": t for k, t in head.items()}
    state.pop("lm_head.weight", None)
    embedding = "model.embed_tokens.weight"
    state[embedding] = state[embedding].bfloat16().half()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    loaded = load(path, device="cpu")
    made = loaded.model.get_output_embeddings()
    assert isinstance(made, QuantLinear) and loaded.kernel.used["lm_head"] in kernels.HELD
    x = states(1, 1, 128)
    want = x.double() @ weight.T
    with torch.inference_mode():
        got = made(x.to(loaded.kernel.dtype)).double()
    assert float((got - want).norm()) < 0.02 * float(want.norm())
    assert loaded.model(TOKENS[:1]).logits.isfinite().all()
