"""The whole run on tiny checkpoints: what is written, that it loads, what it costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import Interpreter
from qwen_tiny import write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qquant.convert as convert
from qquant import blocks, gptq
from qquant.calibration.hold import Holder
from qquant.checkpoint import Checkpoint
from qquant.config import CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
from qquant.convert import quantize
from qquant.errors import CheckpointError, SpecError, TargetError, VerifyError
from qquant.events import BlockDone, Event, LinearDone, Planned, Stage, Warned
from qquant.factor import factorize
from qquant.grid import dequantize
from qquant.pack import unpack_codes, unpack_zeros
from qquant.result import Result
from qquant.runtime import load
from qquant.verify import verify

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
SPEC = QuantSpec(group_size=32)


def native_checkpoint(path: Path, model_type: str, **changes: object) -> Path:
    """A random Qwen2 or Qwen3 checkpoint in bfloat16; no tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(model_type, **(settings | changes))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


def make(kind: str, path: Path) -> Path:
    return write_checkpoint(path) if kind == "qwen" else native_checkpoint(path, kind)


def run(src: Path, dst: Path, spec: QuantSpec = SPEC, **kwargs: object) -> Result:
    return quantize(src, dst, spec, tokens=TOKENS, device="cpu", **kwargs)


def plain_weights(directory: Path, bits: int = 4) -> dict[str, Tensor]:
    """Every weight of a GPTQ directory, dequantized by its own words and nothing of the loader."""
    stored: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    plain = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            base = name.removesuffix(".qweight")
            own = bits or tensor.shape[0] * 32 // stored[f"{base}.g_idx"].numel()
            plain[f"{base}.weight"] = dequantize(
                unpack_codes(tensor, own),
                stored[f"{base}.scales"].T.float(),
                unpack_zeros(stored[f"{base}.qzeros"], own),
            )
        elif name.rpartition(".")[2] not in ("qzeros", "scales", "g_idx"):
            plain[name] = tensor.float()
    return plain


