"""What headers tell is told at once and is what the whole estimate finds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import make, native_checkpoint
from test_mixtures import source as mixture

from qquant import CalibrationSpec, OutputSpec, QuantSpec
from qquant.errors import CheckpointError, SpecError
from qquant.estimate import dry_run
from qquant.sizes import Sizes, foresee

CALIB = CalibrationSpec(samples=12, seqlen=24)
FOUR = QuantSpec(group_size=32)


def checkpoint(kind: str, path: Path) -> Path:
    if kind == "tied":
        return native_checkpoint(path, "qwen2", tie_word_embeddings=True)
    return make(kind, path) if kind in ("qwen", "qwen2", "qwen3") else mixture(path, kind)


@pytest.mark.parametrize(
    "kind", ["qwen", "qwen2", "qwen3", "tied", "qwen2_moe", "qwen3_moe", "qwen3_next"]
)
def test_it_is_what_the_estimate_says(kind: str, tmp_path: Path) -> None:
    src = checkpoint(kind, tmp_path / "src")
    told = foresee(src, FOUR, CALIB, OutputSpec())
    exact = dry_run(src, FOUR, CALIB, device="cpu")
    for field in fields(Sizes):
        assert getattr(told, field.name) == getattr(exact, field.name), field.name
    assert told.rows() == exact.rows()[:4]
    rest = exact.render(told)
    assert "host memory" in rest and "to quantize" not in rest and "output" not in rest


@pytest.mark.parametrize(
    ("spec", "out"),
    [
        (QuantSpec(group_size=32, target_bpw=5.5, bit_choices=(4, 8)), OutputSpec()),
        (QuantSpec(group_size=32, sym=False), OutputSpec(format="compressed-tensors")),
        (QuantSpec(group_size=32, method="rtn"), OutputSpec(dtype="float16")),
    ],
)
def test_other_settings(spec: QuantSpec, out: OutputSpec, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    exact = dry_run(src, spec, CALIB, out, device="cpu")
    told = foresee(src, spec, CALIB, out)
    assert told.rows() == exact.rows()[: len(told.rows())]


def test_what_differs_is_shown_again(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    told = foresee(src, FOUR, CALIB, OutputSpec())
    other = foresee(src, QuantSpec(bits=8, group_size=32), CALIB, OutputSpec())
    exact = dry_run(src, QuantSpec(bits=8, group_size=32), CALIB, device="cpu")
    assert "output" in exact.render(told) and "output" not in exact.render(other)


def test_what_headers_refuse_is_refused(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    with pytest.raises(SpecError, match="group size 128"):
        foresee(src, QuantSpec(), CALIB, OutputSpec())
    (src / "model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match="header"):
        foresee(src, FOUR, CALIB, OutputSpec())


def test_linears_without_inputs_are_refused(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    file, name = src / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    save_file({**load_file(file), name: torch.zeros(0, 0)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: expected a matrix with outputs"):
        foresee(src, FOUR, CALIB, OutputSpec())
