"""Memory is what was taken, and a quantized cache is smaller, read, and judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from fresh import Interpreter
from qwen_tiny import write_checkpoint

from qquant import caches, memory
from qquant.caches import cache_bytes, distance, make_cache
from qquant.errors import InputError, SpecError
from qquant.generation import generate, random_prompt
from qquant.parts.base import Model, Subject
from qquant.parts.memory import KL_PROMPT, KL_TOKENS, MemoryOptions, MemoryPart, heldout
from qquant.protocol import Protocol
from qquant.runtime import Loaded

LAYERS, HEADS, CHANNELS = 24, 8, 64
TOKEN = LAYERS * HEADS * CHANNELS * 2 * 4  # bytes of float32 keys and values: 98 kB


def wide_cache() -> Any:
    """A model whose cache is nearly all that it takes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=CHANNELS,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


SCRIPT = """
import json, sys
from qquant.memory import generating, memory_of, warm
from qquant.runtime import load

warm("cpu")
for context in (200, 1200):
    run = generating(context, 1, "dynamic", lambda done: None)
    found, loaded = memory_of(lambda: load(sys.argv[1], device="cpu", dtype="float32"), run, "cpu")
    print(json.dumps([found.held, found.peak, found.process_peak, loaded.kernel.weight_bytes]))
    del loaded
"""


