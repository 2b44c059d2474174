"""What is known of a task before a model is loaded: its file, its group, its examples."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.tasks._index import Entry, Kind
from test_tasks import data, few, hub, index, loaded, source  # noqa: F401  # fixtures

from qquant.errors import InputError, SpecError
from qquant.parts.tasks import TaskOptions
from qquant.tasks import manager
from qquant.tasks.options import TaskSpec
from qquant.tasks.run import run_task

# --- files of tasks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"group: g\ntask: [mmlu_anatomy, gsm8k]\n", r"that of a group.*one by one"),
        (b"group: g\ntask: mmlu_anatomy\n", "that of a group"),
        (b"task: [mmlu_anatomy]\n", r"`task: NAME`, got task: \['mmlu_anatomy'\]"),
        (b"task: 3\n", "got task: 3"),
        (b"dataset_path: json\n", "no `task`"),
        (b"- a\n- b\n", "Expected YAML dict"),
        (b"task: [\n", "did not find expected node|while parsing"),
        (b"task: \xff\xfe\x00\n", "#x|utf"),
        (b"include: nowhere.yaml\n", "No such file"),
        (b"include: 3\ntask: a\n", "int"),
        (b"task: a\nmetric_list: &a [*a]\n", "Circular"),
        (b"", "Expected YAML dict"),
    ],
)
def test_a_file_that_is_none_of_a_task_is_refused(
    content: bytes, match: str, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(SpecError, match=match):
        TaskOptions((str(tmp_path / "own.yaml"),)).parts()


def own(folder: Path, **changed: Any) -> str:
    """The yaml file of a task whose functions and data are files beside it."""
    config = {"dataset_path": "json", "test_split": "test", **changed}
    text = "task: own\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in config.items())
    text += "process_docs: !function utils.docs\ndoc_to_text: !function sub.more.text\n"
    (folder / "own.yaml").write_text(text)
    for name in ("utils.py", "sub/more.py", "data/one.jsonl", "data/deep/two.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return str(folder / "own.yaml")


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ({"data_files": {"test": "{}/data/*.jsonl"}}, ["data/one.jsonl"]),
        ({"data_files": "{}/data/**"}, ["data/one.jsonl", "data/deep/two.jsonl"]),
        ({"data_files": ["{}/data/one.jsonl"]}, ["data/one.jsonl"]),
        ({"data_dir": "{}/data"}, ["data/one.jsonl", "data/deep/two.jsonl"]),
        ({"data_dir": "{}/data", "data_files": "one.jsonl"}, ["data/one.jsonl"]),
        ("no dict", []),
    ],
)
def test_a_task_is_another_when_a_file_that_it_names_changes(
    files: Any, read: list[str], tmp_path: Path
) -> None:
    given = json.loads(json.dumps(files).replace("{}", str(tmp_path)))
    path = own(tmp_path, dataset_kwargs=given)

    def key() -> Any:
        (part,) = TaskOptions((path,)).parts()
        return part.depends()

    before = key()
    assert key() == before
    for name in ("utils.py", "sub/more.py", *read):
        (tmp_path / name).write_text("changed")
        assert key() != before, name
        before = key()
    (tmp_path / "other.py").write_text("")  # of no matter
    assert key() == before


# --- groups and tags ------------------------------------------------------------------------------


def test_a_group_without_a_score_of_its_own_is_refused(index: Any) -> None:  # noqa: F811
    """Before any question is asked; under the preset it has one."""

    def found(**config: Any) -> Any:
        made = manager.copy.copy(index)
        cfg = {"group": "bare", "task": ["mmlu_anatomy", "mmlu_astronomy"], **config}
        made._index = {**index.task_index, "bare": Entry("bare", Kind.GROUP, None, cfg)}
        return made

    with pytest.raises(SpecError, match=r"got 2 tasks.*no common score.*one by one"):
        manager.check(found(), TaskSpec("bare"))
    with pytest.raises(SpecError, match="got 13 tasks"):
        manager.check(index, TaskSpec("mmlu_other_tasks"))
    inline = [{"group": "inner", "task": ["mmlu_anatomy", "mmlu_astronomy"]}]
    with pytest.raises(SpecError, match="got 2 tasks"):
        manager.check(found(task=inline), TaskSpec("bare"))
    manager.check(found(), TaskSpec("bare", preset="qwen-chat"))
    manager.check(found(task=["mmlu_anatomy"]), TaskSpec("bare"))
    manager.check(found(aggregate_metric_list=[{"metric": "acc"}]), TaskSpec("bare"))


def test_a_tag_has_all_of_lm_evals_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """GSM8K stands in a tag whose other tasks are in folders that are not looked through first."""

    entry = Entry("math_word_problems", Kind.TAG, None, tags={"a", "b", "gsm8k"})
    whole = SimpleNamespace(task_index={entry.name: entry})
    monkeypatch.setattr(manager, "_all", lambda: whole)
    found = manager.manager(TaskSpec("math_word_problems"))
    assert manager.members(found, "math_word_problems") == ["a", "b", "gsm8k"]
    assert (
        len(manager.members(manager.manager(TaskSpec("mmlu_stem_tasks")), "mmlu_stem_tasks")) == 19
    )


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mmlu_anatomy", "ceval-valid_law", "gsm8k"])
def test_more_shots_than_examples_are_refused(
    task: str,
    loaded: Any,  # noqa: F811
    data: Path,  # noqa: F811
    few: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With files before a model is loaded; with the hub when its rows are there."""
    there = 3 if task == "gsm8k" else 2
    match = rf"--shots {there + 1}: .*got {there} for {task}. Give --shots {there}, or fewer"
    with pytest.raises(SpecError, match=match):
        TaskOptions((task,), shots=there + 1, data_dir=str(data)).parts()
    TaskOptions((task,), shots=there, data_dir=str(data)).parts()
    monkeypatch.setattr("datasets.load_dataset", hub)
    with pytest.raises(InputError, match=match):
        run_task(loaded, TaskSpec(task, shots=there + 1, limit=1))
    run_task(loaded, TaskSpec(task, shots=there, limit=1))
