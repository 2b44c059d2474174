"""`device_map="auto"` splits a directory between blocks, and what is split computes the same.

Unquantized ones here; exported GPTQ ones by plain transformers in a process that cannot import
qquant (`offload_process.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from qwen_tiny import tiny_model
from safetensors.torch import load_file
from torch import Tensor

import qquant
from qquant import QuantSpec, register
from qquant.errors import SpecError
from qquant.models import AUTO_MAP, export_files

IDS = torch.randint(1, 256, (2, 20), generator=torch.Generator().manual_seed(0))
BLOCKS = {"qwen": "transformer.h", "qwen2": "model.layers"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("split")
    original = tiny_model(num_hidden_layers=4, vocab_size=256, auto_map=AUTO_MAP).to(torch.bfloat16)
    original.save_pretrained(root / "qwen")
    for file, source in export_files().items():
        shutil.copyfile(source, root / "qwen" / file)
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


EXPORTED = {"qwen-int4": "qwen", "qwen2-int4": "qwen2"}
MISSING = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
readers = [
    pytest.mark.readers,
    pytest.mark.skipif(bool(MISSING), reason="needs pip install 'qquant[readers]'"),
    pytest.mark.skipif(
        torch.version.cuda is not None and not torch.cuda.is_available(),
        reason="with a CUDA build of torch gptqmodel takes its Triton kernel, GPU or not",
    ),
]


@pytest.fixture(scope="module")
def exported(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    made = {}
    for name, family in EXPORTED.items():
        made[name] = root / name
        spec = QuantSpec(group_size=32)
        qquant.quantize(sources[family], made[name], spec, tokens=IDS, device="cpu")
    return made


@pytest.fixture(scope="module")
def spread(
    exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what was seen, logits) of the exported directories."""
    root = tmp_path_factory.mktemp("spread")
    directories = {name: str(path) for name, path in exported.items()}
    (root / "jobs.json").write_text(json.dumps({"ids": IDS.tolist(), "directories": directories}))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "GPTQMODEL_CPU_WORKERS": "2",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HOME": str(root / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    files = [str(root / name) for name in ("jobs.json", "result.json", "logits.safetensors")]
    script = Path(__file__).with_name("offload_process.py")
    run = subprocess.run(
        [sys.executable, str(script), *files], cwd=root, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(Path(files[1]).read_text()), load_file(files[2])


class TestExported:
    pytestmark = readers

    @pytest.mark.parametrize("name", EXPORTED)
    def test_no_block_is_split(self, spread: Any, name: str) -> None:
        seen, blocks = spread[0][name], BLOCKS[EXPORTED[name]]
        split = 0
        for found in [seen["map"], seen["second"]["map"], *seen["rooms"]]:
            parts = blocks_of(found, blocks)
            assert all(len(devices) == 1 for devices in parts.values()), found
            split += len({d for devices in parts.values() for d in devices}) > 1
        assert split > 8, "most of these rooms hold a part of the model only"

    @pytest.mark.parametrize("name", EXPORTED)
    def test_partly_on_disk_it_gives_the_same_bits(self, spread: Any, name: str) -> None:
        (seen, found), blocks = (spread[0][name], spread[1]), BLOCKS[EXPORTED[name]]
        devices = {d for parts in blocks_of(seen["map"], blocks).values() for d in parts}
        assert devices == {"cpu", "disk"}
        assert torch.equal(found[f"{name}.disk"], found[f"{name}.whole"])
        assert seen["disk"] == seen["whole"] and len(seen["whole"]) == 8

    @pytest.mark.parametrize("name", EXPORTED)
    def test_packed_weights_stay_in_memory(self, spread: Any, name: str) -> None:
        """gptqmodel holds them as buffers, which are not offloaded. docs/READERS.md says so."""
        places = spread[0][name]["places"]
        assert places["plain"]["meta"] > 0, "plain weights did leave it"
        assert set(places["packed"]) == {"cpu"}

    @pytest.mark.parametrize("name", EXPORTED)
    def test_with_offload_buffers_it_fails_loudly(self, spread: Any, name: str) -> None:
        """gptqmodel makes tables on the meta device. Once it works, it must be right."""
        (seen, found), key = (spread[0][name], spread[1]), f"{name}.buffers"
        if key in found:
            assert torch.equal(found[key], found[f"{name}.whole"])
        else:
            assert "meta" in seen["error"]

    @pytest.mark.parametrize("name", EXPORTED)
    def test_a_second_device_is_handed_all_that_it_needs(self, spread: Any, name: str) -> None:
        """Hidden states, mask, angles: on the meta device, or a product there would refuse."""
        second = spread[0][name]["second"]
        assert second["device"] == "meta"
        assert second["shape"][:2] == list(IDS.shape)
        assert "meta" in second["ends"]


def test_our_own_loader_says_who_spreads_a_model(exported: dict[str, Path]) -> None:
    with pytest.raises(SpecError, match="from_pretrained"):
        qquant.load(exported["qwen2-int4"], device_map="auto")
