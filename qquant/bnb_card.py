"""The model card of a bitsandbytes directory; what it shares with GPTQ's is in `card.py`.

As there, the card says nothing that the manifest and the source do not. Two surprises are said
where a user meets them: 8 bits run slower than 16 on most hardware (the outliers are looked for at
every call), and a directory of 4 bits needs more memory than its size while it runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .bnb_spec import BLOCK, NESTED_BLOCK, BnbSpec
from .card import cost_lines, layer_rows
from .card_loading import ORIGINAL, by_transformers
from .config import OutputSpec
from .front_matter import Licence, front_lines, licence_line
from .manifest import NAME as MANIFEST
from .report import human_bytes, markdown_table

_NAMES = {"nf4": "NF4", "fp4": "FP4", "int8": "Int8"}


def render_bnb_card(
    manifest: Mapping[str, Any],
    *,
    title: str | None,
    base_model: str,
    licence: Licence,
    weight_bytes: int,
) -> str:
    """The card's text; arguments as in `card.render_card`, `title` None for `SOURCE-NF4`."""
    spec = BnbSpec.from_dict(manifest["quantization"])
    kind = _NAMES[spec.method]
    name = title or f"{manifest['source']['name']}-{kind}"
    layers = layer_rows(manifest)
    before, after = human_bytes(manifest["source"]["tensor_bytes"]), human_bytes(weight_bytes)
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    machine = manifest["machine"]
    tags = ["qwen", "bitsandbytes", spec.method, f"{spec.bits}-bit", "quantized", "qquant"]
    lines = [
        *front_lines(tags, base_model, licence),
        f"# {name}",
        "",
        f"{base_model} with the weights of its {len(layers)} linears quantized to {kind} by "
        f"bitsandbytes through qquant: {after} of weights, {before} before.",
        licence_line(licence),
        "",
        *_loading(manifest, name),
        *_settings(manifest, spec),
        *cost_lines(layers, spec.method),
        "## How to make it again",
        "",
        "```sh",
        reproduce_bnb_command(manifest, name),
        "```",
        "",
        f"Made with {versions}; on {machine['device']} ({machine['device_name']}, "
        f"{machine['threads']} threads).",
        f"`{MANIFEST}` has the hashes of the source and of every file here, and the error of every",
        "linear.",
        "",
    ]
    return "\n".join(lines)


def reproduce_bnb_command(manifest: Mapping[str, Any], target: str = "OUT") -> str:
    """The `qquant quantize` line that gives this manifest's spec, paths by name."""
    spec, plain = BnbSpec.from_dict(manifest["quantization"]), BnbSpec()
    words = ["qquant", "quantize", manifest["source"]["name"], "-o", target]
    words += ["--method", spec.method]
    if spec.compute_dtype != plain.compute_dtype:
        words += ["--compute-dtype", spec.compute_dtype]
    if spec.double_quant:
        words.append("--double-quant")
    if spec.quant_storage != plain.quant_storage:
        words += ["--quant-storage", spec.quant_storage]
    if spec.int8_threshold != plain.int8_threshold:
        words += ["--int8-threshold", f"{spec.int8_threshold:g}"]
    if spec.skip != plain.skip:
        for entry in spec.skip or ("none",):
            words += ["--skip-module", entry]
    words += ["--dtype", manifest["output"]["dtype"]]
    if manifest["output"]["shard_size"] != OutputSpec().shard_size:
        words += ["--shard-size", str(manifest["output"]["shard_size"])]
    return shlex.join(words)


def _loading(manifest: Mapping[str, Any], title: str) -> list[str]:
    original = manifest["source"]["model_type"] == "qwen"
    return [
        "## How to load it",
        "",
        "With transformers (needs `pip install 'bitsandbytes>=0.50' accelerate`):",
        "",
        *by_transformers(title, original),
        *(ORIGINAL if original else ()),
        "With qquant, which runs no code from here:",
        "",
        "```python",
        "import qquant",
        "",
        f'model, tokenizer, report = qquant.load("{title}")',
        "```",
        "",
        "Save a 4-bit model before it has run, or not at all: bitsandbytes 0.50.2 damages one that",
        "ran on a CPU with AVX512-BF16. LoRA adapters can be trained on this directory and kept",
        "beside it.",
        "",
    ]


def _settings(manifest: Mapping[str, Any], spec: BnbSpec) -> list[str]:
    rows = [["method", f"bitsandbytes {_NAMES[spec.method]}"]]
    if spec.method == "int8":
        rows += [["scales", "one per output"], ["outliers from", f"{spec.int8_threshold:g}"]]
    else:
        doubly = f"yes, {NESTED_BLOCK} at a time" if spec.double_quant else "no"
        rows += [
            ["scales", f"one per {BLOCK} weights"],
            ["scales quantized too", doubly],
            ["computes in", manifest["machine"]["compute_dtype"]],
            ["codes stored as", spec.quant_storage],
        ]
    rows += [
        ["left in 16 bits by name", ", ".join(f"`{name}`" for name in spec.skip) or "nothing"],
        ["everything else", manifest["output"]["dtype"]],
    ]
    surprise = [
        "8 bits halve the memory and are slower than 16 bits on most hardware: every product looks",
        "for outlying inputs first.",
    ]
    if spec.bits == 4:
        surprise = [
            "While it runs it needs more memory than its size: embedding and head are 16-bit, and",
            "a product of many tokens unpacks a weight first.",
        ]
    head = [
        "## Quantization",
        "",
        markdown_table(("setting", "value"), rows),
        "",
        "No calibration data was read.",
    ]
    return [*head, *surprise, ""]
