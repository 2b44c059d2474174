"""bitsandbytes on the fly, from a directory, with device maps; what is refused, named, guarded."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_tiny import FAMILIES, IDS, assert_same_state, make, stored
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qquant
import qquant.bnb as bnb
import qquant.bnb_state as bnb_state
from qquant import BnbSpec
from qquant.bnb_convert import quantize_bnb
from qquant.cli import cli
from qquant.devices import choose_dtype
from qquant.errors import (
    CheckpointError,
    MissingDependencyError,
    RunError,
    SpecError,
    VerifyError,
)

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Qwen2 checkpoint and its NF4 directory."""
    src = make("qwen2", tmp_path / "src")
    quantize_bnb(src, tmp_path / "dst", BnbSpec("nf4"), device="cpu")
    return src, tmp_path / "dst"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_on_the_fly_and_from_the_directory_are_one_model(
    kind: str, method: str, tmp_path: Path
) -> None:
    src, dst = make(kind, tmp_path / "src"), tmp_path / "dst"
    quantize_bnb(src, dst, BnbSpec(method), device="cpu")
    flown, tokenizer, report = qquant.load(src, method=method, device="cpu", dtype="float32")
    assert set(report.used.values()) == {f"bitsandbytes {method}"}
    assert len(report.used) == (10 if kind == "qwen" else 14)
    assert (tokenizer is not None) == (kind == "qwen")
    assert report.weight_bytes > 0
    landed = qquant.load(dst, device="cpu", dtype="float32")
    assert landed.kernel.used == report.used
    plain = qquant.load(src, device="cpu", dtype="float32").model
    with torch.no_grad():
        a, b, c = (m(IDS).logits for m in (flown, landed.model, plain))
    assert a.dtype == torch.float32 == flown.dtype == landed.model.dtype
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert 0 < float((a - c).norm() / c.norm()) < (0.05 if method == "int8" else 0.6)
    if kind == "qwen":
        assert flown.config.fp32 and landed.model.config.fp32
        assert isinstance(landed.model.chat(landed.tokenizer, "Hi", history=None)[0], str)
    out = landed.model.generate(IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_plain_transformers_with_a_device_map(
    kind: str, config: BitsAndBytesConfig, tmp_path: Path
) -> None:
    src = make(kind, tmp_path / "src")
    qquant.register()
    where: dict[str, Any] = {"quantization_config": config, "dtype": torch.float32}
    one = AutoModelForCausalLM.from_pretrained(src, **where)
    two = AutoModelForCausalLM.from_pretrained(
        src, device_map="auto", max_memory={"cpu": "2GB"}, **where
    )
    assert_same_state(two.state_dict(), one.state_dict())
    method = "int8" if config is INT8 else "nf4"
    three = qquant.load(
        src, method=method, dtype="float32", device_map="auto", max_memory={"cpu": "2GB"}
    )
    assert_same_state(three.model.state_dict(), one.state_dict())
    with torch.no_grad():
        assert torch.equal(three.model(IDS).logits, one(IDS).logits)


READER = """
import json, sys
class NoQquant:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qquant":
            raise ImportError("qquant is not to be had in this process")
sys.meta_path.insert(0, NoQquant())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                            bnb_4bit_compute_dtype=torch.bfloat16)
src = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, trust_remote_code=True, device_map="auto")
dst = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    same = torch.equal(src(ids).logits, dst(ids).logits)
kind = type(dst.transformer.h[0].attn.c_attn).__name__
assert "qquant" not in sys.modules
print(json.dumps([same, kind, type(dst).__module__, dst.chat(tokenizer, "Hi", history=None)[0]]))
"""


def test_original_qwen_without_qquant_from_the_files_beside_the_weights(tmp_path: Path) -> None:
    src, dst = make("qwen", tmp_path / "src"), tmp_path / "dst"
    quantize_bnb(src, dst, BnbSpec("nf4"), device="cpu")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(src), str(dst), json.dumps(IDS.tolist())],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same, kind, module, response = json.loads(done.stdout.splitlines()[-1])
    assert same and kind == "Linear4bit" and module.startswith("transformers_modules.")
    assert isinstance(response, str)


def test_experts_that_stay_in_16_bits_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src = make(
        "qwen2_moe",
        tmp_path / "src",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    )
    with caplog.at_level(logging.WARNING, "qquant.bnb"):
        model = qquant.load(src, method="nf4", device="cpu", dtype="float32").model
    (text,) = [r.getMessage() for r in caplog.records if r.name == "qquant.bnb"]
    assert "mlp.experts" in text and "stay in 16 bits" in text
    stay = bnb.stays_in_16_bit(model)
    assert any("experts" in name for name in stay)
    assert not any(name.endswith(("lm_head.weight", "embed_tokens.weight")) for name in stay)
    with pytest.raises(CheckpointError, match="qwen2_moe"):
        quantize_bnb(src, tmp_path / "dst", device="cpu")


