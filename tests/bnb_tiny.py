"""Tiny checkpoints of every family for the bitsandbytes tests, and how states are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from qwen_tiny import write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

FAMILIES = ("qwen", "qwen2", "qwen3")
# One linear of each family, and the fused one of original Qwen.
LINEAR = {
    "qwen": "transformer.h.0.attn.c_attn",
    "qwen2": "model.layers.0.self_attn.q_proj",
    "qwen3": "model.layers.0.self_attn.q_proj",
}
IDS = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(3))


def make(kind: str, path: Path, **changes: Any) -> Path:
    """A random checkpoint in bfloat16; original Qwen comes with a tokenizer and its code files.

    Inputs of every linear fill whole blocks of 64 and outputs whole runs of 32: on CPUs with
    AVX512-BF16 bitsandbytes can run no others.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "qwen":
        import qwen_tiny

        write_checkpoint(path)
        qwen_tiny.tiny_model(**({"intermediate_size": 256} | changes)).to(
            torch.bfloat16
        ).save_pretrained(path / "again")
        (path / "again" / "model.safetensors").replace(path / "model.safetensors")
        config = json.loads((path / "again" / "config.json").read_text())
        before = json.loads((path / "config.json").read_text())
        config = {**config, "auto_map": before["auto_map"]}
        (path / "config.json").write_text(json.dumps(config))
        for file in (path / "again").iterdir():
            file.unlink()
        (path / "again").rmdir()
        return path
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(kind, **(settings | changes))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


def plain(path: Path, device: str = "cpu", **how: Any) -> Any:
    """What `from_pretrained` makes of it; without a device map that takes a GPU where one is."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **({"device_map": {"": device}} | how))


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, but for the spaces that pad the JSON of doubly quantized linears."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        ours, tensor = found[name].cpu(), tensor.cpu()
        assert ours.dtype == tensor.dtype, name
        if "quant_state.bitsandbytes__" in name:
            ours_json, theirs = (json.loads(bytes(t.tolist())) for t in (ours, tensor))
            assert ours_json == theirs, name
            continue
        assert ours.shape == tensor.shape, name
        # As bytes: codes stored as floats may spell NaN.
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, tensor))
        assert torch.equal(ours, theirs), name
