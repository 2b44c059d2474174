"""A loaded quantized model on the CPU beside itself in 16 bits and beside gptqmodel's reader.

    python benchmarks/cpu_runtime.py --work DIR

An eighth of Qwen-7B with random weights (4 of 32 blocks, an eighth of the vocabulary, so that head
and blocks keep their proportion), rounded to nearest: what weights say does not matter for time.
Each reader runs in a process of its own, in turn, `--rounds` times: `qquant.load` of the source in
its default dtype for this CPU and in bfloat16, of directories of 4, 8 and 3 bits, the first of them
also under each kernel by name (one that does not run here is left out, which is said), and
transformers with gptqmodel (4 bits). Decoding is after one token of context, prefill is of 512
tokens; all are held against the faster of the two dtypes of the source. Memory is that of the
quantized linears against 2 bytes a weight. Writes `benchmarks/results/cpu-runtime.json` and `.md`
(`cpu-runtime-avx2` on a processor without AVX-512). Run it on an idle machine; it takes some
minutes and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from checkpoints import Shape, write_random
from machine import describe

HERE = Path(__file__).parent
SHAPE = Shape(blocks=4, hidden=4096, ffn=11008, heads=32, vocab=151936 // 8)
READERS = ("16 bits", "16 bits in bfloat16", "int4", "int4 through gptqmodel", "int8", "int3")
UNDER = ("avx2", "torch-int4")  # kernels of 4 bits by name, to see what `auto` should take
READERS += tuple(f"int4 under {kernel}" for kernel in UNDER)
CONTEXT, NEW, PREFILL = 1, 32, 512
MEASURE = """
import json, sys, time
import torch
from qquant.speed import speed
reader, path, context, new, prefill = sys.argv[1:]
started, held, weights = time.perf_counter(), None, None
if reader.endswith("gptqmodel"):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu").eval()
    kernel = type(model.model.layers[0].mlp.down_proj).__name__
else:
    from qquant import QQuantError, load
    from qquant.kernels import QuantLinear
    dtype = "bfloat16" if reader.endswith("bfloat16") else None
    kernel = reader.partition(" under ")[2] or "auto"
    try:
        loaded = load(path, device="cpu", dtype=dtype, kernel=kernel)
    except QQuantError as error:
        print(json.dumps({"refused": str(error)}))
        sys.exit()
    model, kernel = loaded.model, str(loaded.kernel)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    held = sum(m.nbytes for m in packed)
    weights = sum(m.in_features * m.out_features for m in packed)
load_s = time.perf_counter() - started
decode = speed(model, int(context), int(new), repeats=2)
first = speed(model, int(prefill), 1, repeats=2)
print(json.dumps({
    "decode_tokens_per_s": decode.decode_tokens_per_s, "prefill_s": first.prefill_s,
    "linear_bytes": held, "linear_weights": weights, "kernel": kernel,
    "load_s": load_s, "warmup_s": decode.warmup_s}))
"""


def prepared(work: Path) -> dict[str, Path]:
    """The source and its quantized directories by reader, made where they are not there yet."""
    src = work / "eighth"
    if not src.exists():
        write_random(SHAPE, src)
    found = {}
    for reader in READERS:
        if not reader.startswith("int"):
            found[reader] = src
            continue
        bits = reader.removeprefix("int").split()[0]
        found[reader] = dst = work / f"eighth-int{bits}"
        if not dst.exists():
            command = [sys.executable, "-m", "qquant", "quantize", str(src), "-o", str(dst)]
            subprocess.run([*command, "--bits", bits, "--method", "rtn", "--quiet"], check=True)
    return found


def measured(reader: str, path: Path) -> dict[str, Any]:
    words = [reader, str(path), str(CONTEXT), str(NEW), str(PREFILL)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"},
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ratios(rows: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[float, str, float]]:
    """What was aimed at: (measured, direction, bar), from medians over the rounds."""

    def median(reader: str, what: str) -> float:
        return statistics.median(run[what] for run in rows[reader])

    source = READERS[:2]
    decode = max(median(r, "decode_tokens_per_s") for r in source)
    prefill = min(median(r, "prefill_s") for r in source)
    ours, eight, three = (
        median(reader, "decode_tokens_per_s") for reader in ("int4", "int8", "int3")
    )
    one = rows["int4"][0]
    named = {kernel: f"int4 under {kernel}" for kernel in UNDER}
    taken = next((kernel for kernel in UNDER if one["kernel"].startswith(f"{kernel} for")), None)
    others = [reader for kernel, reader in named.items() if kernel != taken and reader in rows]
    found: dict[str, tuple[float, str, float]] = {}
    if taken and others:
        best = max(median(reader, "decode_tokens_per_s") for reader in others)
        found["decode under the kernel that `auto` takes against the other"] = (
            median(named[taken], "decode_tokens_per_s") / best,
            "at least",
            1.0,
        )
    return {
        "decode against 16 bits": (ours / decode, "at least", 2.0),
        "decode against gptqmodel": (
            ours / median(READERS[3], "decode_tokens_per_s"),
            "at least",
            1.0,
        ),
        "prefill time against 16 bits": (median("int4", "prefill_s") / prefill, "at most", 1.3),
        "memory of the linears": (
            one["linear_bytes"] / (2 * one["linear_weights"]),
            "at most",
            0.35,
        ),
        "8 bits, decode against 16 bits": (eight / decode, "at least", 1.0),
        "8 bits, prefill time against 16 bits": (
            median("int8", "prefill_s") / prefill,
            "at most",
            1.3,
        ),
        "3 bits, decode against 16 bits": (three / decode, "at least", 2.0),
        **found,
    }


def table(rows: dict[str, list[dict[str, Any]]], machine: dict[str, Any]) -> str:
    lines = [
        "# A loaded model on the CPU",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}); an eighth of "
        f"Qwen-7B, random weights; medians of {len(rows['int4'])} rounds. Made by "
        "`benchmarks/cpu_runtime.py`.",
        "",
        f"| reader | decode, tokens/s | prefill of {PREFILL}, s | loading, s | kernel |",
        "|---|---:|---:|---:|---|",
    ]
    for reader, runs in rows.items():
        decode, prefill, load = (
            statistics.median(run[what] for run in runs)
            for what in ("decode_tokens_per_s", "prefill_s", "load_s")
        )
        lines.append(
            f"| {reader} | {decode:.2f} | {prefill:.2f} | {load:.1f} | {runs[0]['kernel']} |"
        )
    lines += ["", "| ratio | measured | aim |", "|---|---:|---|"]
    lines += [f"| {w} | {v:.2f} | {way} {bar} |" for w, (v, way, bar) in ratios(rows).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    paths = prepared(given.work)
    rows: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
    for _ in range(given.rounds):
        for reader in tuple(rows):
            one = measured(reader, paths[reader])
            if "refused" in one:
                print(f"{reader}: {one['refused']}")
                del rows[reader]
                continue
            rows[reader].append(one)
    machine = describe()
    narrow = "avx512f" not in machine["flags"]
    path = HERE / "results" / ("cpu-runtime-avx2" if narrow else "cpu-runtime")
    found = {what: list(values) for what, values in ratios(rows).items()}
    command = f"python benchmarks/cpu_runtime.py --work DIR --rounds {given.rounds}"
    result = {"command": command, "machine": machine, "ratios": found, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows, machine))
    print(table(rows, machine))


if __name__ == "__main__":
    main()
