"""The Triton kernels, and the column loops in their three forms: the same, whichever runs.

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

from qquant import columns, kernels
from qquant.errors import RunError
from qquant.kernels import QuantLinear
from qquant.pack import pack

PROCESS = Path(__file__).with_name("triton_process.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: its kernels cannot be run, not even interpreted",
)


def run(what: str) -> dict[str, Any]:
    """What the process found, all its cases at once."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(PROCESS), what],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run("columns")


@needs_triton
def test_kernels_give_what_plain_steps_give_bit_for_bit(interpreted: dict[str, Any]) -> None:
    assert interpreted["blocks"] == dict.fromkeys(interpreted["blocks"], [True] * 5)
    assert len(interpreted["blocks"]) == 8


@needs_triton
def test_a_solve_has_the_same_codes_and_scales_in_every_form(interpreted: dict[str, Any]) -> None:
    solves = interpreted["solves"]
    assert len(solves) == 2 * 6
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


@needs_triton
def test_the_decode_kernel_is_right_for_every_layout() -> None:
    found = run("decode")
    assert len(found) == 3 * 3 * 2 + 1
    for case, error in found.items():
        assert 0 < error < (4e-3 if "bfloat16" in case else 5e-4), case


def test_the_kernel_that_is_wrong_or_fails_is_never_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    scales, zeros = torch.rand(64, 2) + 0.1, torch.full((64, 2), 8, dtype=torch.uint8)
    packed = pack(codes, scales, zeros, bits=4, group_size=32)
    linear = QuantLinear(packed, torch.ones(64), bits=4)
    monkeypatch.setattr(kernels, "triton_misfit", lambda _linear: None)
    monkeypatch.setattr(kernels.QuantLinear, "_by_int4", lambda self, x: self._by_tiles(x) + 1)

    def fail(*_args: Any) -> None:
        raise ValueError("no C compiler")

    monkeypatch.setattr(kernels.QuantLinear, "_by_triton", fail)
    name, said = kernels.fastest(linear, torch.float32)
    assert name == linear.kernel == "dequantize"
    assert "torch-int4: wrong" in said and "triton-int4: ValueError" in said and " us" in said
    monkeypatch.setattr(kernels.QuantLinear, "_by_tiles", fail)
    with pytest.raises(RunError, match="one that is right"):
        kernels.fastest(linear, torch.float32)


@pytest.mark.gpu
def test_a_gpu_gives_bit_for_bit_what_plain_steps_give() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert columns.choose(torch.device("cuda", torch.cuda.current_device())).form == "triton"
