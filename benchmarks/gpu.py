"""The suite for a machine with one GPU: made, quantized, verified, measured, in under 9 minutes.

Each step is a process of its own with what is left of the time; a step that fails or runs out of
it says so and leaves the results of the others alone. `benchmarks/results/gpu-SHAPE.json` is
written after every step, and steps that are not run again keep what they have there, so a long
suite can be run in parts (`--steps`). Each says under `of` what it is of: revision, machine,
versions, command and date. An `error` may stand beside a result: a profile that ended early keeps
what it had measured, and goes on from there when it is run again at the same revision; and where
a step once had a result and then fails without any, the result stays (`failed` tells of the run
that failed). The checkpoint has random weights: speed and memory do not depend on what they say.

Nothing but qquant's own requirements is needed; bitsandbytes and pytest are used where they are
there, and said to be missing where not. In place of greenlet, which not every machine has, threads
do (`stand_in/greenlet.py`). Wheels that are carried along are installed into WORK/site (`--wheels`)
and used by all later runs with that WORK.

The profiles are Qwen's tables' measurements: speed of 2048 tokens and peak memory of reading 2048
(`profile-NAME`), speed of 8192 and peak memory of generating 8192 (`long-NAME`, minutes each), and
beside the first qquant's own protocol, plain and compiled.

    python benchmarks/gpu.py --work DIR
    python benchmarks/gpu.py --work DIR --steps long-bf16 long-int4
    python benchmarks/gpu.py --work DIR --wheels WHEELS --revision 0123abcdef   # no .git
    python benchmarks/gpu.py --work DIR --tiny           # small, on a CPU: tries the suite itself
    python benchmarks/gpu.py --work DIR --tiny --device cuda
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import describe, run_measured
from results import command, last_line, revision

HERE = Path(__file__).parent
STAND_IN = HERE / "stand_in"
BESIDE = ("triton", "bitsandbytes", "pytest")  # versions told beside those of the requirements
MODELS = ("bf16", "int4", "nf4", "int8")
TAIL = 60  # lines of a log that are kept


class StepError(Exception):
    """A step did not do what it is for; the text says why.

    Args:
        ran: what there is to say of it all the same, as in a step that did.
    """

    def __init__(self, text: str, **ran: Any) -> None:
        super().__init__(text)
        self.ran = ran


@dataclass(frozen=True)
class Suite:
    """What is measured where.

    Attributes:
        work: folder of the checkpoints. tiny: small sizes. device: `cuda`, `cpu`. deadline: of
            `monotonic`. revision: of qquant; empty where it is not known.
        stand_in: who imports greenlet is to find `stand_in`, since nothing else can be imported.
    """

    work: Path
    tiny: bool
    device: str
    deadline: float
    revision: str = ""
    stand_in: bool = False

    @property
    def site(self) -> Path:
        """Where wheels are installed that were carried along."""
        return self.work / "site"

    @property
    def env(self) -> dict[str, str]:
        """Of every process."""
        path = [str(STAND_IN)] if self.stand_in else []
        path += [str(HERE.parent), str(HERE), str(self.site) if self.site.exists() else ""]
        path.append(os.environ.get("PYTHONPATH", ""))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}

    @property
    def shape(self) -> str:
        return "small" if self.tiny else "qwen-7b"

    def model(self, name: str) -> str:
        """As `qquant profile` takes it."""
        src = self.work / "src"
        return {"bf16": str(src), "int4": str(self.work / "int4")}.get(name, f"{name}:{src}")

    def run(self, name: str, *words: str) -> dict[str, Any]:
        """A Python command: what it took, and its last line where that is JSON.

        Raises:
            StepError: it failed (the end of its log is under `tail`), or there is no time.
        """
        left = self.deadline - time.monotonic()
        if left < 1:
            raise StepError("no time left")
        log = self.work / f"{name}.log"
        timed = ["timeout", f"{left:.0f}", sys.executable, *words]
        cost = run_measured(timed, cwd=HERE.parent, env=self.env, log=log)
        text = log.read_text(errors="replace")
        if not text.strip():
            text = "nothing said"
        shown = " ".join(w.replace(str(self.work), "WORK") for w in ("python", *words))
        found: dict[str, Any] = {"command": shown, "wall_s": round(cost.wall_s, 2)}
        if cost.code:
            said = "out of time" if cost.code == 124 else last_line(text)
            raise StepError(f"exit code {cost.code}: {said}", **found, tail=self.tail(name))
        try:
            found["result"] = json.loads(text.strip().splitlines()[-1])
        except (ValueError, IndexError):
            found["said"] = last_line(text)
        return found

    def tail(self, name: str) -> list[str]:
        """The last lines of a command's log, without the directories of this machine."""
        lines = (self.work / f"{name}.log").read_text(errors="replace").splitlines()
        return [last_line(line) for line in lines if line.strip()][-TAIL:]

    def own(self, name: str) -> dict[str, Any]:
        """A step of this file, in a process of its own (`child`)."""
        words = ["--work", str(self.work), "--device", self.device, "--child", name]
        return self.run(name, f"{HERE.name}/gpu.py", *words, *(["--tiny"] if self.tiny else []))


