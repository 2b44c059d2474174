"""Bits per linear on the demo checkpoint: estimated and real KL against size, beside uniform ones.

`qquant quantize --target-bpw` shares bits out by an estimate of KL (`qquant/sensitivity.py`). Here
the real KL on held-out text is measured for uniform widths, for mixtures of the same size as those
(the honest comparison: equal bytes), and for targets between. Weights are read back by
`evaluate.py`, which reads the files with code of its own. One JSON result, and a picture where
matplotlib is installed (`pip install 'qquant[plots]'`).

The estimate is of plain GPTQ on the full-precision stream; what is measured has the whole recipe's
refinement and corrections, so it lies lower. What the estimate is for is the order.

    python benchmarks/mixed.py
    python benchmarks/mixed.py --recipe fast --name mixed-fast
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from evaluate import evaluate
from machine import describe
from report_table import paired_ratio
from token_files import encode, read_text, windows

import qquant
from qquant.mixed import bits_range

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
TARGETS = (3.5, 4.5, 5.0)
UNIFORM = (3, 4, 8)


def shapes_of(source: Path) -> list[tuple[int, int]]:
    """[outputs, inputs] of every linear that is quantized."""
    from qquant.checkpoint import Checkpoint
    from qquant.models.families import family_of

    checkpoint = Checkpoint.open(source)
    family = family_of(checkpoint.config)
    names = family.linear_names(checkpoint.tensors)
    shapes = (checkpoint.info(f"{name}.weight").shape for name in names)
    return [(n, k) for n, k in shapes]


def specs(args: argparse.Namespace) -> dict[str, qquant.QuantSpec]:
    """What is compared, by name; `equal 4` is a mixture of the size of uniform 4 bits."""
    base = qquant.spec_from_recipe(args.recipe, group_size=args.group_size)
    weights, sizes = bits_range(shapes_of(args.source), base)

    def spec(**changes: Any) -> qquant.QuantSpec:
        return qquant.spec_from_recipe(args.recipe, group_size=args.group_size, **changes)

    found = {f"uniform {b}": spec(bits=b) for b in UNIFORM}
    found["equal 4"] = spec(target_bpw=sizes[4] / weights)
    found["equal 4, from 2,3,4,8"] = spec(target_bpw=sizes[4] / weights, bit_choices=(2, 3, 4, 8))
    for target in TARGETS:
        found[f"target {target:g}"] = spec(target_bpw=target)
    for target in TARGETS[1:]:
        found[f"target {target:g}, from 4,8"] = spec(target_bpw=target, bit_choices=(4, 8))
    return found


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantizes and measures all of them; the result as it is written to JSON."""
    from transformers import AutoTokenizer

    qquant.register()
    tokenizer = AutoTokenizer.from_pretrained(str(args.source))
    calibration = windows(encode(tokenizer, read_text("library", [])), args.samples, args.seqlen)
    text = read_text("text", [args.heldout])
    heldout = windows(encode(tokenizer, text), args.heldout_samples, args.seqlen)
    rows: dict[str, dict[str, Any]] = {}
    directories = {}
    shapes = shapes_of(args.source)
    for number, (name, spec) in enumerate(specs(args).items()):
        target = directories[name] = work / str(number)
        result = qquant.quantize(args.source, target, spec, tokens=calibration, device="cpu")
        mixed = result.mixed
        weights, sizes = bits_range(shapes, spec)
        rows[name] = {
            "spec": spec.to_dict(),
            "bits_per_weight": mixed.chosen.bits_per_weight
            if mixed
            else sizes[spec.bits] / weights,
            "estimate": mixed.chosen.loss if mixed else None,
            "seconds": result.seconds,
            "sensitivity_seconds": result.timings.get("sensitivity"),
            "mixed": mixed.to_dict() if mixed else None,
        }
        print(f"{name}: {result.seconds:.1f} s", file=sys.stderr, flush=True)
    scores = evaluate(args.source, directories, heldout)
    for name, score in scores.items():
        rows[name]["score"] = asdict(score)
    curve = next(row["mixed"]["curve"] for row in rows.values() if row["mixed"])
    for point in curve:
        if point["uniform_bits"] and point["target_bpw"] is None:
            rows[f"uniform {point['uniform_bits']}"]["estimate"] = point["loss"]
    for row in rows.values():
        other = rows["uniform 4"]["score"]["kl_per_sequence"]
        row["kl_over_uniform_4"] = paired_ratio(row["score"]["kl_per_sequence"], other)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "python benchmarks/mixed.py"
        + (f" --recipe {args.recipe}" if args.recipe != "default" else ""),
        "machine": describe(),
        "versions": {"qquant": qquant.__version__, "torch": torch.__version__},
        "checkpoint": args.source.name,
        "calibration": {"samples": args.samples, "seqlen": args.seqlen},
        "group_size": args.group_size,
        "recipe": args.recipe,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table: size, estimate, real KL and its ratio to uniform 4 bits (95% interval)."""
    calibration = result["calibration"]
    lines = [
        f"# Bits per linear: {result['checkpoint']}",
        "",
        f"Recipe {result['recipe']}, group {result['group_size']}, "
        f"{calibration['samples']}×{calibration['seqlen']} calibration tokens from the model's "
        f"domain; {result['machine']['cpu']}, {result['date']}.",
        "",
        f"    {result['command']}",
        "",
        "| | bits/weight | estimated KL | measured KL | / uniform 4 (95%) | top-1 | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(result["rows"].items(), key=lambda item: item[1]["bits_per_weight"]):
        score = row["score"]
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*row["kl_over_uniform_4"])
        measured = row["sensitivity_seconds"]
        seconds = f"{row['seconds']:.0f}" + (f" ({measured:.0f} to choose)" if measured else "")
        estimate = f"{row['estimate']:.3g}" if row["estimate"] is not None else ""
        lines.append(
            f"| {name} | {row['bits_per_weight']:.3f} | {estimate} "
            f"| {score['kl']:.3g} ± {score['kl_se']:.1g} | {ratio} | {score['top1']:.4f} "
            f"| {seconds} |"
        )
    tokens = next(iter(result["rows"].values()))["score"]["tokens"]
    lines += [
        "",
        "KL(BF16 ‖ quantized) per token in nats, of plain dequantized weights in float32, on "
        f"{tokens} held-out tokens. The estimate is of GPTQ without refinement and corrections.",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Estimated curve and measured points, KL on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    curve = [p for p in rows["target 4.5"]["mixed"]["curve"] if p["target_bpw"] is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    sizes, losses = [p["bits_per_weight"] for p in curve], [p["loss"] for p in curve]
    axes.plot(sizes, losses, "-", color="0.6", label="estimate, mixed")
    for kind, marker, label in (
        ("uniform", "s", "measured, uniform"),
        ("mixed", "o", "measured, mixed"),
    ):
        some = [r for r in rows.values() if (r["mixed"] is None) == (kind == "uniform")]
        axes.errorbar(
            [r["bits_per_weight"] for r in some],
            [r["score"]["kl"] for r in some],
            yerr=[2 * r["score"]["kl_se"] for r in some],
            fmt=marker,
            label=label,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight (codes, scales, zero points)")
    axes.set_ylabel("KL per token, nats")
    axes.set_title(f"{result['checkpoint']}, recipe {result['recipe']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=DEMO / "qwen-demo")
    parser.add_argument("--heldout", type=Path, default=DEMO / "heldout.txt")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--heldout-samples", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="mixed", help="of the result files")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--replot", action="store_true", help="table and picture from the JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = args.results / f"{args.name}.json"
    if args.replot:
        result = json.loads(file.read_text())
    else:
        with tempfile.TemporaryDirectory(prefix="qquant-bench-") as work:
            result = run(args, Path(work))
        file.write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    (args.results / f"{args.name}.md").write_text(table)
    print(table)
    try:
        plot(result, args.results / f"{args.name}.png")
    except ImportError:
        print("no picture: pip install 'qquant[plots]'", file=sys.stderr)


if __name__ == "__main__":
    main()
