"""bitsandbytes on the fly, from a directory, with device maps; what is refused, named, guarded."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_tiny import FAMILIES, IDS, LINEAR, assert_same_state, make, plain, stored
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qquant
import qquant.bnb as bnb
import qquant.bnb_guard as bnb_guard
import qquant.bnb_state as bnb_state
from qquant import BnbSpec
from qquant.bnb_convert import quantize_bnb
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.devices import choose_dtype, native_bfloat16
from qquant.errors import (
    CheckpointError,
    MissingDependencyError,
    RunError,
    SpecError,
    VerifyError,
)

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
INT8 = BitsAndBytesConfig(load_in_8bit=True)
# peft asks transformers by a name that is on its way out.
PEFT_ASKS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Qwen2 checkpoint and its NF4 directory."""
    src = make("qwen2", tmp_path / "src")
    quantize_bnb(src, tmp_path / "dst", BnbSpec("nf4"), device="cpu")
    return src, tmp_path / "dst"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_on_the_fly_and_from_the_directory_are_one_model(
    kind: str, method: str, device: str, tmp_path: Path
) -> None:
    src, dst = make(kind, tmp_path / "src"), tmp_path / "dst"
    quantize_bnb(src, dst, BnbSpec(method), device=device)
    flown, tokenizer, report = qquant.load(src, method=method, device=device, dtype="float32")
    assert set(report.used.values()) == {f"bitsandbytes {method}"}
    assert len(report.used) == (10 if kind == "qwen" else 14)
    assert (tokenizer is not None) == (kind == "qwen")
    assert report.weight_bytes > 0
    exact = {} if method == "int8" else {"compute_dtype": "float32"}
    landed = qquant.load(dst, device=device, dtype="float32", **exact)
    assert landed.kernel.used == report.used
    assert landed.kernel.compute_dtype == report.compute_dtype
    assert report.compute_dtype == (None if method == "int8" else torch.float32)
    full = qquant.load(src, device=device, dtype="float32").model
    ids = IDS.to(device)
    with torch.no_grad():
        a, b, c = (m(ids).logits for m in (flown, landed.model, full))
    assert a.dtype == torch.float32 == flown.dtype == landed.model.dtype
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert 0 < float((a - c).norm() / c.norm()) < (0.05 if method == "int8" else 0.6)
    if kind == "qwen":
        assert flown.config.fp32 and landed.model.config.fp32
        assert isinstance(landed.model.chat(landed.tokenizer, "Hi", history=None)[0], str)
    out = landed.model.generate(ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_plain_transformers_with_a_device_map(
    kind: str, config: BitsAndBytesConfig, device: str, tmp_path: Path
) -> None:
    src = make(kind, tmp_path / "src")
    qquant.register()
    where: dict[str, Any] = {"quantization_config": config, "dtype": torch.float32}
    one = plain(src, device, **where)
    most: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "2GB"}}
    if device == "cuda":
        most["max_memory"] = dict.fromkeys(range(torch.cuda.device_count()), "2GB")
    assert_same_state(plain(src, **most, **where).state_dict(), one.state_dict())
    method = "int8" if config is INT8 else "nf4"
    three = qquant.load(src, method=method, dtype="float32", **most)
    assert_same_state(three.model.state_dict(), one.state_dict())
    ids = IDS.to(device)
    with torch.no_grad():
        found, expected = three.model(ids).logits, one(ids).logits
    torch.testing.assert_close(found.to(expected.device), expected, atol=0, rtol=0)


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
    same = torch.equal(src(ids.to(src.device)).logits, dst(ids.to(dst.device)).logits)
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


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_experts_that_stay_in_16_bits_are_named(
    kind: str, method: str, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {"shared_expert_intermediate_size": 64} if kind == "qwen2_moe" else {}
    src = make(
        kind,
        tmp_path / "src",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        **shared,
    )
    with caplog.at_level(logging.WARNING, "qquant.bnb"):
        model, _, report = qquant.load(src, method=method, device=device, dtype="float32")
    (text,) = [r.getMessage() for r in caplog.records if r.name == "qquant.bnb"]
    assert "mlp.experts" in text and "stay in 16 bits" in text and text in str(report)
    left = {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.dtype == torch.float32
    }
    apart = {"lm_head.weight", "model.embed_tokens.weight"}
    assert set(bnb.stays_in_16_bit(model)) == left - apart
    assert {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)} <= left
    assert "model.layers.0.self_attn.q_proj" in report.used
    saved = qquant.save(model, tmp_path / "saved")
    assert_same_state(
        plain(saved, device, dtype=torch.float32).state_dict(),
        model.state_dict(),
    )
    with pytest.raises(CheckpointError, match=rf"{kind}.*experts bitsandbytes leaves in 16 bits"):
        quantize_bnb(src, tmp_path / "dst", device="cpu")