def verify(suite: Suite) -> dict[str, Any]:
    return suite.run("verify", "-m", "qquant", "verify", str(suite.work / "int4"))


def profile(suite: Suite, name: str, long: bool) -> dict[str, Any]:
    """Of one model, in Qwen's tables' form.

    `qquant profile` writes after each measurement and goes on from there. So what was measured is
    a result even where another measurement failed or time ran out, with `error` beside it, and the
    next run at the same revision makes the rest.

    Raises:
        StepError: nothing was measured that had not been there.
    """
    if name in ("nf4", "int8") and importlib.util.find_spec("bitsandbytes") is None:
        raise StepError("bitsandbytes is not installed")
    short_new, long_new = (8, 16) if suite.tiny else (2048, 8192)
    words = ["--device", suite.device, "--qwen-context", str(short_new)]
    if long:
        words += ["--speed", "qwen", "--qwen-new-tokens", str(long_new)]
        words += ["--memory", "generate", "--generate-tokens", str(long_new)]
    else:
        words += ["--speed", "qwen", "--qwen-new-tokens", str(short_new), "--speed", "modern"]
        words += ["--memory", "weights", "--memory", "encode", "--encode-tokens", str(short_new)]
        words += ["--context", str(short_new), "--new-tokens", "8" if suite.tiny else "128"]
        words += [] if suite.tiny else ["--compile"]
    step = f"{'long' if long else 'profile'}-{name}"
    out, begun = suite.work / step, suite.work / f"{step}.begun"
    file = out / "profile.json"
    known = suite.revision and not suite.revision.endswith("+")
    if out.exists() and not (known and begun.exists() and begun.read_text() == suite.revision):
        shutil.rmtree(out)  # complete, or of another revision, or who knows
    begun.write_text(suite.revision)
    before = measured(file)
    try:
        found = suite.run(
            step, "-m", "qquant", "profile", suite.model(name), "-o", str(out), *words
        )
        begun.unlink()
    except StepError as error:
        if len(measured(file)) == len(before):
            raise
        found = {**error.ran, "error": str(error)}
    text = file.read_text().replace(str(suite.work), "WORK")
    return {**found, "resumed": bool(before), "result": json.loads(text)}


def measured(file: Path) -> list[str]:
    """Keys of the results in a `profile.json`, which may not be there."""
    found: list[str] = []
    waiting = [json.loads(file.read_text())["models"]] if file.exists() else []
    while waiting:
        value = waiting.pop()
        found += [value["key"]] if isinstance(value.get("key"), str) else []
        waiting += [inner for inner in value.values() if isinstance(inner, dict)]
    return found


def gpu_tests(suite: Suite) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise StepError("pytest is not installed")
    # Only the files that have such tests: others import what need not be here.
    files = sorted((HERE.parent / "tests").glob("test_*.py"))
    marked = [f"tests/{file.name}" for file in files if "mark.gpu" in file.read_text()]
    chosen = ["tests/test_triton.py"] if suite.tiny else marked
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *chosen]
    return {**suite.run("tests", *words), "tail": suite.tail("tests")}


STEPS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "make": lambda suite: suite.own("make"),
    "kernels": lambda suite: suite.own("kernels"),
    "quantize": lambda suite: suite.own("quantize"),
    "verify": verify,
    **{f"profile-{n}": (lambda suite, n=n: profile(suite, n, False)) for n in MODELS},  # type: ignore[misc]
    "tests": gpu_tests,
    **{f"long-{n}": (lambda suite, n=n: profile(suite, n, True)) for n in MODELS},  # type: ignore[misc]
}


def child(suite: Suite, name: str) -> dict[str, Any]:
    """What a process of its own does for a step of this file."""
    return {"make": make, "kernels": kernels, "quantize": quantize}[name](suite)


def make(suite: Suite) -> dict[str, Any]:
    from checkpoints import PRESETS, write_random

    target, fresh = suite.work / "src", suite.work / "src.tmp"
    if not target.exists():
        shutil.rmtree(fresh, ignore_errors=True)  # half of one, of a run that was ended
        write_random(PRESETS[suite.shape], fresh, device=suite.device)
        fresh.rename(target)
    return {"bytes": sum(file.stat().st_size for file in target.iterdir())}


