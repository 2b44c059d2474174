"""Quantizes in processes that have done nothing else, and kills some of them, for test_killed.

An interpreter that imports everything, runs nothing itself and starts no thread: each run is a fork
of it, so it begins as a fresh process does, without the seconds that imports take. Requests are
lines of JSON on stdin, answers lines of JSON on stdout.

    {"src": ..., "dst": ..., "seconds": null}    killed with -9 after so many seconds, if not null
    {"src": ..., "dst": ..., "every": "step"}    `dst` is a stem; see `every_step`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers.models  # noqa: F401

import qquant.models.qwen.modeling_qwen  # noqa: F401
from qquant.config import CalibrationSpec, QuantSpec
from qquant.convert import quantize
from qquant.errors import AlreadyDone
from qquant.events import Event, Resumed

DURABLE = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "posix_fallocate")


def go(src: str, dst: str, say: Callable[[str], None]) -> None:
    """The command's run; says "resumed" where it goes on, "already" where nothing is to do."""

    def watch(event: Event) -> None:
        if isinstance(event, Resumed):
            say("resumed")

    calib = CalibrationSpec(samples=16, seqlen=24)
    try:
        quantize(src, dst, QuantSpec(group_size=32), calib, device="cpu", progress=watch)
    except AlreadyDone:
        say("already")


def in_child(
    work: Callable[[Callable[[str], None]], None], seconds: float | None = None
) -> dict[str, Any]:
    """What a fork said and its exit code; killed after `seconds`, unless it has ended by then."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        work(lambda word: os.write(write, f"{word}\n".encode()))
        os._exit(0)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # not waited for yet: the number is still its own
    with open(read) as said:
        words = said.read().split()
    return {"said": words, "code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}


def kill_in_front_of(step: int) -> None:
    """The process kills itself when it is about to take this durable step, counted from 0."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal step
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))


def every_step(src: str, stem: str) -> dict[str, Any]:
    """Killed in front of step 0, 1, ... until there is none left, each into a target of its own."""
    said: list[str] = []
    for step in range(10_000):
        dst = f"{stem}{step}"

        def doomed(say: Callable[[str], None], step: int = step, dst: str = dst) -> None:
            kill_in_front_of(step)
            go(src, dst, say)

        if in_child(doomed)["code"] == 0:
            return {"steps": step, "said": said}
        again = in_child(lambda say, dst=dst: go(src, dst, say))
        assert again["code"] == 0, step
        said += again["said"]
    raise AssertionError("a run takes no end of steps")


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        src, dst = asked["src"], asked["dst"]
        if "every" in asked:
            answer = every_step(src, dst)
        else:
            answer = in_child(lambda say: go(src, dst, say), asked["seconds"])  # noqa: B023
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
