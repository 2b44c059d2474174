"""The column loops in their three forms: the same numbers, whichever runs.

Triton's kernels run under its interpreter, in a process of their own (`triton_process.py`), since
that is switched on before Triton is imported. What is skipped without Triton says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qquant import columns

PROCESS = Path(__file__).with_name("triton_process.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: its kernels cannot be run, not even interpreted",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the process found, all its cases at once."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(PROCESS), "columns"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_triton
def test_kernels_give_what_plain_steps_give_bit_for_bit(interpreted: dict[str, Any]) -> None:
    assert interpreted["blocks"] == dict.fromkeys(interpreted["blocks"], [True] * 4)
    assert len(interpreted["blocks"]) == 8


@needs_triton
def test_a_solve_has_the_same_codes_and_scales_in_every_form(interpreted: dict[str, Any]) -> None:
    solves = interpreted["solves"]
    assert len(solves) == 2 * 4 * 3
    wrong = {case: found for case, found in solves.items() if found["differ"]}
    assert not wrong
    assert all(found["codes"] > 1 for found in solves.values())


@needs_triton
def test_the_trial_before_use_passes_and_notices_a_wrong_kernel(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["trial"] is True
    assert interpreted["trial of a wrong kernel"] is False


def test_a_cpu_keeps_its_form() -> None:
    assert columns.choose(torch.device("cpu")) == columns.Choice("stretches")


def test_without_triton_an_accelerator_takes_steps_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    choice = columns.choose.__wrapped__(torch.device("cuda", 0))
    assert choice == columns.Choice("steps", "triton is not installed")


@needs_triton
def test_a_kernel_that_fails_is_not_used_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_device: torch.device) -> bool:
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(columns, "_kernel_is_right", fail)
    choice = columns.choose.__wrapped__(torch.device("cuda", 0))
    assert choice == columns.Choice("steps", "triton failed: RuntimeError: no C compiler")
    monkeypatch.setattr(columns, "_kernel_is_right", lambda _device: False)
    choice = columns.choose.__wrapped__(torch.device("cuda", 0))
    assert choice.form == "steps" and "other numbers" in choice.reason


@pytest.mark.gpu
def test_a_gpu_gives_bit_for_bit_what_plain_steps_give() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert columns.choose(torch.device("cuda", torch.cuda.current_device())).form == "triton"
