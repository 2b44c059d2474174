"""One task on one loaded model, by lm-eval: scores with errors, and the result of every question.

The model is the one that `qquant.load` gave, whatever its kernel, inside lm-eval's own `HFLM`;
tasks come from `manager`; everything else is lm-eval's `simple_evaluate` with the settings and
seeds (`options.SEEDS`) that its command has by default. Imports lm-eval, so import this only to run
tasks.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.models.huggingface import HFLM

from ..errors import InputError, RunError
from ..estimates import known
from ..runtime import Loaded
from . import manager
from .options import SEEDS, TaskSpec

Advance = Callable[[int, int], None]


def run_task(
    loaded: Loaded, spec: TaskSpec, advance: Advance = lambda done, total: None
) -> dict[str, Any]:
    """Asks a model every question of a task.

    Args:
        loaded: by `qquant.load`, with a tokenizer.
        advance: told how many of lm-eval's requests are answered, of how many (a question with four
            choices is four requests).

    Returns:
        `metric` (its name, and the filter's after a comma where lm-eval has several), `score`
        (value, standard error), `n`, `shots`, `metrics` (all of lm-eval's, by task),
        `questions` (the metric of each, in order; absent where the score is not their mean, as with
        perplexity), `subjects` (name and number of questions of each task in the group that has
        this metric), `mean` (over `questions` or over `subjects`), `higher_is_better` (None where
        the task does not say), `asked` (a hash of the questions), `harness` and the settings.

    Raises:
        InputError: the model has no tokenizer, or no chat template where one is needed; or as
            `manager.manager` and `manager.check`.
        RunError: lm-eval gave no score.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InputError("tokenizer", expected="its files in the directory", got="none")
    if spec.chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat template", expected="one in the tokenizer's files", got="none", cure="Ask without"
        )
    tasks = manager.manager(spec)
    manager.check(tasks, spec)
    out = sys.stdout

    def told(done: int, total: int) -> None:
        with redirect_stdout(out):  # progress may be printed, too, and is not lm-eval's
            advance(done, total)

    with _quiet(loaded.model):
        model = _Model(loaded, spec.batch, told)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[spec.task],
            task_manager=tasks,
            num_fewshot=spec.shots,
            limit=spec.limit,
            apply_chat_template=spec.chat,
            fewshot_as_multiturn=spec.chat,
            confirm_run_unsafe_code=spec.run_code,
            random_seed=SEEDS["random"],
            numpy_random_seed=SEEDS["numpy"],
            torch_random_seed=SEEDS["torch"],
            fewshot_random_seed=SEEDS["fewshot"],
            gen_kwargs=_endings(tokenizer) if spec.preset else None,
        )
    return _result(found, spec, tasks)


class _Model(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's model around a loaded one; progress goes to `advance`, not to a bar."""

    def __init__(self, loaded: Loaded, batch: int, advance: Advance) -> None:
        super().__init__(
            loaded.model, backend="causal", tokenizer=loaded.tokenizer, batch_size=batch
        )
        self._advance, self._done, self._total = advance, 0, 0
        self.set_cache_hook(self)

    def add_partial(self, *_: Any) -> None:
        """What lm-eval calls with each answer, so that it could be kept for another run."""
        self._done += 1
        self._advance(self._done, self._total)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """No bar of lm-eval's while prompts are built, no look at the machine (which starts pip, for
    seconds) or for a git repository where the user happens to be (git complains if there is none),
    and none at how the weights are stored. What lm-eval prints, as when it bootstraps an error,
    goes to stderr: stdout is for results.

    `HFLM` makes transformers' quantization settings of the model's config, which wants the package
    that would have loaded it there; here the model is loaded already.
    """
    evaluator = lm_eval.evaluator
    config, bar = model.config, lm_eval.api.task.tqdm
    look, commit = evaluator.add_env_info, evaluator.get_git_commit_hash
    stored = config.__dict__.pop("quantization_config", None)
    lm_eval.api.task.tqdm = lambda items, **_: items
    evaluator.add_env_info = lambda _: None
    evaluator.get_git_commit_hash = lambda: None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        lm_eval.api.task.tqdm = bar
        evaluator.add_env_info, evaluator.get_git_commit_hash = look, commit
        if stored is not None:
            config.quantization_config = stored


def _endings(tokenizer: Any) -> dict[str, Any]:
    """Ends of an answer as tokens, too: in a batch, text behind one would count as answer."""
    names = ("<|im_end|>", "<|im_start|>", tokenizer.eos_token)
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names if name}
    known = sorted(i for i in ids if isinstance(i, int) and i != tokenizer.unk_token_id)
    return {"eos_token_id": known}


