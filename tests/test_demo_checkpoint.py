"""The bundled demo checkpoint is what its card says, and its training repeats itself."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
MODEL = DEMO / "qwen-demo"
GOLDEN = ROOT / "tests" / "golden"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    """The training scripts import each other by name, as `python scripts/train_demo.py` does."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(json.loads((MODEL / "config.json").read_text()))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(MODEL / "model.safetensors")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return dict(json.loads((DEMO / "measured.json").read_text()))


@pytest.fixture(scope="module")
def held_out_ids() -> list[int]:
    from demo_bpe import encoding, read_ranks

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    return encoding(read_ranks(MODEL / "qwen.tiktoken")).encode_ordinary(text)


def test_the_bundle_is_complete_and_small() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names == {
        "LICENSE",
        "NOTICE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer_config.json",
    }
    sizes = [path.stat().st_size for path in DEMO.rglob("*") if path.is_file()]
    assert sum(sizes) <= 12 * MEGABYTE
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / "LICENSE").read_text()


def test_config_has_the_original_keys_and_sizes_that_quantize(config: dict[str, Any]) -> None:
    golden = json.loads((GOLDEN / "qwen1-tiny" / "config.json").read_text())
    assert set(config) == set(golden)
    assert config["auto_map"] == golden["auto_map"]
    assert (config["bf16"], config["fp16"], config["fp32"]) == (True, False, False)
    assert config["num_hidden_layers"] >= 4
    assert config["hidden_size"] % 128 == 0
    assert config["intermediate_size"] // 2 % 128 == 0
    assert config["vocab_size"] % 128 == 0
    assert config["kv_channels"] * config["num_attention_heads"] == config["hidden_size"]


