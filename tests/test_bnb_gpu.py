"""bitsandbytes on a GPU: the same directories, and memory beside what Qwen published.

Not yet run: no machine of this project's CI has a GPU. The figures of Qwen's first model page for
Qwen-7B on an A100 (load memory in GB, by `torch.cuda.max_memory_allocated`): BF16 16.2, Int8 10.1,
NF4 7.4.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_tiny import FAMILIES, IDS, assert_same_state, make, stored
from transformers import AutoModelForCausalLM

import qquant
from qquant import BnbSpec
from qquant.bnb_convert import quantize_bnb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NOT RUN: no GPU here, and never yet run on one"
    ),
]

PUBLISHED_GB = {"bf16": 16.2, "int8": 10.1, "nf4": 7.4}
SEVEN_B = {  # Qwen-7B's config.json
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_directories_of_the_cpu_load_on_the_gpu_and_the_other_way(
    kind: str, method: str, tmp_path: Path
) -> None:
    src = make(kind, tmp_path / "src")
    for device in ("cpu", "cuda"):
        quantize_bnb(src, tmp_path / device, BnbSpec(method), device=device)
        assert qquant.verify_directory(tmp_path / device, against=src).ok
    on_gpu = qquant.load(tmp_path / "cpu", device="cuda", dtype="float16").model
    on_cpu = qquant.load(tmp_path / "cpu", device="cpu", dtype="float32").model
    with torch.no_grad():
        found = on_gpu(IDS.cuda()).logits.float().cpu()
        torch.testing.assert_close(found, on_cpu(IDS).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_on_the_fly_on_the_gpu_equals_the_directory_made_there(method: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    quantize_bnb(src, tmp_path / "dst", BnbSpec(method), device="cuda")
    flown = qquant.load(src, method=method, device="cuda", dtype="bfloat16").model
    state = {name: tensor.cpu() for name, tensor in flown.state_dict().items()}
    assert_same_state(stored(tmp_path / "dst"), state)


def test_several_devices(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    most = {i: "1GB" for i in range(torch.cuda.device_count())}
    model = qquant.load(src, method="nf4", device_map="auto", max_memory=most).model
    model.generate(IDS[:1, :4].to(model.device), max_new_tokens=3)


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of Qwen-7B: 15.4 GB on the disk."""
    from qquant.models.qwen.configuration_qwen import QWenConfig
    from qquant.models.qwen.modeling_qwen import QWenLMHeadModel

    free = torch.cuda.mem_get_info()[0]
    if free < 20 << 30:
        pytest.skip(f"NOT RUN: needs 20 GiB of free GPU memory, there are {free / 2**30:.0f}")
    path = tmp_path_factory.mktemp("seven") / "qwen-7b-shaped"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = QWenLMHeadModel(QWenConfig(**SEVEN_B))
        finally:
            torch.set_default_dtype(torch.float32)
    model.to(torch.bfloat16).save_pretrained(path)
    del model
    _empty()
    return path


def _empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("method", ["bf16", "int8", "nf4"])
def test_memory_of_a_7b_shape(method: str, seven_b: Path) -> None:
    """Allocated after loading, and the peak of 2048 tokens: beside the published figures."""
    _empty()
    how: dict[str, Any] = {} if method == "bf16" else {"method": method}
    model = qquant.load(seven_b, device="cuda", dtype="bfloat16", **how).model
    loaded = torch.cuda.memory_allocated()
    loading_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prompt = torch.full((1, 2048), 35946, device="cuda")
    model.generate(prompt, max_new_tokens=1, do_sample=False)
    figures = {
        "method": method,
        "allocated_gb": loaded / 2**30,
        "loading_peak_gb": loading_peak / 2**30,
        "encode_2048_peak_gb": torch.cuda.max_memory_allocated() / 2**30,
        "published_load_gb": PUBLISHED_GB[method],
        "gpu": torch.cuda.get_device_name(),
    }
    print(json.dumps(figures))
    assert loaded / 2**30 < 1.05 * PUBLISHED_GB[method]
    if method != "bf16":  # the 16-bit model is never on the GPU as a whole
        assert loading_peak / 2**30 < PUBLISHED_GB["bf16"] - 2
    del model
    _empty()


def test_plain_transformers_on_the_gpu(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    quantize_bnb(src, tmp_path / "dst", BnbSpec("nf4"), device="cuda")
    qquant.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", device_map="auto")
    assert_same_state(
        {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        stored(tmp_path / "dst"),
    )