def test_the_peak_grows_with_the_context_by_the_cache(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """On a CPU, in a process that does nothing else: resident memory."""
    wide_cache().save_pretrained(tmp_path / "wide")
    ended = interpreter.run(SCRIPT, str(tmp_path / "wide"))
    assert ended.code == 0, ended.err
    shown = ended.out.splitlines()[-2:]
    (held, small, _, weights), (_, large, process, _) = map(json.loads, shown)
    assert 0.9 * weights < held < weights + 30e6
    assert held < small < large < process
    # Less than the whole where the shorter run's peak had room to spare (seen: 0.742).
    assert 0.7 * 1000 * TOKEN < large - small < 1.6 * 1000 * TOKEN


def test_a_run_is_counted_from_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a machine of numbers: 100 stand; loading takes 50 and peaks at 80, the run at 70."""
    state = {"now": 100, "peak": 900}

    def take(now: int, peak: int) -> None:
        state.update(now=now, peak=max(state["peak"], peak))

    def reset() -> bool:
        state["peak"] = state["now"]
        return True

    monkeypatch.setattr(memory, "resident_bytes", lambda: state["now"])
    monkeypatch.setattr(memory, "peak_memory", lambda: state["peak"])
    monkeypatch.setattr(memory, "reset_peak_memory", reset)
    found, loaded = memory.memory_of(
        lambda: take(150, 180) or "model", lambda got: take(150, 170) or got, "cpu"
    )
    assert loaded == "model"
    assert (found.held, found.loading_peak, found.peak) == (50, 80, 70)
    assert found.process_peak == 180
    assert found.qwen_gib == 80 / 2**30  # with loading
    state.update(now=100, peak=900)
    monkeypatch.setattr(memory, "reset_peak_memory", lambda: False)  # no such system call
    found, _ = memory.memory_of(lambda: take(150, 180), lambda _: take(150, 170), "cpu")
    assert found.peak is None and found.held == 50


def test_the_run_reads_and_writes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = handmade.tiny_qwen2()
    calls, told = [], []
    real = model.forward

    def spy(**kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        calls.append((kwargs["input_ids"].shape[1], int(cache.get_seq_length())))
        return real(**kwargs)

    monkeypatch.setattr(model, "forward", spy)
    memory.generating(7, 3, "dynamic", told.append)(Loaded(model, None, None))  # type: ignore[arg-type]
    assert calls == [(7, 0), (1, 7), (1, 8)] and told == [1, 2, 3]


def test_bytes_of_a_cache() -> None:
    model = handmade.tiny_qwen2()  # 2 layers, one head of 64 for keys and values
    _, cache = generate(model, random_prompt(model, 3, 6), 5)
    assert cache_bytes(cache) == 2 * 2 * 3 * 10 * 64 * 4
    static = make_cache("static", model.config, 32)
    _, cache = generate(model, random_prompt(model, 3, 6), 5, cache=static)
    assert cache_bytes(cache) == 2 * 2 * 3 * 32 * 64 * 4


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_quantized_cache_is_smaller_and_costs_a_little(kind: str) -> None:
    if kind == "fp8":
        from transformers import cache_utils

        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            pytest.skip("this transformers has no fp8 cache")
    else:
        pytest.importorskip("hqq")
    model = handmade.tiny_qwen2()
    ids = random_prompt(model, 2, 150)

    def make() -> Any:
        return make_cache(f"quantized-{kind}", model.config, 150)

    kl, error = distance(model, ids, 140, make)
    assert error is not None and 0 < error < kl
    low, high = {"int8": (0, 1e-3), "int4": (1e-4, 0.5), "fp8": (0, 0.05)}[kind]
    assert low < kl < high
    _, plain = generate(model, ids, 2)
    _, small = generate(model, ids, 2, cache=make())
    share = cache_bytes(small) / cache_bytes(plain)
    bits = {"int8": 8, "int4": 4, "fp8": 8}[kind]
    assert bits / 32 <= share < bits / 32 + 0.08  # of float32; scales, and the newest token


def test_a_cache_is_at_no_distance_from_itself_and_a_spoiled_one_is_far() -> None:
    from transformers import DynamicCache

    class Spoiled(DynamicCache):
        """Every value that was kept comes back doubled."""

        def update(self, keys: Any, values: Any, layer: int, *more: Any, **kwargs: Any) -> Any:
            keys, kept = super().update(keys, values, layer, *more, **kwargs)
            return keys, torch.cat([2 * kept[:, :, : -values.shape[2]], values], 2)

    model = handmade.tiny_qwen2()
    ids = random_prompt(model, 3, 12)
    same = distance(model, ids, 4, lambda: make_cache("dynamic", model.config, 12))
    assert same == (0.0, 0.0)
    told: list[int] = []
    spoiled, _ = distance(model, ids, 4, lambda: Spoiled(config=model.config), told.append)
    assert spoiled > 1e-3 and told == list(range(1, 9))
    found = []
    for cache in (DynamicCache(config=model.config), Spoiled(config=model.config)):
        model(input_ids=ids[:, :4], past_key_values=cache)
        logits = [
            model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits
            for at in range(4, 12)
        ]
        found.append(torch.cat(logits, 1).double().log_softmax(-1))
    p, q = found
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert spoiled == pytest.approx(expected)
    one = distance(model, ids[:1], 4, lambda: Spoiled(config=model.config))
    assert one[1] is None  # one row has no error
    with pytest.raises(SpecError, match="prompt"):
        distance(model, ids, 12, lambda: Spoiled(config=model.config))


def test_groups_fit_every_shape() -> None:
    """An even number of groups per head and token."""
    config = handmade.tiny_qwen2().config
    for channels, group in ((128, 64), (64, 32), (32, 16), (96, 16), (80, 8)):
        config.head_dim = channels
        assert caches.group_size(config) == group
        assert channels % group == 0 and channels // group % 2 == 0


def test_rows_of_memory() -> None:
    labels = [part.label for part in MemoryOptions().parts()]
    assert labels == ["memory weights", "memory encode-2048"]
    kind = handmade.quantized_cache()
    options = MemoryOptions(memory=("generate", "encode"), kv_caches=(kind,), encode_tokens=64)
    parts = options.parts()
    names = ["encode-64", "generate-8192", f"encode-64-kv-{kind}", f"generate-8192-kv-{kind}"]
    assert [part.label for part in parts] == [f"memory {name}" for name in names]
    assert len({part.process for part in parts}) == 4  # each in a process of its own
    assert [getattr(part, "text", "") for part in parts] == ["", "", "builtin", "builtin"]
    assert "texts" not in options.public()
    for wrong in ({"memory": ("none", "weights")}, {"memory": ("all",)}, {"encode_tokens": 0}):
        with pytest.raises(InputError, match=next(iter(wrong)).replace("_", "-")):
            Protocol.of(**wrong)


def test_a_quantized_cache_in_a_profile(tmp_path: Path) -> None:
    """Memory and distance of one row, on the file that accuracy is measured on."""
    path = write_checkpoint(tmp_path / "src", code=False)
    text = tmp_path / "text.txt"
    text.write_text("Some text to hold out. " * 400)
    kind = handmade.quantized_cache()
    options = MemoryOptions(
        memory=("encode",), encode_tokens=32, kv_caches=(kind,), texts=(str(text),)
    )
    part = options.parts()[-1]
    assert isinstance(part, MemoryPart)
    subject = Subject(Model(str(path)), device="cpu", dtype="float32")
    found = part.measure(subject)
    assert found["cache"] == f"quantized-{kind}" and found["kl_text"] == "text.txt"
    assert found["kl_tokens"] == 8 * KL_TOKENS
    kl, error = found["kl"]
    assert 0 < error < kl < 0.1 and math.isfinite(kl)
    assert "KL" in part.headline(found)
    ids = heldout(subject.loaded.tokenizer, "builtin", KL_PROMPT + KL_TOKENS)
    assert ids.shape == (8, KL_PROMPT + KL_TOKENS)
    with pytest.raises(InputError, match="tokenizer"):
        heldout(None, "builtin", 8)
