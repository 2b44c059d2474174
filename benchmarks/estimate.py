"""What a run was estimated to take beside what it took: time and peak memory.

    python benchmarks/estimate.py --work DIR

Each run is the real command in a process of its own with `--timings`, which estimates first, on a
random-weight checkpoint (hidden 512, Qwen2 layout). Writes `benchmarks/results/estimate.json` and
`.md`, and fails where a time or a peak is off by more than a quarter. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from machine import describe
from memory import checkpoint

HERE = Path(__file__).parent
WITHIN = 0.25
# Recipe, blocks, samples, tokens per sample.
RUNS = (
    ("fast", 4, 64, 512),
    ("default", 4, 64, 512),
    ("qwen", 4, 64, 512),
    ("default", 8, 32, 512),
)
RUN = """
import json, sys, torch
from qquant import CalibrationSpec, quantize, spec_from_recipe
src, dst, recipe, samples, seqlen = sys.argv[1:]
shape = int(samples), int(seqlen)
ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
made = quantize(src, dst, spec_from_recipe(recipe), CalibrationSpec(("builtin",), *shape),
                tokens=ids, device="cpu", overwrite=True, timings=True)
print(json.dumps({
    "estimated": made.foreseen.to_dict(), "timings": made.timings, "peak_bytes": made.peak_bytes,
    "seconds": made.seconds - made.timings["estimate"]}))
"""


def measured(work: Path, recipe: str, blocks: int, samples: int, seqlen: int) -> dict[str, object]:
    src = checkpoint(work / f"speed-{blocks}", "speed", blocks)
    words = [sys.executable, "-c", RUN, str(src), str(work / "made"), recipe]
    said = subprocess.run(
        [*words, str(samples), str(seqlen)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    found = json.loads(said.splitlines()[-1])
    row = {"recipe": recipe, "blocks": blocks, "samples": samples, "seqlen": seqlen, **found}
    row["time_ratio"] = found["estimated"]["total_seconds"] / found["seconds"]
    row["peak_ratio"] = found["estimated"]["host_bytes"] / found["peak_bytes"]
    return row


def table(rows: list[dict[str, object]], machine: dict[str, object]) -> str:
    lines = [
        "# Estimates",
        "",
        f"Random weights, hidden 512; {machine['cpu']}, {machine['cores']} cores. A ratio is "
        "estimated over measured. Made by `benchmarks/estimate.py`.",
        "",
        "| recipe | blocks | tokens | estimated s | took s | ratio "
        "| estimated MB | was MB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        said = row["estimated"]
        lines.append(
            f"| {row['recipe']} | {row['blocks']} | {row['samples'] * row['seqlen']} "
            f"| {said['total_seconds']:.1f} | {row['seconds']:.1f} | {row['time_ratio']:.2f} "
            f"| {said['host_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} "
            f"| {row['peak_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [measured(given.work, *run) for run in RUNS]
    machine = describe()
    path = HERE / "results" / "estimate"
    result = {"command": "python benchmarks/estimate.py", "machine": machine, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows, machine))
    print(table(rows, machine))
    for ratio in ("time_ratio", "peak_ratio"):
        if any(abs(row[ratio] - 1) > WITHIN for row in rows):
            sys.exit(f"an estimate ({ratio}) is off by more than {WITHIN:.0%}")


if __name__ == "__main__":
    main()
