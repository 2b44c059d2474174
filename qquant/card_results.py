"""A profile's results in the front matter of a model card, in the hub's `model-index` form.

Text is edited, not data: what else stands in the front matter (comments, order, quotes) stays as it
was written. Ours lies between two comment lines and is replaced as a whole. Where somebody else's
`model-index` is there already, ours becomes one more element of it. The form is huggingface_hub's
(`EvalResult`), and what comes out is read back by it before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import InputError
from .reporting.accuracy import domain_names, task_names, task_scale, task_setting, task_title
from .reporting.schema import of

BEGIN, END = "# qquant profile: begin", "# qquant profile: end"
RELATION = "base_model_relation: quantized"
_FRONT = re.compile(r"\A---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
# Where the questions come from, as the hub names it.
_DATASETS = {
    "mmlu": "cais/mmlu",
    "ceval-valid": "ceval/ceval-exam",
    "gsm8k": "openai/gsm8k",
    "humaneval": "openai/openai_humaneval",
    "cmmlu": "haonan-li/cmmlu",
}
_METRICS = {"acc": "accuracy"}


def eval_results(found: Mapping[str, Any], model: str) -> Iterator[Any]:
    """`huggingface_hub.EvalResult` of every task and text that the model was measured on."""
    from huggingface_hub import EvalResult

    entry = found["models"][model]
    for task in task_names(found):
        got = of(entry, "tasks", task)
        if not got or got.get("score") is None:
            continue
        score, error = got["score"]
        scale = task_scale(got)
        metric = str(got.get("metric") or "score")
        more: dict[str, Any] = {} if error is None else {"standard_error": _short(error * scale)}
        if got.get("lost") is not None:
            more["lost_against_the_original"] = _short(got["lost"][0] * scale)
        yield EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS.get(task, task),
            dataset_name=task_title(task),
            metric_type=_METRICS.get(metric, metric),
            metric_name=task_setting(got) or metric,
            metric_value=_short(score * scale),
            metric_args=more or None,
        )
    for domain in domain_names(found):
        got = of(entry, "accuracy", "domains", domain)
        for key, metric, words, scale in (
            ("perplexity", "perplexity", "perplexity", 1.0),
            ("kl", "kl_divergence", "KL from the original, nats per token", 1.0),
            ("top1", "top1_agreement", "same top token as the original, %", 100.0),
        ):
            if not got or got.get(key) is None:
                continue
            value, error = got[key]
            yield EvalResult(
                task_type="text-generation",
                dataset_type=domain,
                dataset_name=domain,
                metric_type=metric,
                metric_name=words,
                metric_value=_short(value * scale),
                metric_args=None if error is None else {"standard_error": _short(error * scale)},
            )


def _short(value: float) -> float:
    """Six digits, which is more than any error leaves."""
    return float(f"{value:.6g}")


def with_results(text: str, found: Mapping[str, Any], model: str, title: str) -> str:
    """The card `text` with the model's results in its front matter, in place of earlier ones.

    Args:
        title: the name under which the hub shows the results.

    Raises:
        InputError: the front matter is such that results cannot be put into it.
    """
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    match = _FRONT.match(text)
    front = (match[1] or "") if match else ""
    body = text[match.end() :] if match else "\n" + text
    front = without(front, BEGIN, END)
    if not re.search(r"^base_model_relation:", front, re.MULTILINE):
        front += RELATION + "\n"
    if results := list(eval_results(found, model)):
        index = eval_results_to_model_index(title, results)
        element = yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=1000)
        front = _insert(front, element)
    made = f"---\n{front}---\n{body}"
    _check(made, len(results))
    return made


def without(text: str, begin: str, end: str) -> str:
    """`text` without the lines from `begin` to `end`, both included.

    Raises:
        InputError: one of the two is missing, or they are the wrong way round.
    """
    pattern = rf"^[ \t]*{re.escape(begin)}\n(?:.*\n)*?[ \t]*{re.escape(end)}(?:\n|\Z)"
    found = re.sub(pattern, "", text, flags=re.MULTILINE)
    if begin in found or end in found:
        raise InputError(
            "README.md",
            expected=f"both lines `{begin}` and `{end}`, or neither",
            got="one without the other",
            cure="Remove that line: what is between the two is replaced, the rest is yours",
        )
    return found


def _insert(front: str, element: str) -> str:
    """Ours as the last element of the `model-index` that is there, or as one of its own."""
    there = re.search(r"^model-index:[ \t]*\n(?:[ \t-].*\n|[ \t]*\n|#.*\n)*", front, re.MULTILINE)
    if there is None and re.search(r"^model-index[ \t]*:", front, re.MULTILINE):
        raise InputError(
            "front matter of README.md",
            expected="`model-index:` with its list on the lines below",
            got="it in another form",
            cure="Write it as a list of `- name: ...`, or remove it",
        )
    if there is None:
        return f"{front}{BEGIN}\nmodel-index:\n{element}{END}\n"
    first = re.search(r"^([ \t]*)- ", there[0], re.MULTILINE)
    indent = first[1] if first else ""
    ours = "".join(f"{indent}{line}\n" for line in [BEGIN, *element.splitlines(), END])
    return front[: there.end()] + ours + front[there.end() :]


def _check(text: str, results: int) -> None:
    """Reads the card as the hub does.

    Raises:
        InputError: it cannot be read, or ours is not in it.
    """
    import yaml
    from huggingface_hub.repocard_data import model_index_to_eval_results

    cure = "Mend the front matter by hand first: it has to be YAML, with `model-index` as a list"
    try:
        match = _FRONT.match(text)
        data = yaml.safe_load(match[1] if match else "")
        index = data.get("model-index") or []
        read = model_index_to_eval_results(index)[1] if index else []
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "front matter of README.md", expected="YAML as the hub reads it", got=error, cure=cure
        ) from error
    if len(read) < results:
        raise InputError(
            "front matter of README.md",
            expected=f"{results} results",
            got=f"{len(read)} when read back",
            cure=cure,
        )
