"""Speed is what it says: what runs, what is timed, what is computed of it, how it scales."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import handmade
import numpy
import pytest
import torch
from qwen_tiny import tiny_model, write_checkpoint
from safetensors import safe_open
from torch import nn

from qquant import BnbSpec, caches, compiling, quantize, speed
from qquant.bandwidth import cache_read, copy_bandwidth, weights_read
from qquant.errors import InputError, MissingDependencyError, RunError, SpecError
from qquant.generation import QWEN_SEED, Run, generate, qwen_prompt, random_prompt
from qquant.kernel_report import KernelReport
from qquant.parts.speed import SpeedOptions, SpeedPart, notes, times, traffic
from qquant.protocol import Protocol
from qquant.runtime import load
from qquant.slow import slow_kernel
from qquant.speed import Speed, like_qwen


@pytest.fixture(scope="module")
def model() -> Any:
    return handmade.tiny_qwen2()


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Shape of the ids and length of the cache, of every forward from now on."""
    calls: list[tuple[tuple[int, ...], int]] = []
    real = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        length = int(cache.get_seq_length()) if cache is not None else 0
        calls.append((tuple(kwargs["input_ids"].shape), length))
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_runs_what_it_says(model: Any, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Each run: the prompt at once, then one token at a time on the cache; one run to warm up."""
    calls = watched(model, monkeypatch)
    told: list[tuple[int, int]] = []
    found = speed.speed(
        model, 6, 4, 2, batch=3, cache=cache, told=lambda done, total: told.append((done, total))
    )
    assert calls == [((3, 6), 0), ((3, 1), 6), ((3, 1), 7), ((3, 1), 8)] * 3
    assert told == [(0, 3), (1, 3), (2, 3)]
    assert len(found.runs) == 2 and found.warmup_s is not None and found.warmup_s > 0


def test_every_figure_is_its_definition(model: Any) -> None:
    """A clock that moves as a list says: 1 s and 10 s per run, then 1, 2, ... ms per token."""
    marks: list[float] = []
    at = 0.0
    for prefill in (10.0, 1.0, 3.0, 2.0):  # the warm-up first
        at += 1000
        marks += [at, at := at + prefill]
        for step in range(1, 101):
            marks.append(at := at + step / 1000)
    found = speed.speed(model, 2, 101, 3, batch=2, now=iter(marks).__next__)
    decode = sum(range(1, 101)) / 1000
    assert found.warmup_s == pytest.approx(10 + decode)
    assert [run.prefill_s for run in found.runs] == pytest.approx([1, 3, 2])
    assert found.prefill_s == pytest.approx(2) and found.decode_s == pytest.approx(decode)
    assert found.decode_tokens_per_s == pytest.approx(2 * 100 / decode)
    assert found.qwen_tokens_per_s == pytest.approx(3 * 2 * 101 / (6 + 3 * decode))
    # Over all runs: each of 1 to 100 ms thrice. Linear interpolation, as numpy has it.
    expected = numpy.percentile(sorted([*range(1, 101)] * 3), [50, 90, 99])
    inter = found.inter_token_ms()
    assert [inter["p50"], inter["p90"], inter["p99"]] == pytest.approx(list(expected), abs=1e-6)
    assert inter["p50"] == pytest.approx(50.5, abs=1e-6)
    assert inter["max"] == pytest.approx(100)
    shown = times(found, raw=True)
    assert shown["ttft_s"] == pytest.approx([2, 2])  # the median; from the fastest to the slowest
    assert shown["decode_range"] == pytest.approx([2 * 100 / decode] * 2)
    assert shown["runs"][0]["steps_ms"] == list(map(float, range(1, 101)))
    assert shown["runs"][0]["total_s"] == pytest.approx(1 + decode)


def test_the_share_of_the_bandwidth() -> None:
    """1000 bytes of weights and a cache of 10 bytes a token, 4 steps of 1 s, 5000 bytes/s."""
    found = Speed(7, 5, 2, (Run(3.0, (1.0, 1.0, 1.0, 1.0), 7.0),), cache_bytes=110)
    shown = traffic(found, 1000, 5000.0, whole=False)
    # Steps read a cache of 8, 9, 10 and 11 tokens.
    assert cache_read(110, 11, 7, 5, whole=False) == 95 == 10 * (8 + 9 + 10 + 11) / 4
    assert shown["bytes_per_token"] == (1000 + 95) / 2
    assert shown["bandwidth_share"] == pytest.approx((1000 + 95) / 1.0 / 5000)
    assert traffic(found, 1000, 5000.0, whole=True)["cache_bytes_per_token"] == 55
    nothing = traffic(Speed(7, 1, 1, (Run(3.0, (), 3.0),)), 1000, 5000.0, whole=False)
    assert nothing["bandwidth_share"] is None and nothing["bytes_per_token"] is None


@pytest.mark.alone
def test_copying_is_measured_here() -> None:
    """Between a slow disk and no memory that there is."""
    assert 1e8 < copy_bandwidth(torch.device("cpu"), repeats=1) < 1e13


@pytest.mark.alone
def test_twice_the_layers_is_about_half_the_speed() -> None:
    """Measured in turns; the fastest of each counts. A busy machine gets three tries."""
    models = [handmade.tiny_qwen2(hidden=512, ffn=1024, layers=n) for n in (4, 8)]
    ratios = []
    for _ in range(3):
        fastest = [float("inf")] * 2
        for _ in range(3):
            for i, model in enumerate(models):
                runs = speed.speed(model, 16, 17, 2).runs
                fastest[i] = min(fastest[i], *(run.decode_s for run in runs))
        ratios.append(fastest[0] / fastest[1])
        if 0.4 < ratios[-1] < 0.65:
            return
    pytest.fail(f"the speed of twice the layers came to {ratios} of the speed")


def test_qwens_protocol_is_theirs(tmp_path: Path) -> None:
    """The checkpoint's own sampling, their seed, the length forced past the end of a text."""
    path = write_checkpoint(tmp_path / "src", code=False)
    loaded = load(path, device="cpu", dtype="float32")
    model = loaded.model
    calls: list[dict[str, Any]] = []
    real = model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append({**kwargs, "seed": torch.initial_seed()})
        return real(*args, **kwargs)

    model.generate = spy
    head = model.lm_head.weight
    with torch.no_grad():  # an end of the text that is most likely everywhere
        head[model.generation_config.eos_token_id] += 10
    before = torch.get_rng_state()
    found, what = like_qwen(model, loaded.tokenizer, 1, 12)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls[0]["seed"] == QWEN_SEED == 1024
    assert calls[0]["min_new_tokens"] == calls[0]["max_new_tokens"] == 12
    assert model.generation_config.do_sample  # and nothing in the call says otherwise
    assert "do_sample" not in calls[0]
    (run,) = found.runs
    assert len(run.steps_s) == 11 and found.warmup_s is None
    assert run.total_s >= run.prefill_s + run.decode_s
    assert found.qwen_tokens_per_s == pytest.approx(12 / run.total_s)
    assert what == "我, repeated"
    del model.generate


def test_a_length_that_was_not_forced_is_an_error(model: Any, monkeypatch: Any) -> None:
    real = model.generate

    def short(prompt: Any, **kwargs: Any) -> Any:
        return real(prompt, **{**kwargs, "max_new_tokens": 3, "min_new_tokens": 3})

    monkeypatch.setattr(model, "generate", short)
    with pytest.raises(RunError, match="forced length: expected 4, got 3"):
        like_qwen(model, None, 1, 4)


def test_the_context_of_qwens_protocol(model: Any) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) % 320 for c in text]}

    ids, what = qwen_prompt(model, tokenizer, 5)
    assert ids.tolist() == [[ord("我") % 320] * 5] and what == "我, repeated"
    ids, what = qwen_prompt(model, lambda *_, **__: {"input_ids": [1]}, 5)
    assert ids.shape == (1, 5) and what == "random ids"
    assert qwen_prompt(model, None, 5)[1] == "random ids"