def test_tensors_are_the_original_layout(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    rows, hidden = config["vocab_size"], config["hidden_size"]
    ffn = config["intermediate_size"] // 2
    expected = {"transformer.wte.weight": (rows, hidden), "lm_head.weight": (rows, hidden)}
    expected["transformer.ln_f.weight"] = (hidden,)
    for i in range(config["num_hidden_layers"]):
        block = {
            "ln_1.weight": (hidden,),
            "attn.c_attn.weight": (3 * hidden, hidden),
            "attn.c_attn.bias": (3 * hidden,),
            "attn.c_proj.weight": (hidden, hidden),
            "ln_2.weight": (hidden,),
            "mlp.w1.weight": (ffn, hidden),
            "mlp.w2.weight": (ffn, hidden),
            "mlp.c_proj.weight": (hidden, ffn),
        }
        expected |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert not torch.equal(tensors["transformer.wte.weight"], tensors["lm_head.weight"])


def test_ranks_file_is_a_byte_level_bpe_in_merge_order(config: dict[str, Any]) -> None:
    from demo_bpe import SPECIALS, encoding, read_ranks

    ranks = read_ranks(MODEL / "qwen.tiktoken")
    assert list(ranks.values()) == list(range(len(ranks)))
    assert list(ranks)[:256] == [bytes([value]) for value in range(256)]
    for token, rank in list(ranks.items())[256:]:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        assert any(max(ranks.get(a, rank), ranks.get(b, rank)) < rank for a, b in cuts), token
    assert len(ranks) + len(SPECIALS) <= config["vocab_size"]
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8") + "\r\n\t你好 é 0123 '\u200b\x00"
    tokens = encoding(ranks)
    assert tokens.decode(tokens.encode_ordinary(text)) == text


def test_qquant_reads_the_tokenizer_with_the_same_ids(held_out_ids: list[int]) -> None:
    from transformers import AutoTokenizer

    import qquant

    qquant.register()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    assert tokenizer.encode(text) == held_out_ids
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == tokenizer.eod_id
    assert [tokenizer.im_start_id, tokenizer.im_end_id] == [
        tokenizer.eod_id + 1,
        tokenizer.eod_id + 2,
    ]


def test_tiktoken_merges_as_the_trained_tokenizer_does() -> None:
    from demo_bpe import encoding, to_ranks, train_bpe

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    half = len(text) // 2
    trained = train_bpe([text[:half]], 1000)
    again = train_bpe([text[:half]], 1000)
    ranks = to_ranks(trained)
    assert to_ranks(again) == ranks
    order = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    merged = [token for token in order if len(token) > 1]
    theirs = trained.encode(text[half:])
    ours = encoding(ranks).encode_ordinary(text[half:])
    place = {token: 256 + i for i, token in enumerate(merged)}
    assert len(theirs.tokens) == len(ours)
    long = [(place[a], b) for a, b in zip(theirs.tokens, ours, strict=True) if len(a) > 1]
    assert len(long) > 10_000
    assert all(a == b for a, b in long)


def test_held_out_files_are_not_trained_on(measured: dict[str, Any]) -> None:
    from demo_corpus import HELD_OUT_MODULES, read_corpus

    try:
        corpus = read_corpus()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    trained = {name for name, _ in corpus.train}
    assert len(trained) > 400
    assert not trained & ({name for name, _ in corpus.held_out} | set(HELD_OUT_MODULES))
    modules = {f" {name[:-3].replace('/', '.')}" for name in HELD_OUT_MODULES}
    questions = [question for turns in corpus.chats for question, _ in turns]
    assert not [q for q in questions if q.rstrip("?.").endswith(tuple(modules))]
    if platform.python_version() != measured["python"]:
        pytest.skip(f"the rest needs the library of Python {measured['python']}")
    assert corpus.held_out_text() == (DEMO / "heldout.txt").read_text(encoding="utf-8")


def test_training_repeats_itself_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps in a process apart (another hash seed) and here, with a break after two."""
    script = [str(ROOT / "scripts" / "train_demo.py"), "--tiny", "--work"]
    done = subprocess.run(
        [sys.executable, *script, str(tmp_path / "once")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    once = json.loads(done.stdout.splitlines()[-1])

    import train_demo

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for steps in ("2", "3"):
            arguments = [*script, str(tmp_path / "twice"), "--steps", steps]
            monkeypatch.setattr(sys, "argv", arguments)
            train_demo.main()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    first, twice = map(json.loads, capsys.readouterr().out.splitlines())

    assert (first["steps"], twice["steps"]) == (2, 3)
    del once["seconds"], twice["seconds"]
    assert once == twice
    states = [load_file(tmp_path / work / "state.safetensors") for work in ("once", "twice")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert once["losses"] == sorted(once["losses"], reverse=True)


def test_damage_shows(
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    measured: dict[str, Any],
    held_out_ids: list[int],
) -> None:
    """qquant's network on the bundle: a loss as on the card, and 3-bit rounding moves it by 5%."""
    from demo_measure import held_out_loss, rounded_blocks
    from transformers import AutoModelForCausalLM

    import qquant

    assert len(held_out_ids) == measured["heldout_tokens"]
    full, rough = measured["bf16"]["perplexity"], measured["rtn3_g128"]["perplexity"]
    assert full < PERPLEXITY
    assert rough > 1.05 * full

    qquant.register()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    length, windows = config["seq_length"], 24
    part = held_out_loss(model, held_out_ids, length, windows)
    model.load_state_dict({name: value.float() for name, value in rounded_blocks(tensors).items()})
    worse = held_out_loss(model, held_out_ids, length, windows)
    assert part.perplexity < PERPLEXITY
    assert worse.perplexity > 1.05 * part.perplexity


PERPLEXITY = 40.0
"""Held-out perplexity the bundle must stay under, on the whole text and on its first windows."""


def test_the_trained_network_is_qquants_network(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], held_out_ids: list[int]
) -> None:
    from demo_net import DemoNet, Shape
    from transformers import AutoModelForCausalLM

    import qquant

    qquant.register()
    net = DemoNet(Shape(ranks=2816, rows=config["vocab_size"]))
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.tensor(held_out_ids[:1024]).view(2, 512)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, net(ids), atol=1e-4, rtol=1e-4)


def test_a_chat_turn_ends_by_itself() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qquant

    qquant.register()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    response, history = model.chat(
        tokenizer, "Hi", history=None, do_sample=False, top_p=None, top_k=None, max_new_tokens=60
    )
    assert history == [("Hi", response)]
    assert response.strip()
    assert len(tokenizer.encode(response)) < 40