def quantize(suite: Suite) -> dict[str, Any]:
    """128 samples of 2048 random ids, group 128; parts of the time, memory of the device."""
    import torch

    import qquant

    samples, length = (4, 32) if suite.tiny else (128, 2048)
    vocab = json.loads((suite.work / "src" / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (samples, length), generator=generator)
    made = qquant.quantize(
        suite.work / "src",
        suite.work / "int4",
        qquant.QuantSpec(bits=4, group_size=128),
        tokens=ids,
        device=suite.device,
        overwrite=True,
        restart=True,  # seconds of the whole run, not of the rest of one that was ended
    )
    keys = ("seconds", "timings", "peak_bytes", "device_peak_bytes", "columns", "compute_dtype")
    return {key: getattr(made, key) for key in keys}


def kernels(suite: Suite) -> dict[str, Any]:
    from gpu_kernels import measure

    return measure(suite.device, suite.tiny)


def requirements() -> list[str]:
    """The packages that qquant depends on, by `pyproject.toml`."""
    text = (HERE.parent / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return re.findall(r'^\s*"([\w.-]+)', listed[1], re.MULTILINE)


def install(wheels: Path, suite: Suite) -> None:
    """Every wheel of a folder, and nothing that it asks for.

    Raises:
        SystemExit: there is none, or pip refuses one.
    """
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"--wheels {wheels}: expected wheels, found none")
    words = ["install", "--no-deps", "--no-index", "--no-input", "--disable-pip-version-check"]
    words += ["--quiet", "--upgrade", "--target", str(suite.site), *files]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--wheels {wheels}: {done.stderr.strip() or done.stdout.strip()}")


def greenlet_version(suite: Suite) -> str | None:
    """Of what is imported by that name; None where nothing is."""
    code = "import greenlet; print(greenlet.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, env=suite.env, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


def about(suite: Suite) -> dict[str, Any]:
    """The machine and the versions that results are of; without importing torch."""
    versions = {"python": platform.python_version()}
    for name in [*requirements(), *BESIDE]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["greenlet"] = greenlet_version(suite) or "not installed"
    code = (
        "import json;from qquant.devices import driver_version,gpu_facts;"
        f"print(json.dumps([gpu_facts({suite.device!r}),driver_version()]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, env=suite.env, capture_output=True, text=True
    )
    gpu, driver = json.loads(said.stdout) if said.returncode == 0 else (None, None)
    facts = {"machine": describe(), "gpu": gpu, "driver": driver, "versions": versions}
    own = {"qquant": suite.revision} if suite.revision else {}
    return {"revision": own, **facts, "command": command("gpu.py", sys.argv[1:])}


def kept(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """What a step has now: an earlier result outlasts a run that failed without any."""
    if "error" not in new or "result" in new or not old or not {"result", "said"} & old.keys():
        return new
    return {**old, "error": new["error"], "failed": {k: v for k, v in new.items() if k != "error"}}


def summary(steps: dict[str, Any]) -> str:
    """A line per step: its time, why it has no result or none of the whole, or both."""
    lines = []
    for name, found in steps.items():
        if not {"result", "said"} & found.keys():
            lines.append(f"{name:14} failed: {found['error']}")
            continue
        line = f"{name:14} {found['wall_s']:8.1f} s"
        if "error" in found:
            of = "an earlier result is kept" if "failed" in found else "what was measured is kept"
            line += f"  failed: {found['error']}; {of}"
        result = found.get("result")
        if name == "quantize" and isinstance(result, dict):
            parts = sorted(result["timings"].items(), key=lambda part: -part[1])[:6]
            line += "  " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts)
        elif "said" in found:
            line += f"  {found['said']}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a local disk, kept")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--limit", type=float, default=530, help="seconds for all of it")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the suite")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default cuda, with --tiny cpu")
    parser.add_argument(
        "--out", type=Path, help="the JSON; default benchmarks/results/gpu-SHAPE.json"
    )
    parser.add_argument(
        "--wheels", type=Path, help="a folder; its wheels are installed into WORK/site"
    )
    parser.add_argument(
        "--revision",
        default=os.environ.get("QQUANT_REVISION"),
        help="of qquant, where git cannot tell; also by QQUANT_REVISION",
    )
    parser.add_argument("--child", choices=["make", "kernels", "quantize"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    device = given.device or ("cpu" if given.tiny else "cuda")
    own = given.revision or revision().get("qquant", "")
    suite = Suite(work, given.tiny, device, time.monotonic() + given.limit, own)
    if given.child:
        print(json.dumps(child(suite, given.child)))
        return 0
    if given.wheels:
        install(given.wheels, suite)
    if suite.site.exists():
        sys.path.insert(0, str(suite.site))  # where this process, too, looks for what is there
    missing = [name for name in requirements() if importlib.util.find_spec(name) is None]
    if greenlet_version(suite) is None:  # also one that is there and cannot be imported
        suite = replace(suite, stand_in=True)
        missing = [n for n in missing if n != "greenlet"] + ["greenlet (threads do in its place)"]
    if "llvmlite" in missing:
        missing[missing.index("llvmlite")] = "llvmlite (of CPUs alone)"
    if missing:
        print("missing of qquant's requirements: " + ", ".join(missing), flush=True)
    out = given.out or HERE / "results" / f"gpu-{suite.shape}.json"
    steps = json.loads(out.read_text())["steps"] if out.exists() else {}
    facts, failed = about(suite), False
    for name in given.steps:
        try:
            found = STEPS[name](suite)
        except StepError as error:
            found = {**error.ran, "error": str(error)}
        except (OSError, ValueError, KeyError) as error:
            found = {"error": str(error)}
        if "error" in found:
            found["error"] = re.sub(r"\s+", " ", found["error"])
            failed = True
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        steps[name] = kept(steps.get(name), {**found, "of": {**facts, "date": now}})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"shape": suite.shape, "steps": steps}, indent=1) + "\n")
    print(summary(steps))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
