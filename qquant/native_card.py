"""Manifest and model card of a converted directory: what it is, and what it does otherwise.

The manifest has the place of `manifest.build_manifest`'s, with a `conversion` where that has a
quantization; what the source's own manifest says of how it was made is kept in it. The card says
what the run said at its end.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .card import base_model, find_licence, front_lines, front_matter, licence_line
from .checkpoint import Checkpoint
from .config import OutputSpec
from .directory import read_json
from .manifest import CARD, FORMAT, record_file, versions
from .manifest import NAME as MANIFEST
from .native_layout import Plan
from .report import human_bytes


def conversion_manifest(
    source: Checkpoint, to: str, notes: Sequence[str], shard_size: int
) -> dict[str, Any]:
    """The manifest as a JSON object, `files` still empty; hashes the source, reading all of it."""
    theirs = read_json(source.path, MANIFEST) if (source.path / MANIFEST).is_file() else None
    if theirs is not None:
        theirs.pop("files", None)
    return {
        "manifest": FORMAT,
        "conversion": {"to": to, "notes": list(notes)},
        "source": {
            "name": source.path.name,
            "model_type": source.config.get("model_type"),
            "sha256": source.sha256(),
            "tensor_bytes": source.nbytes,
            "manifest": theirs,
        },
        "output": {"shard_size": shard_size},
        "versions": versions("tokenizers"),
        "files": {},
    }


def write_native_card(
    directory: Path, manifest: dict[str, Any], source: Checkpoint, plan: Plan, chat: bool
) -> None:
    """Writes README.md and adds its hash to the manifest file.

    Args:
        manifest: as written by `write_manifest`; its `files` are brought up to date.
        chat: whether the model answers in ChatML.
    """
    quant = plan.quantization
    name = f"{manifest['source']['name']}-qwen2"
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    tags = ["qwen", "qwen2", "qquant"]
    if quant is not None:
        tags[2:2] = ["gptq", f"{quant['bits']}-bit"]
    licence = find_licence(source.path)
    front = front_lines(tags, _base(source), licence)
    if quant is None:  # the weights are the base model's own
        front = [line for line in front if not line.startswith("base_model_relation")]
    versions_text = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    lines = [
        *front,
        f"# {name}",
        "",
        f"The weights of {manifest['source']['name']}, bit for bit ({human_bytes(size)}), under",
        "the names of the native `qwen2` architecture: no reader needs code from this directory,",
        "nor `trust_remote_code`. Converted by qquant.",
        licence_line(licence),
        "",
        *_loading(name, quant is not None, chat),
        "## What is not as in the original",
        "",
        *(f"- {note}." for note in manifest["conversion"]["notes"]),
        "",
        f"Up to {plan.longest} tokens the logits are the original's within rounding.",
        "",
        "## How to make it again",
        "",
        "```sh",
        *_command(manifest, name),
        "```",
        "",
        f"Made with {versions_text}.",
        f"`{MANIFEST}` has the hashes of the source and of every file here.",
        "",
    ]
    (directory / CARD).write_text("\n".join(lines), encoding="utf-8")
    record_file(directory, manifest, CARD)


def _base(source: Checkpoint) -> str:
    """What a quantized source's own card names; else the source itself."""
    if source.quantization_config is not None and (source.path / CARD).is_file():
        text = source.file(CARD).read_text(encoding="utf-8", errors="replace")
        if named := front_matter(text).get("base_model"):
            return named
    return base_model(source.path)


def _loading(title: str, quantized: bool, chat: bool) -> list[str]:
    lines = ["## How to load it", ""]
    if quantized:
        lines += ["With transformers (needs `pip install optimum gptqmodel`):", ""]
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        f'model = AutoModelForCausalLM.from_pretrained("{title}", device_map="auto")',
    ]
    if chat:
        lines += [
            'messages = [{"role": "user", "content": "Hi"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
        ]
    else:
        lines.append('inputs = tokenizer("Hi", return_tensors="pt").to(model.device)')
    return [
        *lines,
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
        "```",
        "",
    ]


def _command(manifest: dict[str, Any], target: str) -> list[str]:
    words = ["qquant", "convert", manifest["source"]["name"], "-o", target]
    words += ["--to", manifest["conversion"]["to"]]
    if (size := manifest["output"]["shard_size"]) != OutputSpec.shard_size:
        words += ["--shard-size", str(size)]
    return [shlex.join(words)]
