"""One command that runs every quantizer on one checkpoint with the same tokens, side by side.

Each run is a process of its own (`workers/`), in the tool's own environment, with the same number
of threads; what it costs is measured from outside and in the same way for all (`machine.py`).
Runs alternate: every candidate once, then all again in another order, so that a machine that
slows down slows all of them. What they wrote is measured as plain dequantized weights
(`evaluate.py`). Results stay as JSON with the machine, the versions, the settings and the
command, and as a Markdown table.

Three times are told apart. `wall` is the whole process, imports and all. `work` is what the tool
did: load, quantize and save. `quantize` is the middle part alone where a tool has one; qquant
reads, quantizes, writes and verifies in one call, and all of that counts as its `quantize`.

Fairness: the peers run in the dtype that is fastest on this machine (`--dtype`; bfloat16 where the
processor multiplies it, else float32), with the batch size that suits them, at their own defaults;
other settings of theirs are further candidates (`gptqmodel:mse=2.4`). qquant computes in what its
own `auto` takes there, which the result names; `qquant:dtype=float32` asks for the peers'. A first
untimed run on a small checkpoint lets each tool compile and cache what it wants. This process
imports no torch (see `machine.py`). A peer that fails, as one may that does not know a bit width,
is named in the result with what it said; `--keep` adds to a result measured before on the same
checkpoint and tokens.

    python benchmarks/quantize.py --preset small
    python benchmarks/quantize.py --preset speed --repeats 3
    python benchmarks/quantize.py --preset demo --bars
    python benchmarks/quantize.py --preset second --calibration out --bits 4 --bars
    python benchmarks/quantize.py --preset qwen-1.8b --blocks 2 --bits 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bars
import environments
import report_table
from machine import describe, fastest_dtype, run_measured
from presets import PRESETS, ROOT, Preset, Trained, trained
from results import command, last_line, merged, public, revision, sha256

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Candidate:
    """A tool and its settings, written `tool` or `tool:key=value,key=value`."""

    label: str
    tool: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Values are read as JSON where they are JSON, as text otherwise.

        Raises:
            ValueError: no such tool, or a setting without a value.
        """
        tool, _, rest = text.partition(":")
        if not (HERE / "workers" / f"{tool}_worker.py").exists():
            raise ValueError(f"{text!r}: no worker for {tool!r}")
        options: dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: expected key=value, got {pair!r}")
            try:
                options[key] = json.loads(value)
            except json.JSONDecodeError:
                options[key] = value
        return cls(text, tool, options)

    @property
    def folder(self) -> str:
        """The label as a file name."""
        return "".join(c if c.isalnum() or c in "-._" else "-" for c in self.label)

    def unknown(self) -> str:
        """Why this qquant cannot run it; empty where it can."""
        recipe = self.options.get("recipe")
        if self.tool != "qquant" or recipe is None:
            return ""
        sys.path.insert(0, str(ROOT))
        from qquant.config import RECIPES

        return "" if recipe in RECIPES else f"this qquant has no recipe {recipe!r}"