# --- what came out --------------------------------------------------------------------------------


def _result(found: Any, spec: TaskSpec, tasks: Any) -> dict[str, Any]:
    leaves = list(found["samples"])
    top = _top(found, leaves)
    if top is None:
        raise RunError(
            f"task {spec.task}",
            expected="one score for all of it",
            got=f"a group of {len(leaves)} tasks that lm-eval gives no common score",
            cure="Name its tasks one by one",
        )
    metric, key = _metric(found, top, leaves)
    scores = found["results"][top]
    higher = found["higher_is_better"].get(leaves[0], {}).get(metric, True)
    result: dict[str, Any] = {
        "metric": key.removesuffix(",none"),
        "score": [_number(scores[key]), _number(scores.get(key.replace(",", "_stderr,", 1)))],
        "higher_is_better": None if higher is None else bool(higher),
        "n": sum(_size(found["samples"][name]) for name in leaves),
        "shots": found["n-shot"].get(leaves[0], 0),
        "chat_template": spec.chat,
        "preset": spec.preset,
        "limit": spec.limit,
        "source": "hub" if spec.data_dir is None else "local",
        "harness": f"lm-eval {lm_eval.__version__}",
        "metrics": {
            name: {k: shown for k, v in values.items() if (shown := _number(v)) is not None}
            for name, values in found["results"].items()
        },
    }
    questions, subjects, asked = [], [], hashlib.sha256()
    for name in leaves:
        samples = _of_filter(found["samples"][name], key.partition(",")[2])
        if samples:
            subjects.append([name, len(samples)])
        for sample in samples:
            questions.append(_number(sample.get(metric)))
            asked.update(str(sample["doc_hash"]).encode())
    mean = manager.mean_over(tasks, spec, metric)
    sizes = [size for _, size in subjects] if mean == "subjects" else [len(questions)]
    if _is_mean(result["score"][0], questions, sizes):
        result["questions"] = questions
    return result | {"subjects": subjects, "mean": mean, "asked": asked.hexdigest()[:16]}


def _is_mean(score: float | None, questions: Sequence[float | None], sizes: Sequence[int]) -> bool:
    """Whether the score is the mean over `sizes`, in order, of the mean over so many questions.

    Not so where lm-eval makes something else of them, as perplexity of log-likelihoods.
    """
    values = [value for value in questions if value is not None]
    if score is None or not values or len(values) != len(questions):
        return False
    rest = iter(values)
    means = [math.fsum(islice(rest, size)) / size for size in sizes]
    return math.isclose(math.fsum(means) / len(means), score, rel_tol=1e-6, abs_tol=1e-9)


def _top(found: Any, leaves: Sequence[str]) -> str | None:
    """The task or group whose score is that of the whole."""
    if len(leaves) == 1 and not found.get("groups"):
        return leaves[0]
    below = {child for children in found["group_subtasks"].values() for child in children}
    for name in found.get("groups") or ():
        if name not in below:
            return str(name)
    return None


def _metric(found: Any, top: str, leaves: Sequence[str]) -> tuple[str, str]:
    """The first metric that the tasks name and the whole has, and its key, with the filter."""
    listed = found["configs"][leaves[0]].get("metric_list") or ()
    names = [m["metric"] if isinstance(m["metric"], str) else "" for m in listed]
    keys = [k for k in found["results"][top] if "," in k and not _is_error(k)]
    for name in names:
        for key in keys:
            if key.partition(",")[0] == name:
                return name, key
    if not keys:
        raise RunError(f"task {top}", expected="a metric", got="none in lm-eval's results")
    return keys[0].partition(",")[0], keys[0]


def _is_error(key: str) -> bool:
    return key.partition(",")[0].endswith("_stderr")


def _of_filter(samples: Sequence[Any], name: str) -> list[Any]:
    return [sample for sample in samples if sample.get("filter", name) == name]


def _size(samples: Sequence[Any]) -> int:
    return len({sample["doc_id"] for sample in samples})


def _number(value: Any) -> float | None:
    """A finite number as JSON has it; None for anything else, as `N/A`."""
    if isinstance(value, (bool, int, float)) or hasattr(value, "item"):
        number = float(value)
        return known([number])[0]
    return None
