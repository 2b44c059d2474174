"""Tables of what quantization cost: tasks, distribution, long texts, weights.

The table of tasks has the shape of Qwen's own (chat models by benchmark, github.com/QwenLM/Qwen),
that of perplexity over lengths the shape of theirs for long texts; the others have no model there.
A difference is always the paired one, with the words of `figures.verdict` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..report import kind_of
from .figures import (
    Cell,
    Table,
    interval_cell,
    interval_of,
    is_reference,
    models_of,
    name,
    number,
    pair,
    percent,
    verdict_cell,
)
from .schema import of

# Qwen's four, in their order, and one more; other tasks follow by name.
_TITLES = {
    "mmlu": "MMLU",
    "ceval-valid": "C-Eval (val)",
    "ceval": "C-Eval (val)",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "cmmlu": "CMMLU",
}
# Metrics of lm-eval's that are shares of the questions, by their names without the filter's.
_SHARES = re.compile(
    r"(?:\w+_)?acc(?:_\w+)?|exact_match|(?:\w+_)?em|(?:\w+_)?f1|mc[12]|pass(?:@|_at_)\d+|recall"
)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Every accuracy table that the profile has figures for."""
    made = [task_scores(found), task_losses(found), *distribution(found)]
    made += [*by_position(found), *long_context(found), layers(found)]
    return [table.filled() for table in made if table.rows]


def task_names(found: Mapping[str, Any]) -> list[str]:
    """Every task that some model was measured on, Qwen's first."""
    seen = {task for m in models_of(found) for task in of(found["models"][m], "tasks") or {}}
    order = list(_TITLES)
    return sorted(seen, key=lambda t: (order.index(t) if t in order else len(order), t))


def task_title(task: str) -> str:
    """As people call it."""
    return _TITLES.get(task, task)


def task_scale(got: Mapping[str, Any]) -> float:
    """100 for a share, which is shown in points; 1 for what is no share, or not known to be one."""
    metric = str(got.get("metric") or "").partition(",")[0]
    return 100.0 if _SHARES.fullmatch(metric) else 1.0


def is_share(entry: Mapping[str, Any], task: str) -> bool:
    """Whether a model's score of the task is in points; so, too, where there is none."""
    got = of(entry, "tasks", task)
    return not got or task_scale(got) == 100


def _points(found: Mapping[str, Any], key: str) -> tuple[bool, bool]:
    """Whether any figure of that key is in points, and whether any is not."""
    scales = {
        task_scale(got)
        for model in models_of(found)
        for got in (of(found["models"][model], "tasks") or {}).values()
        if got.get(key) is not None
    }
    return 100.0 in scales, 1.0 in scales


def task_setting(got: Mapping[str, Any]) -> str:
    """Under what a task was measured, in words."""
    parts = [str(got["metric"])] if got.get("metric") else []
    parts += [f"{got['shots']}-shot"] if got.get("shots") is not None else []
    parts += [f"preset {got['preset']}"] if got.get("preset") else []
    parts += ["chat template"] if got.get("chat_template") else []
    parts += [f"{got['n']} questions"] if got.get("n") is not None else []
    parts += [f"limited to {got['limit']}"] if got.get("limit") is not None else []
    sources = {"hub": "data from the hub", "local": "data from local files"}
    parts += [sources.get(got["source"], got["source"])] if got.get("source") else []
    parts += [got["harness"]] if got.get("harness") else []
    return ", ".join(parts)


def _task_notes(found: Mapping[str, Any]) -> Iterator[str]:
    for task in task_names(found):
        settings: dict[str, list[str]] = {}
        for model in models_of(found):
            if got := of(found["models"][model], "tasks", task):
                settings.setdefault(task_setting(got), []).append(model)
        if len(settings) == 1:
            yield f"{task_title(task)}: {next(iter(settings))}."
        elif settings:
            told = "; ".join(f"{', '.join(names)}: {s}" for s, names in settings.items())
            yield f"{task_title(task)} was not measured alike, so do not compare: {told}."


