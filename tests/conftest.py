"""What tests of several modules share."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fresh import Interpreter

Ranks = Callable[..., list[dict[str, Any]]]

# `make test` has no limit and runs everything. Where one is set, as CI sets it for slow machines,
# long files come last, and what is left of them when it is over is skipped, which is said.
SECONDS = float(os.environ.get("QQUANT_TEST_SECONDS") or math.inf)
STARTED = time.monotonic()
# A minute or so each, in few tests: the longest first.
LONG = (
    "gpu_stand_in",
    "killed",
    "convert",
    "triton",
    "distributed",
    "compatibility",
    "readers",
    "bnb_convert",
)
LONG += ("gpu_suite", "tasks_command", "device_map", "distributed_mixtures", "greenlet_stand_in")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those of many tests, so that no worker ends alone with a long one."""
    sizes = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[int, int]:
        at = LONG.index(_name(item)) if _name(item) in LONG else len(LONG)
        return at if SECONDS == math.inf else -at, -sizes[item.path]

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _name(item) in LONG and time.monotonic() - STARTED > SECONDS:
        pytest.skip(f"long, and QQUANT_TEST_SECONDS={SECONDS:.0f} are over")


def _name(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("test_")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A test that takes it runs once on the CPU and once on a GPU, where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _the_log_is_left_alone() -> Iterator[None]:
    """A test that silenced qquant's log would make later tests of warnings fail, far away."""
    own = logging.getLogger("qquant")

    def state() -> tuple[object, ...]:
        return own.level, own.disabled, own.propagate, own.handlers[:], logging.root.manager.disable

    before = state()
    yield
    assert state() == before


def _interpreter() -> Iterator[Interpreter]:
    one = Interpreter()
    yield one
    one.end()


interpreter = pytest.fixture(scope="session", name="interpreter")(_interpreter)
another_interpreter = pytest.fixture(scope="session", name="another_interpreter")(_interpreter)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Runs a call in `size` ranks (see `ranks_process.py`); what came of it, by rank."""
    script = Path(__file__).with_name("ranks_process.py")
    folder = tmp_path_factory.mktemp("ranks")
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline() == "ready\n"

        def run(size: int, calls: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
            stdin.write(json.dumps({"size": size, "calls": calls}) + "\n")
            stdin.flush()
            answers: list[dict[str, Any]] = json.loads(stdout.readline())
            assert not [a["bug"] for a in answers if "bug" in a]
            return answers

        yield run
        stdin.close()