class Bench:
    """One run of the benchmark: its settings, its work directory, what it has found."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.parts: Trained | None = None
        if args.preset and PRESETS[args.preset].trained:
            self.parts = trained(args.preset, args.second)
        self.pythons = {"here": sys.executable, "rtn": sys.executable}
        self.candidates = [Candidate.parse(text) for text in args.candidates]
        for tool in environments.TOOLS:
            if any(c.tool == tool for c in self.candidates):
                given = getattr(args, f"python_{tool}")
                self.pythons[tool] = str(given or environments.ensure(tool, args.environments))

    def child(self, command: list[str], log: str, tool: str = "here") -> Any:
        """Runs a python script of this folder in the tool's environment; returns its cost.

        Raises:
            RuntimeError: it failed; the end of its output is in the message.
        """
        threads = str(self.args.threads)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if tool == "gptqmodel":
            env["GPTQMODEL_CPU_WORKERS"] = str(max(2, self.args.threads))
        if tool in ("here", "qquant"):
            env["PYTHONPATH"] = str(ROOT)
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(exist_ok=True)
        cost = run_measured([self.pythons[tool], *command], cwd=self.work, env=env, log=path)
        if cost.code:
            tail = path.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{log} ended with {cost.code}:\n{tail}")
        return cost

    def script(self, name: str, *arguments: object) -> None:
        """Runs one of the helper scripts (not measured)."""
        self.child([str(HERE / name), *map(str, arguments)], Path(name).stem)

    def source(self) -> Path:
        """The checkpoint with its own tokenizer: given, bundled, trained or made."""
        args, target = self.args, self.work / "checkpoint"
        if args.checkpoint:
            return Path(args.checkpoint).resolve()
        if self.parts:
            if not self.parts.model.exists():
                say("training the second checkpoint: some minutes, once")
                train = str(ROOT / "scripts" / "train_second.py")
                work = str(args.second / "training")
                self.child([train, "--out", str(args.second), "--work", work], "train_second")
            return self.parts.model
        more = ["--blocks", args.blocks] if args.blocks else []
        if not target.exists():
            self.script("checkpoints.py", args.preset, target, *more)
        return target

    def readable(self, source: Path) -> Path:
        """The checkpoint that all tools are given: original Qwen is turned into Qwen2's layout."""
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        target = self.work / "checkpoint"
        if config["model_type"] != "qwen":
            return source
        if not target.exists():
            self.script("checkpoints.py", "convert", source, target)
        return target

    def tokens(self, what: str, source: Path, samples: int, seed: int) -> Path:
        """The token file for `calibration` or `heldout`: given, or made from text, or random."""
        given, text = getattr(self.args, what), getattr(self.args, f"{what}_text")
        if given and given not in ("in", "out") and given.endswith(".safetensors"):
            return Path(given).resolve()
        if given and given not in ("in", "out"):
            text = [given]
        kind, files = "random", []
        if text:
            kind, files = "text", [Path(t).resolve() for t in text]
        elif given == "out":
            kind = "builtin"
        elif self.parts and what == "heldout":
            kind, files = "text", [self.parts.heldout]
        elif self.parts and self.parts.domain:
            kind, files = "text", [self.parts.domain]
        elif self.parts:
            kind = "library"
        elif given:
            raise SystemExit("--calibration in: this checkpoint's domain is unknown; give a text")
        target = self.work / f"{what}.safetensors"
        size = ["--samples", samples, "--seqlen", self.args.seqlen, "--seed", seed]
        self.script("token_files.py", kind, source, target, *files, *size)
        return target

    def once(
        self, candidate: Candidate, checkpoint: Path, tokens: Path, bits: int, tag: str
    ) -> dict[str, Any]:
        """One run of one candidate; its directory is `out/<tag>` in the work directory."""
        out, result = self.work / "out" / tag, self.work / f"{tag}.result.json"
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        peer = candidate.tool in environments.PEERS
        job = {
            "checkpoint": str(checkpoint),
            "tokens": str(tokens),
            "out": str(out),
            "result": str(result),
            "bits": bits,
            "group_size": self.args.group_size,
            "threads": self.args.threads,
            "dtype": candidate.options.get("dtype", self.args.dtype if peer else "auto"),
            "options": {k: v for k, v in candidate.options.items() if k != "dtype"},
        }
        (self.work / f"{tag}.job.json").write_text(json.dumps(job))
        worker = HERE / "workers" / f"{candidate.tool}_worker.py"
        cost = self.child([str(worker), str(self.work / f"{tag}.job.json")], tag, candidate.tool)
        found = json.loads(result.read_text())
        work = sum(v for k, v in found["seconds"].items() if k != "import")
        return {**asdict(cost), "work_s": work, **found}

    def warm_up(self) -> None:
        """An untimed run of each tool on a small checkpoint: caches, compiled extensions."""
        small = self.work / "warm"
        self.script("checkpoints.py", "small", small)
        tokens = self.work / "warm.safetensors"
        self.script("token_files.py", "random", small, tokens, "--samples", 8, "--seqlen", 64)
        for tool in dict.fromkeys(c.tool for c in self.candidates):
            say(f"warming up {tool}")
            self.once(Candidate(tool, tool, {}), small, tokens, 4, f"warm-{tool}")

    def run(self) -> dict[str, Any]:
        """Everything; returns the whole result as it is written to JSON."""
        args = self.args
        source = self.source()
        checkpoint = self.readable(source)
        calibration = self.tokens("calibration", source, args.samples, 0)
        heldout = None
        if args.heldout_samples:
            heldout = self.tokens("heldout", source, args.heldout_samples, 1)
        if not args.no_warm_up:
            self.warm_up()
        rows = [row for bits in args.bits for row in self.rows(bits, checkpoint, calibration)]
        self.score(rows, checkpoint, heldout)
        return {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commands": [command("quantize.py", sys.argv[1:])],
            "machine": describe(),
            "checkpoint": args.preset or Path(args.checkpoint).name,
            "config": json.loads((checkpoint / "config.json").read_text()),
            "weights_sha256": sha256(*sorted(checkpoint.glob("*.safetensors"))),
            "calibration": {
                "samples": args.samples,
                "seqlen": args.seqlen,
                "source": public(str(args.calibration or ("in" if self.parts else ""))),
                "sha256": sha256(calibration),
            },
            "heldout_sha256": heldout and sha256(heldout),
            "threads": args.threads,
            "group_size": args.group_size,
            "rows": rows,
        }

    def rows(self, bits: int, checkpoint: Path, calibration: Path) -> list[dict[str, Any]]:
        """All runs of all candidates at one bit width, alternating; no scores yet."""
        rows = []
        for c in self.candidates:
            row: dict[str, Any] = {"candidate": c.label, "bits": bits, "runs": [], "score": None}
            if c.tool == "qquant":
                row["revision"] = revision()
            if why := c.unknown():
                row["skipped"] = why
            rows.append(row)
        pairs = list(zip(self.candidates, rows, strict=True))
        for repeat in range(self.args.repeats):
            shift = repeat % len(pairs)
            for c, row in pairs[shift:] + pairs[:shift]:
                if "skipped" in row or "failed" in row:
                    continue
                tag = f"{c.folder}-{bits}bit" + (f"-{repeat}" if repeat else "")
                try:
                    run = self.once(c, checkpoint, calibration, bits, tag)
                except RuntimeError as error:
                    if c.tool not in environments.PEERS:
                        raise
                    row["failed"] = last_line(str(error))
                    row["runs"] = []
                    say(f"{bits} bits, {c.label} failed: {row['failed']}")
                    continue
                say(
                    f"{bits} bits, run {repeat + 1}, {c.label}: wall {run['wall_s']:.1f} s, "
                    f"work {run['work_s']:.1f} s, {run['max_rss_kib'] / 1024:.0f} MiB"
                )
                row["runs"].append(run)
                if repeat:
                    shutil.rmtree(self.work / "out" / tag)
        return rows

    def score(self, rows: list[dict[str, Any]], checkpoint: Path, heldout: Path | None) -> None:
        """Adds the scores to the rows that ran; a bit width at a time is held in memory."""
        folders = {c.label: c.folder for c in self.candidates}
        for bits in self.args.bits if heldout else ():
            ran = [row for row in rows if row["bits"] == bits and row["runs"]]
            if not ran:
                continue
            out = self.work / f"scores-{bits}.json"
            # By number: a label may contain `=` itself.
            numbered = []
            for i, row in enumerate(ran):
                folder = f"{folders[row['candidate']]}-{bits}bit"
                numbered.append(f"{i}={self.work / 'out' / folder}")
            scoring = ("evaluate.py", checkpoint, heldout, "-o", out)
            threads = ("--threads", self.args.threads)
            self.script(*scoring, *threads, "--candidates", *numbered)
            scores = json.loads(out.read_text())
            for i, row in enumerate(ran):
                row["score"] = scores[str(i)]


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout is the table."""
    print(text, file=sys.stderr, flush=True)


def default_name(preset: str | None, checkpoint: Path | None, calibration: str | None) -> str:
    """Of the result files: `speed`, `accuracy-demo`, `accuracy-demo-out`, or the directory's."""
    if not preset:
        return checkpoint.name if checkpoint else "result"
    name = f"accuracy-{preset}" if PRESETS[preset].trained else preset
    return name + ("-out" if calibration == "out" else "")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=list(PRESETS), help="a checkpoint made or bundled")
    what.add_argument("--small", dest="preset", action="store_const", const="small")
    what.add_argument("--checkpoint", type=Path, help="a Qwen2/3 or original Qwen directory")
    parser.add_argument("--candidates", nargs="+")
    parser.add_argument("--bits", nargs="+", type=int)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default=fastest_dtype(), help="the peers' compute type")
    parser.add_argument("--blocks", type=int, help="the first N blocks of a made checkpoint only")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--heldout-samples", type=int, help="0: no accuracy")
    parser.add_argument(
        "--calibration",
        metavar="in|out|PATH",
        help="text of the model's domain, the builtin set as text, or a text or token file",
    )
    parser.add_argument("--heldout", help="text or token file (safetensors)")
    for name in ("calibration", "heldout"):
        parser.add_argument(f"--{name}-text", nargs="+", type=Path, help="text files")
    parser.add_argument(
        "--second",
        type=Path,
        default=ROOT / "build" / "second",
        help="where the second checkpoint is, or is to be",
    )
    for tool in environments.TOOLS:
        parser.add_argument(f"--python-{tool}", type=Path, help="use this environment")
    parser.add_argument("--environments", type=Path, default=environments.cache_dir())
    parser.add_argument("--work", type=Path, help="keep the work directory here")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--name", help="of the result files")
    parser.add_argument(
        "--keep", action="store_true", help="keep what an earlier result has and this run has not"
    )
    parser.add_argument("--bars", action="store_true", help="check the accuracy bars; exit 1")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    preset = PRESETS.get(args.preset, Preset())
    defaults = {
        "samples": preset.samples,
        "seqlen": preset.seqlen,
        "heldout_samples": preset.heldout,
        "bits": list(preset.bits),
        "candidates": list(preset.candidates),
    }
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in ("checkpoint", "work", "second", *(f"python_{t}" for t in environments.TOOLS)):
        if value := getattr(args, key):
            setattr(args, key, Path(os.path.abspath(value)))
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running child is ended too
    with tempfile.TemporaryDirectory(prefix="qquant-bench-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = Bench(args, work).run()
    name = args.name or default_name(args.preset, args.checkpoint, args.calibration)
    args.results.mkdir(exist_ok=True)
    target = args.results / f"{name}.json"
    if args.keep and target.exists():
        order = list(PRESETS.get(args.preset, Preset()).candidates)
        result = merged(json.loads(target.read_text(encoding="utf-8")), result, order)
    target.write_text(json.dumps(result, indent=1) + "\n")
    table = report_table.markdown(result)
    (args.results / f"{name}.md").write_text(table)
    print(table)
    if args.bars:
        lines, passed = bars.report(result)
        print("\n".join(lines))
        sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
