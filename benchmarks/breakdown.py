"""Where a run's time goes, and how near its products come to the machine's own rate.

    python benchmarks/breakdown.py --work DIR [--recipes default fast qwen] [--repeats 3]

Random weights (8 blocks of hidden 512, `checkpoints.py`'s shape `speed`), 64 samples of 512
tokens. Runs of the recipes alternate, each in a process of its own in qquant's own environment, and
report what `--timings` reports: seconds by part, operations of forwards and Hessians, and the rate
that one large product reached at the end of that same run. Forward counts the operations of linears
and causal attention only, while its seconds have norms and everything else in them. Written are
`benchmarks/results/breakdown.json` and `.md`, with medians. Fails where forward or Hessian comes to
less than 60% of the product's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import environments
from linearity import reported
from machine import describe
from memory import checkpoint
from results import command, revision

HERE = Path(__file__).resolve().parent
BLOCKS, SAMPLES, SEQLEN = 8, 64, 512
LEAST = 0.6  # of the product's rate
RUN = """
import json, sys
import transformers.modeling_layers, transformers.modeling_utils
import torch
from qquant import CalibrationSpec, quantize, spec_from_recipe
from qquant.timings import rates
src, dst, recipe, samples, seqlen = sys.argv[1:]
shape = int(samples), int(seqlen)
ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
made = quantize(src, dst, spec_from_recipe(recipe), CalibrationSpec(("builtin",), *shape),
                tokens=ids, device="cpu", overwrite=True, timings=True)
print(json.dumps({"seconds": made.timings, "gflops": rates(made.timings, made.flops),
                  "matmul": made.matmul_gflops, "dtype": made.compute_dtype}))
"""


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of seconds by part, and of rates as shares of the product's rate in the same run."""
    parts = {key for run in runs for key in run["seconds"]}
    return {
        "seconds": {
            key: statistics.median(run["seconds"].get(key, 0.0) for run in runs)
            for key in sorted(parts)
        },
        "gflops": {
            key: statistics.median(run["gflops"][key] for run in runs) for key in runs[0]["gflops"]
        },
        "of_matmul": {
            key: statistics.median(run["gflops"][key] / run["matmul"] for run in runs)
            for key in runs[0]["gflops"]
        },
    }


def markdown(result: dict[str, Any]) -> str:
    machine, rows = result["machine"], result["recipes"]
    parts = sorted(
        {part for row in rows.values() for part in row["medians"]["seconds"]},
        key=lambda part: -max(row["medians"]["seconds"].get(part, 0) for row in rows.values()),
    )
    lines = [
        "# Where the time goes",
        "",
        f"{BLOCKS} blocks of hidden 512, random weights, {SAMPLES}×{SEQLEN} tokens, "
        f"{result['threads']} threads, {result['dtype']}; {machine['cpu']}, "
        f"{machine['cores']} cores; {result['date']}. Medians of {result['repeats']} alternating "
        "runs, in seconds; in "
        "parentheses GFLOP/s, and that as a share of what one large product reached in the same "
        "run. Forward counts the operations of linears and causal attention only. "
        "Made by `benchmarks/breakdown.py`.",
        "",
        "| part | " + " | ".join(f"`{name}`" for name in rows) + " |",
        "|---|" + "---:|" * len(rows),
    ]
    for part in parts:
        cells = []
        for row in rows.values():
            found = row["medians"]
            cell = f"{found['seconds'].get(part, 0.0):.1f}"
            if part in found["gflops"]:
                cell += f" ({found['gflops'][part]:.0f}, {found['of_matmul'][part]:.0%})"
            cells.append(cell)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--recipes", nargs="+", default=["default", "fast", "qwen"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    python = str(environments.ensure("qquant", environments.cache_dir()))
    src = checkpoint(given.work / f"speed-{BLOCKS}", "speed", BLOCKS)
    runs: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in given.recipes}
    for number in range(given.repeats):
        for recipe in given.recipes:
            words = [str(src), str(given.work / "made"), recipe, str(SAMPLES), str(SEQLEN)]
            runs[recipe].append(reported(python, RUN, words, given.work, given.threads))
            print(f"run {number + 1}, {recipe}: {runs[recipe][-1]}", file=sys.stderr, flush=True)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command("breakdown.py", sys.argv[1:]),
        "revision": revision(),
        "machine": describe(),
        "threads": given.threads,
        "repeats": given.repeats,
        "dtype": " and ".join(sorted({run["dtype"] for own in runs.values() for run in own})),
        "recipes": {name: {"runs": own, "medians": medians(own)} for name, own in runs.items()},
    }
    target = HERE / "results" / "breakdown.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    for name, row in result["recipes"].items():
        for part, share in row["medians"]["of_matmul"].items():
            if share < LEAST:
                sys.exit(f"{name}: {part} at {share:.0%} of the product's rate")


if __name__ == "__main__":
    main()