def test_greedy_tokens_are_those_of_transformers(model: Any) -> None:
    prompt = random_prompt(model, 2, 9)
    tokens = []
    real = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        tokens.append(kwargs["input_ids"])
        return real(*args, **kwargs)

    model.forward = spy
    generate(model, prompt, 6)
    model.forward = real
    whole = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat(tokens[1:], 1), whole[:, 9:14])


def test_compiled_decoding_is_compiled_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.compile's tracing and without its C++, which takes minutes on a busy machine."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setenv("CXX", sys.executable)  # any program will do
    model = tiny_model(num_hidden_layers=1)
    found = speed.speed(model, 5, 6, 1, cache="static", compiled=True)
    assert found.graphs == 1 and found.breaks == 0
    assert times(found, raw=False)["graphs"] == 1
    seen = []
    step = model._compiled_call

    def spy(**kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].item())
        return step(**kwargs)

    prompt = random_prompt(model, 1, 5)
    generate(model, prompt, 6, cache=caches.make_cache("static", model.config, 11), step=spy)
    plain = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert seen == plain[0, 5:10].tolist()


def test_without_a_compiler_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependencyError, match=r"--compile.*C\+\+ compiler"):
        Protocol.of(compiled=True).parts()
    with pytest.raises(MissingDependencyError, match="--compile"):
        SpeedPart("modern", 4, 4, 1, 1, "static", True).measure(None)  # type: ignore[arg-type]


