"""The measures against their definitions, written out in float64 over whole logits."""

from __future__ import annotations

import math

import handmade
import pytest
import torch

from qquant import profile
from qquant.errors import InputError, SpecError


@pytest.fixture(scope="module")
def models():
    reference = handmade.tiny_qwen2()
    candidate = handmade.tiny_qwen2()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return reference, candidate


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 320, (5, 24), generator=torch.Generator().manual_seed(3))


def log_probs(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.double(), -1)


def by_row(values):
    """Mean and standard error over rows of [n, t]."""
    rows = values.double().mean(1)
    return rows.mean().item(), (rows.std() / math.sqrt(len(rows))).item()


def test_perplexity_is_its_definition(models, ids):
    picked = log_probs(models[0], ids)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    mean, error = by_row(-picked)
    ppl, stderr = profile.perplexity(models[0], ids)
    assert ppl == pytest.approx(math.exp(mean), rel=1e-5)
    assert stderr == pytest.approx(math.exp(mean) * error, rel=1e-3)
    loss = models[0](input_ids=ids, labels=ids).loss  # transformers' own
    assert ppl == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert profile.loss(models[0], ids).value == pytest.approx(math.log(ppl))


def test_one_row_has_no_standard_error(models, ids):
    assert math.isnan(profile.perplexity(models[0], ids[:1]).stderr)


def test_comparison_is_its_definition(models, ids):
    p, q = (log_probs(model, ids)[:, :-1] for model in models)
    kl, kl_error = by_row((p.exp() * (p - q)).sum(-1))
    top1, _ = by_row(p.argmax(-1) == q.argmax(-1))
    found = profile.compare(*models, ids)
    assert found.kl.value == pytest.approx(kl, rel=1e-4)
    assert found.kl.stderr == pytest.approx(kl_error, rel=1e-3)
    assert found.top1.value == pytest.approx(top1)
    assert 0 < found.top1.value < 1  # the candidate is neither the same nor another model
    assert found.ppl_reference == profile.perplexity(models[0], ids)
    assert found.ppl_candidate == profile.perplexity(models[1], ids)
    assert found.tokens == 5 * 23


def test_many_candidates_are_each_compared_and_the_reference_runs_once(models, ids, monkeypatch):
    runs = []

    def watched(model, rows, real=profile._body):
        runs.append(model)
        return real(model, rows)

    monkeypatch.setattr(profile, "_body", watched)
    found = profile.compare_all(models[0], {"same": models[0], "other": models[1]}, ids)
    assert runs == [models[0], models[0], models[1]]
    assert found["other"] == profile.compare(*models, ids)
    assert found["same"].kl_per_row == (0.0,) * 5
    rows = found["other"].kl_per_row
    assert len(rows) == 5 and math.fsum(rows) / 5 == found["other"].kl.value
    assert profile.compare_all(models[0], {}, ids) == {}


def test_a_small_distance_is_not_lost_in_rounding(models, ids):
    """8 bits are about 1e-5 nats away: float32 log-probabilities would leave few digits of that."""
    near = handmade.tiny_qwen2()
    near.load_state_dict(models[0].state_dict())
    with torch.no_grad():
        near.get_output_embeddings().weight *= 1 + 1e-4
    p, q = (log_probs(model, ids)[:, :-1] for model in (models[0], near))
    kl, _ = by_row((p.exp() * (p - q)).sum(-1))
    assert kl < 1e-6
    assert profile.compare(models[0], near, ids).kl.value == pytest.approx(kl, rel=0.05)


def test_kl_has_a_direction(models, ids):
    forth, back = profile.compare(*models, ids), profile.compare(*models[::-1], ids)
    assert abs(forth.kl.value - back.kl.value) > 1e-3 * forth.kl.value


def test_a_model_is_at_no_distance_from_itself(models, ids):
    found = profile.compare(models[0], models[0], ids)
    assert (found.kl.value, found.top1.value) == (0.0, 1.0)


def test_batches_and_chunks_change_nothing(models, ids, monkeypatch):
    whole = profile.compare(*models, ids)
    seen = []

    def watched(model, states, real=profile._log_probs):
        seen.append(states.shape[0])
        return real(model, states)

    monkeypatch.setattr(profile, "_log_probs", watched)
    monkeypatch.setattr(profile, "CHUNK_BYTES", 8 * 320 * 7)
    monkeypatch.setattr(profile, "ROW_TOKENS", 48)
    parts = profile.compare(*models, ids)
    assert max(seen) == 7  # what bounds memory: seven positions' logits at a time
    assert sum(seen) == 2 * 5 * 23
    assert parts.kl.value == pytest.approx(whole.kl.value, rel=1e-4)
    assert parts.top1 == whole.top1
    assert parts.ppl_candidate.value == pytest.approx(whole.ppl_candidate.value, rel=1e-5)


def test_other_vocabularies_are_refused(models, ids):
    other = handmade.tiny_qwen2()
    other.resize_token_embeddings(352, mean_resizing=False)
    with pytest.raises(SpecError, match="vocabulary"):
        profile.compare(models[0], other, ids)
    with pytest.raises(SpecError, match="ids"):
        profile.perplexity(models[0], ids[:, :1])


def test_heldout_ids_are_the_text_in_rows():
    def tokenizer(text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    ids = profile.heldout_ids(tokenizer, "abcdefgh", 3)
    assert ids.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert ids.dtype == torch.int64
    assert profile.heldout_ids(tokenizer, "abcdefgh", 3, max_tokens=5).shape == (1, 3)
    with pytest.raises(InputError, match="held-out text"):
        profile.heldout_ids(tokenizer, "ab", 3)
    with pytest.raises(SpecError, match="seqlen"):
        profile.heldout_ids(tokenizer, "abc", 1)
