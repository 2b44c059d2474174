"""bitsandbytes directories end to end: written without a forward, read by plain transformers, and
bit for bit what transformers' own quantizing on the fly makes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from bnb_tiny import FAMILIES, IDS, LINEAR, assert_same_state, make, plain, stored
from click.testing import CliRunner
from fresh import Interpreter
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

import qquant
import qquant.bnb_convert as bnb_convert
from qquant import BnbSpec, OutputSpec, QuantSpec
from qquant.bnb import save
from qquant.bnb_card import reproduce_bnb_command
from qquant.bnb_convert import quantize_bnb
from qquant.bnb_state import quantize_weight
from qquant.cli import cli
from qquant.errors import CheckpointError, SpecError, TargetError, VerifyError
from qquant.events import BlockDone, Event, LinearDone, Planned, Stage, Warned

SPECS = {
    "nf4": BnbSpec("nf4"),
    "nf4-double": BnbSpec("nf4", double_quant=True),
    "nf4-storage": BnbSpec("nf4", quant_storage="bfloat16"),
    "fp4": BnbSpec("fp4"),
    "int8": BnbSpec("int8"),
}


def transformers_config(spec: BnbSpec, compute: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """The same settings as a user of transformers writes them."""
    if spec.method == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=spec.int8_threshold,
            llm_int8_skip_modules=list(spec.skip),
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.method,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_quant_storage=spec.quant_storage,
        llm_int8_skip_modules=list(spec.skip),
    )


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_the_directory_is_what_transformers_would_make(
    kind: str, name: str, device: str, tmp_path: Path
) -> None:
    spec = SPECS[name]
    src, dst = make(kind, tmp_path / "src"), tmp_path / "dst"
    qquant.register()
    result = qquant.quantize(src, dst, spec, device=device)
    assert result.path == dst.resolve()

    config = transformers_config(spec)
    on_the_fly = plain(src, device, quantization_config=config, dtype=torch.bfloat16)
    assert_same_state(stored(dst), {n: t.clone() for n, t in on_the_fly.state_dict().items()})
    reloaded = plain(dst, device)
    assert_same_state(reloaded.state_dict(), stored(dst))
    linear = reloaded.get_submodule(LINEAR[kind])  # c_attn in original Qwen: fused, and quantized
    assert type(linear).__name__ == ("Linear8bitLt" if name == "int8" else "Linear4bit")
    assert type(reloaded.get_output_embeddings()) is torch.nn.Linear
    with torch.no_grad():
        ids = IDS.to(device)
        assert torch.equal(reloaded(ids).logits, on_the_fly(ids).logits)

    written = json.loads((dst / "config.json").read_text())
    assert written["quantization_config"] == json.loads(json.dumps(config.to_dict()))
    assert written["torch_dtype"] == "bfloat16"
    assert not (dst / "quantize_config.json").exists()
    again = save(plain(dst, device), tmp_path / "again")
    assert_same_state(stored(again), stored(dst))


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_events_report_manifest_and_card(name: str, tmp_path: Path) -> None:
    src, dst = make("qwen", tmp_path / "src"), tmp_path / "dst"
    events: list[Event] = []
    result = quantize_bnb(src, dst, SPECS[name], device="cpu", progress=events.append)
    stages = [e.name for e in events if isinstance(e, Stage)]
    assert stages == ["read", "quantize", "write", "verify", "publish"]
    (planned,) = [e for e in events if isinstance(e, Planned)]
    done = [e for e in events if isinstance(e, LinearDone)]
    assert planned.linears == len(done) == len(result.layers) == 10
    assert planned.calibration_tokens == 0
    assert [e.block for e in events if isinstance(e, BlockDone)] == [0, 1]
    assert not [e for e in events if isinstance(e, Warned)]
    worst = 0.02 if name == "nf4-double" else 0.001
    assert all(0 < layer.rel_error < worst for layer in result.layers)

    manifest = json.loads((dst / "qquant_manifest.json").read_text())
    assert BnbSpec.from_dict(manifest["quantization"]) == SPECS[name]
    assert manifest["versions"]["bitsandbytes"]
    assert manifest["calibration"] is None
    files = {p.name for p in dst.iterdir()} - {"qquant_manifest.json", "SHA256SUMS"}
    assert set(manifest["files"]) == files
    assert {"modeling_qwen.py", "qwen.tiktoken", "README.md"} <= files
    card = (dst / "README.md").read_text()
    assert "- bitsandbytes" in card and "base_model_relation: quantized" in card
    assert "--method " + SPECS[name].method in reproduce_bnb_command(manifest)
    assert reproduce_bnb_command(manifest, "src-X") in card.replace("src-NF4", "src-X").replace(
        "src-Int8", "src-X"
    )


def test_the_errors_reported_are_those_of_the_weights(device: str) -> None:
    """Against bitsandbytes' own dequantizing, with one slice and with several."""
    import bitsandbytes.functional as functional

    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for spec in SPECS.values():
        done = quantize_weight(weight, spec, torch.device(device))
        if spec.method == "int8":
            own = functional.int8_vectorwise_dequant(done.parts["weight"], done.parts["SCB"])
        else:
            # A block a row: bitsandbytes 0.50.2 dequantizes wrongly on CPUs with AVX-512 where a
            # block goes on in the next row, as it does in this weight.
            packed, state = functional.quantize_4bit(
                weight.view(-1, 64).to(device),
                quant_type=spec.method,
                compress_statistics=spec.double_quant,
                quant_storage=getattr(torch, spec.quant_storage),
            )
            assert torch.equal(packed.cpu(), done.parts["weight"])
            own = functional.dequantize_4bit(packed, state).cpu().view(weight.shape)
        loss = float((own.float() - weight.float()).square().sum())
        assert done.loss == pytest.approx(loss, rel=1e-3)
        assert done.norm == pytest.approx(float(weight.float().square().sum()), rel=1e-3)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", [(96, 80), (7, 200), (65, 24)])
