"""`qquant reproduce` proves a claim that is true and finds one that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_convert import TOKENS, make

from qquant import CalibrationSpec, QuantSpec, quantize
from qquant.cli import cli
from qquant.errors import CalibrationError, CheckpointError, SpecError
from qquant.reproduce import reproduce

CALIB = CalibrationSpec(samples=4, seqlen=24)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("reproduce") / "src")


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    """By the default recipe with text of its own, in one thread."""
    (source.parent / "mine.txt").write_text("Some words to read. " * 200)
    calib = CalibrationSpec(("builtin", f"{source.parent / 'mine.txt'}=0.5"), samples=6, seqlen=24)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spec = QuantSpec(group_size=32)
        return quantize(source, source.parent / "made", spec, calib, device="cpu").path
    finally:
        torch.set_num_threads(before)


def test_the_same_bytes_come_out(source: Path, made: Path) -> None:
    before, threads = sorted(made.parent.iterdir()), torch.get_num_threads()
    found = reproduce(made, source, calib_dir=source.parent)
    assert found.ok and found.weights_ok and not found.circumstances
    assert {"model.safetensors", "README.md", "SHA256SUMS"} <= set(found.same)
    assert sorted(made.parent.iterdir()) == before  # nothing is left
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "spec", [QuantSpec(method="rtn", group_size=32), QuantSpec(target_bpw=6.0, group_size=32)]
)
def test_other_methods(source: Path, tmp_path: Path, spec: QuantSpec) -> None:
    made = quantize(source, tmp_path / "made", spec, CALIB, device="cpu").path
    assert reproduce(made, source).ok


def test_a_converted_directory_is_refused(source: Path, tmp_path: Path) -> None:
    from qquant.native import convert_to_native

    convert_to_native(source, tmp_path / "native")
    with pytest.raises(CheckpointError, match="reproduce what was converted"):
        reproduce(tmp_path / "native", source)


def test_bitsandbytes(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from qquant import BnbSpec

    made = quantize(source, tmp_path / "made", BnbSpec("nf4", double_quant=True)).path
    assert reproduce(made, source).ok


def test_a_changed_weight_is_found(source: Path, made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    found = reproduce(copy, source, calib_dir=source.parent)
    assert not found.ok and not found.weights_ok
    assert found.different == ("model.safetensors",)
    assert "NOT the same weights" in found.render()


def test_other_versions_are_told(source: Path, made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    manifest = json.loads((copy / "qquant_manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["machine"] |= {"device_name": "m68k", "processor": "none to speak of"}
    narrow = manifest["machine"]["compute_dtype"] == "bfloat16"  # as the processor has it
    parts = {"hessians", "quantized_weights", "attention"} if narrow else {"products"}
    assert manifest["machine"].keys() >= {"columns", "elementwise", *parts}
    manifest["machine"] |= {"columns": "abacus", "elementwise": "by hand"}
    (copy / "qquant_manifest.json").write_text(json.dumps(manifest))
    found = reproduce(copy, source, calib_dir=source.parent)
    assert found.weights_ok and found.different == ("qquant_manifest.json",)
    for told in (
        *("torch: 1.0 then", "device name: m68k then", "processor: none to speak of then"),
        *("columns: abacus then", "elementwise: by hand then"),
    ):
        assert any(text.startswith(told) for text in found.circumstances), found.circumstances


def test_refusals(source: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qquant_manifest"):
        reproduce(source, source)
    other = make("qwen2", tmp_path / "other")
    with pytest.raises(CheckpointError, match="bytes of 'src'"):
        reproduce(made, other, calib_dir=source.parent)
    with pytest.raises(CalibrationError, match=r"mine\.txt.*--calib-dir"):
        reproduce(made, source)
    spec = QuantSpec(group_size=32)
    given = quantize(source, tmp_path / "given", spec, tokens=TOKENS, device="cpu").path
    with pytest.raises(CalibrationError, match="a program"):
        reproduce(given, source)
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    manifest = json.loads((copy / "qquant_manifest.json").read_text())
    manifest["quantization"]["newer_setting"] = 1
    (copy / "qquant_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpecError, match="newer_setting"):
        reproduce(copy, source, calib_dir=source.parent)


def test_the_command(source: Path, made: Path, tmp_path: Path) -> None:
    words = ["reproduce", str(made), "--source", str(source), "--calib-dir", str(source.parent)]
    result = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "kept")])
    assert result.exit_code == 0 and "all" in result.stdout and (tmp_path / "kept").is_dir()
    # A second time there is something in the way, which is not the same as equal files.
    result = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "kept")])
    assert result.exit_code == 2 and "expected nothing there yet" in result.stderr
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert json.loads(result.stdout)["ok"] is True
    result = CliRunner().invoke(cli, ["reproduce", str(made), "--source", str(source)])
    assert result.exit_code == 2 and "error: calibration file mine.txt" in result.stderr
