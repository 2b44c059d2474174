"""Memory against a limit and against depth, measured from outside.

    python benchmarks/memory.py limit --work DIR --limit 2 --recipe qwen --samples 16
    python benchmarks/memory.py depth --work DIR              # 4, 8, 16 and 32 blocks, hidden 512

The results that are kept are of these settings: the limit is in GiB, recipe and samples are `fast`
and 32 (of 256 tokens, `--seqlen`) unless told.

`limit` quantizes a random-weight checkpoint of Qwen-1.8B's shape (3.7 GB) with `--memory` and kills
the run should its anonymous resident memory (`RssAnon`; pages of files do not count, the system can
drop those) ever pass the limit. `depth` runs models that differ in nothing but depth, each in a
process of its own. Both write `benchmarks/results/memory-*.json`. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from machine import describe
from results import command, revision

HERE = Path(__file__).parent
# The checkpoints have no tokenizer, so ids are given; random ones, since nothing is trained.
RUN = """
import json, sys, torch
from qquant import CalibrationSpec, quantize, spec_from_recipe
src, dst, recipe, samples, seqlen, memory = sys.argv[1:]
shape = int(samples), int(seqlen)
ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
made = quantize(src, dst, spec_from_recipe(recipe), CalibrationSpec(("builtin",), *shape),
                tokens=ids, device="cpu", memory=int(memory) or None, overwrite=True)
print(json.dumps({"peak_bytes": made.peak_bytes, "spilled_bytes": made.spilled_bytes,
                  "linears": len(made.layers), "seconds": made.seconds,
                  "output_bytes": made.size_bytes}))
"""


def anonymous(pid: int) -> int:
    """Anonymous resident bytes of a process; 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def watched(words: list[str], limit: int | None) -> tuple[int, int, str]:
    """Runs a command: (exit code, most anonymous bytes, stdout); kills it beyond `limit`."""
    most = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            if limit is not None and most > limit:
                process.kill()
            time.sleep(0.01)
        assert process.stdout is not None
        return process.returncode, most, process.stdout.read()


def checkpoint(folder: Path, shape: str, blocks: int | None = None) -> Path:
    if not folder.exists():
        words = [sys.executable, str(HERE / "checkpoints.py"), shape, str(folder)]
        words += ["--layout", "qwen", *([] if blocks is None else ["--blocks", str(blocks)])]
        subprocess.run(words, check=True)
    return folder


def quantize(src: Path, dst: Path, options: list[str], limit: int | None) -> dict[str, object]:
    words = [sys.executable, "-c", RUN, str(src), str(dst), *options, str(limit or 0)]
    code, most, said = watched(words, limit)
    return {
        "recipe, samples, seqlen": options,
        "exit_code": code,
        "peak_anonymous_bytes": most,
        "limit_bytes": limit,
        "run": json.loads(said) if code == 0 else None,
        "source_bytes": sum(p.stat().st_size for p in src.glob("*.safetensors")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("limit", "depth"))
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    common = [given.recipe, str(given.samples), str(given.seqlen)]
    rows = []
    if given.what == "limit":
        src = checkpoint(given.work / "qwen-1.8b", "qwen-1.8b")
        limit = int(given.limit * 2**30)
        rows.append(quantize(src, given.work / "limited", common, limit))
    else:
        for blocks in (4, 8, 16, 32):
            src = checkpoint(given.work / f"speed-{blocks}", "speed", blocks)
            rows.append({"blocks": blocks, **quantize(src, given.work / "deep", common, None)})
    result = {
        "command": command("memory.py", sys.argv[1:]),
        "revision": revision(),
        "machine": describe(),
        "rows": rows,
    }
    path = HERE / "results" / f"memory-{given.what}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    if any(row["exit_code"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
