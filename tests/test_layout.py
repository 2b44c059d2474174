"""One reading of `quantization_config`, whoever asks: `verify`, `inspect` and `load` agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch

from qquant.errors import CheckpointError
from qquant.layout import Layout
from qquant.runtime import load
from qquant.verify import inspect, verify

IDS = torch.arange(40).view(1, 40)

# Changes to the config of a v1 directory (None is JSON's null, ... takes the key away) that leave
# it a v1 directory.
SAME: list[dict[str, Any]] = [
    {"checkpoint_format": None},
    {"checkpoint_format": ...},
    {"checkpoint_format": None, "format": None},
    {"checkpoint_format": None, "format": "gptq"},
    {"checkpoint_format": "gptq", "format": "gptq"},
    {"quant_method": "gptq", "method": None},
    {"quant_method": "gptq", "method": "gptq"},
    {"sym": None, "desc_act": None},
    {"dynamic": None},
    {"dynamic": {}},
]

# Changes that nobody may guess about, and the key that is named.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format"),
    ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "checkpoint_format"),
    ({"checkpoint_format": ..., "format": "marlin"}, "checkpoint_format"),
    ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
    ({"checkpoint_format": {"gptq": 1}}, "checkpoint_format"),
    ({"checkpoint_format": 1}, "checkpoint_format"),
    ({"quant_method": "gptq", "method": "awq"}, "quant_method"),
    ({"quant_method": "awq", "method": "gptq"}, "quant_method"),
    ({"quant_method": None, "method": "awq"}, "quant_method"),
    ({"bits": None}, "bits"),
    ({"bits": True}, "bits"),
    ({"bits": 4.0}, "bits"),
    ({"bits": [4]}, "bits"),
    ({"group_size": None}, "group_size"),
    ({"sym": "true"}, "sym"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = handmade.tiny_qwen2(hidden=64, ffn=64, layers=1)
    return handmade.make_pair(model, tmp_path, blocks="model.layers")[0]


def configure(directory: Path, changes: dict[str, Any]) -> None:
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((directory / name).read_text())
        quant = values.get("quantization_config", values)
        quant |= changes
        for key in [key for key, value in quant.items() if value is ...]:
            del quant[key]
        (directory / name).write_text(json.dumps(values))


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(directory, device="cpu", kernel="dequantize").model(IDS).logits
    return found


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_null_is_a_missing_key_through_every_door(directory: Path, changes: dict[str, Any]) -> None:
    want, summary = logits(directory), inspect(directory).summary
    assert "v1 zeros" in summary
    configure(directory, changes)
    assert verify(directory).problems == []
    assert inspect(directory).summary == summary
    assert torch.equal(logits(directory), want)


@pytest.mark.parametrize(("changes", "key"), REFUSED, ids=str)
def test_what_contradicts_itself_is_refused_through_every_door(
    directory: Path, changes: dict[str, Any], key: str
) -> None:
    configure(directory, changes)
    named = f"quantization_config: {key}"
    assert named in [problem.key for problem in verify(directory).problems]
    summary = inspect(directory).summary
    assert f"not understood: {named}" in summary or summary == "quantized by awq"
    with pytest.raises(CheckpointError, match=named):
        load(directory, device="cpu")


def test_v2_by_either_key() -> None:
    plain = {"bits": 4, "group_size": 32}
    for keys in (
        {"checkpoint_format": "gptq_v2"},
        {"format": "gptq_v2", "checkpoint_format": None},
    ):
        assert Layout.parse({**plain, **keys}).zero_offset == 0
    assert Layout.parse(plain).zero_offset == 1


def test_a_rule_for_no_module_changes_nothing(directory: Path) -> None:
    before = logits(directory)
    configure(directory, {"dynamic": {"-:.*never": {}}})
    assert verify(directory).problems == []
    assert torch.equal(logits(directory), before)


def test_the_first_rule_that_matches_decides(directory: Path) -> None:
    configure(directory, {"dynamic": {"-:.*never": {}, "+:model.*": {}, ".*": {"bits": 8}}})
    assert verify(directory).problems == []
    assert load(directory, device="cpu").kernel.used
    configure(directory, {"dynamic": {".*": {"bits": 8}, "+:model.*": {}}})
    assert not verify(directory).ok
    with pytest.raises(CheckpointError, match="qweight"):
        load(directory, device="cpu")
