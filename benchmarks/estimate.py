"""What a dry run says beside what the run then takes: time and peak memory.

    python benchmarks/estimate.py --work DIR [--only NAME ...]

Each row is the command with `--dry-run`, three times and timed from outside, before and after the
real run of the same settings with `timings`, which makes the same estimate again, once what it
needs is imported, and is compared with what follows it; each in a process of its own. On the demo
checkpoint and on random weights (Qwen's layout; `checkpoints.py`). Writes
`benchmarks/results/estimate.json` and `.md`, and fails where the run's own estimate, the middle one
of the three, or a peak is off by more than a quarter. Run it on an idle machine. `--only` measures
some rows again and keeps the others from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from machine import describe
from memory import checkpoint

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo" / "qwen-demo"
RESULT = HERE / "results" / "estimate"
WITHIN = 0.25


class Run(NamedTuple):
    """One row: a shape (`checkpoints.PRESETS`, or the demo checkpoint) and the settings."""

    name: str
    shape: str
    blocks: int
    recipe: str
    samples: int
    seqlen: int
    threads: int = 0  # as many as there are


RUNS = (
    Run("fast", "speed", 4, "fast", 64, 512),
    Run("default", "speed", 4, "default", 64, 512),
    Run("qwen", "speed", 4, "qwen", 64, 512),
    Run("deep", "speed", 8, "default", 32, 512),
    Run("wide", "wide", 2, "default", 16, 512),
    Run("demo", "demo", 4, "default", 128, 512),
    Run("one thread", "speed", 4, "fast", 32, 512, threads=1),
)
# The checkpoints have no tokenizer, so ids are given; random ones, since speed is the same.
RUN = """
import json, sys, time, torch
from qquant import CalibrationSpec, quantize, spec_from_recipe
from qquant.events import Stage
began = {}
def watch(event):
    if isinstance(event, Stage):
        began[event.name] = time.perf_counter()
src, dst, recipe, samples, seqlen = sys.argv[1:]
shape = int(samples), int(seqlen)
ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
made = quantize(src, dst, spec_from_recipe(recipe), CalibrationSpec(("builtin",), *shape),
                tokens=ids, device="cpu", overwrite=True, timings=True, progress=watch)
print(json.dumps({
    "said_by_the_run": made.foreseen.to_dict(), "timings": made.timings,
    "peak_bytes": made.peak_bytes, "seconds_after_it": began["publish"] - began["calibrate"],
    "seconds": made.seconds - made.timings["estimate"]}))
"""


def said(words: list[str], threads: int) -> tuple[dict[str, Any], float]:
    """What a command prints last, and its wall time in seconds."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - start


def measured(work: Path, run: Run) -> dict[str, Any]:
    src, dst = DEMO, work / "made"
    if run.shape != "demo":
        src = checkpoint(work / f"{run.shape}-{run.blocks}", run.shape, run.blocks)
    shape = [str(run.samples), str(run.seqlen)]
    dry = [sys.executable, "-m", "qquant", "quantize", str(src), "-o", str(dst)]
    dry += ["--recipe", run.recipe, "--samples", shape[0], "--seqlen", shape[1]]
    dry += ["--device", "cpu", "--dry-run", "--log-json"]
    real = [sys.executable, "-c", RUN, str(src), str(dst), run.recipe, *shape]
    dry_runs = [said(dry, run.threads)]
    found, _ = said(real, run.threads)
    dry_runs += [said(dry, run.threads), said(dry, run.threads)]
    estimates = sorted((e for e, _ in dry_runs), key=lambda e: float(e["total_seconds"]))
    row = {**run._asdict(), "dry_runs": estimates, **found}
    row["dry_run_seconds"] = sorted(seconds for _, seconds in dry_runs)
    row["dry_ratios"] = [e["total_seconds"] / found["seconds"] for e in estimates]
    left = found["said_by_the_run"]["total_seconds"]
    row["time_ratio"] = left / found["seconds_after_it"]
    row["peak_ratio"] = estimates[1]["host_bytes"] / found["peak_bytes"]
    return row


def table(rows: list[dict[str, Any]], machine: dict[str, object]) -> str:
    lines = [
        "# Estimates",
        "",
        f"What `--dry-run` and the run itself foresee, and what the run takes; {machine['cpu']}, "
        f"{machine['cores']} cores. A ratio is estimated over measured; the dry run's are those of "
        "three, and its wall time is that of the slowest; the run's own is of what follows it, "
        "with all imported. Made by `benchmarks/estimate.py`.",
        "",
        "| run | shape | recipe | blocks | tokens | dry run takes s | run took s | run's own ratio "
        "| dry runs' ratios | estimated MB | was MB | ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["dry_ratios"])
        lines.append(
            f"| {row['name']} | {row['shape']} | {row['recipe']} | {row['blocks']} "
            f"| {row['samples'] * row['seqlen']} | {row['dry_run_seconds'][-1]:.2f} "
            f"| {row['seconds']:.1f} | {row['time_ratio']:.2f} | {ratios} "
            f"| {row['dry_runs'][1]['host_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} "
            f"| {row['peak_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def parts(row: dict[str, Any]) -> str:
    """Estimated and measured seconds of the parts that both have, to fit factors again by."""
    told, took = row["said_by_the_run"]["seconds"], row["timings"]
    both = (f"{key} {told[key]:.1f}, took {took[key]:.1f}" for key in told if key in took)
    return f"{row['name']}: {'; '.join(both)}; other {took['other']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    if given.only:
        kept = json.loads(RESULT.with_suffix(".json").read_text())["rows"]
        known = {row["name"]: row for row in kept if "name" in row}
    for run in RUNS:
        if not given.only or run.name in given.only:
            known[run.name] = measured(given.work, run)
            print(parts(known[run.name]), file=sys.stderr)
    rows = [known[run.name] for run in RUNS if run.name in known]
    machine = describe()
    result = {"command": "python benchmarks/estimate.py", "machine": machine, "rows": rows}
    RESULT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(table(rows, machine))
    print(table(rows, machine))
    for row in rows:
        checked = row["time_ratio"], row["dry_ratios"][1], row["peak_ratio"]
        if any(abs(ratio - 1) > WITHIN for ratio in checked):
            sys.exit(f"{row['name']}: an estimate is off by more than {WITHIN:.0%}")


if __name__ == "__main__":
    main()
