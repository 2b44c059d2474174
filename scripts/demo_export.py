"""The trained network as a bundle in the original Qwen layout.

Owns the files of `demo/`: weights in bfloat16 under the original tensor names, the configuration
files with the original's keys, the ranks file, card, licence, notice, the held-out text and the
measurements.  There are no code files in it: `qquant` carries the code for original Qwen.
"""

from __future__ import annotations

import json
import platform
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import torch
from demo_bpe import encoding, write_ranks
from demo_corpus import Corpus
from demo_measure import held_out_loss, rounded_blocks
from demo_net import DemoNet, Shape
from safetensors.torch import save_file

if TYPE_CHECKING:
    from train_demo import DemoPlan

OWN_NOTICE = ("permission to use", "permission is hereby granted")


def write_bundle(
    out: Path,
    net: DemoNet,
    ranks: dict[bytes, int],
    corpus: Corpus,
    plan: DemoPlan,
    run: dict[str, object],
) -> dict[str, object]:
    """Write `out/qwen-demo`, `out/heldout.txt` and `out/measured.json`; return the measurements.

    The measurements are of the bfloat16 weights as written, computed in float32.  Raises
    `FileNotFoundError` when this Python came without its licence text.
    """
    model = out / "qwen-demo"
    model.mkdir(parents=True, exist_ok=True)
    shape, eod = plan.shape, len(ranks)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in net.state_dict().items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "model.safetensors").chmod(0o644)
    write_ranks(model / "qwen.tiktoken", ranks)
    _write_json(model / "config.json", model_config(shape))
    _write_json(model / "tokenizer_config.json", tokenizer_config(shape))
    _write_json(model / "generation_config.json", generation_config(shape, eod))
    held_out = corpus.held_out_text()
    (out / "heldout.txt").write_text(held_out, encoding="utf-8")

    ids = encoding(ranks).encode_ordinary(held_out)
    judge = DemoNet(shape).eval()
    measured: dict[str, object] = {
        "heldout_tokens": len(ids),
        "heldout_bytes": len(held_out.encode()),
    }
    for name, weights in (("bf16", tensors), ("rtn3_g128", rounded_blocks(tensors))):
        judge.load_state_dict({key: value.float() for key, value in weights.items()})
        measured[name] = held_out_loss(judge, ids, shape.seq_length).rounded()
    measured |= {
        "parameters": sum(value.numel() for value in tensors.values()),
        "steps": run["steps"],
        "training_tokens": int(str(run["steps"])) * plan.batch * shape.seq_length,
        "training_seconds": run["seconds"],
        "text_sha256": run["text_sha256"],
        "windows_sha256": run["windows_sha256"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
    }
    _write_json(out / "measured.json", measured)
    (model / "LICENSE").write_text(python_licence(), encoding="utf-8")
    (model / "NOTICE").write_text(notice(corpus), encoding="utf-8")
    (model / "README.md").write_text(card(shape, plan, measured, corpus), encoding="utf-8")
    return measured


def model_config(shape: Shape) -> dict[str, object]:
    """`config.json` with the keys original Qwen wrote."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": True,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * shape.ffn,
        "kv_channels": shape.head_dim,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 4 * shape.seq_length,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": shape.seq_length,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": shape.rows,
    }


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """`tokenizer_config.json` as original Qwen has it."""
    return {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "model_max_length": 4 * shape.seq_length,
        "tokenizer_class": "QWenTokenizer",
    }


def generation_config(shape: Shape, eod: int) -> dict[str, object]:
    """`generation_config.json` of a chat model; the window leaves room for an answer."""
    return {
        "chat_format": "chatml",
        "do_sample": True,
        "eos_token_id": eod,
        "max_new_tokens": shape.seq_length // 4,
        "max_window_size": shape.seq_length * 3 // 4,
        "pad_token_id": eod,
        "top_k": 0,
        "top_p": 0.8,
        "transformers_version": "4.32.0",
    }


def python_licence() -> str:
    """The licence text of the running Python.  Raises `FileNotFoundError` when there is none."""
    library = Path(sysconfig.get_path("stdlib"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    places = (
        library / "LICENSE.txt",
        Path(sys.base_prefix) / "LICENSE",
        Path(sys.base_prefix) / "LICENSE.txt",
        Path(f"/usr/share/doc/python{version}/copyright"),
    )
    for path in places:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(
        "no licence text beside this Python; the bundle must carry it, so run a full installation"
    )


def notice(corpus: Corpus) -> str:
    """Whose text the bundle was made from, with the files that carry a notice of their own."""
    own = sorted(
        name
        for name, text in (*corpus.train, *corpus.held_out)
        if any(words in " ".join(text.lower().replace("#", " ").split()) for words in OWN_NOTICE)
    )
    listed = "".join(f"  {name}\n" for name in own)
    owner = sys.copyright.split("\n\n")[0].replace("\n", " ")
    text = f"""\
qwen-demo: weights and vocabulary trained for the qquant project

Trained on sources and documentation of Python {platform.python_version()} and its standard library,
{owner}
The licence of Python is in LICENSE. The weights are a derivative work: the text was cut into tokens
and a statistical model was fitted to it.

heldout.txt, beside this directory, holds whole files of the same library, unchanged except for
Unicode normalisation and the blank line between files.

These files of the library carry a permissive notice of their own, which stays in their text:
{listed}"""
    return text if own else text.rpartition("\n\n")[0] + "\n"


def card(shape: Shape, plan: DemoPlan, measured: dict[str, object], corpus: Corpus) -> str:
    """The model card."""
    full, rough = measured["bf16"], measured["rtn3_g128"]
    assert isinstance(full, dict) and isinstance(rough, dict)
    minutes = float(str(measured["training_seconds"])) / 60
    rise = 100 * (rough["perplexity"] / full["perplexity"] - 1)
    names = ", ".join(f"`{name}`" for name, _ in corpus.held_out if not name.startswith("topic/"))
    topics = ", ".join(f"`{n.removeprefix('topic/')}`" for n, _ in corpus.held_out if "topic/" in n)
    return f"""\
---
license: other
license_name: python-software-foundation
license_link: LICENSE
language:
- en
tags:
- qwen
- code
library_name: transformers
pipeline_tag: text-generation
---

# qwen-demo

A very small language model in the layout of the original Qwen (`model_type: qwen`), made so that
qquant can be tried and tested without a download. It is not a Qwen model: nothing of Qwen's weights
or vocabulary is in it. It writes text that looks like Python, and takes turns in a chat without
having much to say. Do not use it for anything but trying out software.

| | |
|---|---|
| parameters | {measured["parameters"]:,} in bfloat16 |
| shape | {shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads of {shape.head_dim}, \
feed-forward {shape.ffn}, {shape.rows} rows |
| vocabulary | {shape.ranks} byte-level BPE ranks and {3 + 205} special tokens |
| trained length | {shape.seq_length} tokens; dynamic NTK and logn beyond |
| held-out perplexity | {full["perplexity"]:.3f} per token ({full["nats"]:.4f} ± \
{full["standard_error"]:.4f} nats over {full["tokens"]:,} tokens) |
| after 3-bit rounding | {rough["perplexity"]:.3f} (+{rise:.1f}%; to nearest, groups of 128) |

## How it was made

`scripts/train_demo.py` of qquant, on a CPU, one thread, float32, fixed seeds:
{measured["steps"]} steps of {plan.batch} windows of {shape.seq_length} tokens \
({measured["training_tokens"]:,} tokens, {minutes:.0f} minutes of wall clock).
The text is the standard library of Python {measured["python"]}: its sources, the language
reference that `help()` shows, and ({plan.chat_share:.0%} of the windows) ChatML conversations
made from its docstrings and short functions, with a few greetings written for this purpose. Tests,
code tables and modules that newer Pythons dropped are left out.

- text sha256 `{measured["text_sha256"]}`
- windows sha256 `{measured["windows_sha256"]}`
- Python {measured["python"]}, torch {measured["torch"]}, tokenizers {measured["tokenizers"]}

The same machine and versions give the same bytes; another library version is another text.

## Held-out text

`heldout.txt`, beside this directory, holds whole files the model and its vocabulary never saw:
{names}; and these topics of the reference: {topics}. Perplexity is measured in windows of
{shape.seq_length} tokens that share no prediction, without special tokens, with the bfloat16
weights computed in float32. The numbers are in `measured.json`.

## Limits

It saw {measured["training_tokens"]:,} tokens of one library. It knows no facts, its code rarely
runs, and its answers about Python are wrong as often as not. Names and phrases of the
library can appear verbatim.

## Licence

The training text is under the Python Software Foundation licence, which allows derivative works;
see `LICENSE` and `NOTICE`. The weights are offered under the same terms.
"""


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
