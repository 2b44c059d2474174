"""The README's tables of recipes and peers, from the results that are kept.

    python benchmarks/readme_table.py

Writes between two marks in the README: KL by bits on both trained checkpoints
(`accuracy-demo.json`, `accuracy-second.json`), the default against the best peer of each kind, and
seconds and memory on the larger model (`speed.json`). A test holds that the README is what this
makes. Standard library only.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from report_table import AUTOROUND, GPTQ_PEERS, best_row, paired_ratio

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE.parent / "README.md", HERE / "results"
BEGIN, END = "<!-- recipes: made by benchmarks/readme_table.py -->", "<!-- end of recipes -->"
CHECKPOINTS = ("demo", "second")
# Candidate of the benchmark -> (its name, what it is).
TITLES = {
    "qquant": (
        "default",
        "GPTQ with activation order (groups fixed first), scale search, refit and coordinate "
        "descent, and corrections from a full-precision stream",
    ),
    "qquant:recipe=best": (
        "`--recipe best`",
        "the same with that stream on all batches and more refinement",
    ),
    "qquant:recipe=fast": (
        "`--recipe fast`",
        "the same without the full-precision stream, with less search and refinement",
    ),
    "qquant:recipe=qwen": (
        "`--recipe qwen`",
        "the settings of Qwen's own script for the published Int4 models: damping 0.01, no "
        "activation order, no search",
    ),
    "rtn": (
        "plain rounding",
        "to nearest, scales by each group's largest weight, as a baseline; no calibration data "
        "(`--method rtn` searches scales: see above)",
    ),
    "gptqmodel": ("GPTQModel", "its defaults; for comparison"),
    "llmcompressor": ("llm-compressor", "static activation order; for comparison"),
    "autoround": ("AutoRound", "200 iterations, its `auto_gptq` export; for comparison"),
}
Result = dict[str, Any]


def load(name: str) -> Result:
    """A kept result."""
    found: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def scored(result: Result, candidate: str, bits: int) -> Result | None:
    """The row of a candidate that has a score."""
    rows = (r for r in result["rows"] if r["candidate"] == candidate and r["bits"] == bits)
    return next((row for row in rows if row.get("score")), None)


def accuracy(results: dict[str, Result]) -> list[str]:
    """A row per candidate, a column per checkpoint and bit width."""
    columns = [
        (name, bits)
        for name, result in results.items()
        for bits in dict.fromkeys(row["bits"] for row in result["rows"])
    ]
    heads = ["setting", "what it is", *(f"{name}, {bits} bits" for name, bits in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(columns)]
    for candidate, title in TITLES.items():
        rows = [scored(results[name], candidate, bits) for name, bits in columns]
        if any(rows) or candidate.startswith("qquant"):
            cells = [f"{row['score']['kl']:.3g}" if row else "-" for row in rows]
            lines.append("| " + " | ".join([*title, *cells]) + " |")
    return lines


def against(results: dict[str, Result]) -> list[str]:
    """The default and `best` against the best peer of each kind: parts of its KL, and intervals."""
    heads = [f"{title}, {bits} bits" for title in ("default", "best") for bits in (4, 3, 2)]
    lines = [
        "| KL as a part of | checkpoint | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * 6,
    ]
    for title, tools in (("the better GPTQ tool's", GPTQ_PEERS), ("AutoRound's", AUTOROUND)):
        for name, result in results.items():
            cells = []
            for candidate in ("qquant", "qquant:recipe=best"):
                for bits in (4, 3, 2):
                    base = best_row([r for r in result["rows"] if r["bits"] == bits], tools)
                    row = scored(result, candidate, bits)
                    cells.append(ratio(row, base))
            lines.append("| " + " | ".join([title, name, *cells]) + " |")
    return lines


def ratio(row: Result | None, base: Result | None) -> str:
    """A cell of `against`."""
    if row is None or base is None:
        return "-"
    ours, theirs = (r["score"]["kl_per_sequence"] for r in (row, base))
    return "{:.2f} ({:.2f} to {:.2f})".format(*paired_ratio(ours, theirs))


def speed(result: Result) -> list[str]:
    """Seconds of load, quantize and save, and peak memory, medians."""
    took = {
        row["candidate"]: statistics.median(run["work_s"] for run in row["runs"])
        for row in result["rows"]
        if row.get("runs")
    }
    peers = [name for name in GPTQ_PEERS if name in took]
    heads = "".join(f" | times as fast as {TITLES[name][0]}" for name in peers)
    lines = [
        f"| setting | seconds{heads} | peak MiB |",
        "|---|---:" + "|---:" * len(peers) + "|---:|",
    ]
    for row in result["rows"]:
        name = row["candidate"]
        if name in took:
            peak = statistics.median(run["max_rss_kib"] for run in row["runs"]) / 1024
            ratios = "".join(f" | {took[peer] / took[name]:.2f}" for peer in peers)
            lines.append(f"| {TITLES[name][0]} | {took[name]:.0f}{ratios} | {peak:.0f} |")
    return lines


def render() -> str:
    """What stands between the marks."""
    results = {name: load(f"accuracy-{name}") for name in CHECKPOINTS}
    fast = load("speed")
    demo, calibration = results["demo"], results["demo"]["calibration"]
    tokens = next(row["score"]["tokens"] for row in demo["rows"] if row.get("score"))
    config, work, machine = fast["config"], fast["calibration"], fast["machine"]
    repeats = max(len(row["runs"]) for row in fast["rows"] if row.get("runs"))
    lines = [
        f"KL(BF16 ‖ quantized) in nats per token on {tokens} held-out tokens; group "
        f"{demo['group_size']}, symmetric; the same {calibration['samples']}×"
        f"{calibration['seqlen']} calibration tokens of the model's domain for all "
        "([demo](benchmarks/results/accuracy-demo.md), the bundled checkpoint; "
        "[second](benchmarks/results/accuracy-second.md), a Qwen2 trained otherwise):",
        "",
        *accuracy(results),
        "",
        "With paired 95% intervals:",
        "",
        *against(results),
        "",
        f"Time on {config['num_hidden_layers']} blocks of hidden {config['hidden_size']}, "
        f"{work['samples']}×{work['seqlen']} tokens, random weights, 4 bits, without imports; "
        f"medians of {repeats} alternating runs on {machine['cpu']}, {machine['cores']} cores, "
        f"{fast['date']} ([speed](benchmarks/results/speed.md)):",
        "",
        *speed(fast),
    ]
    return "\n".join(lines)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:start]}\n\n{render()}\n\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