def plain_weights_of(directory: Path) -> dict[str, Tensor]:
    """The same where linears differ: each by the bits that its words make."""
    return plain_weights(directory, bits=0)


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", ["default", "qwen"])
def test_end_to_end(kind: str, recipe: str, tmp_path: Path) -> None:
    src, dst = make(kind, tmp_path / "src"), tmp_path / "dst"
    events: list[Event] = []
    spec = spec_from_recipe(recipe, group_size=32)
    result = run(src, dst, spec, progress=events.append)

    assert result.path == dst.resolve()
    stages = [e.name for e in events if isinstance(e, Stage)]
    assert stages == ["read", "calibrate", "quantize", "write", "verify", "publish"]
    plan = next(e for e in events if isinstance(e, Planned))
    done = [e for e in events if isinstance(e, LinearDone)]
    assert plan.linears == len(done) == len(result.layers)
    assert plan.calibration_tokens == TOKENS.numel()
    assert sum(isinstance(e, BlockDone) for e in events) == plan.blocks == 2
    assert list(result.layers) == done
    assert all(0 < layer.rel_error < 0.1 and not layer.flags for layer in result.layers)

    quant = json.loads((dst / "quantize_config.json").read_text())
    config = json.loads((dst / "config.json").read_text())
    assert config["quantization_config"] == quant
    assert quant["checkpoint_format"] == quant["quant_method"] == "gptq"
    assert quant["desc_act"] is False
    assert config["torch_dtype"] == "float16"
    if kind == "qwen":
        assert (config["fp16"], config["bf16"], config["fp32"]) == (True, False, False)
        assert (dst / "modeling_qwen.py").is_file()
        assert (dst / "qwen.tiktoken").read_bytes() == (src / "qwen.tiktoken").read_bytes()

    # Its logits are those of the plain float model with the dequantized weights in it.
    loaded = load(dst, device="cpu", dtype="float32").model
    reference = load(src, device="cpu", dtype="float32").model
    weights = plain_weights(dst)
    with torch.no_grad():
        ids = TOKENS[:2]
        float_logits = reference(ids).logits
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights[name])
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(loaded(ids).logits, float_logits, atol=1e-3), "it is quantized"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_every_grid_is_written_and_read_back(
    bits: int, sym: bool, group: int, tmp_path: Path
) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    run(src, dst, QuantSpec(bits=bits, sym=sym, group_size=group, sweeps=1))  # verifies itself
    original, stored = load_file(src / "model.safetensors"), plain_weights(dst, bits)
    worst = {2: 0.8, 3: 0.4, 4: 0.2, 8: 0.02}[bits]
    for name, weight in stored.items():
        w = original[name].float()
        assert (weight - w).norm() <= worst * w.norm(), name
    with safe_open(dst / "model.safetensors", "pt") as file:
        zeros = file.get_tensor("model.layers.0.mlp.up_proj.qzeros")
        g_idx = file.get_tensor("model.layers.0.mlp.up_proj.g_idx")
    if sym and bits in (4, 8):
        assert set(zeros.flatten().tolist()) == {0x77777777 if bits == 4 else 0x7F7F7F7F}
    assert g_idx.tolist() == [i // (64 if group == -1 else group) for i in range(64)]


def test_the_published_layout_of_original_qwen(tmp_path: Path) -> None:
    """Names, dtypes and shapes as in Qwen's own Int4 files, a bias for every linear included."""
    src, dst = make("qwen", tmp_path / "src"), tmp_path / "dst"
    run(src, dst)
    stored = load_file(dst / "model.safetensors")
    block = {n.removeprefix("transformer.h.1.") for n in stored if n.startswith("transformer.h.1.")}
    kinds = ("qweight", "qzeros", "scales", "g_idx", "bias")
    linears = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    want = {f"{name}.{kind}" for name in linears for kind in kinds}
    assert block == want | {"ln_1.weight", "ln_2.weight"}
    outside = {n for n in stored if not n.startswith("transformer.h.")}
    assert outside == {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert not stored["transformer.h.0.mlp.w1.bias"].any()
    source = load_file(src / "model.safetensors")
    bias = "transformer.h.0.attn.c_attn.bias"
    assert torch.equal(stored[bias], source[bias].half())
    dtypes = {kind: stored[f"transformer.h.0.mlp.w1.{kind}"].dtype for kind in kinds}
    assert dtypes["qweight"] == dtypes["qzeros"] == dtypes["g_idx"] == torch.int32
    assert dtypes["scales"] == dtypes["bias"] == torch.float16


def test_shards_are_the_same_tensors(tmp_path: Path) -> None:
    src = native_checkpoint(
        tmp_path / "src", "qwen2", hidden_size=256, intermediate_size=512, vocab_size=4096
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    spec = QuantSpec(method="rtn", group_size=32)
    quantize(src, whole, spec, device="cpu")
    quantize(src, cut, spec, out=OutputSpec(shard_size=1_000_000), device="cpu")
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, many = load_file(whole / "model.safetensors"), {}
    for file in set(index["weight_map"].values()):
        many |= load_file(cut / file)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[n], many[n]) for n in one)


def test_rounding_needs_no_calibration(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    events: list[Event] = []
    quantize(src, dst, QuantSpec(method="rtn", group_size=32), device="cpu", progress=events.append)
    assert next(e for e in events if isinstance(e, Planned)).calibration_tokens == 0
    assert json.loads((dst / "qquant_manifest.json").read_text())["calibration"] is None


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    native_checkpoint(src, "qwen2", tie_word_embeddings=True)
    run(src, dst)
    assert "lm_head.weight" not in load_file(dst / "model.safetensors")
    assert load(dst, device="cpu").model(TOKENS[:1]).logits.shape == (1, 24, 256)


SCRIPT = """
import sys, torch
from qquant import quantize, spec_from_recipe
torch.manual_seed(0)
tokens = torch.randint(0, 256, (8, 64))
import qquant.calibration.hold
qquant.calibration.hold.SLAB = 1 << 20  # activations are cut from slabs, filled over several blocks
spec = spec_from_recipe("default", group_size=32)
print(quantize(sys.argv[1], sys.argv[2], spec, tokens=tokens, device="cpu").peak_bytes)
"""


def fresh_run(process: Interpreter, src: Path, dst: Path) -> int:
    """A run in a process of its own; its peak resident bytes."""
    ended = process.run(SCRIPT, str(src), str(dst))
    assert ended.code == 0, ended.err
    return int(ended.out)


def test_the_same_bytes_in_fresh_processes(
    interpreter: Interpreter, another_interpreter: Interpreter, tmp_path: Path
) -> None:
    src = make("qwen2", tmp_path / "src")
    targets = [tmp_path / "a" / "dst", tmp_path / "b" / "dst"]
    for process, target in zip((interpreter, another_interpreter), targets, strict=True):
        target.parent.mkdir()
        fresh_run(process, src, target)
    names = sorted(p.name for p in targets[0].iterdir())
    assert names == sorted(p.name for p in targets[1].iterdir())
    for name in names:
        assert (targets[0] / name).read_bytes() == (targets[1] / name).read_bytes(), name


def test_memory_does_not_grow_with_depth(interpreter: Interpreter, tmp_path: Path) -> None:
    """Five times the layers, the same peak within 10%, and far less more than their weights weigh.

    Of two layers at least: the second is read while the first is worked on, as each further one is.

    Freed blocks go back to the system at once here, and slabs are small. Left to itself glibc's
    heap keeps up to `Tidy`'s slack, more or less from run to run, and the second bound is narrower.
    """
    peaks, weights = [], []
    for layers in (2, 10):
        src = native_checkpoint(
            tmp_path / f"src{layers}",
            "qwen2",
            num_hidden_layers=layers,
            hidden_size=512,
            intermediate_size=2048,
            head_dim=64,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        weights.append((src / "model.safetensors").stat().st_size)
        peaks.append(fresh_run(interpreter, src, tmp_path / f"dst{layers}"))
    assert abs(peaks[1] - peaks[0]) <= 0.1 * peaks[0]
    assert peaks[1] - peaks[0] <= 0.5 * (weights[1] - weights[0])


def test_peak_memory_is_of_this_process_only(tmp_path: Path) -> None:
    """A child's `ru_maxrss` starts at its parent's; what a run reports must not."""
    script = (
        "import subprocess, sys\n"
        "held = b'x' * (1 << 30)\n"
        "code = 'from qquant.host import peak_memory; print(peak_memory())'\n"
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
        "print(len(held))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    child, held = map(int, done.stdout.split())
    assert child < held


def damaged(src: Path, name: str, value: Tensor) -> None:
    tensors = load_file(src / "model.safetensors")
    save_file(tensors | {name: value}, src / "model.safetensors", {"format": "pt"})


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    name = "model.layers.1.mlp.up_proj.weight"
    bad = load_file(src / "model.safetensors")[name]
    bad[3, 4] = float("nan")
    damaged(src, name, bad)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*1 NaN"):
        run(src, dst)
    assert not dst.exists()


def test_an_embedding_too_large_for_float16_names_the_cure(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    name = "lm_head.weight"
    head = load_file(src / "model.safetensors")[name]
    head[0, 0] = 1e30
    damaged(src, name, head)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*--dtype bfloat16"):
        run(src, dst)
    assert not dst.exists()
    run(src, dst, out=OutputSpec(dtype="bfloat16"))
    assert load_file(dst / "model.safetensors")[name].dtype == torch.bfloat16


def test_refusals_before_any_work(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    with pytest.raises(SpecError, match=r"group size 128.*--group-size 32"):
        run(src, dst, QuantSpec(group_size=128))
    run(src, dst)
    with pytest.raises(CheckpointError, match="already quantized"):
        run(dst, tmp_path / "again")
    with pytest.raises(TargetError):
        run(src, dst)
    before = (dst / "model.safetensors").stat().st_mtime_ns
    run(src, dst, overwrite=True)
    assert (dst / "model.safetensors").stat().st_mtime_ns != before
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model_type.*'llama'"):
        run(src, tmp_path / "other")
    (src / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(CheckpointError, match=r"hidden_size: expected 64, as the weights"):
        run(src, tmp_path / "other")
    (src / "config.json").write_text(json.dumps(config | {"num_attention_heads": "four"}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(src, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_a_failed_verification_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    original = blocks.pack

    def wrong_zeros(codes: Tensor, scales: Tensor, zeros: Tensor, **kwargs: object) -> object:
        return original(codes, scales, zeros - 1, **kwargs)

    monkeypatch.setattr(blocks, "pack", wrong_zeros)
    with pytest.raises(VerifyError):
        run(src, dst)
    assert not dst.exists()


def test_broken_side_files_are_refused_before_any_work(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    (src / "generation_config.json").write_text('{"top_p": ')
    events: list[Event] = []
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        quantize(
            src, dst, QuantSpec(method="rtn", group_size=32), device="cpu", progress=events.append
        )
    assert events == [Stage("read")]


def test_extra_merges_travel(tmp_path: Path) -> None:
    src, dst = make("qwen", tmp_path / "src"), tmp_path / "dst"
    (src / "qwen_extra.tiktoken").write_text("YWJj 265\n")
    run(src, dst)
    assert (dst / "qwen_extra.tiktoken").read_bytes() == (src / "qwen_extra.tiktoken").read_bytes()


def test_few_tokens_and_few_bits_still_publish(tmp_path: Path) -> None:
    """Weights may move far where the Hessian permits it: no reason to throw the run away."""
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    spec = QuantSpec(bits=2, group_size=32, damp=0.001, correct_damp=0.001)
    result = quantize(src, dst, spec, tokens=TOKENS[:1], device="cpu")
    report = verify(dst, against=src)
    assert report.ok
    for layer, row in zip(result.layers, report.layers, strict=True):
        assert (row.relative_error or 0) > (row.rounding_error or 1), "moved far"
        assert layer.rel_error < 0.05, "where the data does not look: rounding costs 0.1"


def warnings_of(src: Path, dst: Path, spec: QuantSpec, tokens: Tensor = TOKENS) -> list[str]:
    """What a run warns of; checks that a block ends with a warning of each flagged linear."""
    events: list[Event] = []
    result = quantize(src, dst, spec, tokens=tokens, device="cpu", progress=events.append)
    flagged: list[str] = []
    told: list[str] = []
    for event in events:
        if isinstance(event, LinearDone) and event.flags:
            flagged.append(event.name)
        elif isinstance(event, Warned) and event.text.startswith("model.layers."):
            told.append(event.text.partition(": ")[0])
        elif isinstance(event, BlockDone):
            assert told == flagged
    unusual = sum(bool(layer.flags) for layer in result.layers)
    texts = [event.text for event in events if isinstance(event, Warned)]
    assert sum(text.startswith("model.layers.") for text in texts) == unusual
    return texts


def test_what_does_not_stop_a_run_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    src = make("qwen2", tmp_path / "src")
    plenty = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(1))
    assert warnings_of(src, tmp_path / "plain", SPEC, plenty) == []

    # Fewer tokens than inputs, and no damping: singular Hessians.
    texts = warnings_of(src, tmp_path / "few", replace(SPEC, damp=0.0), TOKENS[:1])
    assert texts[0].startswith("Too little calibration data: 24 tokens")
    assert sum("needed more damping" in text for text in texts) == 14
    assert [r.getMessage() for r in caplog.records if r.name == "qquant.convert"] == texts

    def spilling(*_: object, **__: object) -> Holder:
        return Holder(host_budget=0, spill_outputs=True)

    monkeypatch.setattr(convert, "make_holder", spilling)
    (text,) = warnings_of(src, tmp_path / "spilled", SPEC, plenty)
    assert "do not fit in memory" in text and "--samples" in text
    monkeypatch.undo()

    def singular(h: Tensor, damp: float, order: Tensor) -> tuple[Tensor | None, float]:
        return (None, damp) if damp == 0.3 else factorize(h, damp, order)

    monkeypatch.setattr(gptq, "factorize", singular)
    texts = warnings_of(src, tmp_path / "skipped", replace(SPEC, correct_damp=0.3), plenty)
    assert len(texts) == 14 and all("without the input correction" in text for text in texts)
    texts = warnings_of(src, tmp_path / "rounded", replace(SPEC, damp=0.3), plenty)
    assert len(texts) == 14 and all("fell back to rounding" in text for text in texts)


def test_the_qwen_recipe_is_the_published_one(tmp_path: Path) -> None:
    """Values of Qwen's run_gptq.py and of the published quantize_config.json."""
    src, dst = make("qwen", tmp_path / "src"), tmp_path / "dst"
    run(src, dst, spec_from_recipe("qwen", group_size=32))
    quant = json.loads((dst / "quantize_config.json").read_text())
    published = {
        "bits": 4,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    assert {k: quant[k] for k in published} == published
    stored = load_file(dst / "model.safetensors")
    assert all(bool((t > 0).all()) for n, t in stored.items() if n.endswith(".scales"))


def test_a_tensor_that_reads_back_differently_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    hashes = iter(range(10**6))
    monkeypatch.setattr(Checkpoint, "tensor_sha256", lambda *_: str(next(hashes)))
    with pytest.raises(VerifyError, match="is not what was written"):
        run(src, dst)
    assert not dst.exists()


def test_an_interrupt_before_the_first_block_is_done_leaves_nothing(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"

    def interrupt(event: Event) -> None:
        if isinstance(event, LinearDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(src, dst, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_calibration_from_the_model_itself(tmp_path: Path) -> None:
    src, dst = make("qwen", tmp_path / "src"), tmp_path / "dst"
    calib = CalibrationSpec(sources=("self",), samples=4, seqlen=24)
    quantize(src, dst, SPEC, calib, device="cpu")
    manifest = json.loads((dst / "qquant_manifest.json").read_text())
    assert manifest["calibration"]["shape"] == [4, 24]
    assert manifest["calibration"]["sources"][0]["name"] == "self"
