"""The Markdown table of one benchmark result. Standard library only.

python benchmarks/report_table.py benchmarks/results/speed.json
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IDLE_CORES = 0.1
TIMES = ("wall s", "work s", "quantize s", "CPU s")
GPTQ_PEERS = ("gptqmodel", "llmcompressor")
AUTOROUND = ("autoround",)
SOURCES = {
    "in": ", text of the model's own domain",
    "out": ", text of another domain (qquant's builtin conversations as plain text)",
}


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of mean KLs and its 95% interval: the same sequences drawn, with replacement."""
    generator = random.Random(seed)
    n = len(ours)
    ratios = []
    for _ in range(draws):
        picks = generator.choices(range(n), k=n)
        ratios.append(sum(ours[i] for i in picks) / sum(theirs[i] for i in picks))
    ratios.sort()
    return sum(ours) / sum(theirs), ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def others_cores(rows: Sequence[dict[str, Any]]) -> float:
    """The most that other processes did during a run, in processors; above `IDLE_CORES` the times
    of these rows say little. Results that did not measure it count as idle."""
    runs = [run for row in rows for run in row.get("runs") or ()]
    return max((float(run.get("others_cores", 0.0)) for run in runs), default=0.0)


def best_row(rows: Sequence[dict[str, Any]], tools: Sequence[str]) -> dict[str, Any] | None:
    """The row of these tools, whatever their settings, with the lowest KL; None where none has."""
    scored = [r for r in rows if r.get("score") and r["candidate"].partition(":")[0] in tools]
    return min(scored, key=lambda row: float(row["score"]["kl"]), default=None)


def markdown(result: dict[str, Any]) -> str:
    """Heading, one table per bit width, and what was measured how."""
    machine, config, calibration = result["machine"], result["config"], result["calibration"]
    flags = ", ".join(machine["flags"]) or "none"
    lines = [
        f"# {result['checkpoint']}",
        "",
        f"{config['num_hidden_layers']} blocks, hidden {config['hidden_size']}, ffn "
        f"{config['intermediate_size']}, vocabulary {config['vocab_size']}; group "
        f"{result['group_size']}, symmetric; {calibration['samples']}×{calibration['seqlen']} "
        f"calibration tokens, the same for all{SOURCES.get(calibration.get('source', ''), '')}.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({flags}), {machine['memory_gib']} GiB; "
        f"{result['threads']} threads; {result['date']}.",
        "",
        *(f"    {command}" for command in result.get("commands") or [result["command"]]),
        "",
    ]
    timed = others_cores(result["rows"]) <= IDLE_CORES
    for bits in dict.fromkeys(row["bits"] for row in result["rows"]):
        lines += _table(bits, [row for row in result["rows"] if row["bits"] == bits], timed)
    lines += _notes(result)
    return "\n".join(lines) + "\n"


def _table(bits: int, rows: list[dict[str, Any]], timed: bool) -> list[str]:
    heads = ["candidate", *(TIMES if timed else ()), "peak MiB", "anonymous MiB"]
    ran = [row for row in rows if row.get("runs")]
    scored = [row for row in ran if row["score"]]
    others = {"best GPTQ tool": best_row(rows, GPTQ_PEERS), "AutoRound": best_row(rows, AUTOROUND)}
    bases = {name: row for name, row in others.items() if row}
    if scored:
        heads += ["KL", "top-1", "perplexity"]
        heads += [f"KL / {name}'s (95%)" for name in bases]
    lines = [f"## {bits} bits", "", "| " + " | ".join(heads) + " |"]
    lines.append("|---" + "|---:" * (len(heads) - 1) + "|")
    for row in ran:
        runs = row["runs"]
        cells = [
            f"`{row['candidate']}`",
            *(_times(runs) if timed else ()),
            f"{statistics.median(run['max_rss_kib'] for run in runs) / 1024:.0f}",
            f"{statistics.median(run['tree_anon_kib'] for run in runs) / 1024:.0f}",
        ]
        if score := row["score"]:
            cells += [
                f"{score['kl']:.3g} ± {score['kl_se']:.1g}",
                f"{score['top1']:.4f}",
                f"{score['ppl']:.4f}",
                *(_ratio(row, base) for base in bases.values()),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for row in rows:
        for why in ("failed", "skipped"):
            if row.get(why):
                lines += [f"`{row['candidate']}` {why}: {row[why]}", ""]
    if scored:
        score = scored[0]["score"]
        lines += [
            f"Source perplexity {score['ppl_source']:.4f}, on {score['tokens']} held-out tokens.",
            "",
        ]
    return lines


def _times(runs: list[dict[str, Any]]) -> list[str]:
    """The cells under `TIMES`."""
    return [
        _spread([run["wall_s"] for run in runs]),
        _spread([run["work_s"] for run in runs]),
        f"{statistics.median(run['seconds']['quantize'] for run in runs):.1f}",
        f"{statistics.median(run['cpu_s'] for run in runs):.1f}",
    ]


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> str:
    """A cell: the ratio of KLs and its interval; 1 for the base itself."""
    if row is base:
        return "1"
    ours, theirs = (r["score"]["kl_per_sequence"] for r in (row, base))
    return "{:.3f} ({:.3f} to {:.3f})".format(*paired_ratio(ours, theirs))


def _spread(values: list[float]) -> str:
    """Median, with the range where there is more than one."""
    text = f"{statistics.median(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} to {max(values):.1f})"


def _notes(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["rows"] if row.get("runs")]
    repeats = max(len(row["runs"]) for row in rows)
    load = max(run["load_before"] for row in rows for run in row["runs"])
    others = others_cores(rows)
    times = (
        f"Medians of {repeats} alternating runs. `wall` is the whole process, `work` is load, "
        "quantize and save without imports; qquant does these (and verifies) in one call. "
    )
    if others > IDLE_CORES:
        times = (
            f"Not timed: the machine was not idle (others kept up to {others:.2f} of its "
            "processors busy during a run), which changes no KL. "
        )
    lines = [
        times + "Peak is the largest resident set of the process; anonymous leaves out pages "
        "mapped from files. KL is KL(BF16 ‖ quantized) per token in nats, of plain dequantized "
        "weights in float32.",
        "",
    ]
    shown: set[str] = set()
    for row in rows:
        if row["candidate"] not in shown:
            shown.add(row["candidate"])
            run = row["runs"][0]
            versions = {**run["versions"], **row.get("revision", {})}
            made = ", ".join(f"{k} {v}" for k, v in versions.items() if v != "-")
            kept = ("damp", "damp_percent", "dampening_frac", "actorder", "act_order", "desc_act")
            kept += ("act_group_aware", "mse", "observer", "iters", "batch_size", "dtype")
            used = ", ".join(f"{k} {run['settings'][k]}" for k in kept if k in run["settings"])
            lines.append(f"- `{row['candidate']}`: {made}{'; ' + used if used else ''}")
    if others <= IDLE_CORES:
        lines += ["", f"Largest load average before a run: {load:.2f}."]
    return lines


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
