"""A profile in words: tables for the terminal and for `REPORT.md`, made from `profile.json` alone.

Every figure carries its standard error, and what is said to differ is a paired difference: a loss
of 0.3 that is within twice its error is not told from noise. Figures of a model that was not
measured for something are left empty, not guessed. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .report import human_bytes, markdown_table, text_table

NAME, REPORT = "profile.json", "REPORT.md"

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def render_text(found: Mapping[str, Any]) -> str:
    """For the terminal."""
    parts = [text_table(*_size_and_speed(found))]
    parts += [f"{name}\n{text_table(*table)}" for name, table in _accuracy(found)]
    return "\n\n".join(parts)


def render_markdown(found: Mapping[str, Any]) -> str:
    """`REPORT.md`."""
    protocol, machine = found["protocol"], found["machine"]
    lines = ["# Profile", ""]
    if found.get("reference"):
        lines += [f"Compared with {found['reference']} on the same tokens.", ""]
    lines += ["## Size, speed, memory", "", markdown_table(*_size_and_speed(found)), ""]
    if (speed := protocol["speed"])["new_tokens"]:
        lines += [
            f"Batch 1, greedy, a prompt of {speed['prompt_len']} tokens, "
            f"{speed['new_tokens']} new ones; the median of {speed['repeats']} runs after "
            "one to warm up. Decode is counted after the first token.",
            "",
        ]
    for name, table in _accuracy(found):
        lines += [f"## Accuracy: {name}", "", markdown_table(*table), ""]
    if protocol["accuracy"]["texts"]:
        lines += [
            f"Rows of {protocol['accuracy']['seqlen']} tokens; ± is the standard error over rows. "
            "Loss added is the paired difference of the negative log-likelihood per token, in "
            "nats.",
            "",
        ]
    lines += ["## Kernels", ""]
    lines += [
        f"- {name}: {entry['load']['kernel']}"
        for name, entry in found["models"].items()
        if "load" in entry
    ]
    packages = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines += [
        "",
        "## Machine",
        "",
        f"{machine['device']}, {machine['threads']} threads; {packages}.",
    ]
    return "\n".join(lines) + "\n"


def _size_and_speed(found: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    head = ("model", "files", "weights in memory", "prefill tokens/s", "decode tokens/s", "peak")
    rows = []
    for name, entry in found["models"].items():
        load = entry.get("load", {})
        speed: dict[str, Any] = next(iter(entry.get("speed", {}).values()), {})
        prefill = f"{speed['prompt_len'] / speed['prefill_s']:.1f}" if speed else ""
        decode = f"{speed['decode_tokens_per_s']:.2f}" if speed else ""
        rows.append(
            [
                name,
                human_bytes(load["file_bytes"]) if load else "",
                human_bytes(load["weight_bytes"]) if load else "",
                prefill,
                decode,
                human_bytes(speed["peak_bytes"]) if speed.get("peak_bytes") else "",
            ]
        )
    return head, rows


def _accuracy(
    found: Mapping[str, Any],
) -> list[tuple[str, tuple[Sequence[str], list[list[str]]]]]:
    """A table for each text."""
    head = ("model", "perplexity", "loss added", "KL", "same first token")
    tables: list[tuple[str, tuple[Sequence[str], list[list[str]]]]] = []
    for domain in found["protocol"]["accuracy"]["texts"]:
        rows = []
        for name, entry in found["models"].items():
            got = entry.get("accuracy", {}).get("domains", {}).get(domain)
            if got is None:
                continue
            rows.append(
                [
                    name,
                    _with_error(got["perplexity"], 4),
                    _with_error(got.get("nll_lost"), 5),
                    _with_error(got.get("kl"), 5),
                    _percent(got.get("top1")),
                ]
            )
        if rows:
            tables.append((domain, (head, rows)))
    return tables


def _with_error(
    pair: Sequence[float | None] | None, digits: int, factor: float = 1.0, unit: str = ""
) -> str:
    value, error = pair or (None, None)
    if value is None:
        return ""
    text = f"{factor * value:.{digits}f}"
    return text + ("" if error is None else f" ± {factor * error:.{digits}f}") + unit


def _percent(pair: Sequence[float | None] | None) -> str:
    return _with_error(pair, 2, 100, "%")