def tensor_bytes(path: Path) -> dict[str, int]:
    """Of each tensor of a directory, by its header."""
    found: dict[str, int] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                found[name] = tensor.numel() * tensor.element_size()
    return found


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GPTQ directory in groups of 32 and its unquantized twin in float32."""
    root = tmp_path_factory.mktemp("bytes")
    return handmade.make_pair(handmade.tiny_qwen2(), root, blocks="model.layers", bias=False)


@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_of_an_unquantized_token(directories: tuple[Path, Path], rows: int) -> None:
    """Every tensor of the file, but of the embedding a row per sequence."""
    sizes = tensor_bytes(directories[1])
    sizes.pop("model.embed_tokens.weight")
    loaded = load(directories[1], device="cpu", dtype="float32")
    assert weights_read(loaded.model, rows) == sum(sizes.values()) + rows * 128 * 4
    half = load(directories[1], device="cpu", dtype="bfloat16")
    assert weights_read(half.model, rows) == (sum(sizes.values()) + rows * 128 * 4) / 2


@pytest.mark.parametrize("kernel", ["torch-int4", "dequantize", "dense"])
def test_bytes_of_a_gptq_token(directories: tuple[Path, Path], kernel: str) -> None:
    """By shape alone: what each kernel reads of a linear of K inputs and N outputs."""
    loaded = load(directories[0], device="cpu", kernel=kernel, dtype="float32")
    shapes, rest = [], 0
    for name, module in handmade.tiny_qwen2().named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.layers"):
            shapes.append((module.in_features, module.out_features))
            rest += 4 * module.out_features if module.bias is not None else 0
        elif (
            name != "model.embed_tokens" and (weight := getattr(module, "weight", None)) is not None
        ):
            rest += 4 * weight.numel()
    rest += 128 * 4  # a row of the embedding
    of_linear = {
        "torch-int4": lambda k, n: k * n // 2 + 2 * 2 * (k // 32) * n,  # bfloat16 scale and offset
        "dequantize": lambda k, n: k * n // 2 + (1 + 2) * (k // 32) * n,  # zeros in bytes, float16
        "dense": lambda k, n: 4 * k * n,
    }
    expected = sum(of_linear[kernel](k, n) for k, n in shapes) + rest
    assert weights_read(loaded.model) == expected
    if kernel == "torch-int4":  # beyond its rows, the other kernel runs
        many = loaded.kernel.few_tokens + 1
        total = sum(of_linear["dequantize"](k, n) for k, n in shapes) + rest
        assert weights_read(loaded.model, many) == total + (many - 1) * 128 * 4


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_bytes_of_a_bitsandbytes_token(
    directories: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """The tensors of a directory of that method, without its descriptions."""
    pytest.importorskip("bitsandbytes")
    quantize(directories[1], tmp_path / "out", BnbSpec(method), device="cpu")
    sizes = tensor_bytes(tmp_path / "out")
    read = sum(
        size
        for name, size in sizes.items()
        if name != "model.embed_tokens.weight"
        and "quant_state." not in name
        and not name.endswith("weight_format")
    )
    width = sizes["model.norm.weight"] // 128  # of what is not quantized, in the file
    stored = {2: torch.float16, 4: torch.float32}[width]
    loaded = load(tmp_path / "out", device="cpu", dtype=stored)
    assert weights_read(loaded.model) == read + 128 * width


def test_slow_kernels_are_called_out(directories: tuple[Path, Path]) -> None:
    cpu = torch.device("cpu")
    fast = KernelReport("auto", cpu, torch.float32, {"a": "torch-int4", "b": "torch-int4"})
    assert slow_kernel(fast) is None
    assert slow_kernel(KernelReport("auto", cpu, torch.float32)) is None
    assert "dequantize for 2 linears: torch-int4 runs up to 32 rows, 33" in str(
        slow_kernel(fast, 33)
    )
    exact = load(directories[0], device="cpu", dtype="float32").kernel
    why = slow_kernel(exact)
    assert why is not None and "dequantize for 14 linears" in why and "float32 was asked" in why
    named = load(directories[0], device="cpu", kernel="dequantize").kernel
    assert "asked for by name" in str(slow_kernel(named))
    half = KernelReport("auto", cpu, torch.float16)
    assert slow_kernel(half) == "float16 products are emulated on a CPU"


def test_slow_kernels_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    cpu = torch.device("cpu")
    nf4 = KernelReport("auto", cpu, torch.float32, {"a": "bitsandbytes nf4"})
    int8 = KernelReport("auto", cpu, torch.float32, {"a": "bitsandbytes int8"})
    for has in (True, False):
        monkeypatch.setattr(functional, "has_avx512bf16", lambda has=has: has)
        name = "AVX512" if has else "AVX2"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        assert (slow_kernel(nf4) is None) is has
        assert (slow_kernel(int8) is None) is has
    gpu = KernelReport("auto", torch.device("cuda"), torch.float16, {"a": "bitsandbytes nf4"})
    assert slow_kernel(gpu) is None


def test_settings_have_names_of_their_own() -> None:
    cache = handmade.quantized_cache()
    options = SpeedOptions(
        speed=("modern", "qwen"), contexts=(8, 16), batches=(1, 2), kv_caches=(cache,)
    )
    names = [part.label for part in options.parts()]
    modern = [
        f"speed modern-b{b}-c{c}-n128{kind}"
        for kind, b, c in itertools.product(("", f"-kv-{cache}"), (1, 2), (8, 16))
    ]
    assert names == [*modern, "speed qwen-1-2048", "speed qwen-1-8192", "speed qwen-2048-1"]
    assert Protocol.of(speed=("none",), memory=("none",)).parts()[0].place == ("load",)
    for named, wrong in (
        ("speed", {"speed": ("none", "qwen")}),
        ("speed", {"speed": ("fast",)}),
        ("--context", {"contexts": ()}),
    ):
        with pytest.raises(InputError, match=named):
            Protocol.of(**wrong)


def test_a_missing_package_is_named_before_anything_runs(monkeypatch: Any) -> None:
    monkeypatch.setattr(caches.importlib.util, "find_spec", lambda name: None)
    for kind in ("int8", "int4"):
        with pytest.raises(MissingDependencyError, match=r"qquant\[kv\]"):
            Protocol.of(kv_caches=(kind,)).parts()


def test_texts_past_the_positions_of_the_model_are_noted() -> None:
    assert notes(handmade.tiny_qwen2().config, 256) == []
    (note,) = notes(handmade.tiny_qwen2().config, 257)
    assert "257 tokens are more than the 256" in note
    assert "more than the 32 " in notes(tiny_model().config, 33)[0]  # original Qwen's seq_length


def test_counts_are_checked(model: Any) -> None:
    for wrong in ({"context": 0}, {"new_tokens": 0}, {"repeats": 0}, {"batch": 0}):
        with pytest.raises(SpecError, match=next(iter(wrong))):
            speed.speed(model, **{"context": 4, "new_tokens": 2, "repeats": 1, **wrong})
    with pytest.raises(SpecError, match="static"):
        speed.speed(model, 4, 2, 1, compiled=True)