def task_scores(found: Mapping[str, Any]) -> Table:
    """Accuracy by benchmark, a row per model."""
    tasks = task_names(found)
    rows = []
    for model in models_of(found):
        got = of(found["models"][model], "tasks") or {}
        if got:
            cells = [
                pair(of(got, t, "score"), 1, "", task_scale(got[t])) if t in got else Cell()
                for t in tasks
            ]
            rows.append((name(model), *cells))
    points, others = _points(found, "score")
    told = ["Points out of 100"] if points else []
    told += ["other metrics as they are" if points else "The metric as it is"] if others else []
    notes = (f"{', '.join(told)} ± standard error.", *_task_notes(found))
    head = ("model", *map(task_title, tasks))
    return Table("tasks", "Accuracy by benchmark", head, tuple(rows), notes)


def task_losses(found: Mapping[str, Any]) -> Table:
    """What each model lost on each task, question by question against the reference."""
    rows = []
    for model in models_of(found):
        for task in task_names(found):
            got = of(found["models"][model], "tasks", task)
            if not got or got.get("lost") is None:
                continue
            interval, scale = interval_of(got["lost"], got.get("lost_interval")), task_scale(got)
            rows.append(
                (
                    name(model),
                    Cell(task_title(task)),
                    pair(got["lost"], 2, "", scale),
                    interval_cell(interval, 2, scale),
                    verdict_cell(interval),
                    Cell(got.get("paired_with") or ""),
                )
            )
    points, others = _points(found, "lost")
    what = "points lost" if points and not others else "lost"
    head = ("model", "benchmark", what, "95% interval", "in words", "against")
    mixed = ("In points for shares, else in the metric's own unit. ",) if others else ()
    notes = (
        *mixed,
        "Paired: both models answered the same questions, and the error is that of the difference. "
        "A loss is told from noise if zero is not in its interval.",
    )
    title = f"{what.capitalize()}, and whether that is noise"
    return Table("losses", title, head, tuple(rows), notes)


def domain_names(found: Mapping[str, Any]) -> list[str]:
    """Every text that some model was measured on."""
    seen: dict[str, None] = {}
    for model in models_of(found):
        seen |= dict.fromkeys(of(found["models"][model], "accuracy", "domains") or {})
    return list(seen)


def _ranks(found: Mapping[str, Any], domain: str) -> list[str]:
    """The k of the top-k overlaps measured, as they are keyed."""
    seen = {
        k
        for m in models_of(found)
        for k in of(found["models"][m], "accuracy", "domains", domain, "topk") or {}
    }
    return sorted(seen, key=lambda k: (len(k), k))


def distribution(found: Mapping[str, Any]) -> Iterator[Table]:
    """For each text: perplexity, and the distance from the reference token by token."""
    compared = any(
        got.get("kl") is not None
        for m in models_of(found)
        for got in (of(found["models"][m], "accuracy", "domains") or {}).values()
    )
    for place, domain in enumerate(domain_names(found)):
        ranks = _ranks(found, domain)
        head = ["model", "perplexity"]
        if compared:
            head += ["loss added", "95% interval", "in words", "KL", "same top token"]
            head += [f"top-{k} overlap" for k in ranks]
        rows, counts = [], set()
        for model in models_of(found):
            got = of(found["models"][model], "accuracy", "domains", domain)
            if not got:
                continue
            counts.add(got.get("tokens"))
            cells = [name(model), pair(got.get("perplexity"), 4)]
            if compared:
                lost = interval_of(got.get("nll_lost"), got.get("nll_lost_interval"))
                cells += [pair(got.get("nll_lost"), 5), interval_cell(lost, 5)]
                cells += [verdict_cell(lost), pair(got.get("kl"), 5), percent(got.get("top1"))]
                cells += [percent(of(got, "topk", k)) for k in ranks]
            rows.append(tuple(cells))
        tokens = ", ".join(f"{c:,}" for c in sorted(c for c in counts if c))
        notes = [f"{tokens} tokens; ± is the standard error over rows."] if tokens else []
        if compared and place == 0:
            notes.append(
                "Loss added is the paired difference of the negative log-likelihood per token, in "
                "nats; KL is that of the reference's distribution from the model's, in nats per "
                "token. In words: about the loss; not told from noise if zero is in the interval. "
                "KL and agreement tell smaller differences apart than the loss does."
            )
        yield Table(f"text-{place}", f"Text: {domain}", tuple(head), tuple(rows), tuple(notes))


