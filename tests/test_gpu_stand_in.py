"""The tests of a GPU on a machine without one, against a stand-in in the host's memory.

What passes here has not run on a GPU: see `gpu_stand_in.py` for what that shows and what it cannot.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_stand_in
import pytest

HERE = Path(__file__).parent


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of processes that see a GPU."""
    if reason := gpu_stand_in.why_not():
        pytest.skip(reason)
    (tmp_path / "site").mkdir()
    return gpu_stand_in.environment(tmp_path / "site")


def passed(env: dict[str, str], folder: Path, *words: str) -> int:
    """How many tests of a GPU passed; none may fail or be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", *words], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


def test_whole_runs(env: dict[str, str], tmp_path: Path) -> None:
    assert passed(env, tmp_path, str(HERE / "test_gpu_runs.py")) > 40


def test_triton_kernels(env: dict[str, str], tmp_path: Path) -> None:
    """By Triton's interpreter: chosen as on a GPU, and in a run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    files = [str(HERE / f"test_{name}.py") for name in ("gpu_runs", "runtime", "triton")]
    chosen = "cpu_finds and qwen2-qwen or kernels_on_a_gpu or bit_for_bit"
    assert passed(env | {"TRITON_INTERPRET": "1"}, tmp_path, *files, "-k", chosen) >= 10


def test_the_suite_in_small(env: dict[str, str], tmp_path: Path) -> None:
    """`benchmarks/gpu.py`: one step of each kind that needs no further package."""
    words = ["--tiny", "--device", "cuda", "--work", str(tmp_path / "work")]
    words += ["--out", str(tmp_path / "out.json")]
    words += ["--steps", "make", "kernels", "quantize", "verify", "profile-int4"]
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "benchmarks" / "gpu.py"), *words],
        env=env,
        capture_output=True,
        text=True,
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    for row in found["steps"]["kernels"]["result"]["kernels"].values():
        assert row["compiled"]["fastest"] in row["compiled"]["tried"]
        assert row["us"]["dequantize, 2048 rows"] > 0
    step = found["steps"]["quantize"]
    assert step["of"]["gpu"]["name"] == gpu_stand_in.NAME and found["shape"] == "small"
    made = step["result"]
    assert made["device_peak_bytes"] > 0 and made["compute_dtype"] == "bfloat16"
    profile = found["steps"]["profile-int4"]["result"]
    assert "failed" not in profile and profile["machine"]["gpu"]["name"] == gpu_stand_in.NAME
