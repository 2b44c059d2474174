"""The table of methods in the README is the one that the stored measurements give."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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


def test_the_measurements_are_whole(methods: ModuleType) -> None:
    result = json.loads((RESULTS / "methods.json").read_text())
    assert [row["key"] for row in result["rows"]] == [m.key for m in methods.METHODS]
    for row in result["rows"]:
        assert row["kl"]["tokens"] >= 40_000
        if row["key"] != "bf16":
            assert row["kl"]["kl"][0] > 0
            assert row["qlora"]["losses"] and row["qlora"]["reloaded_difference"] == 0
    assert str(Path.home()) not in json.dumps(result)
