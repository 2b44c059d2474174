"""Quantizes for test_killed, in a fork of `fresh_process.py`; can kill itself at a chosen step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from qquant.config import CalibrationSpec, QuantSpec
from qquant.convert import quantize
from qquant.errors import AlreadyDone
from qquant.events import Event, Resumed

DURABLE = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "posix_fallocate")


def go(src: str, dst: str) -> None:
    """The command's run; says "resumed" where it goes on, "already" where nothing is to do."""

    def watch(event: Event) -> None:
        if isinstance(event, Resumed):
            print("resumed", flush=True)

    calib = CalibrationSpec(samples=16, seqlen=24)
    try:
        quantize(src, dst, QuantSpec(group_size=32), calib, device="cpu", progress=watch)
    except AlreadyDone:
        print("already", flush=True)


def go_killed(step: int, src: str, dst: str) -> None:
    """The same, killed with -9 in front of its durable step of this number, counted from 0."""

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
    go(src, dst)
