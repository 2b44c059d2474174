"""Which `--method` for what: every method measured on the same two checkpoints, as one table.

Accuracy on the bundled demo checkpoint (a trained one, held-out text); memory and speed on random
weights of a larger shape, since a few megabytes drown in what any process needs (speed does not
depend on what the weights say; GPTQ's formats are written by rounding there). Whether a LoRA
adapter trains is tried with `examples/qlora.py` on the demo checkpoint.

    python benchmarks/methods.py                 # all of it, into results/methods.json and .md
    python benchmarks/methods.py --render        # the table again from the JSON, and the README's
    python benchmarks/methods.py --out try --blocks 2 --hidden 512 --steps 4 --rows 2
                                                 # minutes, to see that everything runs

Run it on an otherwise idle machine, with a Python that has qquant, bitsandbytes, peft, and for
GPTQ's adapters gptqmodel and optimum. Every measurement is a process of its own
(`methods_worker.py`). **Nothing here has run on a GPU.** What CPUs do to these methods is not what
GPUs do: bitsandbytes' kernels for CPUs unpack a weight at every product, unless the CPU has
AVX512-BF16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEMO, HELDOUT = ROOT / "demo" / "qwen-demo", ROOT / "demo" / "heldout.txt"
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "gptqmodel")
BEGIN, END = "<!-- methods: made by benchmarks/methods.py -->", "<!-- end of methods -->"


@dataclass(frozen=True)
class Method:
    """A row: its title, `qquant quantize`'s options (None for the source itself), and readers.

    Attributes:
        plain: options that give the same format by rounding, where only time and memory count.
        readers: what loads the directory (docs/READERS.md says what was seen).
    """

    key: str
    title: str
    options: tuple[str, ...] | None
    readers: str
    plain: tuple[str, ...] | None = None
    data: bool = False


_INSPECTED = ("parameters", "nbytes", "bits_per_weight", "bits_per_weight_blocks", "summary")
_GPTQ = "transformers + gptqmodel, qquant.load; others in docs/COMPATIBILITY.md"
_BNB = "transformers + bitsandbytes, qquant.load; others in docs/COMPATIBILITY.md"
METHODS = (
    Method("bf16", "BF16, the source", None, "all"),
    Method("gptq4", "`gptq`, 4 bits (default)", (), _GPTQ, ("--method", "rtn"), data=True),
    Method(
        "gptq8",
        "`gptq`, `--bits 8`",
        ("--bits", "8"),
        _GPTQ,
        ("--method", "rtn", "--bits", "8"),
        data=True,
    ),
    Method("rtn4", "`rtn`, 4 bits", ("--method", "rtn"), _GPTQ),
    Method("nf4", "`nf4`", ("--method", "nf4"), _BNB),
    Method("nf4dq", "`nf4 --double-quant`", ("--method", "nf4", "--double-quant"), _BNB),
    Method("fp4", "`fp4`", ("--method", "fp4"), _BNB),
    Method("int8", "`int8`", ("--method", "int8"), _BNB),
)


def environment(work: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 1)),
        "TORCH_COMPILE_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run(work: Path, *words: str | Path) -> dict[str, Any]:
    """A Python process; the JSON of its last line on stdout.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    print("$", *[w if isinstance(w, str) else w.name for w in words], file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(work),
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:] + done.stdout[-1000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def made(work: Path, source: Path, method: Method, options: tuple[str, ...] | None) -> Path:
    """The directory of a method, quantized if it is not there."""
    if options is None:
        return source
    target = work / f"{source.name}-{method.key}"
    if not target.exists():
        words = ("-m", "qquant", "quantize", source, "-o", target, "--log-json", "--device", "cpu")
        found = run(work, *words, *options)
        (work / f"{target.name}.json").write_text(json.dumps(found))
    return target


def measure(work: Path, method: Method, big: Path, steps: int, rows: int) -> dict[str, Any]:
    """Everything about one method; accuracy on `rows` sequences."""
    worker = HERE / "methods_worker.py"
    small = made(work, DEMO, method, method.options)
    large = made(work, big, method, method.plain or method.options)
    told = work / f"{small.name}.json"
    inspected = run(work, "-m", "qquant", "inspect", small, "--json")
    row: dict[str, Any] = {
        "key": method.key,
        "load_average": os.getloadavg()[0],
        "quantize_s": json.loads(told.read_text())["seconds"] if told.exists() else None,
        "inspect": {key: inspected[key] for key in _INSPECTED},  # not its path
        "kl": run(work, worker, "kl", DEMO, small, HELDOUT, str(rows)),
        "bytes": size_of(large),
        "memory": run(work, worker, "memory", large),
        "speed": run(work, worker, "speed", large),
    }
    if method.options is not None:
        adapter = work / f"{method.key}-adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        words = (ROOT / "examples" / "qlora.py", small, "--text", HELDOUT, "-o", adapter)
        short = ("--steps", str(steps), "--batch", "2", "--seqlen", "128", "--rank", "8")
        row["qlora"] = run(work, *words, *short, "--rate", "1e-3")
    return row


def render(result: dict[str, Any]) -> str:
    """The table and what there is to know about it, in Markdown."""
    rows = {row["key"]: row for row in result["rows"]}
    head = ("method", "bits per weight", "calibration data", "size", "peak memory", "tokens/s")
    head += ("KL to BF16", "Q-LoRA", "readers")
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * 7 + "| --- |"]
    for method in METHODS:
        row = rows[method.key]
        memory = row["memory"]
        peak = memory["load_peak_bytes"]
        peak = max(peak, memory["weight_bytes"] + memory["forward_extra_bytes"])
        qlora = row.get("qlora")
        trains = "LoRA"
        if qlora is not None:
            good = sum(qlora["losses"][-3:]) < sum(qlora["losses"][:3])
            trains = "yes" if good and qlora["reloaded_difference"] == 0 else "no"
        kl = row["kl"]["kl"]
        cells = (
            method.title,
            f"{row['inspect']['bits_per_weight_blocks']:.2f}",
            "yes" if method.data else "no",
            f"{row['bytes'] / 1e6:.0f} MB",
            f"{peak / 1e6:.0f} MB",
            f"{row['speed']['decode_tokens_per_s']:.1f}",
            "0" if method.options is None else f"{kl[0]:.2g} ± {kl[1]:.1g}",
            trains,
            method.readers,
        )
        lines.append("| " + " | ".join(cells) + " |")
    shape, machine = result["shape"], result["machine"]
    speed, products = rows["bf16"]["speed"], rows["nf4"]["speed"]["compute_dtype"]

    def beside_bf16(key: str) -> str:
        times = rows[key]["speed"]["decode_tokens_per_s"] / speed["decode_tokens_per_s"]
        return f"{times:.1f} times as fast" if times >= 1 else f"{1 / times:.1f} times slower"

    held = rows["nf4"]["memory"]["weight_bytes"] / 1e6
    extra = rows["nf4"]["memory"]["forward_extra_bytes"] / 1e6
    flags = ", ".join(machine["flags"]) or "none of note"
    lines += [
        "",
        f"Bits per weight are those of the blocks, scales included; KL in nats per token on "
        f"{rows['bf16']['kl']['tokens']:,} held-out tokens of the demo checkpoint, GPTQ with its "
        "built-in calibration data. Size, memory and speed on random weights of "
        f"{shape['blocks']} blocks, hidden {shape['hidden']}, ffn {shape['ffn']}, vocabulary "
        f"{shape['vocab']} ({rows['bf16']['bytes'] / 1e6:.0f} MB in BF16), through `qquant.load`: "
        "peak of loading or of a forward over 512 tokens, in bfloat16, above what the imports "
        f"took; decoding at batch 1 in {speed['dtype'].removeprefix('torch.')} (4-bit products in "
        f"{products.removeprefix('torch.')}, which the directory names), median of "
        f"{len(speed['decode_runs_s'])}. {machine['cpu']}, {machine['cores']} cores ({flags}), "
        f"{result['date']}. **Not yet run on a GPU.**",
        "",
        f"The surprises, measured: beside BF16, NF4 decodes {beside_bf16('nf4')}, Int8 "
        f"{beside_bf16('int8')} (it looks for outlying inputs at every product), and GPTQ with 8 "
        f"bits {beside_bf16('gptq8')} (two products of 4 bits each). And 4 bits are "
        f"not a quarter of the memory: of the {held:.0f} MB that NF4 holds, embedding and head in "
        f"16 bits are {result['sixteen_bit_bytes'] / 1e6:.0f} MB, and the forward took "
        f"{extra:.0f} MB more for activations and unpacked weights.",
        "",
    ]
    return "\n".join(lines)


