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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant import columns, kernel_choice, kernels, rebuild
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


def test_without_triton_an_accelerator_takes_steps_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    choice = columns._choose.__wrapped__(torch.device("cuda", 0), torch.float32)
    assert choice == columns.Choice("steps", "triton is not installed")


@needs_triton
def test_a_kernel_that_fails_is_not_used_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_kernel: str, _device: torch.device) -> bool:
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(columns, "_is_right", fail)
    choice = columns._choose.__wrapped__(torch.device("cuda", 0), torch.float32)
    assert choice == columns.Choice("steps", "triton failed: RuntimeError: no C compiler")
    monkeypatch.setattr(columns, "_is_right", lambda _kernel, _device: False)
    choice = columns._choose.__wrapped__(torch.device("cuda", 0), torch.float32)
    assert choice.form == "steps" and "other numbers" in choice.reason


@needs_triton
def test_the_decode_kernel_is_right_for_every_layout() -> None:
    found = run("decode")
    assert len(found) == 3 * 3 * 2 * 4 + 14
    for case, error in found.items():
        assert 0 < error < (4e-3 if "bfloat16" in case else 4e-4), case


def test_a_module_that_is_moved_where_triton_does_not_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    packed = pack(
        codes, torch.ones(64, 2), torch.full((64, 2), 8, dtype=torch.uint8), bits=4, group_size=32
    )
    linear = QuantLinear(packed, bits=4)
    linear.kernel = "triton-int4"  # as after `model.cpu()`
    x = torch.randn(1, 64)
    assert torch.allclose(linear(x), x @ (codes.float() - 8).T, atol=1e-4)
    assert linear.kernel == "dequantize"
    assert "goes on under dequantize" in caplog.text


def test_the_kernel_that_is_wrong_or_fails_is_never_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    scales, zeros = torch.rand(64, 2) + 0.1, torch.full((64, 2), 8, dtype=torch.uint8)
    packed = pack(codes, scales, zeros, bits=4, group_size=32)
    linear = QuantLinear(packed, torch.ones(64), bits=4)
    monkeypatch.setattr(kernels, "triton_misfit", lambda _linear: None)
    monkeypatch.setattr(kernels.QuantLinear, "_by_held", lambda self, x: self._by_tiles(x) + 1)

    def fail(*_args: Any) -> None:
        raise ValueError("no C compiler")

    monkeypatch.setattr(kernels.QuantLinear, "_by_triton", fail)
    name, said = kernel_choice.fastest(linear, torch.float32)
    assert name == linear.kernel == "dequantize"
    assert "torch-int4: wrong" in said and "triton-int4: ValueError" in said and " us" in said
    monkeypatch.setattr(kernels.QuantLinear, "_by_tiles", fail)
    with pytest.raises(RunError, match="one that is right"):
        kernel_choice.fastest(linear, torch.float32)


def test_a_large_bias_makes_no_kernel_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    scales, zeros = torch.rand(64, 2) / 50 + 0.01, torch.full((64, 2), 8, dtype=torch.uint8)
    packed = pack(codes, scales, zeros, bits=4, group_size=32)
    bias = 1e4 * torch.randn(64).half()
    linear = QuantLinear(packed, bias, bits=4)
    name, said = kernel_choice.fastest(linear, torch.bfloat16, without=("torch-int4", "avx2"))
    assert name == "dequantize" and "wrong" not in said
    assert linear.bias is bias


def test_inputs_that_are_not_of_16_bits_are_refused() -> None:
    few_rows = pytest.importorskip("qquant.int4_triton").few_rows
    words = torch.zeros(1, 8, dtype=torch.int32)
    with pytest.raises(RunError, match=r"got torch\.float64"):
        few_rows(torch.ones(1, 8).double(), words, torch.ones(1, 8), None, words[0], None, 4, 8)


