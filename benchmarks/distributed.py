"""What sharing a run among processes gains: the same quantization by one process and by several.

Each candidate is one command (`python -m qquant`, or torchrun with it) with a number of processes
and of threads for each, run from outside; its own timings are read. Threads of one process and
processes of one thread compete for the same cores, so the candidates with as many workers as there
are cores show what the exchange costs; what several machines or GPUs gain cannot be seen on one.

    python benchmarks/distributed.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import describe
from results import command

import qquant

HERE = Path(__file__).resolve().parent
CANDIDATES = ((1, 1), (1, 2), (2, 1))  # processes, threads of each
PARTS = ("forward", "hessian", "exchange", "solve", "pack", "write", "commit", "verify")


def quantize(source: Path, target: Path, processes: int, threads: int, more: list[str]) -> Any:
    """The summary that the command prints last."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(processes)]
    words += ["-m", "qquant", "quantize", str(source), "-o", str(target), "--device", "cpu"]
    done = subprocess.run(
        [*words, "--log-json", *more],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def markdown(result: dict[str, Any]) -> str:
    """Seconds of the whole run and of its parts, and against one process with one thread."""
    first = result["rows"][0]["seconds"]
    lines = [
        "# One run, several processes",
        "",
        f"{result['checkpoint']}, {result['samples']}×{result['seqlen']} calibration tokens, the "
        f"default recipe; {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"{result['date']}. Parts are of rank 0; `exchange` has its waiting for others in it.",
        "",
        f"    {result['command']}",
        "",
        "| processes × threads | seconds | speed | " + " | ".join(PARTS) + " |",
        "|---|---:|---:|" + "---:|" * len(PARTS),
    ]
    for row in result["rows"]:
        parts = " | ".join(f"{row['timings'].get(part, 0.0):.1f}" for part in PARTS)
        lines.append(
            f"| {row['processes']} × {row['threads']} | {row['seconds']:.1f} | "
            f"{first / row['seconds']:.2f} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=HERE.parent / "demo" / "qwen-demo")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--name", default="distributed", help="of the result files")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    more = ["--samples", str(args.samples), "--seqlen", str(args.seqlen)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="qquant-bench-") as work:
        for processes, threads in CANDIDATES:
            target = Path(work) / f"{processes}x{threads}"
            found = quantize(args.source, target, processes, threads, more)
            kept = {key: found[key] for key in ("seconds", "peak_bytes", "timings")}
            rows.append({"processes": processes, "threads": threads, **kept})
            print(f"{processes} × {threads}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command("distributed.py", sys.argv[1:]),
        "machine": describe(),
        "versions": {"qquant": qquant.__version__},
        "checkpoint": args.source.name,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "rows": rows,
    }
    (args.results / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    (args.results / f"{args.name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
