"""lm-eval's own tasks, with their data from files, in Qwen's chat form, their code in a sandbox.

A task stays what lm-eval's configuration says; three things are changed in it on the way, where
`TaskFactory` puts a task's configuration together:

- with a data folder, the rows come from there (`custom_dataset`) and not from the hub;
- with a preset, prompts and reading of answers are those of `preset`;
- HumanEval's metric runs code here and now, and fetches its own code from the hub for that: it is
  replaced by the same count of passes, run in `sandbox`. No other task that runs code is let in.

lm-eval looks through some 15,000 configurations to find a task; the folders of those that people
measure Qwen with are looked through first. A task may also be a yaml file of one; a group may not:
lm-eval takes its list of tasks for its name. Imports lm-eval, so import this only to run tasks.
"""

from __future__ import annotations

import copy
import difflib
import functools
import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from ..directory import sha256_file
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
        examples: the split that they are taken from; None if it names none, or is made to be asked
            without. spare: how many of them lm-eval cannot show: 1 where it asks them, too.
    """

    name: str
    dataset: str | None
    subject: str | None
    code: bool
    examples: str | None = None
    spare: int = 0


def manager(spec: TaskSpec) -> Any:
    """A `TaskManager` that knows `spec.task`, and makes tasks as `spec` wants them.

    Raises:
        SpecError: lm-eval has no task of that name, and there is no such file, or it is not that of
            a task.
    """
    found = _few()
    entry = found.task_index.get(spec.task)
    if entry is None and Path(spec.task).is_file():
        _file(spec.task)
    elif entry is None or (entry.kind == Kind.TAG and not spec.task.startswith("mmlu_")):
        found = _all()  # a tag's tasks can stand in any folder; MMLU's are all in its own
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


def _file(path: str) -> dict[str, Any]:
    """The configuration in a task's own yaml file, its functions by name.

    Raises:
        SpecError: it cannot be read, or is not that of one task.
    """
    what, expected, cure = f"--task {path}", "a yaml file with `task: NAME`", None
    try:
        config = load_yaml(path, resolve_func=False)
        json.dumps(config, default=str, skipkeys=True)  # refuses what refers to itself
    except (OSError, ValueError, TypeError, RuntimeError, yaml.YAMLError) as error:
        raise SpecError(what, expected=expected, got=error) from error
    name, got = config.get("task"), None
    if "group" in config and "class" not in config:
        got, cure = "that of a group", "Name its tasks, or files of them, one by one"
    elif not isinstance(name, str) or not name:
        got = "no `task`" if name is None else f"task: {name!r}"
    if got is not None:
        raise SpecError(what, expected=expected, got=got, cure=cure)
    return dict(config)


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
    the files that it names: data, and modules of functions (not what those import)."""
    if spec.task in found.task_index:
        return spec.task, []
    config = _file(spec.task)
    own = [json.loads(json.dumps(config, default=str, skipkeys=True))]
    own += map(sha256_file, _named(config))
    return str(config["task"]), own


def _named(config: dict[str, Any]) -> list[Path]:
    """The files that a task's configuration names, as far as they are there."""
    given = config.get("dataset_kwargs")
    data = given if isinstance(given, dict) else {}
    folder = str(data.get("data_dir") or "")
    found = set(map(_module, _texts(config)))
    for pattern in _texts(data.get("data_files")):
        pattern = os.path.join(folder, pattern)
        found.update((pattern, *glob.glob(pattern, recursive=True)))
    if folder:
        found.update(map(str, Path(folder).rglob("*")))
    return [Path(file) for file in sorted(found) if os.path.isfile(file)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _module(text: str) -> str:
    """Where lm-eval looks first for `!function a.b.name`, which its reader makes FOLDER/a.b.name;
    of any other text, no file's name."""
    folder, name = os.path.split(text)
    module = name.rpartition(".")[0].replace(".", os.sep)
    return os.path.join(folder, f"{module}.py") if os.path.isabs(text) and module else ""


def mean_over(found: Any, spec: TaskSpec, metric: str) -> str:
    """What a group's score is the mean of: all its `questions`, or its `subjects`' means."""
    for one in _aggregated(found, spec) or ():
        if one.get("metric") == metric and not one.get("weight_by_size", True):
            return "subjects"
    return "questions"


def _aggregated(found: Any, spec: TaskSpec) -> list[dict[str, Any]] | None:
    """What a group, or a tag, says of its common scores; None of a task."""
    entry = found.task_index.get(spec.task)
    if entry is None or entry.kind not in (Kind.GROUP, Kind.TAG):
        return None
    if entry.kind == Kind.TAG:
        return []
    config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
    listed = (preset.group(config) if spec.preset else config).get("aggregate_metric_list") or []
    return [listed] if isinstance(listed, dict) else list(listed)


def check(found: Any, spec: TaskSpec) -> list[Any]:
    """What can be known before a model is loaded; returns the rows that come from files.

    Raises:
        InputError: data, permission to run code, or a sandbox for it is missing, or there are fewer
            examples than are to be shown, or the preset has no such task, or a group has no score.
    """
    rows: list[Any] = []
    asked = leaves(found, spec)
    if _aggregated(found, spec) == [] and len(asked) > 1:
        raise SpecError(
            f"--task {spec.task}",
            expected="one score for all of it",
            got=f"{len(asked)} tasks that lm-eval gives no common score",
            cure="Name its tasks one by one",
        )
    for leaf in asked:
        if leaf.code and not spec.run_code:
            raise SpecError(
                f"--task {spec.task}",
                expected="--run-code, since this benchmark runs what the model wrote",
                got="no such flag",
                cure="Add --run-code: each program runs in a sandbox without network or "
                "other processes, that can read your files; or leave the task out",
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
            rows.append(splits := _rows(spec.data_dir, leaf))
            if leaf.examples is not None:
                _enough(spec, leaf.name, len(splits.get(leaf.examples, ())) - leaf.spare)
    if any(leaf.code for leaf in asked):
        sandbox.check()
    return rows


def _enough(spec: TaskSpec, name: str, examples: int) -> None:
    if spec.shots and spec.shots > examples:
        raise SpecError(
            f"--shots {spec.shots}",
            expected="no more examples than there are",
            got=f"{examples} for {name}",
            cure=f"Give --shots {examples}, or fewer",
        )


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
                kind = Kind.GROUP if "group" in child else Kind.TASK
                yield from _walk(Entry(str(name), kind, yaml_path=None, cfg=child), index)
    else:
        yield entry


def _leaf(entry: Any) -> Leaf:
    config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
    examples = config.get("fewshot_split") if config.get("num_fewshot") != 0 else None
    return Leaf(
        entry.name,
        config.get("dataset_path"),
        config.get("dataset_name"),
        bool(config.get("unsafe_code")),
        examples,
        int(examples == config.get("test_split")),
    )


# --- configurations -------------------------------------------------------------------------------


class _Factory(TaskFactory):  # type: ignore[misc]  # lm-eval has no types
    """Puts configurations together as lm-eval does, with the changes above."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(meta={})
        self._spec = spec

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        """Refuses more examples than there are, which lm-eval only asserts, of some samplers."""
        task = super()._build_task(entry, overrides)
        if (sampler := getattr(task, "sampler", None)) and task.config.num_fewshot != 0:
            spare = int(task.fewshot_cfg.split == task.config.test_split)
            _enough(self._spec, entry.name, len(sampler.df) - spare)
        return task

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
