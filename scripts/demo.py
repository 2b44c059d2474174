"""The main job on the bundled checkpoint, as a user would do it: `make demo`.

Quantizes demo/qwen-demo to 4 bits, verifies the result, loads it three ways, each in a process of
its own (BF16 as it was; plain transformers with gptqmodel and optimum, where qquant cannot be
imported; `qquant.load`), and prints size, held-out perplexity and tokens per second side by side.
The measuring is one function for all three, in demo_measure_dir.py. Everything is written under
build/demo. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE, HELDOUT, BUILD = ROOT / "demo/qwen-demo", ROOT / "demo/heldout.txt", ROOT / "build/demo"
# A wrong zero point or scale multiplies perplexity; 4 bits done right move it by a percent.
WORST = 1.1
MODES = {
    "bf16": "BF16, transformers",
    "plain": "Int4, transformers + gptqmodel",
    "qquant": "Int4, qquant.load",
}


def environment() -> dict[str, str]:
    """For every child: no network, caches under build/, gptqmodel's pool large enough to start."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(BUILD / "hf"),
        "GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 1)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def step(title: str, *command: str) -> None:
    """Runs a command with its output shown; ends the demo with its exit code if it fails."""
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    code = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment(), check=False
    ).returncode
    if code:
        sys.exit(code)


def measure(mode: str, directory: Path) -> dict[str, Any]:
    """One way of loading, in a process of its own; its last stdout line is JSON."""
    script = Path(__file__).with_name("demo_measure_dir.py")
    command = [sys.executable, str(script), mode, str(directory), "--heldout", str(HELDOUT)]
    done = subprocess.run(
        command,
        cwd=BUILD,
        env=environment(),
        text=True,
        check=False,
        capture_output=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr + done.stdout)
        sys.exit(f"error: measuring {MODES[mode]} failed with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SOURCE, help="default: the bundled one")
    parser.add_argument("--bits", default="4")
    arguments = parser.parse_args()
    source, bits = arguments.source.resolve(), arguments.bits
    target = BUILD / f"{source.name}-int{bits}"
    BUILD.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def shown(path: Path) -> str:
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    ours, theirs = shown(target), shown(source)
    step("quantize", "qquant", "quantize", theirs, "-o", ours, "--bits", bits, "--overwrite")
    step("verify", "qquant", "verify", ours, "--against", theirs)
    results: dict[str, dict[str, Any]] = {}
    for mode, title in MODES.items():
        print(f"\n== measure: {title}", flush=True)
        directory = source if mode == "bf16" else target
        results[mode] = {"weight_bytes": weight_bytes(directory), **measure(mode, directory)}
        print(f"{results[mode]['kernel']}; wrote: {results[mode]['text']!r}", flush=True)

    print(f"\n{'':32}{'weights':>10}{'perplexity':>18}{'tokens/s':>22}")
    for mode, found in results.items():
        size = f"{found['weight_bytes'] / 1e6:.2f} MB"
        perplexity = f"{found['perplexity']:.3f} ± {found['perplexity_se']:.3f}"
        low, middle, high = found["tokens_per_s"]
        speed = f"{middle:.1f} ({low:.1f}-{high:.1f})"
        print(f"{MODES[mode]:32}{size:>10}{perplexity:>18}{speed:>22}")
    some = results["bf16"]
    print(
        f"Held-out text: {some['tokens']} tokens in windows of {some['window']}. Decoding "
        f"{some['new_tokens']} tokens, median and range of {some['repeats']} runs, on "
        f"{some['threads']} CPU threads. {some['note']}"
    )
    results["seconds"] = {"total": time.perf_counter() - started}
    print(json.dumps(results, ensure_ascii=False))
    for mode, found in results.items():
        if mode != "seconds" and found["perplexity"] > WORST * some["perplexity"]:
            sys.exit(f"error: {MODES[mode]}: perplexity {found['perplexity']:.3f} is too high")


if __name__ == "__main__":
    main()