def test_a_dense_model_leaves_nothing_unasked(
    device: str, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    spec = BnbSpec("nf4", skip=("lm_head", "mlp.down_proj"))
    with caplog.at_level(logging.WARNING, "qquant"):
        model = qquant.load(pair[0], method=spec, device=device, dtype="float32").model
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert not caplog.records


def test_compute_dtype_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 where nothing was named, and it is said."""
    cuda = torch.device("cuda", 0)
    named = BnbSpec(compute_dtype="bfloat16")
    for capability, expected in (((7, 5), "float16"), ((8, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert bnb.compute_dtype(BnbSpec(), "bfloat16", cuda) == expected
        said = " ".join(bnb.compute_notes(BnbSpec(), "bfloat16", cuda))
        assert ("float16: this GPU has no bfloat16" in said) == (expected == "float16")
        assert str(choose_dtype(None, cuda, torch.bfloat16)) == f"torch.{expected}"
        assert bnb.compute_dtype(named, "bfloat16", cuda) == "bfloat16"
        assert not bnb.compute_notes(named, "bfloat16", cuda)
        assert not bnb.compute_notes(BnbSpec("int8"), "bfloat16", cuda)
    assert bnb.compute_dtype(BnbSpec(), "bfloat16", torch.device("cpu")) == "bfloat16"
    assert bnb.compute_dtype(BnbSpec(), "float16", cuda) == "float16"


def test_a_directory_for_newer_gpus_is_loaded_in_float16_and_says_so(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model stays on the CPU; the rule is asked about a GPU of capability 7.5."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with caplog.at_level(logging.WARNING, "qquant.bnb"):
        loaded = bnb.load_model(
            Checkpoint.open(pair[1]),
            None,
            device=torch.device("cuda", 0),
            dtype=torch.float16,
            device_map={"": "cpu"},
        )
    assert loaded.compute_dtype == torch.float16
    (note,) = loaded.notes
    assert note == caplog.messages[0] == "4-bit products in float16: this GPU has no bfloat16"


def product_dtype(model: Any) -> torch.dtype:
    """That of the input which a 4-bit product really gets."""
    import bitsandbytes

    seen: list[torch.dtype] = []
    real = bitsandbytes.matmul_4bit

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return real(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bitsandbytes, "matmul_4bit", spy)
        model(IDS.to(model.device))
    (dtype,) = set(seen)
    return dtype


@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_products_are_in_the_dtype_that_the_directory_names(
    stored_dtype: str,
    dtype: str | None,
    device: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """Whatever dtype the rest is asked for in; unless another compute dtype is, and it is said."""
    spec = BnbSpec("nf4", compute_dtype=stored_dtype)
    quantize_bnb(pair[0], tmp_path / "named", spec, device="cpu")
    model, _, report = qquant.load(tmp_path / "named", device=device, dtype=dtype)
    assert report.compute_dtype == getattr(torch, stored_dtype) == product_dtype(model)
    assert f"4-bit products in {stored_dtype}" in str(report)
    slow = stored_dtype == "bfloat16" and not native_bfloat16(torch.device(device))
    assert ('compute_dtype="float32"' in str(report)) == slow
    for asked in ("float32", torch.float16):
        model, _, report = qquant.load(
            tmp_path / "named", device=device, dtype=dtype, compute_dtype=asked
        )
        wanted = torch.float32 if asked == "float32" else asked
        assert report.compute_dtype == wanted == product_dtype(model)
        assert not report.notes


def test_compute_dtype_on_the_fly(device: str, pair: tuple[Path, Path]) -> None:
    named = BnbSpec("nf4", compute_dtype="float16")
    for how, asked, expected in (
        ("nf4", None, torch.float32),
        ("nf4", "float16", torch.float16),
        (named, None, torch.float16),
        (named, "float32", torch.float32),
    ):
        model, _, report = qquant.load(
            pair[0], method=how, device=device, dtype="float32", compute_dtype=asked
        )
        assert report.compute_dtype == expected == product_dtype(model)
    with pytest.raises(SpecError, match=r"--compute-dtype \(compute_dtype\).*int8"):
        qquant.load(pair[0], method="int8", device="cpu", compute_dtype="float16")
    with pytest.raises(SpecError, match="none without bitsandbytes"):
        qquant.load(pair[0], device="cpu", compute_dtype="float16")


def test_the_report_says_where_a_device_map_put_things(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = qquant.load(pair[1], dtype="float32", device_map={"": "cpu"}).kernel
    assert report.device == torch.device("cpu") and not report.placed
    assert str(report).count("cpu") == 1
    real = AutoModelForCausalLM.from_pretrained

    def spread(*args: Any, **kwargs: Any) -> Any:
        model, found = real(*args, **kwargs)
        model.hf_device_map = {"model": 0, "lm_head": "cpu"}
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spread)
    report = qquant.load(pair[1], device="cpu", dtype="float32").kernel
    assert report.placed == {"model": "cuda:0", "lm_head": "cpu"}
    assert "float32 on cuda:0, cpu" in str(report)


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
    for wrong in ("gptq", 4, {"method": "nf4"}):
        with pytest.raises(SpecError, match=r"method.*nf4.*got"):
            qquant.load(pair[0], method=wrong)  # type: ignore[arg-type]
    everything = BnbSpec("nf4", skip=("model", "lm_head"))
    with pytest.raises(SpecError, match=r"--skip-module.*every one left out"):
        qquant.load(pair[0], method=everything, device="cpu")
    config = json.loads((pair[1] / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_storage"] = "nonsense"
    (pair[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"nonsense|quant_storage"):
        qquant.load(pair[1], device="cpu")


@pytest.mark.parametrize("where", ["directory", "on the fly"])
@pytest.mark.parametrize(
    "missing",
    ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "a linear"],
)
def test_what_is_missing_is_not_filled_with_random_numbers(
    pair: tuple[Path, Path], missing: str, where: str
) -> None:
    path = pair[where == "directory"]
    name = "model.layers.0.mlp.up_proj.weight" if missing == "a linear" else missing
    tensors = load_file(path / "model.safetensors")
    for part in [n for n in tensors if n.startswith(name)]:
        del tensors[part]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        qquant.load(path, method=None if where == "directory" else "nf4", device="cpu")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_linear_without_its_scales_is_named(method: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    dst = quantize_bnb(src, tmp_path / "dst", BnbSpec(method), device="cpu").path
    tensors, name = load_file(dst / "model.safetensors"), "model.layers.0.mlp.up_proj"
    for part in [n for n in tensors if n.startswith(f"{name}.") and n != f"{name}.weight"]:
        del tensors[part]
    save_file(tensors, dst / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        qquant.load(dst, device="cpu")


def test_as_many_blocks_as_the_weights_have(pair: tuple[Path, Path]) -> None:
    for path, method in ((pair[0], "nf4"), (pair[1], None)):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        with pytest.raises(CheckpointError, match="num_hidden_layers"):
            qquant.load(path, method=method, device="cpu")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_tied_head_is_no_linear_to_quantize(method: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src", tie_word_embeddings=True)
    spec = BnbSpec(method, skip=("model.layers.0.mlp.down_proj",))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        qquant.load(src, method=spec, device="cpu")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        quantize_bnb(src, tmp_path / "dst", spec, device="cpu")
    assert qquant.load(src, method=BnbSpec(method), device="cpu").model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_model_that_has_run_is_not_saved(
    method: str,
    device: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    src = pair[0]
    quantize_bnb(src, tmp_path / "made", BnbSpec(method), device=device)
    fresh = qquant.load(src, method=method, device=device, dtype="bfloat16").model
    assert bnb_guard.has_run(fresh) is None
    capfd.readouterr()
    saved = bnb.save(fresh, tmp_path / "saved")
    assert "".join(capfd.readouterr()) == ""  # no bar of transformers'
    assert_same_state(stored(saved), stored(tmp_path / "made"))
    assert qquant.verify_directory(saved, against=src).ok
    fresh.save_pretrained(tmp_path / "by-transformers", save_original_format=False)
    assert_same_state(stored(tmp_path / "by-transformers"), stored(saved))

    with torch.no_grad():
        fresh(IDS.to(device))
    for call in (bnb.save, type(fresh).save_pretrained):
        with pytest.raises(RunError, match=r"has not run.*Load it again.*AVX512-BF16"):
            call(fresh, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    with pytest.raises(SpecError, match="bitsandbytes"):
        bnb.save(qquant.load(src, device="cpu").model, tmp_path / "after")


Step = Callable[[Any, torch.Tensor], Any]
RUNS: dict[str, Step] = {
    "model": lambda model, ids: model(ids),
    "forward": lambda model, ids: model.forward(ids),
    "body": lambda model, ids: model.base_model(ids),
    "one linear": lambda model, ids: next(bnb_guard.bnb_linears(model))[1](
        torch.zeros(1, 64, device=ids.device)
    ),
    "generate": lambda model, ids: model.generate(ids[:1, :4], max_new_tokens=1, do_sample=False),
    "a copy": lambda model, ids: copy.deepcopy(model)(ids),
    "compiled": lambda model, ids: torch.compile(model, backend="eager")(ids),
}


@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
@pytest.mark.parametrize("how", RUNS)
def test_any_forward_leaves_its_mark(kind: str, how: str, device: str, tmp_path: Path) -> None:
    """On models of both families, whoever runs what of them, by transformers' own saving too."""
    src = make(kind, tmp_path / "src")
    model = qquant.load(src, method="nf4", device=device, dtype="float32").model
    ids = IDS.to(device)
    with torch.no_grad():
        RUNS[how](model, ids)
    if how == "a copy":  # it ran, the model did not
        model.save_pretrained(tmp_path / "fine")
        assert qquant.verify_directory(tmp_path / "fine", against=src).ok
        model = copy.deepcopy(model)
        model(ids)
    with pytest.raises(RunError, match="has not run"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_a_guarded_model_is_otherwise_what_it_was(pair: tuple[Path, Path]) -> None:
    loaded = qquant.load(pair[1], device="cpu", dtype="float32")
    other = plain(pair[1])
    assert isinstance(loaded.model, type(other)) and str(type(loaded.model)) == str(type(other))
    assert other.state_dict().keys() == loaded.model.state_dict().keys()
    reference = weakref.ref(loaded.model)
    gc.disable()
    try:
        del loaded
        assert reference() is None  # memory comes back at once
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
@PEFT_ASKS
def test_an_adapter_is_saved_after_training(kind: str, device: str, tmp_path: Path) -> None:
    """With gradient checkpointing; the base is refused, then and through the adapter's base."""
    from peft import LoraConfig, get_peft_model

    src = make(kind, tmp_path / "src")
    base = qquant.load(src, method="nf4", device=device, dtype="float32").model
    name = "activation_checkpointing_enable"  # in newer transformers
    getattr(base, name, getattr(base, "gradient_checkpointing_enable", None))(
        {"use_reentrant": False}
    )
    leaf = LINEAR[kind].rpartition(".")[2]
    model = get_peft_model(base, LoraConfig(target_modules=[leaf], task_type="CAUSAL_LM"))
    model.train()
    ids = IDS.to(device)
    model(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert all(".lora_" in name for name in stored(tmp_path / "adapter"))
    with pytest.raises(RunError, match="has not run"):
        base.save_pretrained(tmp_path / "base")
    with pytest.raises(RunError, match="has not run"):
        model.base_model.model.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_an_adapter_of_transformers_own_is_saved_too(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    model = qquant.load(pair[1], device="cpu", dtype="float32").model
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model(IDS)
    model.save_pretrained(tmp_path / "adapter")
    assert all(".lora_" in name for name in stored(tmp_path / "adapter"))


def run_on_avx512_bf16(model: Any) -> None:
    """What bitsandbytes 0.50.2 does in a forward on such a CPU, by its own code."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as repack

    for _, module in bnb_guard.bnb_linears(model):
        weight = module.weight
        weight.data, weight.quant_state = repack(weight.data, weight.quant_state)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_the_damage_of_saving_after_a_forward_is_seen(double: bool, tmp_path: Path) -> None:
    """absmax transposed in bfloat16: refused by `save`, found by `verify`, and really harmful."""
    src = make("qwen2", tmp_path / "src")
    spec = BnbSpec("nf4", double_quant=double)
    quantize_bnb(src, tmp_path / "good", spec, device="cpu")
    good = plain(tmp_path / "good", dtype=torch.bfloat16)
    model = plain(tmp_path / "good")
    run_on_avx512_bf16(model)
    assert "packed" in (bnb_guard.has_run(model) or "")
    with pytest.raises(RunError, match="AVX512-BF16"):
        bnb.save(model, tmp_path / "refused")

    model.save_pretrained(tmp_path / "bad", save_original_format=False)  # what a user would do
    if not double:
        absmax = stored(tmp_path / "bad")["model.layers.0.self_attn.q_proj.weight.absmax"]
        assert absmax.dtype == torch.bfloat16 and absmax.dim() == 2
        assert "scales of" in (bnb_guard.has_run(model) or "")  # and the model in memory stays so
        with torch.no_grad():
            broken = plain(tmp_path / "bad")
            assert not torch.allclose(broken(IDS).logits, good(IDS).logits, atol=0.1)
    report = qquant.verify_directory(tmp_path / "bad")
    assert not report.ok
    text = " ".join(map(str, report.problems))
    assert "AVX512-BF16" in text and ("nested_dtype" if double else "absmax") in text, text


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_saving_an_adapter_leaves_the_base_in_order(double: bool, tmp_path: Path) -> None:
    """peft takes a state dict of everything, which turns packed weights back: in order, here."""
    src = make("qwen2", tmp_path / "src")
    spec = BnbSpec("nf4", double_quant=double)
    model = qquant.load(src, method=spec, device="cpu", dtype="bfloat16").model
    with torch.no_grad():
        before = copy.deepcopy(model)(IDS).logits
        run_on_avx512_bf16(model)
        state = model.state_dict()
        assert not torch.isnan(model(IDS).logits).any()
        torch.testing.assert_close(model(IDS).logits, before, atol=0.05, rtol=0.05)
    (name,) = [n for n in state if n.endswith("layers.0.mlp.up_proj.weight.absmax")]
    assert state[name].dim() == 1
    with pytest.raises(RunError, match="has not run"):
        model.save_pretrained(tmp_path / "after")


def test_save_verifies_what_it_wrote(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that nothing marks, whose scales are not whole."""
    model = plain(pair[1])
    state = model.model.layers[1].mlp.up_proj.weight.quant_state
    state.absmax = state.absmax.clone()
    state.absmax[3] = float("nan")
    with pytest.raises(VerifyError, match=r"layers\.1\.mlp\.up_proj"):
        bnb.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
