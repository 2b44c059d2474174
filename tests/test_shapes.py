"""Headers tell a model's shapes, and whether config.json is of the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import TOKENS, make
from test_mixtures import source as mixture

from qquant import QuantSpec, quantize
from qquant.blocks import hold_dtype_of
from qquant.checkpoint import Checkpoint
from qquant.errors import CheckpointError
from qquant.estimate import dry_run
from qquant.models.families import family_of
from qquant.models.shapes import Shapes, check_shapes
from qquant.models.skeleton import Skeleton

SPEC = QuantSpec(group_size=32)
DENSE = ("qwen", "qwen2", "qwen3")


def checkpoint(kind: str, path: Path) -> Path:
    return make(kind, path) if kind in DENSE else mixture(path, kind)


@pytest.mark.parametrize(
    "kind",
    [*DENSE, "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"],
)
def test_they_are_the_models(kind: str, tmp_path: Path) -> None:
    source = Checkpoint.open(checkpoint(kind, tmp_path / "src"))
    family = family_of(source.config)
    check_shapes(source, family)
    shapes = Shapes.of(source, family)
    skeleton = Skeleton(source, family, torch.device("cpu"), torch.float32)
    config = skeleton.config
    assert shapes.blocks == len(skeleton.blocks) and shapes.hidden == config.hidden_size
    assert shapes.weights == max(sum(p.numel() for p in b.parameters()) for b in skeleton.blocks)
    assert shapes.stored == skeleton.stored_dtype
    held = hold_dtype_of(skeleton)
    assert held == (torch.bfloat16 if shapes.stored == "BF16" else None)
    share = config.num_experts_per_tok / config.num_experts if family.experts else 1.0
    assert shapes.expert_share == share
    assert shapes.shared_expert == any("shared" in n for names in skeleton.linears for n in names)
    linears = [skeleton.model.get_submodule(n) for n in family.linear_names(source.tensors)]
    assert sum(g.times * g.rows * g.inputs for g in shapes.groups) == sum(
        m.weight.numel() for m in linears
    )
    heads = [
        m.in_features
        for name, m in skeleton.model.named_modules()
        if name.endswith(("self_attn.o_proj", "attn.c_proj"))
    ]
    assert shapes.attended == sum(heads)


def refused(src: Path, match: str) -> None:
    """By the dry run, and by the run."""
    for act in (
        lambda: dry_run(src, SPEC, device="cpu", compute_dtype="float32"),
        lambda: quantize(src, src.parent / "dst", SPEC, tokens=TOKENS, device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=match):
            act()
    assert not (src.parent / "dst").exists()


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        ("qwen2", {"hidden_size": 128}, r"hidden_size: expected 64, as the weights have, got 128"),
        ("qwen2", {"hidden_size": "64"}, r"hidden_size: expected a positive integer, got \W*64"),
        ("qwen2", {"hidden_size": -64}, "hidden_size: expected a positive integer, got -64"),
        ("qwen2", {"vocab_size": 10**12}, "vocab_size: expected 256"),
        ("qwen2", {"intermediate_size": 97}, "intermediate_size: expected 96"),
        ("qwen2", {"num_attention_heads": 3}, "num_attention_heads: .*64 wide together"),
        ("qwen2", {"num_attention_heads": True}, "num_attention_heads: expected a positive"),
        ("qwen2", {"num_key_value_heads": 4}, "num_key_value_heads: expected 2"),
        ("qwen3", {"head_dim": 8}, "num_attention_heads: .*got 4 of 8"),
        ("qwen", {"intermediate_size": 2}, "intermediate_size: expected"),
        ("qwen", {"vocab_size": 7}, "vocab_size: expected"),
        ("qwen3_moe", {"moe_intermediate_size": 31}, "moe_intermediate_size: expected"),
        ("qwen3_moe", {"num_experts_per_tok": "two"}, "num_experts_per_tok: expected a positive"),
    ],
)
def test_a_config_of_another_model(
    kind: str, values: dict[str, Any], match: str, tmp_path: Path
) -> None:
    src = checkpoint(kind, tmp_path / "src")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | values))
    refused(src, match)


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def reshaped(name: str, *shape: int) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(*shape, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("model.norm.weight"), r"model\.norm\.weight: expected a tensor of this name"),
        (without("lm_head.weight"), "lm_head.weight: expected a tensor of this name"),
        (without("model.layers.1.input_layernorm.weight"), "1.input_layernorm.weight: .*none in"),
        (without("model.layers.0.self_attn.q_proj.bias"), "0.self_attn.q_proj.bias: .*none in"),
        (without("model.layers.1.mlp.up_proj.weight"), "1.mlp.up_proj.weight: .*none in the check"),
        (reshaped("model.layers.1.mlp.up_proj.weight", 64, 64), r"shape \(96, 64\).*64, 64"),
        (reshaped("model.layers.1.self_attn.k_proj.weight", 96, 64), "from other blocks"),
        (reshaped("model.embed_tokens.weight", 256), "embed_tokens.weight: expected shape"),
        (reshaped("model.embed_tokens.weight", 256, 96), "expected shape .*, 96"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Any]], Any], match: str, tmp_path: Path
) -> None:
    src = make("qwen2", tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    change(tensors)
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    refused(src, match)


def test_linears_that_no_block_has(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "o_proj" not in name}
    save_file(kept, src / "model.safetensors", {"format": "pt"})
    refused(src, r"self_attn\.o_proj\.weight: expected a tensor of this name, got none")
