"""Every Qwen that transformers knows is supported or refused with a reason; shapes of all releases.

Random weights in the proportions of the real models, small: quantized, verified, loaded by
transformers' own class with the dequantized weights, and run beside `qquant.load`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_tiny import tiny_model, write_checkpoint
from safetensors.torch import load_file
from test_convert import native_checkpoint, plain_weights
from test_experts import tiny

from qquant import QuantSpec, quantize
from qquant.checkpoint import Checkpoint
from qquant.errors import CheckpointError
from qquant.models.families import FAMILIES, family_of, refusal
from qquant.models.skeleton import Skeleton
from qquant.runtime import load
from qquant.verify import verify

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
SPEC = QuantSpec(group_size=32)


def test_no_qwen_of_transformers_is_forgotten() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = [name for name in CONFIG_MAPPING_NAMES if "qwen" in name]
    assert {"qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next"} <= set(known)
    for name in known:
        if name in FAMILIES:
            assert family_of({"model_type": name}).model_type == name
            continue
        reason = refusal(name)
        assert reason, f"{name} is neither supported nor refused with a reason"
        with pytest.raises(CheckpointError) as raised:
            family_of({"model_type": name})
        assert reason in str(raised.value) and repr(name) in str(raised.value)


def test_what_is_no_qwen_has_no_reason_made_up() -> None:
    assert refusal("llama") is None
    with pytest.raises(CheckpointError, match=r"got 'llama'\."):
        family_of({"model_type": "llama"})


def test_names_of_a_family_are_found_in_order() -> None:
    parts = ("gate", "up", "down")
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (0, 10) for e in (0, 2, 10)
             for p in parts]  # fmt: skip
    shuffled = [f"{n}.weight" for n in reversed(names)]
    more = ["model.layers.0.mlp.gate.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"]
    more += ["model.layers.0.mlp.experts.0.up_proj.bias", "lm_head.weight"]
    family = FAMILIES["qwen3_moe"]
    assert family.linear_names(shuffled + more) == names
    assert set(family.by_block(shuffled)) == {0, 10}
    assert family.kind_of("mlp.experts.10.up_proj") == "mlp.experts.*.up_proj"
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        family.first_linear(more)


def whole_way(src: Path, dst: Path, spec: QuantSpec = SPEC, trust: bool = False) -> Any:
    """Quantizes, verifies, loads and generates; the loaded model."""
    result = quantize(src, dst, spec, tokens=TOKENS, device="cpu")
    report = verify(dst, against=src)
    assert (report.problems, report.warnings) == ([], [])
    assert len(report.layers) == len(result.layers)
    checkpoint = Checkpoint.open(src)
    skeleton = Skeleton(
        checkpoint, family_of(checkpoint.config), torch.device("cpu"), torch.float32
    )
    assert len(result.layers) == sum(map(len, skeleton.linears))
    loaded = load(dst, device="cpu", dtype="float32").model
    reference = load(src, device="cpu", dtype="float32").model  # transformers' class, or ours
    with torch.no_grad():
        ids = TOKENS[:2]
        before = reference(ids).logits
        weights = plain_weights(dst)
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights[name])
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, atol=2e-4, rtol=1e-3)
        assert not torch.allclose(loaded(ids).logits, before, atol=1e-3), "it is quantized"
        made = loaded.generate(ids[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (2, 9)
    return loaded


# Widths and settings of the releases, an eighth or less of them: heads of 16 for heads of 128, the
# inner width in the same proportion (5504/2048, 11008/4096, 13696/5120, 24576/8192).
ORIGINAL = {
    "1.8B": {"num_attention_heads": 4, "intermediate_size": 320, "seq_length": 128},
    "7B": {"num_attention_heads": 6, "intermediate_size": 512, "seq_length": 32},
    "14B": {"num_attention_heads": 8, "intermediate_size": 704, "vocab_size": 544},
    "72B": {
        "num_attention_heads": 6,
        "intermediate_size": 576,
        "vocab_size": 544,
        "rotary_emb_base": 1_000_000,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "seq_length": 512,
    },
}


@pytest.mark.parametrize("size", ORIGINAL)
def test_original_qwen(size: str, tmp_path: Path) -> None:
    changes = {"kv_channels": 16, "initializer_range": 0.1} | ORIGINAL[size]
    changes["hidden_size"] = 16 * changes["num_attention_heads"]
    src = write_checkpoint(tmp_path / "src")
    for file in src.glob("*.safetensors"):
        file.unlink()
    model = tiny_model(**changes)
    model.save_pretrained(src)
    loaded = whole_way(src, tmp_path / "dst")
    assert loaded.config.vocab_size == changes.get("vocab_size", 512)
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    inner = changes["intermediate_size"] // 2
    assert stored["transformer.h.1.mlp.w1.scales"].shape == (changes["hidden_size"] // 32, inner)


NATIVE = {
    "qwen1.5 (all heads their own)": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-0.5b (tied, two key heads)": (
        "qwen2",
        {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 96},
    ),
    "qwen2.5-7b (untied, few key heads)": (
        "qwen2",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128},
    ),
    "qwen3-0.6b (tied, heads wider than hidden)": (
        "qwen3",
        {"tie_word_embeddings": True, "head_dim": 32},
    ),
    "qwen3-32b (untied)": ("qwen3", {"num_attention_heads": 8, "head_dim": 16}),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native(name: str, tmp_path: Path) -> None:
    kind, changes = NATIVE[name]
    src = native_checkpoint(tmp_path / "src", kind, **changes)
    stored_before = set(load_file(src / "model.safetensors"))
    assert ("lm_head.weight" in stored_before) != changes.get("tie_word_embeddings", False)
    assert any("q_norm" in n for n in stored_before) == (kind == "qwen3")
    assert any(n.endswith("q_proj.bias") for n in stored_before) == (kind == "qwen2")
    whole_way(src, tmp_path / "dst")
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    kept = {n for n in stored_before if not n.endswith("_proj.weight")}
    assert kept <= set(stored)


HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_linear_attention(kind: str, tmp_path: Path) -> None:
    """One block of four with full attention. Small projections and the convolution stay plain."""
    src = tmp_path / "src"
    tiny(kind, **HYBRID).to(torch.bfloat16).save_pretrained(src)
    # Random deltas are chaotic: two streams drift apart until a correction makes no sense.
    whole_way(src, tmp_path / "dst", QuantSpec(group_size=32, correct=0.0, correct_residual=0.0))
    stored = set(load_file(tmp_path / "dst" / "model.safetensors"))
    mixed = "in_proj_qkvz" if kind == "qwen3_next" else "in_proj_qkv"
    plain = ["conv1d.weight", "A_log", "dt_bias", "norm.weight"]
    plain += ["in_proj_ba.weight"] if kind == "qwen3_next" else ["in_proj_a.weight"]
    for block in range(3):
        stem = f"model.layers.{block}.linear_attn"
        assert {f"{stem}.{mixed}.qweight", f"{stem}.out_proj.qweight"} <= stored
        assert {f"{stem}.{name}" for name in plain} <= stored
    assert "model.layers.3.self_attn.q_proj.qweight" in stored
    assert ("model.layers.2.mlp.experts.5.up_proj.qweight" in stored) == (kind != "qwen3_5_text")
    assert "model.layers.3.mlp.gate.weight" in stored or kind == "qwen3_5_text"
    card = (tmp_path / "dst" / "README.md").read_text()
    assert ("Not with transformers" in card) == (kind == "qwen3_5_moe_text")
    quantized = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    (ends,) = quantized["modules_in_block_to_quantize"]
    plain = {n.removesuffix(".weight") for n in stored if n.endswith(".weight")}
    packed = {n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")}
    assert all(any(n.endswith(end) for end in ends) for n in packed)
    assert not any(end in name for name in plain for end in ends)  # vLLM: in, transformers: at end


def test_bitsandbytes_directories_of_linear_attention_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra qquant[bnb]")
    from qquant.bnb_convert import quantize_bnb

    tiny("qwen3_5_text", **HYBRID).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"qwen3_5_text.*linear attention has not been tried"):
        quantize_bnb(tmp_path / "src", tmp_path / "dst", device="cpu")
