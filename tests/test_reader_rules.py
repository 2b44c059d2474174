"""The checker of readers' rules: each rule refuses what it is about, and `inspect` shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import handmade
import pytest
from click.testing import CliRunner

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