@needs_triton
def test_a_kernel_is_launched_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which is another one where a model is on `cuda:1`."""
    from qquant import columns_triton, int4_triton, rebuild_triton

    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )
    for index in (0, 1):
        there = SimpleNamespace(
            is_cuda=True, device=f"cuda:{index}", get_device=lambda index=index: index
        )
        with int4_triton.on_its_device(there):
            assert entered == ["cuda:1"][:index]
    with int4_triton.on_its_device(torch.ones(1)):
        assert entered == ["cuda:1"]

    open_for: list[Tensor] = []
    launched: list[Tensor] = []

    @contextmanager
    def place(x: Tensor) -> Iterator[None]:
        open_for.append(x)
        yield
        open_for.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **_: launched.append(open_for[-1])

    for module in (int4_triton, columns_triton, rebuild_triton):
        monkeypatch.setattr(module, "on_its_device", place)
    monkeypatch.setattr(rebuild_triton, "_rebuild", Kernel())
    for name in ("alone", "several", "product", "added"):
        monkeypatch.setattr(int4_triton, name, Kernel())
    for name in ("_gptq", "_descent"):
        monkeypatch.setattr(columns_triton, name, Kernel())
    x, line = torch.ones(4, 4), torch.ones(4)
    words = torch.ones(1, 8, dtype=torch.int32)
    codes = torch.zeros(4, 4, dtype=torch.uint8)
    half, parts = torch.ones(2, 16).half(), (torch.ones(1, 8), None, words[0], None, 4)
    int4_triton.few_rows(half[:1], words.expand(2, 8), *parts, 16)
    int4_triton.few_rows(half, words.expand(2, 8), *parts, 16)
    int4_triton.few_rows(half, words.expand(2, 8), *parts, 0)
    rebuild_triton.rebuild(words, torch.ones(1, 8), codes, words[0], 4, torch.float32)
    columns_triton.gptq_block(x, x, x, x, x, line, 15, codes)
    columns_triton.descent_block(x, x, line, x, line, line, 0.0, 15.0)
    assert len(launched) == 1 + 2 + 2 + 1 + 2 and not open_for
    assert launched[-2] is x and launched[-1] is x


def test_weights_are_rebuilt_by_torch_where_triton_is_not_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose, there = rebuild.choose.__wrapped__, torch.device("cuda", 0)
    assert choose(torch.device("cpu")) == rebuild.Choice("torch")
    monkeypatch.setattr(rebuild, "_kernel_is_right", lambda _device: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    assert choose(there) == rebuild.Choice("torch", "triton's kernel gave other numbers than torch")
    monkeypatch.setattr(rebuild, "_kernel_is_right", lambda _device: 1 / 0)
    form, reason = choose(there)
    assert form == "torch" and reason == "triton failed: ZeroDivisionError: division by zero"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert choose(there) == rebuild.Choice("torch", "triton is not installed")


@needs_triton
def test_rebuilt_weights_are_torchs_bit_for_bit() -> None:
    found = run("rebuild")
    assert len(found) == 1 + 3 * 2 * 3
    assert all(found.values()), found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROCESS.with_name("triton_compiled.py"))],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_triton
def test_kernels_compile_for_a_gpu_and_fit_its_registers(compiled: dict[str, Any]) -> None:
    taken = compiled["taken"]
    assert len(taken) == 3 * 2 * 4 + 3 * 2 + 3
    assert not {case: found for case, found in taken.items() if found["spilled"]}
    # Of a processor's 65536 registers: two programs of 8 warps, or one of 16.
    alone = {case: found for case, found in taken.items() if case.startswith("alone")}
    assert all(found["registers"] <= 128 for found in alone.values()), alone
    assert all(found["shared"] <= 100 << 10 for found in taken.values()), taken


@needs_triton
def test_instructions_per_weight_are_what_the_page_says(compiled: dict[str, Any]) -> None:
    """Of 4 bits in bfloat16, by the weights of a thread in a step (docs/KERNELS.md)."""
    taken = compiled["taken"]

    def per_weight(case: str, weights: int) -> float:
        return float(taken[case]["loop"] / weights)

    of = "4 bits, bfloat16 True"
    assert 3 < per_weight(f"alone, 16 warps, {of}", 256 * 32 * 8 // 512) < 4.1
    assert 3 < per_weight(f"alone, 8 warps, {of}", 64 * 32 * 8 // 256) < 4.3
    assert 5 < per_weight(f"several, groups of 128, {of}", 16 * 64 * 8 // 128) < 6.1
    assert 13 < per_weight("product, 4 bits", 16 * 64 * 8 // 128) < 16


@needs_triton
def test_warps_wait_for_each_other_before_codes_are_replaced(compiled: dict[str, Any]) -> None:
    """Those that hold the same rows read a code and write it: no interpreter shows that."""
    found = compiled["descent"]
    first = found.index("tt.store")  # of the codes, before those of `moved`
    assert found.count("tt.store") == 2 and found[first - 1] == "barrier"


@pytest.mark.gpu
def test_a_gpu_gives_bit_for_bit_what_plain_steps_give() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert columns.choose(torch.device("cuda", torch.cuda.current_device())).form == "triton"
