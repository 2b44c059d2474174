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
from qquant.models.declared import number, tensors_of
from qquant.models.families import Family, family_of
from qquant.models.shapes import Shapes, check_shapes, parameters
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
        ("qwen3_moe", {"num_local_experts": 6.0}, r"num_local_experts: .*integer, got \W*6\.0"),
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
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.bfloat16)})


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
        (
            reshaped("model.embed_tokens.weight", 256),
            "embed_tokens.weight: expected two dimensions",
        ),
        (reshaped("model.embed_tokens.weight"), "embed_tokens.weight: expected two dimensions"),
        (reshaped("model.embed_tokens.weight", 256, 96), r"embed.*shape \(256, 64\).*256, 96"),
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


KINDS = (*DENSE, "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def changed(
    kind: str,
    path: Path,
    values: dict[str, Any],
    change: Callable[[dict[str, Any]], Any] | None = None,
) -> tuple[Checkpoint, Family]:
    """A checkpoint with other values in config.json (`GONE`: the key is not there) and tensors."""
    src = checkpoint(kind, path / "src")
    config = json.loads((src / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value != GONE}
    (src / "config.json").write_text(json.dumps(kept))
    if change is not None:
        tensors = load_file(src / "model.safetensors")
        change(tensors)
        save_file(tensors, src / "model.safetensors", {"format": "pt"})
    source = Checkpoint.open(src)
    return source, family_of(source.config)


def build(source: Checkpoint, family: Family) -> Skeleton:
    return Skeleton(source, family, torch.device("cpu"), torch.float32)


GONE = "(no such key)"


def everywhere(end: str, *shape: int) -> Callable[[dict[str, Any]], Any]:
    """In all blocks: without the tensors, or with tensors of this shape."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(f".{end}")]:
            (reshaped(name, *shape) if shape else without(name))(tensors)

    return change


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("qwen2", reshaped("lm_head.weight", 128, 64), r"lm_head.*expected shape \(256, 64\)"),
        ("qwen", reshaped("lm_head.weight", 512, 32), r"lm_head.*expected shape \(512, 64\)"),
        ("qwen2", reshaped("model.norm.weight", 32), r"model\.norm.*expected shape \(64,\)"),
        ("qwen2", everywhere("input_layernorm.weight"), r"0\.input_layernorm.*none in the check"),
        ("qwen3_next", everywhere("post_attention_layernorm.weight"), r"0\.post_att.*none in the"),
        ("qwen", everywhere("ln_2.weight"), r"h\.0\.ln_2\.weight: .*none in the check"),
        ("qwen2", everywhere("q_proj.bias"), r"0\.self_attn\.q_proj\.bias: .*none in the check"),
        ("qwen2_moe", everywhere("v_proj.bias"), r"0\.self_attn\.v_proj\.bias: .*none in the"),
        ("qwen", everywhere("c_attn.bias"), r"0\.attn\.c_attn\.bias: .*none in the checkpoint"),
        ("qwen3", everywhere("q_norm.weight"), r"0\.self_attn\.q_norm\.weight: .*none in the"),
        ("qwen3_moe", everywhere("k_norm.weight", 8), r"k_norm.*expected shape \(16,\).*got \W*8"),
        ("qwen3_moe", everywhere("mlp.gate.weight"), r"0\.mlp\.gate\.weight: .*none in the check"),
        ("qwen3_next", everywhere("A_log"), r"0\.linear_attn\.A_log: .*none in the checkpoint"),
        ("qwen3_5_text", everywhere("dt_bias", 8), r"dt_bias: expected shape \(32,\).*got \W*8"),
        (
            "qwen2",
            everywhere("q_proj.bias", 32),
            r"q_proj\.bias: expected shape \(64,\).*got \W*32",
        ),
        (
            "qwen2",
            everywhere("q_proj.weight", 128, 64),
            r"q_proj.*shape \(64, 64\).*got \W*128, 64",
        ),
        ("qwen2", everywhere("v_proj.weight", 64, 64), r"v_proj.*shape \(32, 64\).*got \W*64, 64"),
        ("qwen", everywhere("c_attn.weight", 256, 64), r"c_attn.*\(192, 64\).*got \W*256, 64"),
    ],
)
def test_tensors_that_the_class_has_otherwise(
    kind: str, change: Callable[[dict[str, Any]], Any], match: str, tmp_path: Path
) -> None:
    source, family = changed(kind, tmp_path, {}, change)
    with pytest.raises(CheckpointError, match=match):
        check_shapes(source, family)
    with pytest.raises(CheckpointError):
        build(source, family)


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        ("qwen2", {"num_key_value_heads": None}, r"num_key_value_heads: expected 2.*null, which m"),
        (
            "qwen2_moe",
            {"num_key_value_heads": None},
            "heads: expected a positive integer, got null",
        ),
        ("qwen2", {"hidden_size": None}, "hidden_size: expected a positive integer, got null"),
        ("qwen", {"hidden_size": None}, "hidden_size: expected a positive integer, got null"),
        ("qwen2", {"head_dim": None}, "head_dim: expected a positive integer, got null"),
        ("qwen3", {"head_dim": None}, "head_dim: expected a positive integer, got null"),
        ("qwen2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ("qwen2", {"tie_word_embeddings": None}, "expected true or false, got null"),
        *(
            (kind, {key: GONE}, rf'{key}: expected {want}.*none, which means.*Add "{key}": {want}')
            for kind, key, want in (
                ("qwen2", "hidden_size", 64),
                ("qwen2", "intermediate_size", 96),
                ("qwen2", "vocab_size", 256),
                ("qwen2", "num_key_value_heads", 2),
                ("qwen", "hidden_size", 64),
                ("qwen3_moe", "moe_intermediate_size", 32),
                ("qwen2_moe", "num_experts", 6),
                ("qwen2_moe", "shared_expert_intermediate_size", 96),
            )
        ),
        ("qwen2", {"num_attention_heads": GONE}, "num_attention_heads: .*got none, which means 32"),
        ("qwen3", {"head_dim": GONE}, "num_attention_heads: .*got 4 of 128"),
        (
            "qwen3",
            {"attention_bias": True},
            r"0\.self_attn\.q_proj\.bias: .*none in the checkpoint",
        ),
        ("qwen3_next", {"linear_num_value_heads": 16}, r"linear_attn.*expected shape"),
    ],
)
def test_values_that_the_class_does_not_take(
    kind: str, values: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source, family = changed(kind, tmp_path, values)
    with pytest.raises(CheckpointError, match=match):
        check_shapes(source, family)
    with pytest.raises(CheckpointError):
        build(source, family)


@pytest.mark.parametrize(
    ("kind", "values", "change"),
    [
        ("qwen2", {}, reshaped("model.layers.0.foo.weight", 3)),
        ("qwen", {}, reshaped("transformer.h.1.attn.masked_bias", 1)),
        ("qwen2", {"head_dim": GONE}, None),
        ("qwen2", {"tie_word_embeddings": True}, reshaped("lm_head.weight", 7)),
        ("qwen2", {"tie_word_embeddings": True}, without("lm_head.weight")),
        ("qwen2_moe", {"qkv_bias": False}, everywhere("q_proj.bias")),
        ("qwen3_moe", {"head_dim": GONE}, None),
        ("qwen3_moe", {"intermediate_size": GONE, "num_experts_per_tok": 6}, None),
        ("qwen3_moe", {"shared_expert_intermediate_size": None}, None),  # it has no such expert
        ("qwen3_5_text", {"linear_num_value_heads": GONE}, None),
        ("qwen", {"hidden_size": GONE, "n_embd": 64}, None),
        ("qwen", {"vocab_size": 300, "padded_vocab_size": 512}, None),
    ],
)
def test_what_the_run_takes_is_not_refused(
    kind: str,
    values: dict[str, Any],
    change: Callable[[dict[str, Any]], Any] | None,
    tmp_path: Path,
) -> None:
    source, family = changed(kind, tmp_path, values, change)
    skeleton = build(source, family)
    check_shapes(source, family)
    assert sorted(parameters(source, family)) == sorted(skeleton.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_declared_is_what_the_class_has(kind: str, tmp_path: Path) -> None:
    """Every tensor of every block; and the values of keys that are absent."""
    source, family = changed(kind, tmp_path, {})
    skeleton = build(source, family)
    for block in skeleton.blocks:
        have = {name: tuple(p.shape) for name, p in block.named_parameters()}
        parts = {"self_attn", "linear_attn"} & {name.partition(".")[0] for name in have}
        parts |= {"mlp.experts"} & {".".join(name.split(".")[:2]) for name in have}
        assert tensors_of(source.config, family, parts) == have
    defaults = type(skeleton.config)()
    numbers = [
        key
        for key in defaults.to_dict()
        if key.endswith(("_size", "_heads", "_dim", "_channels", "_per_tok", "num_experts"))
        and key != "chunk_size_feed_forward"
    ]
    assert len(numbers) >= 5
    for key in numbers:
        assert number({}, family, key) == getattr(defaults, key), key


def test_linears_that_no_block_has(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "o_proj" not in name}
    save_file(kept, src / "model.safetensors", {"format": "pt"})
    refused(src, r"self_attn\.o_proj\.weight: expected a tensor of this name, got none")
