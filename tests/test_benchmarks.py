"""The benchmark's own parts: its readers of the formats, its conversion, its arithmetic.

What is compared with qquant is read by code that shares nothing with it, so that code is held here
against definitions and against transformers, not against the tools it judges.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bit stream spelled out: codes [count, N] to int32 words [ceil(count·bits/32), N]."""
    columns = []
    for column in codes.T.tolist():
        stream = sum(code << (i * bits) for i, code in enumerate(column))
        count = -(-len(column) * bits // 32)
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
        columns.append([w - (1 << 32) if w >> 31 else w for w in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 96])
def test_unpack_reads_the_bit_stream(bits: int, count: int) -> None:
    from evaluate import unpack

    codes = torch.randint(0, 2**bits, (count, 5), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(words_of(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_gptq_linear_is_scale_times_code_minus_zero(bits: int, zero_offset: int) -> None:
    from evaluate import dequantize_gptq

    g = torch.Generator().manual_seed(bits)
    size, out, groups = 64, 32, 2
    codes = torch.randint(0, 2**bits, (size, out), generator=g)
    zeros = torch.randint(0, 2**bits, (groups, out), generator=g)
    scales = torch.rand((groups, out), generator=g).half()
    order = torch.randperm(size, generator=g) % groups
    stored = (zeros - zero_offset) % 2**bits
    part = {
        "qweight": words_of(codes, bits),
        "qzeros": words_of(stored.T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": order.int(),
    }
    found = dequantize_gptq(part, bits, zero_offset=zero_offset)
    for k, n in [(0, 0), (1, 31), (40, 7), (63, 30)]:
        group = int(order[k])
        expected = float(scales[group, n]) * int(codes[k, n] - zeros[group, n])
        assert found[n, k] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_compressed_linear_is_scale_times_signed_code(bits: int) -> None:
    from evaluate import dequantize_compressed

    g = torch.Generator().manual_seed(bits)
    signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 64), generator=g)
    scale = torch.rand((8, 2), generator=g)
    part = {
        "weight_packed": words_of((signed + 2 ** (bits - 1)).T, bits).T.contiguous(),
        "weight_scale": scale,
        "weight_shape": torch.tensor([8, 64]),
    }
    expected = signed.float() * scale.repeat_interleave(32, dim=1)
    assert torch.equal(dequantize_compressed(part, bits), expected)
    with pytest.raises(ValueError, match="weight_g_idx"):
        dequantize_compressed({**part, "weight_g_idx": torch.arange(64)}, bits)


def test_converted_checkpoint_is_the_same_network(tmp_path: Path) -> None:
    from checkpoints import Shape, to_qwen2, write_random
    from evaluate import build
    from transformers import AutoModelForCausalLM

    from qquant.models.qwen.configuration_qwen import QWenConfig
    from qquant.models.qwen.modeling_qwen import QWenLMHeadModel

    shape = Shape(blocks=2, hidden=64, ffn=96, heads=2, vocab=80, rope_theta=5000.0)
    original = write_random(shape, tmp_path / "original", layout="qwen")
    converted = to_qwen2(original, tmp_path / "converted")
    direct = write_random(shape, tmp_path / "direct")
    for file in direct.glob("*.safetensors"):
        assert file.read_bytes() == (converted / file.name).read_bytes()

    ids = torch.randint(0, 80, (2, 40), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    config = QWenConfig.from_pretrained(original)
    config.bf16, config.fp32 = False, True
    ours = QWenLMHeadModel.from_pretrained(original, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = loaded(ids).logits
        assert torch.allclose(build(converted)(ids).logits, expected, atol=1e-5)
        assert torch.allclose(build(original)(ids).logits, expected, atol=1e-5)
        assert torch.allclose(ours(ids).logits, expected, atol=1e-4)


def test_scores_of_the_source_itself_and_of_damage(tmp_path: Path) -> None:
    from checkpoints import PRESETS, write_random
    from evaluate import evaluate
    from safetensors.torch import load_file, save_file

    source = write_random(PRESETS["small"], tmp_path / "source")
    damaged = write_random(PRESETS["small"], tmp_path / "damaged")
    head = next(f for f in damaged.glob("*.safetensors") if "lm_head.weight" in load_file(f))
    part = load_file(head)
    save_file({**part, "lm_head.weight": part["lm_head.weight"] * 0.5}, head, {"format": "pt"})
    tokens = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(0))
    scores = evaluate(source, {"same": source, "damaged": damaged}, tokens)
    assert scores["same"].kl == 0 and scores["same"].top1 == 1
    assert scores["same"].ppl == pytest.approx(scores["same"].ppl_source)
    # Halving the head halves the logits: the order stays, the distribution does not.
    assert scores["damaged"].top1 == 1 and scores["damaged"].kl > 1e-3


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    from checkpoints import PRESETS, write_random
    from evaluate import build

    path = write_random(PRESETS["small"], tmp_path / "source")
    sorted(path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"):
        build(path)


def test_candidate_and_ratio() -> None:
    from quantize import Candidate, public
    from report_table import paired_ratio

    parsed = Candidate.parse("gptqmodel:mse=2.4,desc_act=true")
    assert parsed.tool == "gptqmodel" and parsed.options == {"mse": 2.4, "desc_act": True}
    assert "/" not in parsed.folder and ":" not in parsed.folder
    with pytest.raises(ValueError, match="no worker"):
        Candidate.parse("nothing")
    ratio, low, high = paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert ratio == low == high == 0.5
    assert public("--python-x=/a/b/python") == "--python-x=python"


def test_child_cost_is_measured_from_outside(tmp_path: Path) -> None:
    # From a slim process, as the benchmark is: a child's ru_maxrss starts at its parent's.
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import dataclasses, json, pathlib
import quantize
from machine import run_measured
assert "torch" not in sys.modules, "the measuring process must stay small"
code = "x = bytearray(200 << 20); import time; time.sleep(0.4); raise SystemExit(3)"
cost = run_measured(
    [sys.executable, "-c", code], cwd=pathlib.Path("."), env={{}}, log=pathlib.Path("log")
)
print(json.dumps(dataclasses.asdict(cost)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    cost = json.loads(done.stdout)
    assert cost["code"] == 3 and cost["wall_s"] >= 0.4
    assert 200 < cost["max_rss_kib"] / 1024 < 240
    assert 200 < cost["tree_anon_kib"] / 1024 < 240


def test_what_others_do_meanwhile_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import machine

    before, end = machine._busy_seconds(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert machine._busy_seconds() - before > 0.25

    # The machine did five seconds' work, this process and the child their part of it.
    monkeypatch.setattr(machine, "_busy_seconds", iter([100.0, 105.0]).__next__)
    own = time.process_time()
    code = "import time\nwhile time.process_time() < 0.5: pass"
    cost = machine.run_measured(
        [sys.executable, "-c", code], cwd=tmp_path, env={}, log=tmp_path / "log"
    )
    own = time.process_time() - own
    assert cost.cpu_s > 0.5
    assert cost.others_cores * cost.wall_s == pytest.approx(5 - cost.cpu_s - own, abs=0.1)


def test_table_names_no_directory() -> None:
    from report_table import markdown

    run = {
        "wall_s": 2.0,
        "work_s": 1.0,
        "cpu_s": 2.0,
        "max_rss_kib": 2048,
        "tree_anon_kib": 1024,
        "load_before": 0.1,
        "seconds": {"quantize": 1.0},
        "versions": {"torch": "2"},
        "settings": {"damp": 0.1},
    }
    score = {"kl": 1.0, "kl_se": 0.1, "top1": 1.0, "ppl": 2.0, "ppl_source": 2.0, "tokens": 4}
    rows = [
        {"candidate": name, "bits": 4, "runs": [run], "score": {**score, "kl_per_sequence": kls}}
        for name, kls in (("qquant", [0.5, 0.5]), ("gptqmodel", [1.0, 1.0]))
    ]
    config = dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"), 1
    )
    machine = {"cpu": "c", "cores": 2, "flags": [], "memory_gib": 1}
    calibration = {"samples": 1, "seqlen": 1}
    result = {
        "checkpoint": "x",
        "config": config,
        "machine": machine,
        "calibration": calibration,
        "group_size": 128,
        "threads": 2,
        "date": "2026-01-01",
        "commands": ["c"],
        "rows": rows,
    }
    text = markdown(json.loads(json.dumps(result)))
    row = next(line for line in text.splitlines() if line.startswith("| `qquant`"))
    assert "0.500 (0.500 to 0.500)" in row


def test_only_a_bias_of_zeros_is_left_out() -> None:
    from checkpoints import rename

    name = "transformer.h.0.attn.c_proj.bias"
    assert not list(rename(name, torch.zeros(4)))
    with pytest.raises(ValueError, match="not zero"):
        list(rename(name, torch.tensor([0.0, 1.0])))
    assert len(list(rename("transformer.h.0.attn.c_attn.bias", torch.ones(6)))) == 3
    with pytest.raises(KeyError):
        list(rename("transformer.h.0.attn.other.bias", torch.zeros(4)))


def test_rates_are_shares_of_the_product_of_the_same_run() -> None:
    import breakdown

    def run(seconds: float, gflops: float, matmul: float) -> dict[str, Any]:
        return {"seconds": {"forward": seconds}, "gflops": {"forward": gflops}, "matmul": matmul}

    found = breakdown.medians([run(9, 50, 100), run(5, 90, 120), run(6, 60, 110)])
    assert found["seconds"] == {"forward": 6} and found["gflops"] == {"forward": 60}
    assert found["of_matmul"]["forward"] == pytest.approx(60 / 110)
    text = breakdown.markdown(
        {
            "machine": {"cpu": "any", "cores": 2},
            "date": "2026-01-01",
            "threads": 2,
            "repeats": 3,
            "dtype": "bfloat16",
            "recipes": {"fast": {"medians": found}},
        }
    )
    assert "| forward | 6.0 (60, 55%) |" in text and "2 threads, bfloat16" in text
    assert "Forward counts the operations of linears and causal attention only." in text


def test_results_of_memory_say_what_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import memory

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(memory, "HERE", tmp_path)
    monkeypatch.setattr(memory, "checkpoint", lambda folder, *_: folder)
    monkeypatch.setattr(memory, "quantize", lambda *_: {"exit_code": 0})
    monkeypatch.setattr(memory, "revision", lambda: {"qquant": "0123abcdef"})
    words = ["limit", "--work", str(tmp_path / "w"), "--recipe", "qwen", "--samples", "16"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *words])
    memory.main()
    found = json.loads((tmp_path / "results" / "memory-limit.json").read_text())
    assert found["command"] == "python benchmarks/memory.py limit --recipe qwen --samples 16"
    assert found["revision"] == {"qquant": "0123abcdef"} and found["rows"] == [{"exit_code": 0}]


def test_a_line_is_told_from_a_curve() -> None:
    import linearity

    straight = linearity.fitted([1, 2, 4, 8], [3.0, 5.0, 9.0, 17.0])
    assert straight["seconds_per_unit"] == pytest.approx(2)
    assert straight["seconds_at_zero"] == pytest.approx(1)
    assert straight["furthest"] == pytest.approx(0, abs=1e-9)
    square = linearity.fitted([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0])
    assert square["log_slope"] == pytest.approx(2)
    assert square["furthest"] > linearity.WITHIN and square["log_slope"] > linearity.STEEPEST
