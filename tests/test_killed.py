"""Killed for good, so that no handler runs: the same command goes on and ends in the same bytes.

What goes on within a process is in test_resume.py.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_tiny import tiny_model, write_checkpoint
from test_resume import same

PROCESS = Path(__file__).with_name("killed_process.py")


class Interpreter:
    """Forks a fresh process per run, once all imports are done (`killed_process.py`)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, src: Path, dst: Path, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"src": str(src), "dst": str(dst), "seconds": None} | more
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return dict(json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        self._process.kill()  # its own end would take seconds
        self._process.communicate()


@pytest.fixture(scope="module")
def interpreters() -> Iterator[list[Interpreter]]:
    """Two: what a run depends on that differs between them, such as hash seeds, would show."""
    with contextlib.ExitStack() as stack:
        found = [Interpreter() for _ in range(2)]
        for one in found:
            stack.callback(one.end)
        for one in found:
            one.ready()
        yield found


def make_deep(path: Path) -> Path:
    """Eight blocks, and a tokenizer."""
    write_checkpoint(path)
    config = json.loads((path / "config.json").read_text())
    tiny_model(num_hidden_layers=8).to(torch.bfloat16).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    return path


def test_killed_at_random_moments(interpreters: list[Interpreter], tmp_path: Path) -> None:
    """Twenty kills -9 at moments spread over the whole run, each in a fresh process."""
    src, kills, seed = make_deep(tmp_path / "src"), 20, random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    began = time.monotonic()
    assert interpreters[0].ask(src, tmp_path / "whole")["code"] == 0
    length = time.monotonic() - began
    resumed = 0
    while kills:
        dst = tmp_path / f"dst{kills}"
        while not dst.exists():
            seconds = None
            if kills:
                seconds = chance.uniform(0, length)
                kills -= 1
            found = chance.choice(interpreters).ask(src, dst, seconds=seconds)
            assert found["code"] in ((0, -9) if seconds is not None else (0,))
            resumed += "resumed" in found["said"]
        assert same(dst, tmp_path / "whole")
    assert resumed  # or the test has shown nothing


def test_killed_in_front_of_every_durable_step(
    interpreters: list[Interpreter], tmp_path: Path
) -> None:
    """Each call that flushes, renames, makes or removes something on the disk."""
    source = write_checkpoint(tmp_path / "src")
    assert interpreters[0].ask(source, tmp_path / "whole")["code"] == 0
    found = interpreters[1].ask(source, tmp_path / "dst", every="step")
    steps, said = found["steps"], found["said"]
    assert steps > 40 and said.count("resumed") > 10
    assert said.count("already") > 3  # killed after the target had its name
    assert not list(tmp_path.glob(".dst*"))
    for step in range(steps):
        assert same(tmp_path / f"dst{step}", tmp_path / "whole"), step
