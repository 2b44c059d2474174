"""The command `lm_eval` itself, in a process of its own, beside our run of the same questions.

The command gets lm-eval's own task configurations with one change: rows come from json files in the
hub's form, since there is no hub here. Ours reads the authors' files. Model code is that of the
directory there and qquant's loader here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from qwen_tiny import write_checkpoint
from test_tasks import data, evaluated, few, hub, index, seeds  # noqa: F401  # fixtures

import qquant
from qquant.tasks.options import TaskSpec
from qquant.tasks.run import run_task

OWN = Path(lm_eval.__file__).parent / "tasks"
TASKS = {
    "gsm8k": ("gsm8k/gsm8k.yaml", "openai/gsm8k", "main"),
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", "cais/mmlu", "anatomy"),
}


def configurations(folder: Path) -> None:
    """lm-eval's own, under the names `own_*`, with rows from files."""
    for task, (path, dataset, subject) in TASKS.items():
        files = {}
        for split, rows in hub(dataset, subject).items():
            files[split] = str(folder / f"{task}-{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
        changed = {"include": str(OWN / path), "task": f"own_{task}", "tag": []}
        changed |= {"dataset_path": "json", "dataset_name": None}
        changed |= {"dataset_kwargs": {"data_files": files}}
        (folder / f"{task}.yaml").write_text(json.dumps(changed))  # JSON is YAML


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("command") / "src")


@pytest.fixture(scope="module")
def theirs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command says of each task: results and samples."""
    root = tmp_path_factory.mktemp("own")
    configurations(root)
    words = ["--model", "hf", "--device", "cpu", "--batch_size", "1", "--num_fewshot", "2"]
    words += ["--model_args", f"pretrained={source},dtype=float32,trust_remote_code=True"]
    words += ["--include_path", str(root), "--tasks", ",".join(f"own_{task}" for task in TASKS)]
    words += ["--log_samples", "--output_path", str(root / "out")]
    command = Path(sys.executable).with_name("lm_eval")
    home = {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(
        [str(command), *words], env=os.environ | home, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (written,) = (root / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(written.read_text())
    for task in TASKS:
        (samples,) = (root / "out").rglob(f"samples_own_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in samples.read_text().splitlines()]
    return found


def written(value: Any) -> Any:
    """As the command writes a prompt or an answer into its log."""
    return [written(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_scores_are_those_of_the_command(
    task: str,
    source: Path,
    theirs: dict[str, Any],
    data: Path,  # noqa: F811
    evaluated: list[Any],  # noqa: F811
    few: None,  # noqa: F811
) -> None:
    loaded = qquant.load(source, device="cpu", dtype="float32")
    run_task(loaded, TaskSpec(task, shots=2, data_dir=str(data)))
    (mine,) = evaluated
    samples = theirs[task]
    assert len(mine["samples"][task]) == len(samples) > 1
    for ours, other in zip(mine["samples"][task], samples, strict=True):
        asked = [list(given.values()) for given in other["arguments"].values()]
        assert written(ours["arguments"]) == written(asked) and ours["filter"] == other["filter"]
        assert written(ours["resps"]) == written(other["resps"])
        assert written(ours["filtered_resps"]) == written(other["filtered_resps"])
    assert seeds(mine["config"]) == seeds(theirs["config"])  # the command's own
    scores = theirs["results"][f"own_{task}"]
    numbers = {k: v for k, v in mine["results"][task].items() if "," in k}
    assert numbers == {k: v for k, v in scores.items() if "," in k} and len(numbers) >= 2
