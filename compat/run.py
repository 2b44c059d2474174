"""Runs every reader on every kind of directory and writes what they did: the compatibility page.

    python compat/run.py                          # all readers; makes their environments first
    python compat/run.py --only transformers qquant --python transformers=PATH --python qquant=PATH
    python compat/run.py --page                   # only the page, from the results as they are

Each reader runs in an environment of its own made from `compat/requirements/` (kept in the user's
cache; auto-gptq's and vLLM's are CUDA builds of 5 and 9 GB), in a process that is given directories
and token ids and gives back logits (`read.py`, `read_vllm.py`). What is kept is the distance
‖a - b‖ / ‖b‖ of the logits from those of the dequantized model in float32. Results of readers that
are not run again are kept; SGLang's column, and only that one, is by rules (`qquant/readers.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import page

HERE = Path(__file__).resolve().parent
REQUIREMENTS, RESULTS = HERE / "requirements", HERE / "results.json"
# Reader -> the requirements of its environment.
READERS = {
    "transformers": "today",
    "gptqmodel": "gptqmodel",
    "peft": "today",
    "qquant": "qquant",
    "auto-gptq": "auto-gptq",
    "vllm": "vllm",
}


def ensure(name: str) -> Path:
    """The python of an environment, made first if it is not there (minutes).

    Raises:
        subprocess.CalledProcessError: pip failed; what it said is on the terminal.
    """
    first, last = REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}.last.txt"
    files = [file for file in (first, last) if file.exists()]
    tag = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = base / "qquant-compat" / f"{name}-py{sys.version_info[0]}{sys.version_info[1]}-{tag}"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(first)], check=True, cwd=REQUIREMENTS)
        if last.exists():
            build = ["--no-build-isolation", "--no-deps", "-r", str(last)]
            subprocess.run([*pip, *build], check=True, env={**os.environ, "BUILD_CUDA_EXT": "0"})
        complete.touch()
    return python


def environment(work: Path, own: bool) -> dict[str, str]:
    """For a reader: no network, no compiler, caches of its own; qquant only where it is `own`."""
    env = {k: v for k, v in os.environ.items() if own or k != "PYTHONPATH"}
    return env | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),  # the directories' own code is copied there
        "GPTQMODEL_CPU_WORKERS": "2",
        "TORCH_COMPILE_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def read(reader: str, python: Path, work: Path, made: dict[str, Path], ids: Any) -> dict[str, Any]:
    """What `reader` saw in each directory: {"versions": ..., "found": {kind: ...}}.

    Raises:
        SystemExit: the process failed as a whole.
    """
    jobs, result = work / "jobs.json", work / f"{reader}.json"
    directories = {name: str(path) for name, path in made.items()}
    jobs.write_text(json.dumps({"ids": ids.tolist(), "directories": directories}))
    script = ["read_vllm.py"] if reader == "vllm" else ["read.py", reader]
    command = [str(python), str(HERE / script[0]), *script[1:], str(jobs), str(result)]
    env = environment(work, own=reader == "qquant")
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, check=False)
    (work / f"{reader}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"error: {reader} failed as a whole: {done.stderr[-2000:]}")
    return dict(json.loads(result.read_text()))


def cell(seen: dict[str, Any], reference: Any) -> dict[str, Any]:
    """What is kept of a directory and a reader; logits become their distance from `reference`."""
    import torch

    kept = {key: value for key, value in seen.items() if key not in ("logits", "generated")}
    if "error" in kept:
        kept["error"] = _unplaced(" ".join(str(kept["error"]).split()))[:300]
    if "logits" in seen:
        logits = torch.tensor(seen["logits"])
        kept["distance"] = round(float((logits - reference).norm() / reference.norm()), 6)
        kept["generates"] = len(seen.get("generated", ())) == 10
    return kept


def _unplaced(text: str) -> str:
    """Without the folder that the directories were made in."""
    return re.sub(r"/[^'\" ]*/kinds/", "", text)


def by_rules(path: Path, reader: str) -> dict[str, Any]:
    from qquant.readers import verdicts

    found = [v for v in verdicts(path) if v.reader.startswith(reader)]
    if not found:
        return {"unknown": True}
    return {"reads": found[0].reads, "how": found[0].how, "why": list(found[0].why)}


def measure(
    names: list[str], readers: list[str], pythons: dict[str, Path], work: Path, given: set[str]
) -> dict[str, Any]:
    """The results of `readers` on the kinds `names`, as they stand in results.json.

    Args:
        given: readers whose environment was there already; the others' was made for them.
    """
    import directories

    made = directories.make(work / "kinds", names)
    references = {name: directories.reference(path) for name, path in made.items()}
    found: dict[str, Any] = {"versions": {}, "environments": {}, "kinds": {}, "cells": {}}
    for name in made:
        found["kinds"][name] = directories.KINDS[name].title
        found["cells"][name] = {"sglang": by_rules(made[name], "SGLang")}
    for reader in readers:
        print(f"{reader} ...", flush=True)
        seen = read(reader, pythons[reader], work, made, directories.token_ids())
        found["versions"][reader] = seen["versions"]
        found["environments"][reader] = "given" if reader in given else "own"
        for name in made:
            found["cells"][name][reader] = cell(seen["found"][name], references[name])
    return found


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, by reader and kind."""
    cells = {k: {**old.get("cells", {}).get(k, {}), **v} for k, v in new["cells"].items()}
    found = {"kinds": new["kinds"], "cells": cells}
    for key in ("versions", "environments"):
        found[key] = {**old.get(key, {}), **new[key]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="READER=PATH",
        help="an environment that is there already; repeatable",
    )
    parser.add_argument("--work", type=Path, help="keep directories and logs here")
    parser.add_argument("--page", action="store_true", help="write only the page")
    options = parser.parse_args()
    if not options.page:
        given = {k: Path(v) for k, _, v in (item.partition("=") for item in options.python)}
        pythons = {r: given.get(r) or ensure(READERS[r]) for r in options.only}
        with tempfile.TemporaryDirectory() as scratch:
            work = (options.work or Path(scratch)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            import directories

            # That so little data is too little is known.
            logging.getLogger("qquant").setLevel(logging.ERROR)
            new = measure(list(directories.KINDS), options.only, pythons, work, set(given))
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(merged(old, new), indent=1) + "\n")
    page.PAGE.write_text(page.render(json.loads(RESULTS.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
