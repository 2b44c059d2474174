"""Tasks in the profile: the damaged is told from the good, and nothing is asked twice.

The questions are the bundled demo checkpoint's own held-out text: a few tokens of it, and which of
four goes on from there? It answers two in three, so that what a model lost can be seen.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qquant import QuantSpec, quantize
from qquant.checkpoint import Checkpoint
from qquant.events import Measured
from qquant.profiling import profile_models
from qquant.protocol import Protocol
from qquant.runtime import tokenizer_of

DEMO = Path(__file__).parents[1] / "demo"
BEFORE, AFTER = 16, 6  # tokens


def questions(count: int) -> list[dict[str, Any]]:
    """What comes next: three of the choices are from elsewhere in the text, and as long."""
    tokenizer = tokenizer_of(Checkpoint.open(DEMO / "qwen-demo"))
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        at, *elsewhere = (rng.randrange(BEFORE, len(ids) - AFTER) for _ in range(4))
        choices = [tokenizer.decode(ids[i : i + AFTER]) for i in elsewhere]
        gold = rng.randrange(4)
        choices.insert(gold, tokenizer.decode(ids[at : at + AFTER]))
        rows.append({"text": tokenizer.decode(ids[at - BEFORE : at]), "choices": choices})
        rows[-1]["gold"] = gold
    return rows


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task's yaml file, as anyone can write one for lm-eval; its rows are in `rows.jsonl`."""
    root = tmp_path_factory.mktemp("task")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(150)))
    config = {
        "task": "goes_on",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(root / "rows.jsonl")},
            "cache_dir": str(root / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (root / "goes_on.yaml").write_text(json.dumps(config))  # JSON is YAML
    return root / "goes_on.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, a copy, its Int8, and that with the scales of one layer doubled."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(DEMO / "qwen-demo", root / "src")
    shutil.copytree(root / "src", root / "copy")
    quantize(root / "src", root / "int8", QuantSpec(method="rtn", bits=8), device="cpu")
    shutil.copytree(root / "int8", root / "wrong")
    tensors = load_file(root / "wrong" / "model.safetensors")
    scales = [name for name in tensors if re.match(r"transformer\.h\.0\..*\.scales", name)]
    assert len(scales) == 5
    for name in scales:
        tensors[name] *= 2
    save_file(tensors, root / "wrong" / "model.safetensors", {"format": "pt"})
    return root


def test_the_good_the_wrong_and_the_same(models: Path, task: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def run(*names: str) -> Any:
        asked.clear()
        return profile_models(
            [str(models / name) for name in names],
            tmp_path,
            against=str(models / "src"),
            protocol=Protocol.of(
                tasks=(str(task),),
                task_batch=32,
                texts=(str(DEMO / "heldout.txt"),),
                seqlen=128,
                max_tokens=4096,
                speed=("none",),
                memory=("none",),
            ),
            device="cpu",
            dtype="float32",
            progress=lambda e: asked.append(e.model) if isinstance(e, Measured) else None,
        )

    found = run("copy", "int8", "wrong")
    assert "failed" not in found and {"src", "copy", "int8", "wrong"} <= set(asked)
    ours = {name: entry["tasks"]["goes_on"] for name, entry in found["models"].items()}
    src, copy, int8, wrong = (ours[name] for name in ("src", "copy", "int8", "wrong"))
    assert src["n"] == 150 and src["score"][0] > 0.25 + 5 * src["score"][1]
    assert "lost" not in src

    assert copy["lost"] == [0, 0] and copy["lost_interval"] == [0, 0]
    assert copy["score"] == src["score"] and copy["questions"] == src["questions"]

    low, high = int8["lost_interval"]
    assert low <= 0 <= high and abs(int8["lost"][0]) < 0.02  # not told from the original

    assert wrong["lost_interval"][0] > 0  # the damaged one is
    assert wrong["lost"][0] == pytest.approx(src["score"][0] - wrong["score"][0])
    assert found["machine"]["versions"]["lm_eval"] in wrong["harness"]
    assert wrong["paired_with"] == "src" and wrong["harness"].startswith("lm-eval")
    texts = {m: e["accuracy"]["domains"]["heldout.txt"] for m, e in found["models"].items()}
    src, copy, int8, wrong = (texts[name] for name in ("src", "copy", "int8", "wrong"))
    assert copy["nll_lost"] == copy["nll_lost_interval"] == copy["kl"] == [0, 0]
    assert wrong["nll_lost_interval"][0] > 10 * abs(int8["nll_lost"][0])
    assert int8["nll_lost_interval"][0] < 0 < int8["nll_lost_interval"][1]  # noise, to this
    assert int8["kl"][0] > 10 * int8["kl"][1] > 0 and wrong["kl"][0] > 1000 * int8["kl"][0]
    assert wrong["top1"][0] < 0.5 < int8["top1"][0] and wrong["topk"]["10"][0] < 0.5
    assert wrong["perplexity"][0] > src["perplexity"][0] + 3 * src["perplexity"][1]
    assert abs(int8["perplexity"][0] - src["perplexity"][0]) < src["perplexity"][1] / 10
    for span, other in zip(wrong["by_position"], src["by_position"], strict=True):
        assert span["nll_lost"][0] > 0 and span["perplexity"][0] > other["perplexity"][0]

    report = (tmp_path / "REPORT.md").read_text()
    assert "goes\\_on" in report and "wrong, compared with src: worse on goes" in report
    assert "copy, compared with src: exactly the same on goes" in report

    assert run("copy", "int8", "wrong")["models"] == found["models"] and asked == []

    lines = task.with_name("rows.jsonl").read_text().splitlines(keepends=True)
    task.with_name("rows.jsonl").write_text("".join(lines[:20]))
    fewer = run("copy")
    assert asked == ["src", "copy"]  # other questions: asked again, and the rest is kept
    assert fewer["models"]["copy"]["tasks"]["goes_on"]["n"] == 20
    assert fewer["models"]["copy"]["load"] == found["models"]["copy"]["load"]
    assert set(fewer["models"]) == {"src", "copy"}
    for name in ("int8", "wrong"):
        assert fewer["aside"][name] == found["models"][name]
    assert set(fewer["aside"]["copy"]) == {"tasks"}  # what was asked before
