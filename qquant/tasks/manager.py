"""lm-eval's own tasks, with their data from files, in Qwen's chat form, their code in a sandbox.

A task stays what lm-eval's configuration says; three things are changed in it on the way, where
`TaskFactory` puts a task's configuration together:

- with a data folder, the rows come from there (`custom_dataset`) and not from the hub;
- with a preset, prompts and reading of answers are those of `preset`;
- HumanEval's metric runs code here and now, and fetches its own code from the hub for that: it is
  replaced by the same count of passes, run in `sandbox`. No other task that runs code is let in.

lm-eval looks through some 15,000 configurations to find a task; the folders of those that people
measure Qwen with are looked through first. Imports lm-eval, so import this only to run tasks.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from ..errors import InputError, SpecError
from . import local, preset, sandbox
from .options import TaskSpec

_FOLDERS = ("mmlu/default", "ceval", "cmmlu", "gsm8k", "humaneval")
_OWN_DATA = ("json", "csv", "parquet", "text", "arrow")  # builders of files that a task names


@dataclass(frozen=True)
class Leaf:
    """A task that has questions of its own.

    Attributes:
        name: lm-eval's. dataset, subject: the hub's names of its data. code: whether it runs code.
    """

    name: str
    dataset: str | None
    subject: str | None
    code: bool


def manager(spec: TaskSpec) -> Any:
    """A `TaskManager` that knows `spec.task`, and makes tasks as `spec` wants them.

    Raises:
        SpecError: lm-eval has no task of that name, and there is no such file.
    """
    found = _few()
    if spec.task not in found.task_index and not Path(spec.task).is_file():
        found = _all()
    if spec.task not in found.task_index and not Path(spec.task).is_file():
        near = difflib.get_close_matches(spec.task, found.all_tasks, 3)
        raise SpecError(
            f"--task {spec.task}",
            expected="a task of lm-eval's, or the path of one's yaml file",
            got="neither",
            cure=f"Near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them",
        )
    found = copy.copy(found)  # the index is shared, the factory is this task's
    found._factory = _Factory(spec)
    return found


@functools.cache
def _few() -> Any:
    root = Path(lm_eval.tasks.__file__).parent
    few = [str(root / folder) for folder in _FOLDERS]
    return TaskManager(include_defaults=False, include_path=few)


@functools.cache
def _all() -> Any:
    return TaskManager()


def leaves(found: Any, spec: TaskSpec) -> list[Leaf]:
    """The tasks that have questions in `spec.task`, by their configurations alone."""
    entry = found.task_index.get(spec.task) or TaskIndex.entry_from_path(Path(spec.task))
    return [_leaf(e) for e in _walk(entry, found.task_index)]


def members(found: Any, name: str) -> list[str]:
    """A tag's tasks; any other name for itself."""
    entry = found.task_index.get(name)
    return sorted(entry.tags) if entry is not None and entry.kind == Kind.TAG else [name]


def identity(found: Any, spec: TaskSpec) -> tuple[str, list[Any]]:
    """The name that lm-eval has for a task; of one from a file also what stands in the file and in
    the files of data that it names."""
    if spec.task in found.task_index:
        return spec.task, []
    config = load_yaml(spec.task, resolve_func=False)
    own: list[Any] = [json.loads(json.dumps(config, default=str))]
    data = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    for files in data.values() if isinstance(data, dict) else [data]:
        for file in [files] if isinstance(files, str) else files:
            if Path(file).is_file():
                own.append(hashlib.sha256(Path(file).read_bytes()).hexdigest())
    return str(config.get("task") or config.get("group")), own


def mean_over(found: Any, spec: TaskSpec, metric: str) -> str:
    """What a group's score is the mean of: all its `questions`, or its `subjects`' means."""
    entry = found.task_index.get(spec.task) or TaskIndex.entry_from_path(Path(spec.task))
    if entry is None or entry.kind != Kind.GROUP:
        return "questions"
    config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
    listed = (preset.group(config) if spec.preset else config).get("aggregate_metric_list") or []
    for one in [listed] if isinstance(listed, dict) else listed:
        if one.get("metric") == metric and not one.get("weight_by_size", True):
            return "subjects"
    return "questions"


def check(found: Any, spec: TaskSpec) -> list[Any]:
    """What can be known before a model is loaded; returns the rows that come from files.

    Raises:
        InputError: data, permission to run code, or a sandbox for it is missing, or the preset has
            no such task.
    """
    rows: list[Any] = []
    for leaf in leaves(found, spec):
        if leaf.code and not spec.run_code:
            raise SpecError(
                f"--task {spec.task}",
                expected="--run-code, since this benchmark runs what the model wrote",
                got="no such flag",
                cure="Add --run-code: each program runs in a sandbox without network, files, or "
                "other processes; or leave the task out",
            )
        if leaf.code and not _ours(leaf.name, found.task_index):
            raise SpecError(
                f"--task {leaf.name}",
                expected="a task whose code qquant can put into a sandbox: humaneval and its kin",
                got="one that lm-eval would run in this process",
                cure="Run it by lm_eval itself, at your own risk",
            )
        if spec.preset and preset.of(leaf.dataset) is None:
            raise SpecError(
                f"--preset {spec.preset}",
                expected="mmlu, ceval-valid, gsm8k or humaneval",
                got=leaf.name,
                cure="Leave the preset or the task out",
            )
        if spec.data_dir is not None and leaf.dataset not in _OWN_DATA:
            rows.append(_rows(spec.data_dir, leaf))
    if any(leaf.code for leaf in leaves(found, spec)):
        sandbox.check()
    return rows


