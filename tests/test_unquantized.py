"""What is not quantized arrives as it was, whatever its shape and however it is cut into pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import unquantized
from qquant.checkpoint import Checkpoint
from qquant.errors import CheckpointError
from qquant.headers import TensorPlan, dtype_name
from qquant.shards import ShardWriter

SHAPES = ((0, 4), (4, 0), (), (1,), (7,), (5, 3, 2), (3, 100), (33, 8), (64, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def source(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("piece", [1, 64, 100, 1 << 20])
def test_every_shape_in_pieces(
    to: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a piece, a last piece that is shorter, the same memory many times."""
    monkeypatch.setattr(unquantized, "_PIECE", piece)
    made = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype_name(dtype)}{shape}": torch.randn(shape, generator=made).to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }
    read = source(tmp_path / "src", tensors)
    (tmp_path / "dst").mkdir()
    plan = [TensorPlan(name, dtype_name(to), tuple(t.shape)) for name, t in tensors.items()]
    with ShardWriter(tmp_path / "dst", plan, 1 << 30) as writer:
        unquantized.copy_tensors(read, list(tensors), writer, to)
    found = load_file(tmp_path / "dst" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(to)), name


@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_what_does_not_fit_is_named(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unquantized, "_PIECE", piece)
    large = torch.ones(40, 8)
    large[39, 7] = 1e6
    read = source(tmp_path / "src", {"wte": large})
    (tmp_path / "dst").mkdir()
    plan = [TensorPlan("wte", "F16", (40, 8))]
    with (
        pytest.raises(CheckpointError, match=r"wte.*float16"),
        ShardWriter(tmp_path / "dst", plan, 1 << 30) as writer,
    ):
        unquantized.copy_tensors(read, ["wte"], writer, torch.float16)
