"""What people train and save: merged LoRA, Trainer folders, other vocabularies, any float dtype."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_targets import write_tokenizer
from safetensors.torch import load_file, save_file
from test_convert import SPEC, native_checkpoint, run
from test_families import whole_way

from qquant import CalibrationSpec, QuantSpec, quantize
from qquant.errors import CheckpointError, QQuantError
from qquant.runtime import load
from qquant.verify import verify

RTN = QuantSpec(method="rtn", group_size=32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_merged_adapter(tmp_path: Path) -> None:
    """peft's own merging; the adapter's files may lie beside the result."""
    peft = pytest.importorskip("peft", reason="needs the extra qquant[bnb]")
    from transformers import AutoModelForCausalLM

    base, src = native_checkpoint(tmp_path / "base", "qwen2"), tmp_path / "src"
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(model, lora)
    trained.save_pretrained(tmp_path / "adapter")
    trained.merge_and_unload().save_pretrained(src)
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copyfile(file, src / file.name)
    name = "model.layers.0.mlp.down_proj.weight"
    before, merged = (load_file(p / "model.safetensors") for p in (base, src))
    assert before.keys() == merged.keys() and not torch.equal(before[name], merged[name])
    whole_way(src, tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("adapter_*"))


def test_an_adapter_by_itself_is_told_what_to_do(tmp_path: Path) -> None:
    src = tmp_path / "adapter"
    src.mkdir()
    (src / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(1)}, src / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter.*merge_and_unload"):
        run(src, tmp_path / "dst")


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_a_trainers_checkpoint(tmp_path: Path) -> None:
    """Its state is neither read, nor unpickled, nor copied; nor is code that DeepSpeed leaves."""
    src, dst, sprung = (
        native_checkpoint(tmp_path / "src", "qwen3"),
        tmp_path / "dst",
        tmp_path / "x",
    )
    pickles = ["optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state.pth"]
    pickles += ["rng_state_0.pth", "pytorch_model.bin"]
    (src / "global_step40").mkdir()
    pickles += ["global_step40/mp_rank_00_model_states.pt"]
    for name in pickles:
        (src / name).write_bytes(pickle.dumps(Bomb(sprung)))
    (src / "trainer_state.json").write_text('{"global_step": 40')  # not even JSON
    (src / "latest").write_text("global_step40")
    (src / "zero_to_fp32.py").write_text("raise SystemExit")
    (src / "runs").mkdir()
    (src / "runs" / "events.out.tfevents.1").write_bytes(b"\0")
    whole_way(src, dst)
    assert not sprung.exists()
    got = {p.name for p in dst.iterdir()}
    assert got == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "configuration.json",
        "generation_config.json",
        "model.safetensors",
        "qquant_manifest.json",
        "quantize_config.json",
    }
    pickle.loads((src / "optimizer.pt").read_bytes()).close()
    assert sprung.exists(), "the pickles were live"


def text_calibration(path: Path) -> CalibrationSpec:
    path.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return CalibrationSpec(sources=(str(path),), samples=8, seqlen=24)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [260, 320])
def test_a_resized_vocabulary(tied: bool, rows: int, tmp_path: Path) -> None:
    """Tokens were added and the embedding padded, so that it has more rows than tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    src, dst = tmp_path / "src", tmp_path / "dst"
    base = native_checkpoint(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    write_tokenizer(src)
    tokenizer = AutoTokenizer.from_pretrained(src)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(src)
    assert len(tokenizer) < rows
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    model.save_pretrained(src)
    quantize(src, dst, SPEC, text_calibration(tmp_path / "text.txt"), device="cpu")
    assert verify(dst, against=src).ok
    stored = load_file(dst / "model.safetensors")
    assert stored["model.embed_tokens.weight"].shape[0] == rows
    assert ("lm_head.weight" in stored) != tied
    loaded = load(dst, device="cpu", dtype="float32")
    assert len(loaded.tokenizer) == len(tokenizer)
    ids = loaded.tokenizer("the <think>", return_tensors="pt")["input_ids"]
    assert int(ids.max()) == len(tokenizer) - 1, "the added token"
    assert loaded.model(ids).logits.shape[-1] == rows


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    """Tokens were added and the embedding was not resized; the calibration text has one of them."""
    from transformers import AutoTokenizer

    src = native_checkpoint(tmp_path / "src", "qwen2", vocab_size=260)
    write_tokenizer(src)
    tokenizer = AutoTokenizer.from_pretrained(src)
    tokenizer.add_tokens([f"<tool_{i}>" for i in range(9)])
    tokenizer.save_pretrained(src)
    text = tmp_path / "text.txt"
    text.write_text("Call <tool_8> now. " * 400)
    calib = CalibrationSpec(sources=(str(text),), samples=8, seqlen=24)
    with pytest.raises(CheckpointError, match="260 rows"):
        quantize(src, tmp_path / "dst", SPEC, calib, device="cpu")
    assert not (tmp_path / "dst").exists()


def in_dtype(src: Path, dtype: torch.dtype) -> None:
    tensors = load_file(src / "model.safetensors")
    cast = {n: t.to(dtype) for n, t in tensors.items()}
    save_file(cast, src / "model.safetensors", {"format": "pt"})
    config = json.loads((src / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (src / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sources_of_any_float_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same weights in either dtype: one grid, codes of one rounding."""
    src = native_checkpoint(tmp_path / "src", "qwen2")
    plain = quantize(src, tmp_path / "plain", RTN, device="cpu").path
    in_dtype(src, dtype)
    whole_way(src, tmp_path / "dst")
    other = quantize(src, tmp_path / "other", RTN, device="cpu").path
    one, two = (load_file(p / "model.safetensors") for p in (plain, other))
    packed = [n for n in one if n.endswith(".qweight")]
    assert packed and all(torch.equal(one[n], two[n]) for n in packed)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_a_source_in_shards_is_the_same_model(kind: str, tmp_path: Path) -> None:
    from test_experts import tiny
    from transformers import AutoModelForCausalLM

    src, cut = tmp_path / "src", tmp_path / "cut"
    if kind == "qwen2":
        native_checkpoint(src, kind)
    else:
        tiny(kind).to(torch.bfloat16).save_pretrained(src)
    AutoModelForCausalLM.from_pretrained(src, dtype="auto").save_pretrained(
        cut, max_shard_size="50KB"
    )
    assert not (cut / "model.safetensors").exists()
    assert len(list(cut.glob("model-*.safetensors"))) > 2
    one, two = (run(p, tmp_path / f"{p.name}-dst").path for p in (src, cut))
    first, second = (load_file(p / "model.safetensors") for p in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    (cut / "model.safetensors.index.json").unlink()
    with pytest.raises(QQuantError, match="index"):
        run(cut, tmp_path / "never")