def test_a_dense_model_leaves_nothing_unasked(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    spec = BnbSpec("nf4", skip=("lm_head", "mlp.down_proj"))
    with caplog.at_level(logging.WARNING, "qquant"):
        model = qquant.load(pair[0], method=spec, device="cpu", dtype="float32").model
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert not caplog.records


def test_compute_dtype_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for capability, expected in (((7, 5), "float16"), ((8, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert bnb.compute_dtype(BnbSpec(), "bfloat16", cuda) == expected
        assert str(choose_dtype(None, cuda, torch.bfloat16)) == f"torch.{expected}"
        assert bnb.compute_dtype(BnbSpec(compute_dtype="bfloat16"), "bfloat16", cuda) == "bfloat16"
    assert bnb.compute_dtype(BnbSpec(), "bfloat16", torch.device("cpu")) == "bfloat16"
    assert bnb.compute_dtype(BnbSpec(), "float16", cuda) == "float16"


def test_the_products_are_in_the_dtype_asked_for(pair: tuple[Path, Path]) -> None:
    """Whatever the directory names: so that a GPU without bfloat16 can be given float16."""
    model = qquant.load(pair[1], device="cpu", dtype="float16").model
    linear = model.model.layers[0].mlp.up_proj
    seen: list[torch.dtype] = []
    import bitsandbytes

    real = bitsandbytes.matmul_4bit

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return real(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bitsandbytes, "matmul_4bit", spy)
        linear(torch.zeros(1, 64, dtype=torch.float16))
    assert seen == [torch.float16]


@pytest.mark.parametrize("state", ["missing", "old", "broken"])
def test_without_bitsandbytes_one_line_says_what_to_install(
    state: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if state == "missing":
            raise PackageNotFoundError(name)
        return "0.49.1" if state == "old" else "0.50.2"

    def broken(name: str) -> Any:
        raise OSError("libbitsandbytes_cpu.so: no such file\nand more")

    monkeypatch.setattr(bnb_state, "version", version)
    if state == "broken":
        monkeypatch.setattr(importlib, "import_module", broken)
    for call in (
        lambda: qquant.load(pair[0], method="nf4"),
        lambda: qquant.load(pair[1]),
        lambda: quantize_bnb(pair[0], tmp_path / "new"),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install 'bitsandbytes>=0\.50'"):
            call()
    if state == "broken":
        monkeypatch.undo()
        return
    done = CliRunner().invoke(
        cli, ["quantize", str(pair[0]), "-o", str(tmp_path / "new"), "--method", "nf4"]
    )
    assert done.exit_code == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "bitsandbytes" in done.stderr and "pip install" in done.stderr
    assert qquant.verify_directory(pair[1], against=pair[0]).ok  # which needs none


def test_refusals(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="quantized already"):
        qquant.load(pair[1], method="nf4", device="cpu")
    with pytest.raises(SpecError, match="kernel"):
        qquant.load(pair[1], kernel="dequantize", device="cpu")
    with pytest.raises(SpecError, match="none without bitsandbytes"):
        qquant.load(pair[0], device_map="auto")
    with pytest.raises(SpecError, match="method"):
        qquant.load(pair[0], method="gptq")
    config = json.loads((pair[1] / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_storage"] = "nonsense"
    (pair[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"nonsense|quant_storage"):
        qquant.load(pair[1], device="cpu")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_model_that_has_run_is_not_saved(
    method: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    src = pair[0]
    quantize_bnb(src, tmp_path / "made", BnbSpec(method), device="cpu")
    fresh = qquant.load(src, method=method, device="cpu", dtype="bfloat16").model
    assert bnb.has_run(fresh) is None
    saved = bnb.save(fresh, tmp_path / "saved")
    assert_same_state(stored(saved), stored(tmp_path / "made"))
    assert qquant.verify_directory(saved, against=src).ok

    with torch.no_grad():
        fresh(IDS)
    with pytest.raises(RunError, match=r"has not run.*Load it again"):
        bnb.save(fresh, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    with pytest.raises(SpecError, match="bitsandbytes"):
        bnb.save(qquant.load(src, device="cpu").model, tmp_path / "after")


def run_on_avx512_bf16(model: Any) -> None:
    """What bitsandbytes 0.50.2 does in a forward on such a CPU, by its own code."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as repack

    for _, module in bnb.bnb_linears(model):
        weight = module.weight
        weight.data, weight.quant_state = repack(weight.data, weight.quant_state)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_the_damage_of_saving_after_a_forward_is_seen(double: bool, tmp_path: Path) -> None:
    """absmax transposed in bfloat16: refused by `save`, found by `verify`, and really harmful."""
    src = make("qwen2", tmp_path / "whole-blocks", intermediate_size=128)
    spec = BnbSpec("nf4", double_quant=double)
    quantize_bnb(src, tmp_path / "good", spec, device="cpu")
    good = AutoModelForCausalLM.from_pretrained(tmp_path / "good", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "good")
    run_on_avx512_bf16(model)
    assert "packed" in (bnb.has_run(model) or "")
    with pytest.raises(RunError, match="AVX512-BF16"):
        bnb.save(model, tmp_path / "refused")

    model.save_pretrained(tmp_path / "bad", save_original_format=False)  # what a user would do
    if not double:
        absmax = stored(tmp_path / "bad")["model.layers.0.self_attn.q_proj.weight.absmax"]
        assert absmax.dtype == torch.bfloat16 and absmax.dim() == 2
        assert "scales of" in (bnb.has_run(model) or "")  # and the model in memory stays so
        with torch.no_grad():
            broken = AutoModelForCausalLM.from_pretrained(tmp_path / "bad")
            assert not torch.allclose(broken(IDS).logits, good(IDS).logits, atol=0.1)
    report = qquant.verify_directory(tmp_path / "bad")
    assert not report.ok
    text = " ".join(map(str, report.problems))
    assert "AVX512-BF16" in text and ("nested_dtype" if double else "absmax") in text, text


def test_save_verifies_what_it_wrote(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that nothing marks, whose scales are not whole."""
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    state = model.model.layers[1].mlp.up_proj.weight.quant_state
    state.absmax = state.absmax.clone()
    state.absmax[3] = float("nan")
    with pytest.raises(VerifyError, match=r"layers\.1\.mlp\.up_proj"):
        bnb.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
