"""Killed for good, so that no handler runs: the same command goes on and ends in the same bytes.

What goes on within a process is in test_resume.py.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from fresh import Ended, Interpreter
from qwen_tiny import tiny_model, write_checkpoint
from test_resume import same

GO = "import sys, killed_process; killed_process.go(*sys.argv[1:])"
GO_KILLED = "import sys, killed_process; killed_process.go_killed(int(sys.argv[1]), *sys.argv[2:])"
KILLED = -9


def make_deep(path: Path) -> Path:
    """Eight blocks, and a tokenizer."""
    write_checkpoint(path)
    config = json.loads((path / "config.json").read_text())
    tiny_model(num_hidden_layers=8).to(torch.bfloat16).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    return path


def test_killed_at_random_moments(
    interpreter: Interpreter, another_interpreter: Interpreter, tmp_path: Path
) -> None:
    """Twenty kills -9 at moments spread over the whole run, each in a fresh process."""
    src, kills, seed = make_deep(tmp_path / "src"), 20, random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def run(dst: Path, seconds: float | None = None) -> Ended:
        one = chance.choice((interpreter, another_interpreter))
        ended = one.run(GO, str(src), str(dst), seconds=seconds)
        assert ended.code == 0 or (ended.code == KILLED and seconds is not None), ended.err
        return ended

    began = time.monotonic()
    run(tmp_path / "whole")
    length = time.monotonic() - began
    resumed = 0
    while kills:
        dst = tmp_path / f"dst{kills}"
        while not dst.exists():
            ended = run(dst, chance.uniform(0, length) if kills else None)
            kills = max(0, kills - 1)
            resumed += "resumed" in ended.out
        assert same(dst, tmp_path / "whole")
    assert resumed  # or the test has shown nothing


def test_killed_in_front_of_every_durable_step(
    interpreter: Interpreter, another_interpreter: Interpreter, tmp_path: Path
) -> None:
    """Each call that flushes, renames, makes or removes something on the disk."""
    source = write_checkpoint(tmp_path / "src")
    assert another_interpreter.run(GO, str(source), str(tmp_path / "whole")).code == 0
    step, said = 0, []
    while True:
        dst = tmp_path / f"dst{step}"
        ended = interpreter.run(GO_KILLED, str(step), str(source), str(dst))
        if ended.code != KILLED:
            break
        again = interpreter.run(GO, str(source), str(dst))
        assert again.code == 0, (step, again.err)
        said += again.out.split()
        assert same(dst, tmp_path / "whole"), step
        step += 1
    assert ended.code == 0, ended.err
    assert step > 40 and said.count("resumed") > 10
    assert said.count("already") > 3  # killed after the target had its name
    assert not list(tmp_path.glob(".dst*"))
