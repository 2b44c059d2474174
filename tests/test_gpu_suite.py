"""`benchmarks/gpu.py` on a CPU in small: steps of one's choice, each with a result of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(
    work: Path, out: Path, *steps: str, words: tuple[str, ...] = (), first: Path = ROOT
) -> tuple[int, str, dict[str, Any]]:
    """The suite in a process of its own, which finds modules in `first` before all others."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(first), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--work", str(work)]
    command += ["--out", str(out), *words, "--steps", *steps]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(out.read_text())


def wheel(folder: Path, name: str, version: str) -> None:
    """A package that says nothing but its name and version."""
    folder.mkdir()
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        made.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        made.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        made.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr(f"{about}/RECORD", "")


def test_a_failing_step_leaves_the_others_and_later_runs_keep_what_is_there(
    tmp_path: Path,
) -> None:
    work, out = tmp_path / "work", tmp_path / "out.json"
    code, said, found = run(work, out, "make", "verify", "kernels")
    assert code == 1, "verify has nothing to verify yet"
    assert "failed: exit code" in said.splitlines()[1]
    steps = found["steps"]
    assert list(steps) == ["make", "verify", "kernels"] and "error" in steps["verify"]
    assert steps["verify"]["tail"][-1] in steps["verify"]["error"]
    assert steps["make"]["result"]["bytes"] > 10_000
    for row in steps["kernels"]["result"]["kernels"].values():
        tried = row["eager"]
        assert tried["fastest"] in tried["tried"] and " us" in tried["tried"]
    of = steps["kernels"]["of"]
    assert of["gpu"] is None and of["machine"]["cores"] >= 1
    assert of["versions"]["torch"] and "--steps make verify kernels" in of["command"]

    # As on a machine without greenlet, with the results of another call before it.
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "greenlet.py").write_text("raise ImportError('not here')\n")
    wheel(tmp_path / "wheels", "bitsandbytes", "99.9")
    words = ("--revision", "0123abcdef", "--wheels", str(tmp_path / "wheels"))
    code, said, found = run(work, out, "quantize", "verify", words=words, first=tmp_path / "hidden")
    assert code == 0, said
    assert said.startswith("missing of qquant's requirements: greenlet (threads do in its place)\n")
    assert found["steps"]["make"] == steps["make"], "of the call that made it"
    made = found["steps"]["quantize"]["result"]
    assert made["columns"] in ("llvm", "stretches") and made["timings"]["solve"] > 0
    of = found["steps"]["quantize"]["of"]
    assert of["revision"] == {"qquant": "0123abcdef"} and of["date"] > steps["make"]["of"]["date"]
    assert of["versions"]["greenlet"] == "stand-in by threads"
    assert (
        of["versions"]["bitsandbytes"] == "99.9" != steps["make"]["of"]["versions"]["bitsandbytes"]
    )
    assert found["steps"]["verify"]["said"].endswith("14 linears")
    assert "error" not in found["steps"]["verify"]
    assert str(tmp_path) not in out.read_text()


def test_requirements_are_those_of_the_project() -> None:
    import gpu

    named = gpu.requirements()
    assert {"torch", "greenlet", "transformers", "click"} <= set(named)
    assert len(named) == len(set(named)) and "setuptools" not in named


def test_half_a_checkpoint_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import checkpoints
    import gpu

    suite = gpu.Suite(tmp_path, True, "cpu", time.monotonic() + 60)
    whole = checkpoints.write_random

    def ended(shape: Any, target: Path, **more: Any) -> None:
        target.mkdir()
        (target / "part-0").write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_random", ended)
    with pytest.raises(KeyboardInterrupt):
        gpu.make(suite)
    monkeypatch.setattr(checkpoints, "write_random", whole)
    assert gpu.make(suite)["bytes"] > 10_000
    assert [file.name for file in tmp_path.iterdir()] == ["src"]
    assert not list(tmp_path.glob("src/part-0"))


