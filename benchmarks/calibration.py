"""What the model should read while it is quantized: sources and numbers of samples against KL.

For each source the largest set of rows is made once (`qquant.calibration`, as a run of the command
would, chats in the checkpoint's format) and smaller ones are its first rows, so that along a curve
only the amount changes. Every quantization is judged on two held-out texts: of the model's own
domain, and of another. Sources: `builtin` and `self` as on the command line, `domain` (text the
model was trained on: what a user with the right data has), and two files that are given: `chat`
(`--chat`, conversations) and `text` (`--text`, prose or whatever else of another domain).

Which recipe and how many bits are options; results of several calls add up in one file (`--keep`).
The plot needs matplotlib (`pip install 'qquant[plots]'`), the rest does not.

    python benchmarks/calibration.py --preset demo --sources builtin self domain
    python benchmarks/calibration.py --sources chat text --chat A.json --text B.txt --keep
    python benchmarks/calibration.py --plot benchmarks/results/calibration-demo.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import describe
from presets import ROOT, Trained, trained
from report_table import paired_ratio
from results import command, revision

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES = (16, 32, 64, 128, 256)
SOURCES = ("builtin", "self", "domain", "chat", "text")
USUAL = ("builtin", 128)
"""What `qquant quantize` takes unless told otherwise."""
PLACES = {"in": "own domain", "out": "another domain"}


def markdown(result: dict[str, Any]) -> str:
    """Two tables, KL in and out of the domain: a line per source, a column per sample count."""
    rows, machine = result["rows"], result["machine"]
    counts = sorted({row["samples"] for row in rows})
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines = [
        f"# Calibration of {result['checkpoint']}",
        "",
        f"{result['bits']} bits, recipe `{result['recipe']}`, {result['seqlen']} tokens a sample; "
        f"KL(BF16 ‖ quantized) per token in thousandths of a nat, ± its standard error, on "
        f"{rows[0]['in']['tokens']} held-out tokens of each text. "
        f"{machine['cpu']}, {machine['cores']} cores; {result['date']}.",
        "",
    ]
    for place, title in PLACES.items():
        lines += [f"## Held-out text of {result['heldout'][place]} ({title})", ""]
        lines.append("| source | " + " | ".join(f"{n} samples" for n in counts) + " |")
        lines.append("|---" + "|---:" * len(counts) + "|")
        for source in sources:
            cells = []
            for count in counts:
                found = [r[place] for r in rows if (r["source"], r["samples"]) == (source, count)]
                cells.append(
                    f"{1e3 * found[0]['kl']:.3f} ± {1e3 * found[0]['kl_se']:.2g}" if found else "-"
                )
            lines.append(f"| `{source}` | " + " | ".join(cells) + " |")
        lines += ["", *against_usual(rows, place)]
    lines += [f"`{name}`: {why}" for name, why in result.get("skipped", {}).items()]
    return "\n".join(lines).rstrip() + "\n"


def against_usual(rows: list[dict[str, Any]], place: str) -> list[str]:
    """Lines that hold every row's KL against that of the usual calibration, sequences paired."""
    usual = [row for row in rows if (row["source"], row["samples"]) == USUAL]
    if not usual:
        return []
    base = usual[0][place]["kl_per_sequence"]
    source, samples = USUAL
    lines = [f"KL beside that of `{source}` with {samples} samples (95% interval, paired):", ""]
    for row in rows:
        if row is not usual[0]:
            ratio = paired_ratio(row[place]["kl_per_sequence"], base)
            found = "{:.3f} ({:.3f} to {:.3f})".format(*ratio)
            lines.append(f"- `{row['source']}`, {row['samples']} samples: {found}")
    return [*lines, ""]


def plot(result: dict[str, Any], target: Path) -> None:
    """Both tables as curves.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install 'qquant[plots]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, (place, title) in zip(axes, PLACES.items(), strict=True):
        for source in dict.fromkeys(row["source"] for row in result["rows"]):
            rows = sorted(
                (row for row in result["rows"] if row["source"] == source),
                key=lambda row: int(row["samples"]),
            )
            axis.errorbar(
                [row["samples"] for row in rows],
                [row[place]["kl"] for row in rows],
                yerr=[row[place]["kl_se"] for row in rows],
                marker="o",
                capsize=2,
                label=source,
            )
        axis.set_xscale("log", base=2)
        axis.set_title(f"held-out: {result['heldout'][place]} ({title})")
        axis.set_xlabel(f"calibration samples of {result['seqlen']} tokens")
        axis.set_ylabel("KL, nats per token")
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(f"{result['checkpoint']}, {result['bits']} bits, recipe {result['recipe']}")
    figure.savefig(str(target), dpi=120, metadata={"Software": None})


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new result with what an old one has and it has not.

    Raises:
        ValueError: they are about different things.
    """
    for key in ("checkpoint", "bits", "recipe", "seqlen", "heldout", "heldout_sha256", "machine"):
        if old[key] != new[key]:
            raise ValueError(f"--keep: the result kept differs in {key}; give another --name")
    measured = {(row["source"], row["samples"]) for row in new["rows"]}
    kept = [row for row in old["rows"] if (row["source"], row["samples"]) not in measured]
    rows = sorted([*new["rows"], *kept], key=lambda r: (SOURCES.index(r["source"]), r["samples"]))
    present = {row["source"] for row in rows}
    skipped = {**old["skipped"], **new["skipped"]}
    return {
        **new,
        "rows": rows,
        "commands": list(dict.fromkeys([*old["commands"], *new["commands"]])),
        "skipped": {name: why for name, why in skipped.items() if name not in present},
    }


