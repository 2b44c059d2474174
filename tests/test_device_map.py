"""`device_map="auto"` splits a directory between blocks, and what is split computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from qwen_tiny import tiny_model
from torch import Tensor

from qquant import register

IDS = torch.randint(1, 256, (2, 20), generator=torch.Generator().manual_seed(0))
BLOCKS = {"qwen": "transformer.h", "qwen2": "model.layers"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("split")
    tiny_model(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(root / "qwen")
    handmade.tiny_qwen2(layers=4).to(torch.bfloat16).save_pretrained(root / "qwen2")
    register()
    return {name: root / name for name in BLOCKS}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.float()
    return found


def load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def blocks_of(device_map: dict[str, Any], blocks: str) -> dict[int, set[str]]:
    """Devices of each block's parts; a block under one key is whole by construction."""
    found: dict[int, set[str]] = {}
    for name, device in device_map.items():
        if name.startswith(f"{blocks}."):
            index = int(name.removeprefix(f"{blocks}.").partition(".")[0])
            found.setdefault(index, set()).add(str(device))
    return found


@pytest.mark.parametrize("family", BLOCKS)
def test_no_block_is_split_however_small_the_devices(sources: dict[str, Path], family: str) -> None:
    """On the meta device, with every room for two GPUs from nothing to the whole model."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(sources[family])
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    whole = sum(p.numel() * 2 for p in model.parameters())
    assert model._no_split_modules
    split = 0
    for share in range(1, 20):
        room = {0: whole * share // 20, 1: whole * share // 20, "cpu": 10 * whole}
        found = infer_auto_device_map(
            model, max_memory=room, no_split_module_classes=list(model._no_split_modules)
        )
        parts = blocks_of(found, BLOCKS[family])
        assert all(len(devices) == 1 for devices in parts.values()), found
        split += len(set(map(str, found.values()))) > 1
    assert split > 10, "most of these rooms hold a part of the model only"


@pytest.mark.parametrize("family", BLOCKS)
def test_a_model_that_is_partly_on_disk_gives_the_same_bits(
    sources: dict[str, Path], family: str, tmp_path: Path
) -> None:
    whole = load(sources[family], dtype=torch.float32)
    size = sum(p.numel() * 4 for p in whole.parameters())
    options = {"dtype": torch.float32, "device_map": "auto", "offload_folder": str(tmp_path)}
    split = load(sources[family], **options, max_memory={"cpu": size * 2 // 3})
    parts = blocks_of(split.hf_device_map, BLOCKS[family])
    assert {d for devices in parts.values() for d in devices} >= {"disk"}
    assert all(len(devices) == 1 for devices in parts.values())
    assert torch.equal(logits(split), logits(whole))
    made = split.generate(IDS[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = whole.generate(IDS[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(made, expected)
