"""Weights that no training gives: a finite, verified directory, or one line that names the tensor.

Each case goes through the whole run on a tiny Qwen2, rounding and GPTQ alike. That a damaged source
is refused is in `test_bad_input.py`; here are values that are finite, and some that are not once
they are multiplied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import handmade
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qquant.config import OutputSpec, QuantSpec
from qquant.convert import quantize
from qquant.errors import QQuantError
from qquant.runtime import load
from qquant.verify import verify

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TOKENS = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(0))
SPECS = [
    QuantSpec(group_size=32),
    QuantSpec(group_size=-1, sym=False, bits=3, act_order=False),
    QuantSpec(group_size=32, method="rtn", bits=8),
]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "good"
    handmade.tiny_qwen2(hidden=64, ffn=64, layers=1).save_pretrained(path)
    return path


def changed(good: Path, path: Path, change: Callable[[Tensors], None]) -> Path:
    path.mkdir()
    tensors = load_file(good / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_bytes((good / "config.json").read_bytes())
    return path


def fill(name: str, value: float, at: object = ...) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][at] = value  # type: ignore[index]

    return change


def scale(name: str, by: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] *= by

    return change


def dead(tensors: Tensors) -> None:
    """No linear has any weight."""
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            tensor.zero_()


def same_rows(tensors: Tensors) -> None:
    """Every token looks alike: activations are constant and every Hessian has rank one."""
    tensors[EMBEDDING][:] = tensors[EMBEDDING][0].clone()


def low_rank(tensors: Tensors) -> None:
    """Embeddings in a plane: Hessians of rank two."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(2, 64, generator=generator)
    tensors[EMBEDDING][:] = torch.randn(len(tensors[EMBEDDING]), 2, generator=generator) @ plane


FINE: dict[str, Callable[[Tensors], None]] = {
    "a linear of zeros": fill(UP, 0.0),
    "zero rows": fill(UP, 0.0, slice(3, 9)),
    "zero columns": fill(UP, 0.0, (slice(None), slice(3, 40))),
    "no weights at all": dead,
    "denormal weights": fill(UP, 1e-40),
    "tiny weights": fill(DOWN, 1e-7),
    "one large weight": fill(UP, 1e4, (0, 0)),
    "all the same": fill(UP, 0.5),
    "constant activations": same_rows,
    "zero activations": fill(NORM, 0.0),
    "zero embeddings": fill(EMBEDDING, 0.0),
    "rank two": low_rank,
    "small activations": scale(NORM, 1e-12),
    "large activations": scale(NORM, 1e4),
}


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda s: f"{s.method}{s.bits}")
@pytest.mark.parametrize("case", FINE)
def test_what_is_finite_is_quantized(good: Path, tmp_path: Path, case: str, spec: QuantSpec):
    source = changed(good, tmp_path / "source", FINE[case])
    target = tmp_path / "target"
    quantize(source, target, spec, tokens=TOKENS, device="cpu")
    report = verify(target)
    assert report.ok, report.render()
    manifest = json.loads((target / "qquant_manifest.json").read_text())
    assert all(math.isfinite(row["loss"]) for row in manifest["layers"])
    with torch.no_grad():
        logits = load(target, device="cpu", dtype="float32", kernel="dequantize").model(TOKENS[:1])
    assert torch.isfinite(logits.logits).all()


HUGE: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "weights": (fill(UP, 1e30), "model.layers.0.mlp"),
    "one weight": (fill(DOWN, 1e30, (0, 0)), "model.layers.0.mlp.down_proj"),
    "a norm": (fill(NORM, 1e30), "model.layers.0.input_layernorm"),
    "a norm that fits float32 only": (fill(NORM, 1e5), "model.layers.0.input_layernorm"),
    "embeddings": (fill(EMBEDDING, 1e30, 7), EMBEDDING),
    "a head": (fill(HEAD, -1e5, (2, 2)), HEAD),
    "NaN in the head": (fill(HEAD, math.nan, (2, 2)), HEAD),
    "infinity in a norm": (fill(NORM, math.inf, 0), NORM),
    "infinity in the embedding": (fill(EMBEDDING, -math.inf, (5, 5)), EMBEDDING),
}


@pytest.mark.parametrize("spec", SPECS[::2], ids=lambda s: f"{s.method}{s.bits}")
@pytest.mark.parametrize("case", HUGE)
def test_what_does_not_fit_is_named(good: Path, tmp_path: Path, case: str, spec: QuantSpec):
    change, name = HUGE[case]
    source = changed(good, tmp_path / "source", change)
    with pytest.raises(QQuantError) as caught:
        quantize(source, tmp_path / "target", spec, tokens=TOKENS, device="cpu")
    assert name in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("size", [1e15, 1e18, 1e19, 1e25, 1e38])
def test_activations_whose_squares_overflow(good: Path, tmp_path: Path, size: float):
    """In bfloat16 they can be written; what H and the loss come to decides."""
    source = changed(good, tmp_path / "source", fill(NORM, size))
    target = tmp_path / "target"
    out = OutputSpec(dtype="bfloat16")
    try:
        quantize(source, target, SPECS[0], out=out, tokens=TOKENS, device="cpu")
    except QQuantError as error:
        assert "model.layers.0." in str(error)
        assert not target.exists()
    else:
        assert verify(target).ok