class Study:
    """One call: its checkpoint, its two held-out texts, its rows."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        import torch
        from transformers import AutoTokenizer

        import qquant

        qquant.register()
        torch.set_num_threads(args.threads)
        self.args, self.scratch = args, scratch
        self.parts: Trained = trained(args.preset, args.second)
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.parts.model))
        config = json.loads((self.parts.model / "config.json").read_text(encoding="utf-8"))
        self.model_type = str(config["model_type"])
        self.heldout = {
            "in": self.windows(self.parts.heldout.read_text(encoding="utf-8")),
            "out": self.windows(self.other_text()),
        }
        self.names = {
            "in": "Python sources" if args.preset == "demo" else "docstrings",
            "out": "docstrings" if args.preset == "demo" else "Python sources",
        }

    def windows(self, text: str) -> Any:
        """Held-out ids [n, seqlen] of a text."""
        from token_files import encode, windows

        return windows(encode(self.tokenizer, text), self.args.heldout_samples, self.args.seqlen)

    def other_text(self) -> str:
        """The held-out text of the other checkpoint's domain."""
        if self.args.preset == "second":
            return (ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")
        sys.path.insert(0, str(ROOT / "scripts"))
        from second_corpus import read_docs

        return read_docs().held_out_text()

    def tokens(self, source: str, samples: int) -> Any:
        """Calibration ids [samples, seqlen] of a source."""
        from qquant.calibration.tokens import calibration_tokens, sample_from_model
        from qquant.config import CalibrationSpec

        given = {"chat": self.args.chat, "text": self.args.text}
        name = str(given.get(source, source))
        if source == "domain":
            from token_files import read_text

            path = self.parts.domain
            text = read_text("text", [path]) if path else read_text("library", [])
            name = str(self.scratch / "domain.txt")
            Path(name).write_text(text, encoding="utf-8")
        spec = CalibrationSpec(sources=(name,), samples=samples, seqlen=self.args.seqlen)

        def generate(count: int, seed: int) -> Any:
            from qquant.runtime import load

            loaded = load(self.parts.model, device="cpu")
            rows, seqlen = -(-count // spec.seqlen), spec.seqlen
            return sample_from_model(
                loaded.model, loaded.tokenizer, samples=rows, seqlen=seqlen, seed=seed, batch=64
            )

        made = calibration_tokens(
            self.tokenizer, spec, model_type=self.model_type, generate=generate
        )
        return made.ids

    def rows(self, source: str) -> list[dict[str, Any]]:
        """One source at every number of samples."""
        from dataclasses import asdict

        from evaluate import evaluate

        from qquant.config import CalibrationSpec, OutputSpec, spec_from_recipe
        from qquant.convert import quantize

        spec = spec_from_recipe(self.args.recipe, bits=self.args.bits)
        start = time.perf_counter()
        ids = self.tokens(source, max(self.args.samples))
        say(f"{source}: {ids.shape[0]} rows in {time.perf_counter() - start:.0f} s")
        rows: list[dict[str, Any]] = []
        made = {}
        for count in self.args.samples:
            out = self.scratch / f"{source}-{count}"
            quantize(
                self.parts.model,
                out,
                spec,
                CalibrationSpec(samples=count, seqlen=self.args.seqlen),
                OutputSpec(),
                device="cpu",
                tokens=ids[:count],
            )
            rows.append({"source": source, "samples": count, "revision": revision()})
            made[str(count)] = out
        for place, tokens in self.heldout.items():
            scores = evaluate(self.parts.model, made, tokens)
            for row in rows:
                row[place] = asdict(scores[str(row["samples"])])
        for row in rows:
            say(
                f"{source}, {row['samples']} samples: KL {row['in']['kl']:.6f} in, "
                f"{row['out']['kl']:.6f} out"
            )
        return rows

    def run(self) -> dict[str, Any]:
        """All sources; the result as it is written."""
        from qquant.calibration.tokens import ids_sha256

        args = self.args
        skipped = {}
        for name, file in (("chat", args.chat), ("text", args.text)):
            if name in args.sources and not file:
                skipped[name] = f"not measured: no file was given with --{name}"
        return {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commands": [command("calibration.py", sys.argv[1:])],
            "machine": describe(),
            "checkpoint": args.preset,
            "bits": args.bits,
            "recipe": args.recipe,
            "seqlen": args.seqlen,
            "heldout": self.names,
            "heldout_sha256": {place: ids_sha256(ids) for place, ids in self.heldout.items()},
            "rows": [row for s in args.sources if s not in skipped for row in self.rows(s)],
            "skipped": skipped,
        }


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout is the table."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=["demo", "second"], default="demo")
    parser.add_argument("--second", type=Path, default=ROOT / "build" / "second")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--chat", type=Path, help="a file of conversations")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES))
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--heldout-samples", type=int, default=80)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="of the result files (default: calibration-PRESET)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="add to an earlier result")
    parser.add_argument("--plot", type=Path, metavar="RESULT.json", help="only draw that result")
    args = parser.parse_args()
    if args.plot:
        result = json.loads(args.plot.read_text(encoding="utf-8"))
        plot(result, args.plot.with_suffix(".png"))
        return
    with tempfile.TemporaryDirectory(prefix="qquant-calibration-") as scratch:
        result = Study(args, Path(scratch)).run()
    target = args.results / f"{args.name or 'calibration-' + args.preset}.json"
    if args.keep and target.exists():
        result = merged(json.loads(target.read_text(encoding="utf-8")), result)
    target.write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    target.with_suffix(".md").write_text(table)
    print(table)
    try:
        plot(result, target.with_suffix(".png"))
    except SystemExit as error:
        say(str(error))


if __name__ == "__main__":
    main()
