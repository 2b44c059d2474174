"""The README's tables of recipes are what the kept results give."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readme_table")


def test_the_readme_is_up_to_date(table: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = readme.index(table.BEGIN) + len(table.BEGIN), readme.index(table.END)
    assert readme[start:end].strip() == table.render()


def test_figures_are_those_of_the_results(table: ModuleType) -> None:
    results = {name: table.load(f"accuracy-{name}") for name in table.CHECKPOINTS}
    row = table.scored(results["demo"], "qquant", 4)
    lines = table.accuracy(results)
    assert f"| {row['score']['kl']:.3g} |" in next(x for x in lines if x.startswith("| default"))
    assert len({line.count("|") for line in lines}) == 1
    peers = [table.scored(results["second"], tool, 3) for tool in table.GPTQ_PEERS]
    least = min(peer["score"]["kl"] for peer in peers)
    own = table.scored(results["second"], "qquant", 3)["score"]["kl"]
    lines = [line for line in table.against(results) if "better GPTQ tool's | second" in line]
    assert lines[0].split(" | ")[3].startswith(f"{own / least:.2f} (")


def test_times_are_medians_against_the_peers(table: ModuleType) -> None:
    def row(candidate: str, *seconds: float) -> dict[str, object]:
        runs = [{"work_s": s, "max_rss_kib": 2048} for s in seconds]
        return {"candidate": candidate, "runs": runs}

    rows = [row("qquant", 30, 10, 20), row("gptqmodel", 50, 60, 70), row("rtn")]
    lines = table.speed({"rows": rows})
    assert lines[2:] == ["| default | 20 | 3.00 | 2 |", "| GPTQModel | 60 | 1.00 | 2 |"]
    both = table.speed({"rows": [*rows, row("llmcompressor", 30)]})
    assert both[0].count("times as fast") == 2
    assert both[2] == "| default | 20 | 3.00 | 1.50 | 2 |"
    assert both[3] == "| GPTQModel | 60 | 1.00 | 0.50 | 2 |"


def test_what_was_not_measured_is_a_dash(table: ModuleType) -> None:
    assert table.ratio(None, None) == "-" and table.ratio({"score": {}}, None) == "-"


def test_what_is_said_of_calibration_is_what_was_measured() -> None:
    """KL with 128 samples beside that of `builtin`, in the own domain and in another."""
    said = (ROOT / "docs" / "EXPERIMENTS.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found: dict[str, list[list[str]]] = {}
    for name in ("demo", "second"):
        text = (ROOT / "benchmarks" / "results" / f"calibration-{name}.md").read_text("utf-8")
        for source in ("domain", "self", "chat", "text"):
            ratios = re.findall(rf"`{source}`, 128 samples: (\d+\.\d+)", text)
            found.setdefault(source, []).append([f"{float(r) + 1e-9:.2f}" for r in ratios])
    for source, (demo, second) in found.items():
        (row,) = [line for line in said.splitlines() if line.startswith(f"| `{source}`")]
        assert row.endswith(f"| {' / '.join(demo)} | {' / '.join(second)} |"), row
    (own, other), (own_second, other_second) = found["self"]
    assert f"{own} and {own_second} of the KL with `builtin`" in readme
    assert f"own domain, {other} and {other_second} in another" in readme
