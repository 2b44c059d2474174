"""The one table and the few sentences that a reader in a hurry needs.

A row per model: size, what was lost, how fast, how much memory. Where there are several texts,
tasks or settings the table takes the mean over texts and tasks and the first setting, and says so;
the sentences name what must not be overlooked: slow kernels, and whether losses are noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .accuracy import domain_names, task_names, task_scale, task_title
from .figures import (
    NOISE,
    SAME,
    Cell,
    Table,
    gib,
    interval_of,
    is_reference,
    models_of,
    name,
    number,
    size,
    verdict,
)
from .running import peak_of, peaks, slow_kernels, whats
from .schema import of


def glance(found: Mapping[str, Any]) -> Table:
    """The summary; columns without a figure for any model are left out."""
    setting, what = _setting(found), (whats(found) or [""])[-1]
    head = ["model", "files", "KL", "same top token", "task score"]
    head += [f"tokens/s ({setting})", f"peak GiB ({what})"]
    rows = []
    for model in models_of(found):
        entry = found["models"][model]
        cells = [name(model), size(of(entry, "load", "file_bytes"))]
        cells += [number(_mean(found, model, "kl"), 5)]
        cells += [number(_mean(found, model, "top1"), 2, "%", 100)]
        cells += [number(_task_mean(found, model), 1)]
        got = of(entry, "speed", setting) if setting else None
        cells += [number(_rate(got or {}), 2)]
        peak = peaks(found, model).get(what) if what else None
        cells += [gib(peak_of(peak)) if peak else Cell()]
        rows.append(cells)
    used = [i for i in range(len(head)) if i == 0 or any(row[i].text for row in rows)]
    notes: tuple[str, ...] = ()
    if len(domain_names(found)) > 1 or len(task_names(found)) > 1:
        notes = ("KL and agreement are means over the texts, the score is the mean of the tasks.",)
    return Table(
        "glance",
        "Summary",
        tuple(head[i] for i in used),
        tuple(tuple(row[i] for i in used) for row in rows),
        notes,
    )


def _setting(found: Mapping[str, Any]) -> str | None:
    for model in models_of(found):
        for setting in of(found["models"][model], "speed") or {}:
            return str(setting)
    return None


def _rate(got: Mapping[str, Any]) -> float | None:
    key = "qwen_tokens_per_s" if got.get("preset") == "qwen" else "decode_tokens_per_s"
    value = got.get(key)
    return None if value is None else float(value)


def _mean(found: Mapping[str, Any], model: str, key: str) -> float | None:
    """Over the texts; nothing where the model lacks one that others have."""
    values = [
        of(found["models"][model], "accuracy", "domains", domain, key)
        for domain in domain_names(found)
    ]
    if not values or any(v is None for v in values):
        return None
    return float(sum(v[0] for v in values) / len(values))


def _task_mean(found: Mapping[str, Any], model: str) -> float | None:
    got = [of(found["models"][model], "tasks", task) for task in task_names(found)]
    if not got or any(g is None or g.get("score") is None or task_scale(g) == 1 for g in got):
        return None
    return float(sum(100 * g["score"][0] for g in got) / len(got))


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What must not be overlooked, a sentence each."""
    return [*_nothing_lost(found), *_noise(found), *slow_kernels(found)]


def accuracy_measured(models: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any of these entries tells what a model says, and not its weights alone."""
    kinds = ("accuracy", "tasks", "long_context")
    return any(of(entry, kind) for entry in models for kind in kinds)


def _nothing_lost(found: Mapping[str, Any]) -> list[str]:
    reference = found.get("reference")
    if not reference or accuracy_measured(found["models"].values()):
        return []
    return [
        f"Accuracy was not measured, as no text and no benchmark was given: beside {reference} "
        "stand the error of the weights, sizes, speed and memory alone."
    ]


def _noise(found: Mapping[str, Any]) -> list[str]:
    told = []
    for model in models_of(found) if found.get("reference") else ():
        if is_reference(found, model):
            continue
        groups: dict[str, list[str]] = {}
        for what, interval in _differences(found, model):
            groups.setdefault(verdict(interval), []).append(what)
        parts = []
        for words, things in groups.items():
            listed = ", ".join(things)
            if words == SAME:
                parts.append(f"exactly the same on {listed}")
            elif words == NOISE:
                parts.append(f"not told from noise on {listed}")
            else:
                parts.append(f"{words} on {listed}")
        if parts:
            told.append(f"{model}, compared with {found.get('reference')}: {'; '.join(parts)}.")
    return told


def _differences(
    found: Mapping[str, Any], model: str
) -> list[tuple[str, tuple[float, float] | None]]:
    made = []
    for task in task_names(found):
        got = of(found["models"][model], "tasks", task)
        if got and got.get("lost") is not None:
            interval = interval_of(got["lost"], got.get("lost_interval"))
            made.append((task_title(task), interval))
    for domain in domain_names(found):
        got = of(found["models"][model], "accuracy", "domains", domain)
        if got and got.get("nll_lost") is not None:
            interval = interval_of(got["nll_lost"], got.get("nll_lost_interval"))
            made.append((f"{domain} (loss per token)", interval))
    return [(what, interval) for what, interval in made if interval is not None]
