"""Original Qwen's first release (August 2023) named config keys otherwise: the whole way with them.

The same weights under either generation of names must give the same quantized tensors and the same
logits; only config.json differs, which keeps the names it came with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_tiny import write_checkpoint
from safetensors.torch import load_file

from qquant.config import QuantSpec
from qquant.convert import quantize
from qquant.errors import CheckpointError
from qquant.runtime import load
from qquant.verify import inspect, verify

TOKENS = torch.randint(0, 256, (32, 24), generator=torch.Generator().manual_seed(0))
SPEC = QuantSpec(group_size=32)
# Today's key -> the first release's.
OLD = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "attn_dropout_prob": "attn_pdrop",
    "emb_dropout_prob": "embd_pdrop",
}


def first_release(config: dict[str, Any]) -> dict[str, Any]:
    """The config as the first release wrote it: old names, `vocab_size` the number of tokens."""
    old = {OLD.get(key, key): value for key, value in config.items()}
    old.pop("dtype", None)
    return old | {
        "vocab_size": config["vocab_size"] - 38,
        "params_dtype": "torch.float32",
        "activation": "swiglu",
        "pos_emb": "rotary",
        "tokenizer_type": "QWenTokenizer",
        "use_flash_attn": "auto",
        "bf16": False,
        "fp16": False,
        "fp32": True,
    }


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """One checkpoint twice: today's names, the first release's."""
    new = write_checkpoint(tmp_path / "new")
    # The published checkpoints' own code cannot be imported today; ours travels with the export.
    old = tmp_path / "old"
    shutil.copytree(new, old, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((new / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(first_release(config)))
    assert not OLD.keys() & first_release(config).keys() - {"vocab_size"}
    return new, old


def test_the_whole_way_with_first_release_names(sources: tuple[Path, Path], tmp_path: Path) -> None:
    logits, stored = [], []
    for src in sources:
        dst = tmp_path / f"{src.name}-int4"
        result = quantize(src, dst, SPEC, tokens=TOKENS, device="cpu")
        assert [layer.name for layer in result.layers if layer.flags] == []
        report = verify(dst, against=src)
        assert (report.problems, report.warnings) == ([], [])
        assert len(report.layers) == len(result.layers) == 10
        assert inspect(dst).layers == 2
        stored.append(load_file(dst / "model.safetensors"))
        loaded = load(dst, device="cpu", dtype="float32")
        assert loaded.tokenizer is not None
        with torch.no_grad():
            # Past seq_length (32) too, where dynamic NTK and logn depend on the config.
            longer = TOKENS[:8].reshape(2, 96)
            logits.append([loaded.model(ids).logits for ids in (TOKENS[:2], longer)])
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    assert logits[0][0].shape == (2, 24, 512)
    assert all(torch.equal(one, two) for one, two in zip(*logits, strict=True))


def test_the_export_reads_its_own_config(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """By the code that travels with it, as transformers runs it without qquant."""
    dst = tmp_path / "int4"
    quantize(sources[1], dst, QuantSpec(group_size=32, method="rtn"), device="cpu")
    written = json.loads((dst / "config.json").read_text())
    assert written["n_embd"] == 64 and "hidden_size" not in written
    script = (
        "import sys; sys.modules['qquant'] = None\n"  # cannot be imported
        "from transformers import AutoConfig\n"
        "c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.vocab_size, c.dtype)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script, str(dst)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert shown.stdout.split() == ["64", "2", "2", "512", "torch.float16"]


def test_a_first_release_config_without_layers_is_refused(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    path = sources[1] / "config.json"
    config = json.loads(path.read_text())
    del config["n_layer"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        quantize(sources[1], tmp_path / "int4", SPEC, tokens=TOKENS, device="cpu")
