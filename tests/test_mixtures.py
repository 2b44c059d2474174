"""Qwen2-MoE and Qwen3-MoE from checkpoint to loaded directory, every expert a linear of its own."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import plain_weights
from test_experts import tiny
from torch import Tensor

import qquant.convert as convert
from qquant import CalibrationSpec, QuantSpec, quantize, spec_from_recipe
from qquant.calibration.hold import Holder
from qquant.errors import CheckpointError, SpecError
from qquant.estimate import dry_run
from qquant.events import Event, LinearDone, Planned, Warned
from qquant.result import Result
from qquant.runtime import load
from qquant.verify import verify

KINDS = ("qwen2_moe", "qwen3_moe")
EXPERTS = 6
TOKENS = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(0))
# 128 of the 384 tokens go to an expert on the average, and an expert has 64 inputs.
SPEC = QuantSpec(group_size=32)


def source(path: Path, kind: str, **changes: Any) -> Path:
    """A random bfloat16 mixture as transformers saves it: experts apart."""
    settings = {"num_hidden_layers": 2, "vocab_size": 256} | changes
    tiny(kind, **settings).to(torch.bfloat16).save_pretrained(path)
    return path


def names_of(directory: Path) -> set[str]:
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """(kind, source, directory, result, events) of a mixture whose second block is dense."""
    root = tmp_path_factory.mktemp(request.param)
    src = source(root / "src", request.param, num_hidden_layers=3, mlp_only_layers=[1])
    events: list[Event] = []
    result = quantize(src, root / "dst", SPEC, tokens=TOKENS, device="cpu", progress=events.append)
    return request.param, src, root / "dst", result, events


def test_every_expert_is_quantized_and_routers_are_not(made: tuple[Any, ...]) -> None:
    kind, _, dst, result, events = made
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    want = set()
    for block in range(3):
        names = list(attention)
        if block == 1:
            names += [f"mlp.{p}" for p in mlp]
        else:
            names += [f"mlp.experts.{e}.{p}" for e in range(EXPERTS) for p in mlp]
            names += [f"mlp.shared_expert.{p}" for p in mlp] if kind == "qwen2_moe" else []
        want |= {f"model.layers.{block}.{name}" for name in names}
    stored = names_of(dst)
    assert {n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")} == want
    for name in want:
        assert {f"{name}.{k}" for k in ("qzeros", "scales", "g_idx")} <= stored
    for block in (0, 2):
        plain = [f"model.layers.{block}.mlp.gate.weight"]
        plain += [f"model.layers.{block}.mlp.shared_expert_gate.weight"] * (kind == "qwen2_moe")
        assert set(plain) <= stored
    assert {layer.name for layer in result.layers} == want
    plan = next(e for e in events if isinstance(e, Planned))
    assert plan.linears == len(want) == sum(isinstance(e, LinearDone) for e in events)


def test_it_verifies(made: tuple[Any, ...]) -> None:
    _, src, dst, result, _ = made
    report = verify(dst, against=src)
    assert report.ok and not report.problems
    assert len(report.layers) == len(result.layers)
    assert all(0 < (row.relative_error or 0) < 0.5 for row in report.layers)


def spoilt(dst: Path, to: Path, drop: str) -> Path:
    """A copy without the tensors that a pattern finds."""
    to.mkdir()
    tensors = load_file(dst / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not re.search(drop, name)}
    assert len(kept) < len(tensors)
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        shutil.copyfile(dst / name, to / name)
    return to


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (r"self_attn\.", "model.layers.0.self_attn.q_proj.weight"),
        (r"layers\.0\.self_attn\.", "model.layers.0.self_attn.q_proj.weight"),
        (r"experts\.\d+\.down_proj", "model.layers.0.mlp.experts.0.down_proj.weight"),
        (r"mlp\.gate\.", "model.layers.0.mlp.gate.weight"),
        (r"layers\.2\..*_norm\.", "model.layers.2.self_attn.q_norm.weight"),
    ],
)
def test_what_no_block_has_is_missed_without_the_source(
    made: tuple[Any, ...], tmp_path: Path, drop: str, missing: str
) -> None:
    kind, _, dst, _, _ = made
    if kind == "qwen2_moe" and "_norm" in drop:
        pytest.skip("its queries and keys have no norms")
    report = verify(spoilt(dst, tmp_path / "spoilt", drop))
    assert any(missing in str(problem.got) for problem in report.problems), report.render()


def test_an_expert_may_be_left_out_by_a_rule(made: tuple[Any, ...], tmp_path: Path) -> None:
    _, src, dst, _, _ = made
    stem = "model.layers.0.mlp.experts.3."
    other = spoilt(dst, tmp_path / "other", re.escape(stem))
    tensors, plain = load_file(other / "model.safetensors"), load_file(src / "model.safetensors")
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{stem}{part}.weight"] = plain[f"{stem}{part}.weight"].half()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((other / name).read_text())
        quant = config.get("quantization_config", config)
        quant["dynamic"] = {rf"-:{re.escape(stem)}.*": {}}
        (other / name).write_text(json.dumps(config))
    report = verify(other)
    assert report.ok, report.render()


def test_it_loads_and_computes_the_dequantized_model(made: tuple[Any, ...]) -> None:
    """In transformers' own classes with its own fused experts, beside ours."""
    from transformers import AutoModelForCausalLM

    kind, src, dst, _, _ = made
    loaded = load(dst, device="cpu", dtype="float32").model
    plain = dst.parent / f"plain-{kind}"
    plain.mkdir()
    shutil.copyfile(src / "config.json", plain / "config.json")
    save_file(plain_weights(dst), plain / "model.safetensors", {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    assert any(n.endswith("experts.gate_up_proj") for n, _ in reference.named_parameters())
    original = load(src, device="cpu", dtype="float32").model
    with torch.no_grad():
        got, want = loaded(TOKENS[:2]).logits, reference(TOKENS[:2]).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(got, original(TOKENS[:2]).logits, atol=1e-3), "it is quantized"
    made_text = loaded.generate(TOKENS[:1, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    again = reference.generate(TOKENS[:1, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert made_text.tolist() == again.tolist() and made_text.shape == (1, 10)


@pytest.mark.parametrize("kernel", ["dequantize", "torch-int4"])
def test_kernels_run_experts(made: tuple[Any, ...], kernel: str) -> None:
    """A decoded token goes to two experts; the others are not called."""
    dst = made[2]
    model = load(dst, device="cpu", kernel=kernel).model
    want = load(dst, device="cpu", dtype="float32", kernel="dense").model
    with torch.no_grad():
        got, exact = (m(TOKENS[:1, :1]).logits.float() for m in (model, want))
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_experts_with_few_tokens_are_named(tmp_path: Path) -> None:
    """In the log, the manifest and the card; and they are as good as the others."""
    src = source(tmp_path / "src", "qwen3_moe")
    tensors = load_file(src / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[5], gate[0], gate[2] = 0, -gate[1], -gate[3]  # two others are always above it
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    events: list[Event] = []
    dst = tmp_path / "dst"
    result = quantize(src, dst, SPEC, tokens=TOKENS, device="cpu", progress=events.append)
    flags = {layer.name: layer.flags for layer in result.layers}
    starved = [f"model.layers.0.mlp.experts.5.{p}_proj" for p in ("gate", "up", "down")]
    assert all(flags[name] == ("few-tokens:0",) for name in starved)
    warned = [e.text for e in events if isinstance(e, Warned)]
    manifest = json.loads((dst / "qquant_manifest.json").read_text())
    card = (dst / "README.md").read_text()
    for name in starved:
        (line,) = [text for text in warned if text.startswith(f"{name}: ")]
        assert "an expert with 0 tokens of its own" in line
        (row,) = [r for r in manifest["layers"] if r["name"] == name]
        assert row["flags"] == ["few-tokens:0"]
        assert name in card
    assert "an expert with 0 tokens of its own" in card
    assert manifest["quantization"]["expert_tokens"] == 1.0
    assert "replace_fused_blocks" in card
    report = verify(dst, against=src)
    errors = {row.name: row.relative_error or 1.0 for row in report.layers}
    assert all(errors[name] < 0.2 for name in starved)

    # Left to its own tokens, of which it has none, it is rounded, and named as well.
    own = spec_from_recipe("qwen", group_size=32)
    result = quantize(src, tmp_path / "own", own, tokens=TOKENS, device="cpu")
    flags = {layer.name: layer.flags for layer in result.layers}
    assert all("no-tokens" in flags[name] for name in starved)
    assert not any("no-tokens" in f for n, f in flags.items() if n not in starved)
    assert "an expert that no calibration token went to" in (tmp_path / "own/README.md").read_text()
    near = quantize(src, tmp_path / "rtn", replace(own, method="rtn"), device="cpu").path
    one, two = (load_file(p / "model.safetensors") for p in (tmp_path / "own", near))
    assert all(torch.equal(one[f"{n}.qweight"], two[f"{n}.qweight"]) for n in starved)


def test_the_estimate(made: tuple[Any, ...]) -> None:
    """Counts and bytes are exact; that experts will lack tokens is said beforehand."""
    _, src, dst, result, _ = made
    calib = CalibrationSpec(samples=16, seqlen=24)
    said = dry_run(src, SPEC, calib, device="cpu")
    assert said.linears == len(result.layers)
    written = (dst / "model.safetensors").stat().st_size
    header = int.from_bytes((dst / "model.safetensors").read_bytes()[:8], "little") + 8
    assert said.output_bytes == written - header
    assert said.seconds["hessian"] > 0
    assert not any("An expert gets" in note for note in said.notes)
    few = dry_run(src, SPEC, CalibrationSpec(samples=4, seqlen=24), device="cpu")
    assert any("An expert gets 32 tokens on the average, and needs 64" in n for n in few.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_is_what_was_foreseen(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most bytes ever on hold, beside the budget's sum; and where they wait changes no byte."""
    src = source(tmp_path / "src", kind)
    holders = []
    original = convert.make_holder

    def watch(needs: Any, *args: Any, **kwargs: Any) -> Holder:
        holders.append((needs.waiting, original(needs, *args, **kwargs)))
        return holders[-1][1]

    monkeypatch.setattr(convert, "make_holder", watch)
    spec = replace(SPEC, correct_share=1.0)  # there is one batch only
    plain = quantize(src, tmp_path / "plain", spec, tokens=TOKENS, device="cpu")
    ((waiting, holder),) = holders
    assert 0.5 * waiting < holder.peak_bytes <= waiting
    monkeypatch.setattr(
        convert, "make_holder", lambda *_, **__: Holder(host_budget=0, spill_outputs=True)
    )
    tight = quantize(src, tmp_path / "tight", spec, tokens=TOKENS, device="cpu")
    assert tight.spilled_bytes > 0
    for file in sorted(plain.path.iterdir()):
        assert file.read_bytes() == (tight.path / file.name).read_bytes(), file.name


def stopped(src: Path, dst: Path) -> Result:
    """Ends after the first block."""

    def stop(event: Event) -> None:
        if isinstance(event, LinearDone) and event.block == 1:
            raise KeyboardInterrupt

    return quantize(src, dst, SPEC, tokens=TOKENS, device="cpu", progress=stop)


@pytest.mark.parametrize("kind", KINDS)
def test_in_its_own_dtype(kind: str, tmp_path: Path) -> None:
    """Where nothing is converted on the way, streams must not come to share their tensors."""
    src = source(tmp_path / "src", kind, num_hidden_layers=3, mlp_only_layers=[1])
    spec = spec_from_recipe("default", group_size=32)
    settings = {"tokens": TOKENS, "device": "cpu"}
    result = quantize(src, tmp_path / "dst", spec, compute_dtype="bfloat16", **settings)
    wide = quantize(src, tmp_path / "wide", spec, compute_dtype="float32", **settings)
    for own, exact in zip(result.layers, wide.layers, strict=True):
        assert own.rel_error == pytest.approx(exact.rel_error, rel=0.2), own.name


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    src = source(tmp_path / "src", "qwen2_moe")
    whole = quantize(src, tmp_path / "whole", SPEC, tokens=TOKENS, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        stopped(src, tmp_path / "dst")
    again = quantize(src, tmp_path / "dst", SPEC, tokens=TOKENS, device="cpu")
    assert again.resumed == 1
    for file in sorted(whole.path.iterdir()):
        assert file.read_bytes() == (again.path / file.name).read_bytes(), file.name


def test_sparse_steps(tmp_path: Path) -> None:
    """Every second block has experts, and rounding works without calibration."""
    src = source(tmp_path / "src", "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    spec = QuantSpec(group_size=32, method="rtn")
    dst = quantize(src, tmp_path / "dst", spec, device="cpu").path
    packed = {n for n in names_of(dst) if n.endswith(".qweight")}
    assert {n.split(".")[2] for n in packed if "experts" in n} == {"1", "3"}
    assert {n.split(".")[2] for n in packed if ".mlp.up_proj" in n} == {"0", "2"}
    assert verify(dst, against=src).ok
    assert load(dst, device="cpu").model(TOKENS[:1]).logits.isfinite().all()


def test_what_is_refused(tmp_path: Path) -> None:
    src, dst = source(tmp_path / "src", "qwen3_moe"), tmp_path / "dst"
    with pytest.raises(SpecError, match=r"target_bpw.*qwen3_moe.*experts.*--bits 4"):
        quantize(src, dst, QuantSpec(group_size=32, target_bpw=4.7), tokens=TOKENS, device="cpu")
    tensors = load_file(src / "model.safetensors")
    weights = [n for n in tensors if ".layers.1.mlp.experts.3." in n]
    fewer = {n: t for n, t in tensors.items() if n not in weights}
    save_file(fewer, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.\w+_proj.*none in the checkpoint"):
        quantize(src, dst, SPEC, tokens=TOKENS, device="cpu")
    more = tensors | {n.replace("experts.3", "experts.6"): tensors[n].clone() for n in weights}
    save_file(more, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"num_\w*experts.*as the weights have, 7.*got 6"):
        quantize(src, dst, SPEC, tokens=TOKENS, device="cpu")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"num_experts": 10**9}))
    with pytest.raises(CheckpointError, match=r"num_experts.*got 1000000000"):
        load(src, device="cpu")
    (src / "config.json").write_text(json.dumps(config))
    fused = dict(fewer)
    for block in (0, 1):
        stem = f"model.layers.{block}.mlp.experts"
        each: list[list[Tensor]] = [
            [tensors[f"{stem}.{e}.{p}_proj.weight"] for e in range(EXPERTS)]
            for p in ("gate", "up", "down")
        ]
        gate, up, down = map(torch.stack, each)
        fused = {n: t for n, t in fused.items() if not n.startswith(f"{stem}.")}
        fused |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    save_file(fused, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stored in one piece.*save it again"):
        quantize(src, dst, SPEC, tokens=TOKENS, device="cpu")
    assert not dst.exists()


def test_verify_misses_an_expert(made: tuple[Any, ...], tmp_path: Path) -> None:
    dst = shutil.copytree(made[2], tmp_path / "dst")
    for name in ("SHA256SUMS", "qquant_manifest.json"):
        (dst / name).unlink()
    tensors = load_file(dst / "model.safetensors")
    gone = {n: t for n, t in tensors.items() if ".experts.5." not in n}
    save_file(gone, dst / "model.safetensors", {"format": "pt"})
    problems = [str(p) for p in verify(dst).problems]
    assert any("model.layers.0.mlp.experts: expected 6 experts, got 5" in p for p in problems)
    gone = {n: t for n, t in tensors.items() if ".layers.2.mlp.experts.5.up" not in n}
    save_file(gone, dst / "model.safetensors", {"format": "pt"})
    assert any("mlp.experts.5.up_proj" in str(p) for p in verify(dst).problems)