def into_readme(text: str) -> None:
    """Puts the table between its marks."""
    readme = ROOT / "README.md"
    whole = readme.read_text(encoding="utf-8")
    start, end = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    readme.write_text(f"{whole[:start]}\n\n{text}\n{whole[end:]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="only the table, from the JSON")
    parser.add_argument("--only", nargs="+", help="measure these rows again, keep the others")
    parser.add_argument("--work", type=Path, help="kept; a temporary directory by default")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12, help="of the adapter's training")
    parser.add_argument("--rows", type=int, default=80, help="held-out sequences for the KL")
    parser.add_argument("--out", type=Path, help="a trial: results go here, the README stays")
    args = parser.parse_args()
    saved = (args.out or RESULTS).resolve() / "methods.json"
    saved.parent.mkdir(parents=True, exist_ok=True)
    if not args.render:
        with tempfile.TemporaryDirectory(prefix="qquant-methods-") as scratch:
            work = (args.work or Path(scratch)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            old = json.loads(saved.read_text())["rows"] if args.only and saved.exists() else []
            everything(work, args, {row["key"]: row for row in old}, saved)
    result = json.loads(saved.read_text(encoding="utf-8"))
    if missing := sorted({m.key for m in METHODS} - {row["key"] for row in result["rows"]}):
        sys.exit(f"no table yet: --only {' '.join(missing)} are still to be measured")
    text = render(result)
    saved.with_suffix(".md").write_text("# Methods\n\n" + text, encoding="utf-8")
    if args.out is None:
        into_readme(text)
    print(text)


def everything(work: Path, args: argparse.Namespace, rows: dict[str, Any], saved: Path) -> None:
    """All rows (those of `--only` anew), with the machine and the shape; saved after each."""
    shape = {
        "blocks": args.blocks,
        "hidden": args.hidden,
        "ffn": args.hidden * 11 // 4,
        "heads": args.hidden // 64,
        "vocab": 8192,
    }
    big = work / "random"
    if not big.exists():
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
            "from pathlib import Path; from checkpoints import Shape, write_random\n"
            f"write_random(Shape(**{shape!r}), Path({str(big)!r})); print('{{}}')"
        )
        run(work, "-c", code)
    for method in METHODS:
        if not args.only or method.key in args.only:
            rows[method.key] = measure(work, method, big, args.steps, args.rows)
            result = {
                "date": time.strftime("%Y-%m-%d"),
                "command": "python benchmarks/methods.py",
                "machine": describe(),
                "versions": {name: version(name) for name in PACKAGES},
                "shape": shape,
                "sixteen_bit_bytes": 2 * 2 * shape["vocab"] * shape["hidden"],
                "rows": [rows[m.key] for m in METHODS if m.key in rows],
            }
            saved.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