def test_slices_change_nothing(
    name: str, shape: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows do not begin at a block."""
    import qquant.bnb_state as bnb_state

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = quantize_weight(weight, SPECS[name], torch.device(device))
    monkeypatch.setattr(bnb_state, "_SLICE", 64)
    parts = quantize_weight(weight, SPECS[name], torch.device(device))
    assert_same_state(parts.parts, whole.parts)
    assert parts.loss == pytest.approx(whole.loss)


def test_what_is_left_out_by_name_stays_and_is_written_in_full(device: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    spec = BnbSpec("nf4", skip=("lm_head", "mlp.down_proj", "model.layers.1.self_attn"))
    quantize_bnb(src, tmp_path / "dst", spec, device=device)
    tensors = stored(tmp_path / "dst")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        assert torch.equal(tensors[f"{name}.weight"], stored(src)[f"{name}.weight"])
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    skip = config["llm_int8_skip_modules"]
    assert len(skip) == 1 + 2 + 4 and "model.layers.1.self_attn.q_proj" in skip
    assert_same_state(plain(tmp_path / "dst", device).state_dict(), tensors)
    assert qquant.verify_directory(tmp_path / "dst", against=src).ok
    with pytest.raises(SpecError, match=r"\(skip\) 'mlp\.down'"):
        quantize_bnb(src, tmp_path / "other", BnbSpec("nf4", skip=("mlp.down",)), device="cpu")


def test_a_head_of_its_own_can_be_quantized_and_a_tied_one_not(device: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    spec = BnbSpec("int8", skip=())
    quantize_bnb(src, tmp_path / "dst", spec, device=device)
    assert "lm_head.SCB" in stored(tmp_path / "dst")
    assert_same_state(plain(tmp_path / "dst", device).state_dict(), stored(tmp_path / "dst"))
    tied = make("qwen2", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*--skip-module lm_head"):
        quantize_bnb(tied, tmp_path / "no", spec, device="cpu")
    quantize_bnb(tied, tmp_path / "yes", BnbSpec("int8"), device=device)
    assert "lm_head.weight" not in stored(tmp_path / "yes")
    model = plain(tmp_path / "yes", device)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_several_shards_and_another_dtype(device: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src", hidden_size=256, intermediate_size=1024, vocab_size=2048)
    out = OutputSpec(dtype="float16", shard_size=1_000_000)
    quantize_bnb(src, tmp_path / "dst", BnbSpec("nf4"), out, device=device)
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) > 1
    assert qquant.verify_directory(tmp_path / "dst", against=src).ok
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    quant = transformers_config(BnbSpec("nf4"))
    on_the_fly = plain(src, device, quantization_config=quant, dtype=torch.float16)
    assert_same_state(stored(tmp_path / "dst"), on_the_fly.state_dict())


SCRIPT = """
import sys
from qquant import BnbSpec, quantize
print(quantize(sys.argv[1], sys.argv[2], BnbSpec(sys.argv[3]), device="cpu").peak_bytes)
"""


def fresh_run(process: Interpreter, src: Path, dst: Path, method: str) -> int:
    """A run in a process of its own; its peak resident bytes."""
    ended = process.run(SCRIPT, str(src), str(dst), method)
    assert ended.code == 0, ended.err
    return int(ended.out)


def test_memory_does_not_grow_with_depth(interpreter: Interpreter, tmp_path: Path) -> None:
    peaks, weights = [], []
    for layers in (1, 4):
        src = make(
            "qwen2",
            tmp_path / f"src{layers}",
            num_hidden_layers=layers,
            hidden_size=1024,
            intermediate_size=4096,
            head_dim=64,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
        weights.append((src / "model.safetensors").stat().st_size)
        peaks.append(fresh_run(interpreter, src, tmp_path / f"dst{layers}", "nf4"))
    assert weights[1] - weights[0] > 100_000_000
    # Peaks differ by a few megabytes from run to run; a held model would add all of it.
    assert peaks[1] - peaks[0] < 0.25 * (weights[1] - weights[0])


def test_the_same_bytes_in_fresh_processes(
    interpreter: Interpreter, another_interpreter: Interpreter, tmp_path: Path
) -> None:
    src = make("qwen2", tmp_path / "src")
    for parent, process in (("a", interpreter), ("b", another_interpreter)):
        (tmp_path / parent).mkdir()
        fresh_run(process, src, tmp_path / parent / "dst", "nf4")
    files = sorted((tmp_path / "a" / "dst").iterdir())
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / "dst" / file.name).read_bytes(), file.name


def test_refused_interrupted_and_failed_runs_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"

    def interrupt(event: Event) -> None:
        if isinstance(event, BlockDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_bnb(src, dst, device="cpu", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]

    tensors = load_file(src / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for value, spec, words in (
        (float("nan"), BnbSpec("nf4"), "finite weights"),
        (1e6, BnbSpec("int8"), r"fit float16.*--method nf4"),
    ):
        bad = {**tensors, name: tensors[name].clone()}
        bad[name][0, 0] = value
        save_file(bad, src / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            quantize_bnb(src, dst, spec, device="cpu")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
    save_file(tensors, src / "model.safetensors", {"format": "pt"})

    with monkeypatch.context() as patch:  # a disk that gives back something else
        count = itertools.count()
        patch.setattr(bnb_convert, "tensor_sha256", lambda tensor: str(next(count)))
        with pytest.raises(VerifyError, match="not what was written"):
            quantize_bnb(src, dst, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]

    quantize_bnb(src, dst, device="cpu")
    with pytest.raises(TargetError):
        quantize_bnb(src, dst, device="cpu")
    with pytest.raises(CheckpointError, match="already quantized"):
        quantize_bnb(dst, tmp_path / "again", device="cpu")
    quantize_bnb(src, dst, BnbSpec("int8"), device="cpu", overwrite=True)
    with pytest.raises(SpecError, match="reads no data"):
        qquant.quantize(src, tmp_path / "x", BnbSpec(), tokens=torch.zeros(1, 1))


def invoke(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(w) for w in words])
    return done.exit_code, done.output


def test_the_command_line(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    for words, method in (
        (("--method", "nf4"), "nf4"),
        (("--bits", "4", "--method", "bnb"), "nf4"),
        (("--bits", "8", "--method", "bnb"), "int8"),
        (("--method", "fp4", "--bits", "4"), "fp4"),
        (("--method", "int8", "--int8-threshold", "0"), "int8"),
    ):
        code, output = invoke("quantize", src, "-o", tmp_path / "dst", "--overwrite", *words)
        assert code == 0, output
        config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
        assert config["load_in_8bit"] == (method == "int8")
        assert method == "int8" or config["bnb_4bit_quant_type"] == method
    assert config["llm_int8_threshold"] == 0.0
    code, output = invoke(
        *("quantize", src, "-o", tmp_path / "dst", "--overwrite", "--method", "nf4"),
        *("--double-quant", "--quant-storage", "bfloat16", "--compute-dtype", "float16"),
        *("--skip-module", "lm_head", "--skip-module", "mlp.c_proj", "--dtype", "float16"),
        "--log-json",
    )
    assert code == 0, output
    done = json.loads(output.splitlines()[-1])
    assert (done["event"], done["linears"]) == ("done", 8)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["fp16"] is True
    quant = config["quantization_config"]
    assert quant["bnb_4bit_use_double_quant"] is True
    assert quant["bnb_4bit_quant_storage"] == "bfloat16"
    assert quant["bnb_4bit_compute_dtype"] == "float16"
    code, output = invoke("verify", tmp_path / "dst", "--against", src)
    assert code == 0 and "8 linears compared" in output
    code, output = invoke("inspect", tmp_path / "dst")
    assert code == 0 and "bitsandbytes NF4" in output and "double quantization" in output


def test_a_gptq_run_that_ended_early_is_kept_until_restart(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"

    def interrupt(event: Event) -> None:
        if isinstance(event, BlockDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spec = QuantSpec(method="rtn", group_size=32)
        qquant.quantize(src, dst, spec, device="cpu", progress=interrupt)
    code, output = invoke("quantize", src, "-o", dst, "--method", "nf4")
    assert code == 2 and "--restart to begin anew" in output, output
    code, output = invoke("quantize", src, "-o", dst, "--method", "nf4", "--restart")
    assert code == 0, output
    assert qquant.verify_directory(dst, against=src).ok


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "bnb"), "--bits 4 (NF4) or --bits 8 (Int8)"),
        (("--method", "bnb", "--bits", "3"), "got --bits 3"),
        (("--method", "nf4", "--bits", "8"), "expected 4, got 8"),
        (("--method", "nf5"), "gptq, rtn, nf4, fp4, int8, bnb"),
        (("--method", "nf4", "--group-size", "64"), "--group-size"),
        (("--method", "nf4", "--calib", "builtin"), "--calib"),
        (("--method", "nf4", "--recipe", "qwen"), "--recipe"),
        (("--double-quant",), "--method nf4, fp4, int8 or bnb"),
        (("--skip-module", "lm_head"), "--skip-module"),
        (("--method", "int8", "--double-quant"), "--double-quant (double_quant)"),
        (("--method", "nf4", "--int8-threshold", "5"), "--int8-threshold (int8_threshold)"),
        (("--method", "nf4", "--quant-storage", "int3"), "--quant-storage uint8"),
        (("--method", "nf4", "--compute-dtype", "int8"), "--compute-dtype auto"),
        (("--method", "nf4", "--skip-module", "nothing"), "--skip-module (skip) 'nothing'"),
        (
            ("--method", "int8", "--skip-module", "model", "--skip-module", "lm_head"),
            "--skip-module (skip) model, lm_head: expected some linear left to quantize",
        ),
    ],
)
def test_contradictions_are_refused_by_name(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    src = make("qwen2", tmp_path / "src")
    code, output = invoke("quantize", src, "-o", tmp_path / "dst", *words)
    assert code == 2 and message in output, output
    assert len(output.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
