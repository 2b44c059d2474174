"""The checker of readers' rules: each rule refuses what it is about, and `inspect` shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from click.testing import CliRunner
from test_experts import tiny as mixture_of_experts
from test_families import HYBRID

import qquant
from qquant import OutputSpec, QuantSpec
from qquant.cli import cli
from qquant.readers import verdicts


def made(root: Path, family: str = "qwen2", rules: Any = None, **settings: Any) -> Path:
    model = handmade.tiny_qwen1() if family == "qwen" else handmade.tiny_qwen2()
    blocks = "transformer.h" if family == "qwen" else "model.layers"
    path, _ = handmade.make_pair(model, root, blocks=blocks, **settings)
    if rules is not None:
        for name in ("config.json", "quantize_config.json"):
            content = json.loads((path / name).read_text())
            content.get("quantization_config", content)["dynamic"] = rules
            (path / name).write_text(json.dumps(content))
    return path


def by_reader(path: Path) -> dict[str, Any]:
    return {verdict.reader.split()[0]: verdict for verdict in verdicts(path)}


def test_the_default_is_read_by_all(tmp_path: Path) -> None:
    found = by_reader(made(tmp_path, group_size=128))
    assert all(verdict.reads and not verdict.why for verdict in found.values())
    assert "Marlin" in found["vLLM"].how and "Machete" in found["vLLM"].how
    assert "Marlin" in found["SGLang"].how


@pytest.mark.parametrize(("group", "hopper"), [(32, "Humming on 9.0"), (128, "Machete on 9.0")])
def test_vllms_kernel_on_hopper(tmp_path: Path, group: int, hopper: str) -> None:
    """Where Machete does not fit, Humming stands before Marlin there, and only there."""
    how = by_reader(made(tmp_path, group_size=group))["vLLM"].how
    assert how == f"Marlin (compute capability 7.5); {hopper}"


@pytest.mark.parametrize(
    ("bits", "kernels"),
    [
        (4, "torch-int4 or avx2; on CUDA also triton-int4 or marlin, not yet run on a GPU"),
        (3, "torch-int4 or avx2; on CUDA dequantize"),
        (8, "torch-int4 or avx2; on CUDA triton-int4 or marlin, not yet run on a GPU"),
    ],
)
def test_our_own_kernels(tmp_path: Path, bits: int, kernels: str) -> None:
    """Named as `qquant.load` then reports them."""
    path = made(tmp_path, bits=bits, group_size=32)
    how = by_reader(path)["qquant.load"].how
    assert how == kernels
    ran = qquant.load(path, device="cpu", dtype="bfloat16").kernel.counts
    assert set(ran) < set(how.partition(";")[0].split(" or "))


def test_our_own_kernels_where_torchs_op_does_not_fit(tmp_path: Path) -> None:
    how = by_reader(made(tmp_path, group_size=16))["qquant.load"].how
    assert how.startswith("avx2 or dequantize; ")


def test_a_compressed_tensors_directory(tmp_path: Path) -> None:
    handmade.tiny_qwen2().save_pretrained(tmp_path / "src")
    for sym in (True, False):
        spec, path = QuantSpec(group_size=32, method="rtn", sym=sym), tmp_path / f"{sym}"
        qquant.quantize(
            tmp_path / "src", path, spec, out=OutputSpec(format="compressed-tensors"), device="cpu"
        )
        found = by_reader(path)
        assert set(found) == {"transformers", "qquant.load", "vLLM"}
        assert all(verdict.reads for verdict in found.values())
        assert ("dequantize=True" in found["transformers"].how) is not sym
        assert "Marlin" in found["vLLM"].how and "Humming" in found["vLLM"].how


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text"])
def test_a_mixture_needs_its_experts_apart(tmp_path: Path, kind: str) -> None:
    settings = HYBRID if kind == "qwen3_5_moe_text" else {}
    mixture_of_experts(kind, **settings).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    spec = QuantSpec(group_size=32, method="rtn")
    qquant.quantize(tmp_path / "src", tmp_path / "dst", spec, device="cpu")
    found = by_reader(tmp_path / "dst")
    if kind == "qwen3_moe":
        assert 'replace_fused_blocks("qwen3_moe")' in found["transformers"].how
    else:
        assert "nothing takes the experts" in found["transformers"].why[0]
    assert "Humming" in found["vLLM"].how  # its experts on 9.0


@pytest.mark.parametrize(
    ("settings", "refused", "because"),
    [
        ({"bits": 3}, {"vLLM"}, "3 bits"),
        ({"bits": 2}, {"vLLM"}, "2 bits"),
        ({"sym": False}, {"vLLM"}, "asymmetric"),
        ({"desc_act": True, "group_size": 32}, {"vLLM"}, "desc_act"),
        ({"v2": True}, {"auto-gptq"}, "v2 zero points"),
        ({"group_size": 16}, {"vLLM", "transformers"}, "groups of 16"),
        ({"family": "qwen"}, {"vLLM", "auto-gptq"}, "qquant convert"),
    ],
)
def test_what_a_rule_refuses(
    tmp_path: Path, settings: dict[str, Any], refused: set[str], because: str
) -> None:
    found = by_reader(made(tmp_path, **settings))
    assert {name for name, verdict in found.items() if not verdict.reads} == refused
    assert all(because in " ".join(found[name].why) for name in refused)
    assert found["qquant.load"].reads


def test_rules_per_linear(tmp_path: Path) -> None:
    """8 bits for whole matrices are fine; for a part of one that is loaded whole, they are not."""
    whole = made(tmp_path / "a", rules={r"+:.*mlp\.down_proj$": {"bits": 8}})
    found = by_reader(whole)
    assert found["vLLM"].reads and found["SGLang"].reads
    assert not found["transformers"].reads and "dynamic" in found["transformers"].why[0]
    part = by_reader(made(tmp_path / "b", rules={r"+:.*self_attn\.q_proj$": {"bits": 8}}))
    for name in ("vLLM", "SGLang"):
        assert not part[name].reads and "self_attn.qkv_proj" in part[name].why[0]
    odd = by_reader(made(tmp_path / "c", rules={r"+:.*mlp\.down_proj$": {"bits": 3}}))
    assert not odd["SGLang"].reads and not odd["vLLM"].reads


def test_an_unquantized_directory_has_readers_too(tmp_path: Path) -> None:
    handmade.tiny_qwen2().save_pretrained(tmp_path)
    assert all(verdict.reads for verdict in verdicts(tmp_path))


def test_inspect_shows_it(tmp_path: Path) -> None:
    path = made(tmp_path, bits=3)
    shown = CliRunner().invoke(cli, ["inspect", str(path), "--readers"])
    assert shown.exit_code == 0
    assert "vLLM 0.33.0: no: 3 bits" in shown.output
    as_json = CliRunner().invoke(cli, ["inspect", str(path), "--readers", "--json"])
    found = {v["reader"]: v["reads"] for v in json.loads(as_json.output)["readers"]}
    assert found["qquant.load"] and not found["vLLM 0.33.0"]
    plain = CliRunner().invoke(cli, ["inspect", str(path), "--json"])
    assert "readers" not in json.loads(plain.output)