def by_position(found: Mapping[str, Any]) -> Iterator[Table]:
    """For each text: KL and agreement by the token's place in its row."""
    for place, domain in enumerate(domain_names(found)):
        spans: dict[tuple[int, int], list[Cell]] = {}
        models: list[str] = []
        for model in models_of(found):
            rows = of(found["models"][model], "accuracy", "domains", domain, "by_position") or []
            rows = [r for r in rows if r.get("kl") is not None]
            if not rows or is_reference(found, model):
                continue
            for row in rows:
                cells = spans.setdefault((row.get("from", 0), row.get("to", 0)), [])
                cells += [Cell()] * (2 * len(models) - len(cells))
                cells += [pair(row["kl"], 5), percent(row.get("top1"))]
            models.append(model)
        head = ["tokens"]
        for model in models:
            head += [f"{model}: KL", f"{model}: same top token"]
        made = []
        for (start, end), cells in sorted(spans.items()):
            padding = [Cell()] * (2 * len(models) - len(cells))
            made.append((Cell(f"{start} to {end}", start), *cells, *padding))
        title = f"By position in a row: {domain}"
        yield Table(f"position-{place}", title, tuple(head), tuple(made))


def long_context(found: Mapping[str, Any]) -> Iterator[Table]:
    """Perplexity over lengths, with and without dynamic NTK and logn: the shape of Qwen's table."""
    lengths = sorted(
        {
            row["length"]
            for m in models_of(found)
            for row in of(found["models"][m], "long_context", "rows") or []
            if row.get("length") is not None
        }
    )
    rows, texts = [], set()
    for model in models_of(found):
        got = of(found["models"][model], "long_context") or {}
        settings: dict[tuple[str, str, int, bool, bool], dict[int, Cell]] = {}
        for row in got.get("rows") or []:
            text = row.get("text") or got.get("text") or ""
            switched = bool(row.get("dynamic_ntk")), bool(row.get("logn"))
            key = (text, row.get("sha256") or "", row.get("most_tokens") or 0, *switched)
            settings.setdefault(key, {})[row.get("length")] = pair(row.get("perplexity"), 2)
        contents = {digest for _, digest, *_ in settings}
        for (text, digest, most, ntk, logn), cells in sorted(settings.items()):
            words = [w for w, on in (("dynamic_ntk", ntk), ("logn", logn)) if on]
            made = [cells.get(length, Cell()) for length in lengths]
            read = f"{text}, up to {most} tokens" if most else text
            read += f" ({digest[:8]})" if len(contents) > 1 else ""
            rows.append((name(model), Cell(" + ".join(words) or "neither"), *made, Cell(read)))
            texts |= {read} if read else set()
    if len(texts) == 1:  # else a column says which
        rows = [row[:-1] for row in rows]
    head = ("model", "switched on", *(str(length) for length in lengths))
    head += ("text",) if len(texts) != 1 else ()
    notes = (f"Perplexity ± standard error on {', '.join(sorted(texts))}.",) if texts else ()
    yield Table("long", "Perplexity over lengths", head, tuple(rows), notes)


def layers(found: Mapping[str, Any]) -> Table:
    """Error of the weights by kind of linear, and where it is largest."""
    rows = []
    for model in models_of(found):
        linears = of(found["models"][model], "layers", "linears") or {}
        errors = {n: e["relative_error"] for n, e in linears.items() if "relative_error" in e}
        kinds: dict[str, list[str]] = {}
        for linear in errors:
            kinds.setdefault(kind_of(linear), []).append(linear)
        for kind, members in kinds.items():
            worst = max(members, key=lambda n: errors[n])
            mean = sum(errors[n] for n in members) / len(members)
            rows.append(
                (
                    name(model),
                    Cell(kind),
                    number(len(members), 0),
                    number(mean, 2, "%", 100),
                    number(errors[worst], 2, "%", 100),
                    Cell(worst),
                )
            )
    head = ("model", "linear", "count", "mean error", "largest", "which")
    notes = ("Error of a weight: ‖W − Ŵ‖ / ‖W‖ against the reference's.",)
    return Table("layers", "Error by kind of linear", head, tuple(rows), notes)
