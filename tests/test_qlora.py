"""The Q-LoRA example on every kind of base: the loss goes down, the adapter comes back the same."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bnb_tiny import make

from qquant import BnbSpec, QuantSpec, quantize
from qquant.models.families import FAMILIES

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "qlora.py"
DEMO = ROOT / "demo" / "qwen-demo"
SHORT = ("--steps", "12", "--batch", "2", "--seqlen", "48", "--rank", "8", "--rate", "2e-3")
READERS = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]


@pytest.fixture(scope="module")
def qlora() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qlora", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little enough that twelve steps see it again and again."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")[:700])
    return path


def check(found: dict[str, Any], falls_to: float = 0.9) -> None:
    losses = found["losses"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < falls_to * sum(losses[:3]), losses
    assert found["moved"] > 0.01
    assert found["reloaded_difference"] == 0.0
    assert found["trainable"] > 0 and found["adapter_bytes"] > 4 * found["trainable"]


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_original_qwen_on_a_directory(
    method: str, qlora: ModuleType, text: Path, tmp_path: Path
) -> None:
    quantize(DEMO, tmp_path / "base", BnbSpec(method), device="cpu")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    words = [str(tmp_path / "base"), "--text", str(text), "-o", str(tmp_path / "adapter"), *SHORT]
    check(qlora.main(words))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(qlora.TARGETS["qwen"])


def test_original_qwen_on_the_fly(qlora: ModuleType, text: Path, tmp_path: Path) -> None:
    words = [str(DEMO), "--text", str(text), "-o", str(tmp_path / "adapter"), "--method", "nf4"]
    check(qlora.main([*words, *SHORT]))
    with pytest.raises(SystemExit, match="--method nf4"):
        qlora.main([str(DEMO), "--text", str(text), "-o", str(tmp_path / "x")])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_native_qwen(kind: str, qlora: ModuleType, tmp_path: Path) -> None:
    """No tokenizer in these: the example's functions one by one."""
    src = make(kind, tmp_path / "src")
    quantize(src, tmp_path / "base", BnbSpec("nf4", double_quant=True), device="cpu")
    ids = torch.randint(1, 250, (4, 24), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    base, tokenizer = qlora.load_base(tmp_path / "base")
    assert tokenizer is None
    model = qlora.attach(base, rank=8)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert len(adapted) == 2 * 7
    losses = qlora.train(model, ids, 12, batch=2, rate=2e-3)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    again = PeftModel.from_pretrained(qlora.load_base(tmp_path / "base")[0], tmp_path / "adapter")
    assert torch.equal(qlora.logits_of(again.eval(), ids), qlora.logits_of(model, ids))


def test_every_adapter_learns_where_a_forward_would_repack_the_base(
    qlora: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AVX512-BF16: gradients go through the base to the first block's adapters, and
    the reloaded pair computes what the trained one does."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    src = make("qwen2", tmp_path / "src")
    base, _ = qlora.load_base(src, "nf4")
    ids = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    model = qlora.attach(base, rank=8)
    qlora.logits_of(model.eval(), ids)
    qlora.train(model, ids, 2, batch=2, rate=2e-3)
    moved = {n: bool(p.any()) for n, p in model.named_parameters() if ".lora_B" in n}
    assert len(moved) == 2 * 7 and all(moved.values()), moved
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    again = PeftModel.from_pretrained(qlora.load_base(src, "nf4")[0], tmp_path / "adapter")
    assert torch.equal(qlora.logits_of(again.eval(), ids), qlora.logits_of(model, ids))


def test_targets_are_all_linears_of_a_block(qlora: ModuleType) -> None:
    assert {"qwen", "qwen2", "qwen3"} <= set(qlora.TARGETS)
    for kind in qlora.TARGETS:
        for linear in FAMILIES[kind].linears:
            assert any(linear.endswith(target) for target in qlora.TARGETS[kind]), (kind, linear)


@pytest.mark.readers
@pytest.mark.skipif(
    bool(READERS), reason=f"{' and '.join(READERS)} not installed: pip install 'qquant[readers]'"
)
@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
def test_a_gptq_directory(kind: str, text: Path, tmp_path: Path) -> None:
    """In a process of its own, since gptqmodel sets variables of the environment."""
    if kind == "qwen":
        src, group = DEMO, 128
    else:
        src, group = make("qwen2", tmp_path / "src", vocab_size=3072), 32
        for name in ("qwen.tiktoken", "tokenizer_config.json"):
            (src / name).write_bytes((DEMO / name).read_bytes())
    quantize(src, tmp_path / "base", QuantSpec(group_size=group, method="rtn"), device="cpu")
    # A native export does not pass code on, so a borrowed tokenizer has to be named again.
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path / "base")
    env = {
        **os.environ,
        "GPTQMODEL_CPU_WORKERS": "2",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    words = [str(tmp_path / "base"), "--text", str(text), "-o", str(tmp_path / "adapter"), *SHORT]
    if kind == "qwen2":  # of random weights, which have more to unlearn
        words += ["--rate", "2e-2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Random weights have nothing to build on: twelve steps take off a few percent at least.
    check(json.loads(done.stdout.splitlines()[-1]), 0.9 if kind == "qwen" else 0.99)
