"""What conversions share: their result, and the manifest and model card of the directory.

The manifest has the place of `manifest.build_manifest`'s, with a `conversion` where that has a
quantization; what the source's own manifest says of how it was made is kept in it. The card says
what the run said at its end.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import OutputSpec
from .directory import read_json
from .front_matter import base_model, find_licence, front_lines, front_matter, licence_line
from .manifest import CARD, FORMAT, record_file, versions
from .manifest import NAME as MANIFEST
from .report import human_bytes


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        path: the published directory.
        seconds: wall time.
        tensors, size_bytes: tensors, and bytes of all files.
        notes: what the result does otherwise than the source, in words.
    """

    path: Path
    seconds: float
    tensors: int
    size_bytes: int
    notes: tuple[str, ...]


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


def write_card(
    directory: Path,
    manifest: dict[str, Any],
    source: Checkpoint,
    *,
    suffix: str,
    tags: Sequence[str],
    what: Sequence[str],
    loading: Sequence[str],
    difference: Sequence[str] = (),
) -> None:
    """Writes README.md and adds its hash to the manifest file.

    Args:
        manifest: as written by `write_manifest`; its `files` are brought up to date.
        suffix: the result's name in examples, behind the source's; `{title}` in `loading` is both.
        tags: beside `qwen` and `qquant`.
        what: lines that say what it is.
        loading: lines that show how to load it.
        difference: lines on what its readers do otherwise than the source's.
    """
    title = f"{manifest['source']['name']}-{suffix}"
    licence = find_licence(source.path)
    front = front_lines(["qwen", *tags, "qquant"], _base(source), licence)
    if source.quantization_config is None:  # the weights are the base model's own
        front = [line for line in front if not line.startswith("base_model_relation")]
    versions_text = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    lines = [
        *front,
        f"# {title}",
        "",
        *what,
        licence_line(licence),
        "",
        "## How to load it",
        "",
        *(line.replace("{title}", title) for line in loading),
        "",
        *difference,
        "## How to make it again",
        "",
        "```sh",
        _command(manifest, title),
        "```",
        "",
        f"Made with {versions_text}.",
        f"`{MANIFEST}` has the hashes of the source and of every file here.",
        "",
    ]
    (directory / CARD).write_text("\n".join(lines), encoding="utf-8")
    record_file(directory, manifest, CARD)


def weight_bytes(directory: Path) -> str:
    """Size of the weights, for people."""
    return human_bytes(sum(path.stat().st_size for path in directory.glob("*.safetensors")))


def _base(source: Checkpoint) -> str:
    """What a quantized source's own card names; else the source itself."""
    if source.quantization_config is not None and (source.path / CARD).is_file():
        text = source.file(CARD).read_text(encoding="utf-8", errors="replace")
        if named := front_matter(text).get("base_model"):
            return named
    return base_model(source.path)


def loading_code(chat: bool, trust: str = "") -> list[str]:
    """Lines of Python that load and run `{title}` with transformers.

    Args:
        chat: whether the tokenizer has a chat template.
        trust: what `from_pretrained` has to be given besides.
    """
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{{title}}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{{title}}", device_map="auto"{trust})',
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
    ]


def _command(manifest: dict[str, Any], target: str) -> str:
    words = ["qquant", "convert", manifest["source"]["name"], "-o", target]
    words += ["--to", manifest["conversion"]["to"]]
    if (size := manifest["output"]["shard_size"]) != OutputSpec.shard_size:
        words += ["--shard-size", str(size)]
    return shlex.join(words)