def _rows(folder: str, leaf: Leaf) -> local.Splits:
    if leaf.dataset is None or not local.known(leaf.dataset):
        raise InputError(
            f"--data-dir for {leaf.name}",
            expected="MMLU, C-Eval, CMMLU, GSM8K or HumanEval",
            got=f"the data set {leaf.dataset}",
            cure="Leave --data-dir out to use the hub, or measure this task on its own",
        )
    return local.rows(folder, leaf.dataset, leaf.subject)


def _walk(entry: Any, index: dict[str, Any]) -> Iterator[Any]:
    if entry is None:
        return
    if entry.kind == Kind.TAG:
        for name in sorted(entry.tags):
            yield from _walk(index.get(name), index)
    elif entry.kind == Kind.GROUP:
        config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
        for child in config.get("task") or ():
            if isinstance(child, str):
                yield from _walk(index.get(child), index)
            elif (name := child.get("group", child.get("task"))) in index:
                yield from _walk(
                    replace(index[name], cfg={**(index[name].cfg or {}), **child}), index
                )
            else:
                yield Entry(name=str(name), kind=Kind.TASK, yaml_path=None, cfg=child)
    else:
        yield entry


def _leaf(entry: Any) -> Leaf:
    config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
    return Leaf(
        entry.name,
        config.get("dataset_path"),
        config.get("dataset_name"),
        bool(config.get("unsafe_code")),
    )


# --- configurations -------------------------------------------------------------------------------


class _Factory(TaskFactory):  # type: ignore[misc]  # lm-eval has no types
    """Puts configurations together as lm-eval does, with the changes above."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(meta={})
        self._spec = spec

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> Any:
        spec, path = self._spec, entry.yaml_path
        plain = load_yaml(path, resolve_func=False) if path else dict(entry.cfg or {})
        if plain.get("unsafe_code"):
            entry = replace(entry, yaml_path=None, cfg=_sandboxed(plain))
        config = super()._load_full_config(entry, overrides)
        if entry.kind == Kind.GROUP:
            return preset.group(config) if spec.preset else config
        leaf = Leaf(entry.name, plain.get("dataset_path"), plain.get("dataset_name"), False)
        if spec.data_dir is not None and leaf.dataset not in _OWN_DATA:
            config["custom_dataset"] = _dataset(_rows(spec.data_dir, leaf))
        if spec.preset and (changes := preset.of(leaf.dataset)) is not None:
            config |= changes
        return config


def _dataset(rows: local.Splits) -> Callable[..., Any]:
    def build(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(lines) for split, lines in rows.items()})

    return build


# --- HumanEval ------------------------------------------------------------------------------------


def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Any) -> Any:
    """HumanEval's metric: of n programs for a question c pass, so k drawn of them hold a right one
    with 1 - C(n-c, k) / C(n, k) (Chen et al., 2021, equation 1). Each runs in the sandbox."""
    counts = []
    for test, programs in zip(references, predictions, strict=True):
        passed = [sandbox.run_code(f"{program}\n{test}").passed for program in programs]
        counts.append((len(passed), sum(passed)))
    result = {}
    for size in [k] if isinstance(k, int) else k:
        chances = [1 - math.comb(n - c, size) / math.comb(n, size) for n, c in counts if n >= size]
        if chances:
            result[f"pass@{size}"] = sum(chances) / len(chances)
    return result


def completed(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Programs: the question's beginning and what the model wrote on."""
    return [[doc["prompt"] + r for r in answers] for answers, doc in zip(resps, docs, strict=False)]


def completed_fenced(
    resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """The same where the model writes in a fenced block: up to its end."""
    cut = [[answer.partition("```")[0] for answer in answers] for answers in resps]
    return completed(cut, docs)


_REPLACED = {
    "humaneval/utils.pass_at_k": pass_at_k,
    "humaneval/utils.build_predictions": completed,
    "humaneval/utils.build_predictions_instruct": completed_fenced,
}


def _ours(name: str, index: dict[str, Any]) -> bool:
    entry = index.get(name)
    try:
        return entry is not None and bool(_sandboxed(dict(entry.cfg or {})))
    except InputError:
        return False


def _sandboxed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose functions of HumanEval's are the ones above."""

    def swap(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: swap(item) for key, item in value.items()}
        if isinstance(value, list):
            return [swap(item) for item in value]
        if isinstance(value, str):
            for name, function in _REPLACED.items():
                if value.replace("\\", "/").endswith(name):
                    return function
            if "/utils." in value and Path(value.rpartition(".")[0] + ".py").exists():
                raise InputError(
                    value, expected="a function that qquant can replace", got="another"
                )
        return value

    return dict(swap(config))
