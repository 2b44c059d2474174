"""The measures against their definitions, written out in float64 over whole logits."""

from __future__ import annotations

import math

import handmade
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qquant import profile
from qquant.errors import InputError, SpecError, TargetError
from qquant.kept import KeptReference


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


def test_topk_rows_and_positions_are_their_definitions(models, ids):
    p, q = (log_probs(model, ids)[:, :-1] for model in models)
    found = profile.compare_all(models[0], {"it": models[1]}, ids, ks=(5, 10, 10**6))["it"]
    for k in (5, 10):
        share = torch.tensor(
            [
                [len({*a.topk(k).indices.tolist()} & {*b.topk(k).indices.tolist()}) / k]
                for x, y in zip(p, q, strict=True)
                for a, b in zip(x, y, strict=True)
            ]
        ).view(5, 23)
        value, error = by_row(share)
        assert found.topk[k] == pytest.approx((value, error))
        assert 0.1 < value < 1
    assert set(found.topk) == {5, 10}  # there are not a million tokens
    kl = (p.exp() * (p - q)).sum(-1)
    lost = (p - q).gather(2, ids[:, 1:, None])[..., 0]
    assert found.kl_per_row == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert found.top1_per_row == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean(1).tolist()
    )
    low, high = found.nll_lost_interval
    value, error = by_row(lost)
    expected = (value - 2.776 * error, value + 2.776 * error)
    assert (low, high) == pytest.approx(expected, abs=2e-3 * error)
    assert [(s.first, s.last) for s in found.by_position] == [(1, 15), (16, 23)]
    for span in found.by_position:
        own = slice(span.first - 1, span.last)
        assert span.kl == pytest.approx(by_row(kl[:, own]), rel=1e-3)
        assert span.nll_lost == pytest.approx(by_row(lost[:, own]), rel=1e-3)
        nll = -q.gather(2, ids[:, 1:, None])[..., 0][:, own]
        assert span.perplexity.value == pytest.approx(math.exp(by_row(nll)[0]), rel=1e-4)
    alone = profile.losses(models[1], ids)
    assert alone.nll_per_row == found.nll_per_row and alone.perplexity == found.ppl_candidate
    assert [s.perplexity for s in alone.by_position] == [s.perplexity for s in found.by_position]


@pytest.mark.parametrize("count", [1, 15, 16, 511, 1000])
def test_positions_are_cut_without_gap(count):
    spans = profile.positions(count)
    assert [p for first, last in spans for p in range(first, last + 1)] == [*range(1, count + 1)]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes, files' contents apart."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "from_file" not in func.__name__:
            views = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in views:
                self.most = max(self.most, out.numel() * out.element_size())
        return out


def test_memory_does_not_grow_with_the_text(models, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "CHUNK_BYTES", 8 * 320 * 7)
    monkeypatch.setattr(profile, "ROW_TOKENS", 48)
    most = []
    for rows in (4, 64):
        ids = torch.randint(0, 320, (rows, 24), generator=torch.Generator().manual_seed(3))
        with Largest() as seen:
            kept = profile.keep_reference(models[0], ids, tmp_path, str(rows))
            profile.compare_all(kept, {"it": models[1]}, ids, ks=(5, 10))
        most.append(seen.most)
        assert kept._states.numel() == rows * 24 * 128  # all of them, in the file
    weights = max(p.numel() * 4 for p in models[0].parameters())
    assert most[0] == most[1] <= weights < 64 * 24 * 128 * 4 < 64 * 23 * 320 * 8


@pytest.mark.parametrize("kind", ["qwen1", "qwen2"])
def test_a_long_row_makes_no_square(kind):
    model = (handmade.tiny_qwen1 if kind == "qwen1" else handmade.tiny_qwen2)()
    length = 3072
    ids = torch.randint(0, 320, (1, length), generator=torch.Generator().manual_seed(3))
    with Largest() as seen:
        profile.losses(model, ids)
    assert seen.most < length * length  # not even a mask of a byte for each pair


def test_kept_states_give_the_same_as_the_model_and_can_be_opened_again(models, ids, tmp_path):
    kept = profile.keep_reference(models[0], ids, tmp_path, "it")
    assert profile.compare(kept, models[1], ids) == profile.compare(*models, ids)
    cpu = torch.device("cpu")
    again = KeptReference.open(tmp_path, "it", cpu)
    assert torch.equal(again.ids, ids)
    assert profile.compare(again, models[1], ids) == profile.compare(*models, ids)
    assert profile.losses(again, ids) == profile.losses(models[0], ids)
    with pytest.raises(SpecError, match="token ids"):
        profile.compare(again, models[1], ids.flip(1))
    (tmp_path / "it.safetensors").rename(tmp_path / "it.part")  # killed before the seal
    assert KeptReference.open(tmp_path, "it", cpu) is None
    (tmp_path / "it.part").rename(tmp_path / "it.safetensors")
    states = (tmp_path / "it.states").read_bytes()
    for wrong in (states[:-4], b"", None):  # zeros would be read for what is not there
        (tmp_path / "it.states").unlink(missing_ok=True)
        if wrong is not None:
            (tmp_path / "it.states").write_bytes(wrong)
        assert KeptReference.open(tmp_path, "it", cpu) is None
    (tmp_path / "it.states").write_bytes(states)
    (tmp_path / "it.safetensors").write_bytes(b"damaged")
    assert KeptReference.open(tmp_path, "it", cpu) is None


def test_a_disk_that_is_full_is_told(models, ids, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(TargetError, match=r"it\.states.*No space left"):
        profile.keep_reference(models[0], ids, tmp_path, "it")
    assert not list(tmp_path.iterdir())


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