def test_what_a_profile_measured_before_it_failed_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    suite = gpu.Suite(tmp_path, True, "cpu", time.monotonic() + 60, "one")
    file = tmp_path / "profile-bf16" / "profile.json"
    ends: list[tuple[int, int]] = []  # measurements it makes, and its exit code

    def measured(self: gpu.Suite, name: str, *words: str) -> dict[str, Any]:
        more, code = ends.pop(0)
        there = json.loads(file.read_text())["models"].get("it", {}) if file.exists() else {}
        file.parent.mkdir(exist_ok=True)
        for n in range(len(there), len(there) + more):
            there[f"p{n}"] = {"key": f"k{n}", "by": self.revision}
        text: dict[str, Any] = {"models": {"it": there} if there else {}}
        text |= {"from": f"{self.work}/src"} | ({"failed": [ends]} if code else {})
        file.write_text(json.dumps(text))
        ran = {"command": "python -m qquant profile", "wall_s": 1.5}
        if code:
            raise gpu.StepError(f"exit code {code}: out of time", **ran, tail=["..."])
        return ran

    monkeypatch.setattr(gpu.Suite, "run", measured)

    def profile(revision: str = "one") -> dict[str, Any]:
        return gpu.profile(replace(suite, revision=revision), "bf16", False)

    def parts(found: dict[str, Any]) -> list[str]:
        return [part["by"] for part in found["result"]["models"]["it"].values()]

    ends[:] = [(0, 1)]
    with pytest.raises(gpu.StepError, match="exit code 1"):
        profile()
    ends[:] = [(2, 124)]
    found = profile()
    assert found["error"] == "exit code 124: out of time" and found["wall_s"] == 1.5
    assert parts(found) == ["one"] * 2 and not found["resumed"]
    assert found["result"]["from"] == "WORK/src"
    ends[:] = [(0, 124)]
    with pytest.raises(gpu.StepError, match="exit code 124"):
        profile()  # nothing that had not been there
    ends[:] = [(1, 0)]
    found = profile()
    assert parts(found) == ["one"] * 3 and found["resumed"] and "error" not in found
    ends[:] = [(1, 124), (1, 0), (1, 0)]
    assert parts(profile()) == ["one"], "what was complete is measured anew"
    assert parts(profile("two")) == ["two"], "as is what is of another revision"
    assert parts(profile("two")) == ["two"]
    for unknown in ("", "two+"):  # nobody knows whether it is the same
        ends[:] = [(1, 124), (1, 0)]
        profile(unknown)
        assert parts(profile(unknown)) == [unknown]


def test_a_failure_does_not_take_an_earlier_result_away() -> None:
    import gpu

    old = {"wall_s": 2.0, "result": {"x": 1}, "of": {"date": "1"}}
    failed = {"error": "no time left", "wall_s": 1.0, "of": {"date": "2"}}
    assert gpu.kept(None, failed) == gpu.kept({"error": "before"}, failed) == failed
    both = gpu.kept(old, failed)
    assert both == {**old, "error": "no time left", "failed": {"wall_s": 1.0, "of": {"date": "2"}}}
    assert gpu.kept(both, failed) == both
    part = {**failed, "result": {"x": 2}}
    assert gpu.kept(old, part) == part and gpu.kept(both, old) == old
    lines = gpu.summary({"a": failed, "b": both, "c": part, "d": old}).splitlines()
    assert lines[0].split() == ["a", "failed:", "no", "time", "left"]
    assert "2.0 s" in lines[1] and lines[1].endswith("no time left; an earlier result is kept")
    assert "1.0 s" in lines[2] and lines[2].endswith("no time left; what was measured is kept")
    assert lines[3].endswith("2.0 s")


def test_the_end_of_the_tests_log_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    suite = gpu.Suite(tmp_path, True, "cpu", time.monotonic() + 60)
    monkeypatch.setattr(gpu.Suite, "run", lambda *_: {"wall_s": 1.0, "said": "1 passed"})
    lines = [f"line {n} of {tmp_path}/src" for n in range(100)]
    (tmp_path / "tests.log").write_text("\n\n".join(lines))
    tail = gpu.gpu_tests(suite)["tail"]
    assert tail == [f"line {n} of src" for n in range(100 - gpu.TAIL, 100)]


def test_a_run_that_was_ended_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seconds would be those of the rest."""
    import gpu

    import qquant

    asked: dict[str, Any] = {}

    def quantize(*_: Any, **more: Any) -> Any:
        asked.update(more)
        raise gpu.StepError("far enough")

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text('{"vocab_size": 64}')
    monkeypatch.setattr(qquant, "quantize", quantize)
    with pytest.raises(gpu.StepError):
        gpu.quantize(gpu.Suite(tmp_path, True, "cpu", 0.0))
    assert asked["restart"] and asked["overwrite"]
