"""Public benchmarks: each task is a measurement, asked of the model that is loaded in the run.

What is asked and how it is scored is `tasks`, on top of lm-eval. Before any model is loaded, tasks
are looked up, their local data is read, and HumanEval is refused where it was not allowed to run
what a model writes. Models are asked apart; the paired difference follows from their answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingDependencyError, RunError, SpecError
from ..tasks.options import SEEDS, TaskSpec
from ..tasks.paired import lost
from .base import Options, Part, Subject, hashed, option


@dataclass(frozen=True)
class TaskPart(Part):
    """One task; stands in `tasks`.

    Attributes:
        spec: what is asked, and how.
        name: the task's, as lm-eval calls it.
        data: a hash of what is read from files: rows, or the task's own yaml file and what that
            names.
        harness: lm-eval's version.
    """

    spec: TaskSpec
    name: str
    data: str
    harness: str

    @property
    def place(self) -> tuple[str, ...]:
        return ("tasks", self.name)

    @property
    def label(self) -> str:
        return f"task {self.name}"

    def depends(self) -> object:
        """Not the folder, whose contents are hashed; not the leave to run code."""
        asked = {**asdict(self.spec), "task": self.name, "data_dir": self.spec.data_dir is None}
        asked.pop("run_code")
        return [asked, self.data, self.harness]

    def seeds(self) -> Mapping[str, int]:
        return {f"lm_eval_{generator}": seed for generator, seed in SEEDS.items()}

    def packages(self) -> tuple[str, ...]:
        return ("lm_eval",)

    def check(self, subjects: Sequence[Subject]) -> None:
        """There is a tokenizer, with a chat template where one is needed."""
        for subject in subjects:
            tokenizer = subject.tokenizer
            if self.spec.chat and not getattr(tokenizer, "chat_template", None):
                raise InputError(
                    f"chat template of {subject.model.name}",
                    expected="one in the tokenizer's files",
                    got="none",
                    cure="Leave --chat-template and --preset out",
                )

    def measure(self, subject: Subject) -> dict[str, Any]:
        from ..tasks.run import run_task

        try:
            result = run_task(subject.loaded, self.spec, subject.advance)
        except ConnectionError as error:
            raise RunError(
                f"questions of {self.name}",
                expected="the hub, or what an earlier run has fetched from it",
                got=error,
                cure="Try again with a network, or give the original files with --data-dir",
            ) from error
        return {"model": subject.model.name, **result}

    def pair(self, found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
        """`lost`: how much worse the score is than the reference's, and its error.

        Nothing where the two were not measured alike, or where what is stored does not say enough.
        """
        alike = all(reference.get(key) == found.get(key) for key in ("under", "asked", "mean"))
        over, higher = found.get("mean"), found.get("higher_is_better")
        known = over in ("questions", "subjects") and isinstance(higher, bool)
        if not alike or not known or found.get("asked") is None or reference.get("model") is None:
            return {}
        try:
            difference = lost(
                reference["questions"],
                found["questions"],
                subjects=[size for _, size in found["subjects"]] if over == "subjects" else (),
                higher_is_better=bool(higher),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return {}
        return {
            "lost": [difference.value, difference.stderr],
            "lost_interval": difference.interval,
            "paired_with": reference["model"],
        }

    def headline(self, found: Mapping[str, Any]) -> str:
        value, error = found["score"]
        if value is None:
            return f"{found['n']} questions"
        return f"{found['metric']} {value:.4f}" + ("" if error is None else f" ± {error:.4f}")


@dataclass(frozen=True)
class TaskOptions(Options):
    """What is asked.

    Attributes:
        tasks: names of lm-eval's tasks, groups or tags, or paths of tasks' own yaml files.
        limit, shots, chat_template, preset, data_dir, run_code: see `tasks.options.TaskSpec`.
        task_batch: questions at a time.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None
    chat_template: bool = False
    preset: str | None = None
    data_dir: str | None = None
    run_code: bool = False
    task_batch: int = 1

    def __post_init__(self) -> None:
        self._spec("")  # refuses settings that cannot be used
        if not self.tasks:
            for key in ("limit", "shots", "preset", "data_dir"):
                if getattr(self, key) is not None:
                    cure = "Give --task NAME, or leave it out"
                    raise SpecError(option(key), expected="a task", got="none", cure=cure)

    def _spec(self, task: str) -> TaskSpec:
        return TaskSpec(
            task,
            self.limit,
            self.shots,
            self.chat_template,
            self.preset,
            self.data_dir,
            self.run_code,
            self.task_batch,
        )

    def parts(self) -> tuple[Part, ...]:
        if not self.tasks:
            return ()
        harness = _harness()
        from ..tasks import manager

        found: dict[str, Part] = {}
        for given in self.tasks:
            spec = self._spec(given)
            for task in manager.members(manager.manager(spec), given):
                spec = replace(spec, task=task)
                lookup = manager.manager(spec)
                rows = manager.check(lookup, spec)
                name, own = manager.identity(lookup, spec)
                part = TaskPart(spec, name, hashed([rows, own]), harness)
                if found.setdefault(name, part) != part:
                    raise SpecError("--task", expected="tasks of different names", got=name)
        return tuple(found.values())

    def public(self) -> dict[str, Any]:
        if not self.tasks:
            return {}
        shown = {**asdict(self), "tasks": [Path(task).name for task in self.tasks]}
        return {**shown, "data_dir": None if self.data_dir is None else "local files"}


def _harness() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            "--task",
            expected="the package lm-eval",
            got="none",
            cure="Run `pip install 'qquant[eval]'`",
        ) from error
