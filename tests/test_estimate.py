"""What a run is said to take is what it takes; limits on memory are kept or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_convert import SPEC, TOKENS, make, native_checkpoint

import qquant.budget as budget
import qquant.estimate as estimate
from qquant import CalibrationSpec, QuantSpec, quantize
from qquant.budget import MemoryNeeds, make_holder
from qquant.calibration.hold import Holder
from qquant.cli import cli
from qquant.convert import dry_run
from qquant.errors import SpecError, TargetError

CALIB = CalibrationSpec(samples=12, seqlen=24)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("estimate") / "src")


@pytest.mark.parametrize(
    "spec", [SPEC, QuantSpec(bits=3, group_size=32), QuantSpec(bits=8, group_size=64)]
)
def test_sizes_are_those_of_the_files(tmp_path: Path, spec: QuantSpec) -> None:
    src = native_checkpoint(tmp_path / "src", "qwen2", hidden_size=128, intermediate_size=256)
    said = dry_run(src, spec, CALIB, device="cpu")
    made = quantize(src, tmp_path / "dst", spec, CALIB, tokens=TOKENS, device="cpu")
    written = (made.path / "model.safetensors").stat().st_size
    header = int.from_bytes((made.path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert said.output_bytes == written - header
    assert said.linears == len(made.layers) and said.blocks == 2
    assert said.calibration_tokens == TOKENS.numel() and said.widest == 256
    assert said.output_bytes < said.disk_bytes


def test_nothing_is_written_and_no_weight_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qquant.checkpoint import Checkpoint

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    before = sorted(p for p in source.parent.rglob("*"))
    monkeypatch.setattr(Checkpoint, "_bytes", read)
    said = dry_run(source, SPEC, CALIB, device="cpu")
    assert set(said.seconds) == {"set-up", "forward", "hessian", "solve", "write and verify"}
    assert all(value > 0 for value in said.seconds.values())
    assert sorted(p for p in source.parent.rglob("*")) == before


@pytest.mark.alone
def test_more_work_takes_longer(source: Path) -> None:
    """Estimates in the same terms: tokens count in the forward and the Hessian, not in solves."""
    few = dry_run(source, SPEC, CalibrationSpec(samples=84, seqlen=24), device="cpu")
    many = dry_run(source, SPEC, CalibrationSpec(samples=8400, seqlen=24), device="cpu")
    assert many.seconds["forward"] > 20 * few.seconds["forward"]
    assert many.seconds["hessian"] > 20 * few.seconds["hessian"]
    assert many.waiting_bytes == 100 * few.waiting_bytes
    rounded = dry_run(source, QuantSpec(method="rtn", group_size=32), CALIB, device="cpu")
    assert "forward" not in rounded.seconds and rounded.calibration_tokens == 0


def test_the_fit_recovers_a_cost() -> None:
    cost = np.array([0.3, 0.0, 2.0, 0.5])
    shapes = [(64, 256), (512, 256), (64, 640), (512, 640), (1024, 384)]
    rows = np.array([estimate._terms(n, k) for n, k in shapes])
    assert np.allclose(estimate._fit(rows, rows @ cost), cost, atol=1e-6)


def test_the_estimate_of_memory_is_near_the_peak(tmp_path: Path) -> None:
    """Within a quarter of the part that grows with the model, in a process of its own."""
    import subprocess
    import sys

    src = native_checkpoint(
        tmp_path / "src", "qwen2", hidden_size=512, intermediate_size=2048, head_dim=64,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    script = (
        "import sys, torch, transformers.models.qwen2.modeling_qwen2\n"
        "torch.set_num_threads(1)\n"
        "from qquant import CalibrationSpec, QuantSpec, quantize\n"
        "from qquant.convert import dry_run\n"
        "from qquant.devices import resident_bytes\n"
        "calib = CalibrationSpec(samples=16, seqlen=128)\n"
        "ids = torch.randint(0, 256, (16, 128))\n"
        "said = dry_run(sys.argv[1], QuantSpec(), calib, device='cpu')\n"
        "base = resident_bytes()\n"
        "made = quantize(sys.argv[1], sys.argv[2], QuantSpec(), tokens=ids, device='cpu')\n"
        "print(base, said.host_bytes, made.peak_bytes)\n"
    )
    words = [sys.executable, "-c", script, str(src), str(tmp_path / "dst")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    base, said, peak = map(int, done.stdout.split())
    assert abs(said - peak) <= 0.25 * peak, (base, said, peak)


def holder(monkeypatch: pytest.MonkeyPatch, memory: int, needs: MemoryNeeds) -> Holder:
    monkeypatch.setattr(budget, "resident_bytes", lambda: 1000 << 20)
    return make_holder(needs, CPU, memory=memory)


def test_what_a_limit_leaves_is_for_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = MemoryNeeds(waiting=800 << 20, kept=0, at_work=500 << 20, reading=0)
    least = (1000 + 500 << 20) + budget.SLACK
    tight = holder(monkeypatch, least + (300 << 20), needs)
    assert tight.host_budget == 300 << 20 and tight.spill_outputs
    wide = holder(monkeypatch, least + (900 << 20), needs)
    assert wide.host_budget == 900 << 20 and not wide.spill_outputs
    with pytest.raises(SpecError, match=r"--memory: expected at least 1\.62 GiB"):
        holder(monkeypatch, least - 1, needs)
    with pytest.raises(SpecError, match="--gpu-memory"):
        make_holder(needs, CPU, gpu_memory=1 << 30)


def test_a_limit_never_changes_the_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantize(source, tmp_path / "plain", SPEC, tokens=TOKENS, device="cpu")
    assert plain.spilled_bytes == 0
    monkeypatch.setattr(
        "qquant.convert.make_holder", lambda *_, **__: Holder(host_budget=0, spill_outputs=True)
    )
    tight = quantize(source, tmp_path / "tight", SPEC, tokens=TOKENS, device="cpu")
    assert tight.spilled_bytes > 0
    for file in sorted(plain.path.iterdir()):
        assert file.read_bytes() == (tight.path / file.name).read_bytes(), file.name


def test_the_command(source: Path, tmp_path: Path) -> None:
    bare = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--device", "cpu", "--dry-run"]
    words = [*bare, "--group-size", "32"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    for word in ("bits per weight", "host memory", "disk", "calibration", "time"):
        assert word in result.stdout
    result = CliRunner().invoke(cli, [*words, "--log-json"])
    found = json.loads(result.stdout)
    assert found["event"] == "estimate" and found["total_seconds"] > 0
    assert not (tmp_path / "dst").exists()
    for more, text in (
        (["--memory", "1MB"], "--memory: expected at least"),
        (["--memory", "much"], "--memory: expected a size"),
    ):
        result = CliRunner().invoke(cli, [*words, *more])
        assert result.exit_code == 2 and text in result.stderr, result.output
    result = CliRunner().invoke(cli, [*bare, "--method", "nf4"])
    assert result.exit_code == 2 and "--dry-run: expected no such" in result.stderr


def test_the_room_for_what_is_kept_counts(source: Path, tmp_path: Path, monkeypatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    said = dry_run(source, SPEC, CalibrationSpec(samples=10**6, seqlen=24), device="cpu")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 200 << 20))
    assert said.disk_bytes > 200 << 20
    with pytest.raises(TargetError, match="disk of"):
        quantize(source, tmp_path / "d", SPEC, CalibrationSpec(samples=10**6, seqlen=24))
