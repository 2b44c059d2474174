"""Operations are counted as they were multiplied, and shown beside the seconds they took."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_convert import make
from test_runtime import needs_avx2
from torch.utils._python_dispatch import TorchDispatchMode

from qquant.cli import cli
from qquant.config import QuantSpec
from qquant.convert import quantize
from qquant.hessian import Hessian
from qquant.runtime import load
from qquant.timings import Clock, attention_flops, matmul_gflops, rates, render

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))


class Products(TorchDispatchMode):
    """Counts matrix products as torch is asked for them, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "mkldnn::_linear_pointwise":
            x, weight = args[:2]
            self.flops += 2 * x.numel() * weight.shape[0]
        if func._schema.name in ("aten::addmm_", "aten::addmm", "aten::mm"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [64, 256, 1000])
@pytest.mark.parametrize("n", [32, 2000])
def test_a_hessians_count_is_what_torch_multiplied(k: int, n: int) -> None:
    stats = Hessian(k, weights=[torch.randn(n, k)], residual=True)
    with Products() as counter:
        stats.add(torch.randn(10, k), torch.randn(10, k), torch.randn(10, n))
        stats.add(torch.randn(7, k))
    assert stats.flops == counter.flops
    few = n < k
    full = 2 * 17 * k * k + 2 * 10 * (2 * n * k if few else k * (k + n))
    assert stats.flops == full if k <= 256 else stats.flops < full


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("int16", marks=needs_avx2)])
def test_a_forwards_count_is_that_of_its_shapes(kind: str, dtype: str, tmp_path: Path) -> None:
    """One stream: every linear once per token, but for the last one of the last block."""
    src = make(kind, tmp_path / "src")
    spec = QuantSpec(group_size=32, correct=0.0)
    result = quantize(src, tmp_path / "dst", spec, tokens=TOKENS, device="cpu", compute_dtype=dtype)
    model = load(src, device="cpu", dtype="float32").model
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    last = list(linears)[-1]
    done = sum(2 * m.weight.numel() for n, m in linears.items() if n != last)
    attended = 2 * attention_flops(model.config, *TOKENS.shape)
    assert result.flops["forward"] == done * TOKENS.numel() + attended
    shared = ("k_proj", "v_proj", "up_proj", "w2")  # read what the one before them reads
    inputs = [m.in_features for n, m in linears.items() if not n.endswith(shared)]
    # Up to 256 inputs are one square; of integers, panels of 16 from the diagonal on.
    each = (k * (k + 16) if dtype == "int16" else 2 * k * k for k in inputs)
    assert result.flops["hessian"] == sum(each) * TOKENS.numel()


def test_two_streams_count_the_batches_that_ran(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    flops = {}
    for share in (0.0, 0.5, 1.0):
        spec = QuantSpec(group_size=32, correct=float(share > 0), correct_share=share or 0.5)
        many = TOKENS.repeat(8, 4)  # 96 x 96: nine batches, of which the second stream runs some
        found = quantize(src, tmp_path / str(share), spec, tokens=many, device="cpu")
        flops[share] = found.flops["forward"]
    assert flops[0.0] < flops[0.5] < flops[1.0] <= 2 * flops[0.0]
    # The last block's last linear is multiplied in neither stream.
    assert flops[1.0] == 2 * flops[0.0]


def test_attention_is_the_causal_half() -> None:
    class Config:
        num_attention_heads, hidden_size, head_dim = 4, 64, 16

    pairs = sum(q + 1 for q in range(24))
    assert attention_flops(Config, 3, 24) == 3 * 4 * pairs * 16 * 2 * 2


def test_clock_adds_up() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("solve"):
            pass
    clock.add("forward", 2.0, 10**9)
    clock.add("forward", 1.0, 2 * 10**9)
    assert clock.parts["forward"] == 3.0 and clock.parts["solve"] >= 0
    assert rates(clock.parts, clock.flops) == {"forward": pytest.approx(1.0)}
    assert rates({"forward": 0.0}, {"forward": 5}) == {}


def test_table_shows_rates_beside_the_machines() -> None:
    seconds = {"other": 1.0, "forward": 2.0, "read": 1.0}
    lines = render(seconds, {"forward": 60 * 10**9}, 50.0).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["read", "forward", "other", "total"]
    assert lines[3].split() == ["forward", "2.00", "50.0%", "30.0", "60%"]
    assert "50.0 GFLOP/s" in lines[-1]
    assert "GFLOP/s:" not in render(seconds, {"forward": 1}, None)


@pytest.mark.alone
def test_the_yardstick_is_a_rate() -> None:
    rate = matmul_gflops(torch.device("cpu"), torch.float32)
    assert 0.5 < rate < 1e5


def test_the_command_shows_and_logs_them(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    args = ["quantize", str(src), "-o", str(tmp_path / "dst"), "--timings", "--group-size", "32"]
    args += ["--samples", "4", "--seqlen", "32", "--device", "cpu", "--calib", str(text)]
    args += ["--compute-dtype", "float32"]  # in which every run is estimated, without torch
    shown = CliRunner().invoke(cli, args)
    assert shown.exit_code == 0, shown.output
    table = shown.stdout[shown.stdout.index("part ") :]
    for part in ("read", "calibrate", "forward", "hessian", "solve", "pack", "write", "verify"):
        assert f"\n{part} " in table
    assert "matmul on this machine" in table
    result = CliRunner().invoke(cli, [*args, "--overwrite", "--log-json"])
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["matmul_gflops"] > 0 and set(done["gflops"]) == {"forward", "hessian"}
    assert sum(done["timings"].values()) == pytest.approx(done["seconds"], rel=1e-6)
    plain = CliRunner().invoke(cli, [a for a in args if a != "--timings"] + ["--overwrite"])
    assert "matmul" not in plain.stdout
    for said in (shown, plain):
        times = r"estimated \d.* s after set-up and calibration, took \d.* s; "
        times += r"estimated peak \d.*B, was \d.*B"
        assert len(re.findall(f"^{times}$", said.stdout, re.MULTILINE)) == 1, said.stdout
    assert done["foreseen"]["calibration_tokens"] == 4 * 32
