"""Tiny original-Qwen material for tests: a ranks file, a random model, a checkpoint directory.

The ranks are the 256 single bytes and a few merges, so special tokens begin at 256 + merges: the
tests see that nothing depends on Qwen's own 151,643.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
import torch

from qquant.models import AUTO_MAP, TOKENIZER_AUTO_MAP, export_files
from qquant.models.qwen.configuration_qwen import QWenConfig
from qquant.models.qwen.modeling_qwen import QWenLMHeadModel

GOLDEN = Path(__file__).parent / "golden"
MERGES = [
    b" t",  # before "th", so that merging two at a time arrives at " the"
    b"th",
    b"he",
    b" the",
    b"er",
    b"us",
    b"user",
    b"\n\n",
    "你".encode()[:2],
    "你".encode(),
]
N_RANKS = 256 + len(MERGES)


def qwen_ranks() -> Path:
    """Qwen's own ranks file, which may not be redistributed; skips the test without it."""
    roots = [os.environ.get("QQUANT_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    for root in roots:
        if root and (Path(root) / "qwen.tiktoken").is_file():
            return Path(root) / "qwen.tiktoken"
    pytest.skip("needs qwen.tiktoken: set QQUANT_DATA to the folder that has it")


def write_ranks(path: Path) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    lines = [base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


def tiny_config(**changes: object) -> QWenConfig:
    """2 layers, hidden 64, 2 heads of 32, ffn 96, 512 rows, seq_length 32."""
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 32,
        "intermediate_size": 192,
        "initializer_range": 0.2,
        "seq_length": 32,
        "max_position_embeddings": 512,
    }
    return QWenConfig(**(settings | changes))


def tiny_model(seed: int = 0, attn: str = "eager", **changes: object) -> QWenLMHeadModel:
    torch.manual_seed(seed)
    config = tiny_config(**changes)
    config._attn_implementation = attn
    return QWenLMHeadModel(config).eval()


def write_checkpoint(path: Path, *, code: bool = True, seed: int = 0) -> Path:
    """A chat checkpoint as exported: weights, ranks, configs and (with `code`) the code files."""
    tiny_model(seed).save_pretrained(path)
    write_ranks(path / "qwen.tiktoken")
    config = json.loads((path / "config.json").read_text())
    config |= {"auto_map": AUTO_MAP, "tokenizer_class": "QWenTokenizer"}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "QWenTokenizer", "auto_map": TOKENIZER_AUTO_MAP}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    generation = {
        "chat_format": "chatml",
        "eos_token_id": N_RANKS,
        "pad_token_id": N_RANKS,
        "max_window_size": 400,
        "max_new_tokens": 12,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    if code:
        for name, source in export_files().items():
            (path / name).write_bytes(source.read_bytes())
    return path
