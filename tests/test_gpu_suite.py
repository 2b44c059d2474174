"""`benchmarks/gpu.py` on a CPU in small: steps of one's choice, each with a result of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(work: Path, out: Path, *steps: str) -> tuple[int, str, dict[str, Any]]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--work", str(work)]
    done = subprocess.run(
        [*command, "--out", str(out), "--steps", *steps], env=env, capture_output=True, text=True
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(out.read_text())


def test_a_failing_step_leaves_the_others_and_later_runs_keep_what_is_there(
    tmp_path: Path,
) -> None:
    work, out = tmp_path / "work", tmp_path / "out.json"
    code, said, found = run(work, out, "make", "verify", "kernels")
    assert code == 1, "verify has nothing to verify yet"
    assert "failed: exit code" in said.splitlines()[1]
    steps = found["steps"]
    assert list(steps) == ["make", "verify", "kernels"] and "error" in steps["verify"]
    assert steps["make"]["result"]["bytes"] > 10_000
    for tried in steps["kernels"]["result"]["kernels"].values():
        assert tried["fastest"] in tried["tried"] and " us" in tried["tried"]
    assert found["gpu"] is None and found["machine"]["cores"] >= 1
    assert found["versions"]["torch"] and "--steps make verify kernels" in found["command"]

    code, said, found = run(work, out, "quantize", "verify")
    assert code == 0, said
    assert found["steps"]["make"] == steps["make"]
    made = found["steps"]["quantize"]["result"]
    assert made["columns"] == "stretches" and made["timings"]["solve"] > 0
    assert found["steps"]["verify"]["said"].endswith("14 linears")
    assert str(tmp_path) not in out.read_text()
