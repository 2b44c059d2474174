"""`benchmarks/stand_in/greenlet.py` does what the real one does, as far as qquant goes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import greenlet as installed
import pytest
import torch
from qwen_tiny import write_checkpoint

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "benchmarks" / "stand_in"
RUNS = """
import hashlib, json, sys, threading
from pathlib import Path

import greenlet
import torch

from qquant import quantize, spec_from_recipe
from qquant.calibration.hold import Holder
from qquant.calibration.walk import BlockWalk

src, dst = map(Path, sys.argv[1:])
dst.mkdir()
ids = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))


def files(name):
    made = quantize(src, dst / name, spec_from_recipe("default", group_size=32), tokens=ids,
                    device="cpu")
    files = sorted(file for file in made.path.rglob("*") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


found = {"greenlet": greenlet.__version__, "plain": files("plain")}
import qquant.convert
qquant.convert.make_holder = lambda *_, **__: Holder(host_budget=2**62, recompute_from=0)
found["again"] = files("again")


def raising(self, x, weight, bias):
    raise ZeroDivisionError("inside a batch")


BlockWalk._product = raising
try:
    files("failed")
except ZeroDivisionError as error:
    found["raised"] = str(error)
found["left"] = sorted(t.name for t in threading.enumerate() if t.name == "greenlet")
print(json.dumps(found))
"""


def run(src: Path, dst: Path, first: Path) -> dict[str, Any]:
    """`RUNS` with what is in `first` before all that is installed."""
    path = os.pathsep.join([str(first), str(ROOT)])
    command = [sys.executable, "-c", RUNS, str(src), str(dst)]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_runs_write_the_same_bytes_and_raise_the_same(tmp_path: Path) -> None:
    """Of two streams; inputs kept and made again; batches that fail leave nothing behind."""
    src = write_checkpoint(tmp_path / "src")
    real = run(src, tmp_path / "real", ROOT)
    ours = run(src, tmp_path / "ours", STAND_IN)
    assert (real.pop("greenlet"), ours.pop("greenlet")) == (
        installed.__version__,
        "stand-in by threads",
    )
    assert ours == real
    assert real["plain"] == real["again"] and len(real["plain"]) > 5
    assert real["raised"] == "inside a batch" and real["left"] == []


@pytest.fixture(params=["installed", "stand-in"])
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """What is held of one is held of the other."""
    if request.param == "installed":
        yield installed
        return
    spec = importlib.util.spec_from_file_location("stand_in_greenlet", STAND_IN / "greenlet.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield found
    assert not [t for t in threading.enumerate() if t.name == "greenlet"], "all have ended"


def test_values_go_both_ways(module: ModuleType) -> None:
    here = module.getcurrent()
    assert here is module.getcurrent() and here.parent is None and not here.dead

    class Echo(module.greenlet):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__(self.body)

        def body(self, *first: Any) -> str:
            got: Any = first
            while got != "end":
                assert module.getcurrent() is self
                got = here.switch(got)
            return "over"

    echo = Echo()
    assert echo.parent is here and not echo and not echo.dead
    assert [echo.switch(), echo.switch(1), echo.switch(1, 2)] == [(), 1, (1, 2)]
    assert echo and not echo.dead
    assert echo.switch("end") == "over" and echo.dead and not echo
    gone = weakref.ref(echo)
    del echo
    assert gone() is None, "nothing refers to what has ended"


def test_what_is_raised_goes_to_the_parent(module: ModuleType) -> None:
    def outer() -> str:
        inner = module.greenlet(lambda: 1 // 0)  # its parent is the one that made it
        with pytest.raises(ZeroDivisionError):
            inner.switch()
        return f"raised in {'the other' if inner.dead else 'none'}"

    assert module.greenlet(outer).switch() == "raised in the other"

    here = module.getcurrent()
    side = module.greenlet(here.switch)
    side.switch()
    with pytest.raises(KeyError, match="thrown"):
        side.throw(KeyError("thrown"))
    assert side.dead


def test_frames_unwind_when_thrown_into(module: ModuleType) -> None:
    here = module.getcurrent()
    seen: list[str] = []

    def body(held: torch.Tensor) -> None:
        try:
            here.switch()
        finally:
            seen.append("left")

    tensor = torch.zeros(1)
    gone = weakref.ref(tensor)
    side = module.greenlet(body)
    side.switch(tensor)
    del tensor
    assert gone() is not None
    assert isinstance(side.throw(), module.GreenletExit)
    assert seen == ["left"] and side.dead and gone() is None
    assert isinstance(side.throw(), module.GreenletExit), "and again, to no effect"
    never = module.greenlet(body)
    never.throw()
    assert never.dead and seen == ["left"]


def test_torchs_own_modes_come_along(module: ModuleType) -> None:
    def modes() -> tuple[bool, bool, int]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()

    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            assert module.greenlet(modes).switch() == modes()
