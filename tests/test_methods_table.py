"""The table of methods in the README is the one that the stored measurements give."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
measured = pytest.mark.skipif(
    not (RESULTS / "methods.json").is_file(),
    reason="no benchmarks/results/methods.json yet: python benchmarks/methods.py makes it",
)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "methods_benchmark", RESULTS.parent / "methods.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "methods_benchmark", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@measured
def test_the_readme_has_the_measured_table(methods: ModuleType) -> None:
    result = json.loads((RESULTS / "methods.json").read_text())
    text = methods.render(result)
    readme = (ROOT / "README.md").read_text()
    start, end = readme.index(methods.BEGIN) + len(methods.BEGIN), readme.index(methods.END)
    assert readme[start:end].strip() == text.strip()
    assert (RESULTS / "methods.md").read_text() == "# Methods\n\n" + text
    assert "Not yet run on a GPU" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(methods.METHODS)
    assert all(row.count("|") == 10 for row in rows)


@measured
def test_the_measurements_are_whole(methods: ModuleType) -> None:
    result = json.loads((RESULTS / "methods.json").read_text())
    assert [row["key"] for row in result["rows"]] == [m.key for m in methods.METHODS]
    for row in result["rows"]:
        assert row["kl"]["tokens"] >= 20_000
        if row["key"] != "bf16":
            assert row["kl"]["kl"][0] > 0
            assert row["qlora"]["losses"] and row["qlora"]["reloaded_difference"] == 0
    assert str(Path.home()) not in json.dumps(result)


def made_up(methods: ModuleType) -> dict[str, Any]:
    """A result as `everything` leaves it, of invented figures."""
    rows = []
    for number, method in enumerate(methods.METHODS):
        row: dict[str, Any] = {
            "key": method.key,
            "inspect": {"bits_per_weight_blocks": 4.5 + number},
            "kl": {"kl": [0.01 * number, 0.001], "tokens": 40_960},
            "bytes": 10_000_000 * (number + 1),
            "memory": {
                "load_peak_bytes": 30_000_000,
                "weight_bytes": 20_000_000,
                "forward_extra_bytes": 15_000_000,
            },
            "speed": {
                "decode_tokens_per_s": 100.0 / (number + 1),
                "decode_runs_s": [1.0] * 5,
                "dtype": "torch.float32",
                "compute_dtype": "torch.bfloat16",
            },
        }
        if method.options is not None:
            up = method.key == "fp4"  # did not train
            losses = [3.0, 3.0, 3.0, 4.0 if up else 2.0]
            row["qlora"] = {"losses": losses, "reloaded_difference": 0.0}
        rows.append(row)
    return {
        "rows": rows,
        "shape": {"blocks": 8, "hidden": 1024, "ffn": 2816, "heads": 16, "vocab": 8192},
        "machine": {"cpu": "a CPU", "cores": 2, "flags": []},
        "date": "2026-01-01",
        "sixteen_bit_bytes": 33_000_000,
    }


def test_the_table_has_every_method_and_every_question(methods: ModuleType) -> None:
    """Also before anything is measured: bits, data, size, memory, speed, KL, Q-LoRA, readers."""
    lines = methods.render(made_up(methods)).splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert heads == [
        *("method", "bits per weight", "calibration data", "size", "peak memory", "tokens/s"),
        *("KL to BF16", "Q-LoRA", "readers"),
    ]
    table = {}
    for line in lines[2 : 2 + len(methods.METHODS)]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[cells[0]] = dict(zip(heads, cells, strict=True))
    assert set(table) == {method.title for method in methods.METHODS}
    assert all(all(row.values()) for row in table.values())
    assert table["`nf4`"]["calibration data"] == "no" and table["`nf4`"]["Q-LoRA"] == "yes"
    assert table["`fp4`"]["Q-LoRA"] == "no"
    assert table["`gptq`, 4 bits (default)"]["calibration data"] == "yes"
    assert table["`nf4`"]["peak memory"] == "35 MB"
    text = " ".join(lines)
    assert "4-bit products in bfloat16" in text and "Int8 8.0 times slower" in text
