"""Whether time grows linearly with calibration tokens and with blocks: measured, fitted, drawn.

    python benchmarks/linearity.py --work DIR [--recipe default] [--threads 2]

Random weights (hidden 512, `checkpoints.py`'s shape `speed`). Along one axis only the number of
calibration samples of 512 tokens changes (4 blocks), along the other only the number of blocks (32
samples). Each run is a process of its own, in qquant's own environment; what counts are the seconds
that the run itself reports, without its start. The order is shuffled (seed 0), so that a machine
that slows down does not bend a curve. Written are `benchmarks/results/linearity.json`, `.md` and,
where matplotlib is there (`pip install 'qquant[plots]'`), `.png`: the least-squares line of each
axis, and how far the points are from it. Fails where a point is further off than a quarter of its
time, or where ten times the work would take twelve times as long by the log-log slope.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import environments
from machine import describe, run_measured
from memory import RUN, checkpoint
from results import command, revision

HERE = Path(__file__).resolve().parent
SEQLEN = 512
SAMPLES, BLOCKS = (16, 32, 64, 128), (2, 4, 8, 16)
FIXED = {"tokens": 4, "blocks": 32}  # blocks along the tokens, samples along the blocks
WITHIN, STEEPEST = 0.25, math.log10(12)


def points() -> dict[str, list[tuple[int, int]]]:
    """(samples, blocks) along each axis."""
    return {
        "tokens": [(n, FIXED["tokens"]) for n in SAMPLES],
        "blocks": [(FIXED["blocks"], n) for n in BLOCKS],
    }


def fitted(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """The least-squares line, the furthest point from it as a share of its time, the log slope."""
    slope, start = statistics.linear_regression(xs, ys)
    off = max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    logs = ([math.log10(v) for v in values] for values in (xs, ys))
    return {
        "seconds_per_unit": slope,
        "seconds_at_zero": start,
        "furthest": off,
        "log_slope": statistics.linear_regression(*logs).slope,
    }


def reported(python: str, run: str, words: Sequence[str], work: Path, threads: int) -> Any:
    """The last JSON object that a run in a process of its own prints.

    Args:
        run: the program. words: its arguments. work: a folder for its log.

    Raises:
        RuntimeError: it failed.
    """
    log = work / "run.log"
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}
    cost = run_measured([python, "-c", run, *words], cwd=work, env=env, log=log)
    said = log.read_text(errors="replace")
    if cost.code:
        raise RuntimeError(said[-2000:])
    return json.loads(next(line for line in reversed(said.splitlines()) if line[:1] == "{"))


def markdown(result: dict[str, Any]) -> str:
    """Both axes: points, line, distance."""
    machine = result["machine"]
    lines = [
        "# Time against tokens and blocks",
        "",
        f"Random weights, hidden 512, recipe `{result['recipe']}`, {result['threads']} threads; "
        f"{machine['cpu']}, {machine['cores']} cores; {result['date']}. "
        "Made by `benchmarks/linearity.py`.",
    ]
    for axis, found in result["axes"].items():
        fit = found["fit"]
        lines += ["", f"| {axis} | seconds | by the line |", "|---:|---:|---:|"]
        for x, y in zip(found["x"], found["seconds"], strict=True):
            line = fit["seconds_at_zero"] + fit["seconds_per_unit"] * x
            lines.append(f"| {x} | {y:.1f} | {line:.1f} |")
        lines += [
            "",
            f"Furthest from the line: {fit['furthest']:.0%}. Slope of the logarithms: "
            f"{fit['log_slope']:.2f} (1 is linear; below it, what is spent once weighs).",
        ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], target: Path) -> None:
    """Points and lines of both axes; nothing without matplotlib, and says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'qquant[plots]'", file=sys.stderr)
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, found) in zip(figure.subplots(1, 2), result["axes"].items(), strict=True):
        fit, ends = found["fit"], [0, max(found["x"])]
        line = [fit["seconds_at_zero"] + fit["seconds_per_unit"] * x for x in ends]
        axis.plot(ends, line, "-", color="0.6", label="least-squares line")
        axis.plot(found["x"], found["seconds"], "o", label="measured")
        axis.set(xlabel=name, ylabel="seconds", ylim=(0, None), xlim=(0, None))
    figure.axes[0].legend()
    figure.savefig(str(target), dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--python", help="qquant's environment; made where none is given")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    python = given.python or str(environments.ensure("qquant", environments.cache_dir()))
    wanted = points()
    runs = sorted({p for axis in wanted.values() for p in axis})
    random.Random(0).shuffle(runs)
    took: dict[tuple[int, int], float] = {}
    for samples, blocks in runs:
        src = checkpoint(given.work / f"speed-{blocks}", "speed", blocks)
        words = [str(src), str(given.work / "made"), given.recipe, str(samples), str(SEQLEN), "0"]
        found = reported(python, RUN, words, given.work, given.threads)
        took[samples, blocks] = float(found["seconds"])
        print(f"{samples} samples, {blocks} blocks: {took[samples, blocks]:.1f} s", file=sys.stderr)
    axes = {}
    for name, axis in wanted.items():
        xs = [s * SEQLEN if name == "tokens" else b for s, b in axis]
        ys = [took[point] for point in axis]
        axes[name] = {"x": xs, "seconds": ys, "fit": fitted(xs, ys)}
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command("linearity.py", sys.argv[1:]),
        "revision": revision(),
        "machine": describe(),
        "recipe": given.recipe,
        "threads": given.threads,
        "axes": axes,
    }
    target = given.results / "linearity.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(result))
    plot(result, target.with_suffix(".png"))
    print(markdown(result))
    if any(
        a["fit"]["furthest"] > WITHIN or a["fit"]["log_slope"] > STEEPEST for a in axes.values()
    ):
        sys.exit("not linear")


if __name__ == "__main__":
    main()
