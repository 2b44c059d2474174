"""The model card: README.md of an exported directory, made from its manifest.

The front matter is what model hubs read (base model and relation, licence, tags); the body is what
a person needs: how to load it, how it was made, what it cost per kind of linear, and every linear
that did not go as configured, by name. The card says nothing that the manifest or the source's own
files do not: no accuracy is claimed, since none was measured here.

How it is loaded is `card_loading`'s to say, what hubs read of it and the licence `front_matter`'s.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_loading import is_compressed, loading, mixture_of
from .checkpoint import Checkpoint
from .config import RECIPES, CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
from .front_matter import Licence, base_model, find_licence, front_lines, licence_line
from .manifest import CARD, record_file
from .manifest import NAME as MANIFEST
from .report import flag_rows, human_bytes, losses_by_kind, markdown_table

_OPTIONS = {
    "sym": ("--sym", "--asym"),
    "act_order": ("--act-order", "--no-act-order"),
    "negative_scales": ("--negative-scales", "--no-negative-scales"),
}


@dataclass(frozen=True)
class Row:
    """A manifest's layer row, as `report` reads it."""

    name: str
    loss: float
    rel_error: float
    damp: float
    flags: tuple[str, ...]


def layer_rows(manifest: Mapping[str, Any]) -> list[Row]:
    """The manifest's linears."""
    return [
        Row(r["name"], r["loss"], r["relative_loss"], r["damp"], tuple(r["flags"]))
        for r in manifest["layers"]
    ]


def write_card(
    directory: Path,
    manifest: dict[str, Any],
    source: Checkpoint,
    render: Callable[..., str] | None = None,
) -> None:
    """Writes README.md and adds its hash to the manifest file.

    Args:
        directory: complete apart from the card.
        manifest: as written by `write_manifest`; its `files` are brought up to date.
        source: the checkpoint that was quantized.
        render: of another method, taking what `render_card` takes.
    """
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    text = (render or render_card)(
        manifest,
        title=None,
        base_model=base_model(source.path),
        licence=find_licence(source.path),
        weight_bytes=size,
    )
    (directory / CARD).write_text(text, encoding="utf-8")
    record_file(directory, manifest, CARD)


def reproduce_command(manifest: Mapping[str, Any], target: str = "OUT") -> str:
    """The shortest `qquant quantize` line that gives this manifest's specs, paths by name."""
    quant = QuantSpec(**manifest["quantization"])
    recipe, changes = _nearest_recipe(quant)
    words = ["qquant", "quantize", manifest["source"]["name"], "-o", target]
    words += ["--bits", str(quant.bits)] if quant.target_bpw is None else []
    if recipe != "default":
        words += ["--recipe", recipe]
    for key, value in changes.items():
        if key in _OPTIONS:
            words.append(_OPTIONS[key][0 if value else 1])
        elif key == "bit_choices":
            words += ["--bit-choices", ",".join(map(str, value))]
        elif key != "bits":
            words += ["--" + key.replace("_", "-"), str(value)]
    if calibration := manifest["calibration"]:
        spec, plain = calibration["spec"], CalibrationSpec()
        if tuple(spec["sources"]) != plain.sources:
            for given in spec["sources"]:
                words += ["--calib", given]
        for key in ("samples", "seqlen", "seed"):
            if spec[key] != getattr(plain, key):
                words += [f"--{key}", str(spec[key])]
    for key, value in manifest["output"].items():
        if value != getattr(OutputSpec(), key):
            words += ["--" + key.replace("_", "-"), str(value)]
    return shlex.join(words)


def _nearest_recipe(quant: QuantSpec) -> tuple[str, dict[str, Any]]:
    """The recipe that differs least from `quant`, and the fields in which it does."""
    best: tuple[str, dict[str, Any]] | None = None
    for recipe in RECIPES:
        base = spec_from_recipe(recipe).to_dict()
        changes = {key: value for key, value in quant.to_dict().items() if value != base[key]}
        if best is None or len(changes) < len(best[1]):
            best = recipe, changes
    assert best is not None  # RECIPES is not empty
    return best


def _computed(dtype: str) -> str:
    return "float32 with products of 16-bit integers" if dtype == "int16" else dtype


def _tags(manifest: Mapping[str, Any]) -> list[str]:
    quant = manifest["quantization"]
    width = "mixed-precision" if mixture_of(manifest) else f"{quant['bits']}-bit"
    tags = ["qwen", "gptq", width, "quantized", "qquant"]
    if is_compressed(manifest):
        tags.insert(2, "compressed-tensors")
    return tags + (["rtn"] if quant["method"] == "rtn" else [])


def _mixed(mixed: Mapping[str, Any]) -> list[str]:
    """What was chosen, and the curve it was chosen from."""
    head = ["target", "bits per weight", "estimated KL"]
    widths = list(mixed["curve"][0]["linears"])
    rows = []
    for point in mixed["curve"]:
        target = point["target_bpw"]
        name = f"uniform {point['uniform_bits']}" if target is None else f"{target:g}"
        if target is not None and target == mixed["target_bpw"]:
            name = f"**{name}** (this directory)"
        row = [name, f"{point['bits_per_weight']:.3f}", f"{point['loss']:.3g}"]
        rows.append(row + [str(point["linears"][b]) for b in widths])
    return [
        "## Bits per linear",
        "",
        "Chosen within the target by measured loss: an estimate of the KL divergence from the",
        "unquantized model, in nats per token, of GPTQ without refinement. Linears that readers",
        "load as one have equal bits. Bits per weight count codes, scales and zero points.",
        "",
        markdown_table([*head, *(f"{b}-bit linears" for b in widths)], rows),
        "",
    ]


def _quantization(manifest: Mapping[str, Any]) -> list[str]:
    quant = manifest["quantization"]
    group = "one scale per channel" if quant["group_size"] == -1 else f"{quant['group_size']}"
    rows = [["recipe", manifest["recipe"]]] if manifest["recipe"] else []
    mixed = mixture_of(manifest)
    bits = str(quant["bits"])
    if mixed:
        bits = f"{mixed['bits_per_weight']:.3f} per weight (target {mixed['target_bpw']:g})"
    rows += [["bits", bits], ["group size", group]]
    rows.append(["grid", "symmetric" if quant["sym"] else "asymmetric"])
    rows.append(["method", "GPTQ" if quant["method"] == "gptq" else "round to nearest"])
    if quant["method"] == "gptq":
        rows += [
            ["activation order", "yes, groups fixed first" if quant["act_order"] else "no"],
            ["damping", str(quant["damp"])],
            ["scale search", str(quant["scale_search"])],
            ["refinement sweeps", str(quant["sweeps"])],
            ["input correction", f"{quant['correct']}, residual {quant['correct_residual']}"],
        ]
    rows.append(["everything else", manifest["output"]["dtype"]])
    lines = ["## Quantization", "", markdown_table(("setting", "value"), rows), ""]
    lines += ["Embedding, norms and the output head are not quantized. On disk:"]
    if is_compressed(manifest):
        return [*lines, "compressed-tensors, `pack-quantized`.", ""]
    return [*lines, "GPTQ v1, trivial `g_idx`, `desc_act: false`.", ""]


def _calibration(manifest: Mapping[str, Any]) -> list[str]:
    lines = ["## Calibration", ""]
    calibration = manifest["calibration"]
    if calibration is None:
        return [*lines, "None: the method reads no data.", ""]
    samples, seqlen = calibration["shape"]
    lines += [f"{samples} sequences of {seqlen} tokens; SHA-256 of the ids", ""]
    lines += [f"`{calibration['sha256']}`.", ""]
    rows = [
        [str(s.get("name", "")), str(s.get("documents", "")), str(s.get("tokens", ""))]
        for s in calibration["sources"]
    ]
    lines += [markdown_table(("source", "documents", "tokens"), rows), ""]
    if notes := calibration["notes"]:
        lines += [*(f"- {note}" for note in notes), ""]
    return lines


def cost_lines(layers: Sequence[Row], method: str) -> list[str]:
    """The table of errors by kind of linear, and the exceptions by name."""
    lines = ["## What it cost, per kind of linear", ""]
    if method == "gptq":
        lines += ["Error of the linear's output on the calibration data, as a share of the output:"]
        lines += ["‖X(W − Ŵ)‖ / ‖XW‖. This says nothing about accuracy on tasks.", ""]
    else:
        lines += ["Error of the weights, as a share of the weights: ‖W − Ŵ‖ / ‖W‖. This says"]
        lines += ["nothing about accuracy on tasks.", ""]
    rows = [
        [f"`{kind}`", str(count), f"{mean:.2%}", f"{worst:.2%}", f"`{name}`"]
        for kind, count, mean, worst, name in losses_by_kind(layers)
    ]
    lines += [markdown_table(("linear", "count", "mean", "worst", "which"), rows), ""]
    lines += ["## Linears that did not go as configured", ""]
    lines += [f"- `{name}`: {text}" for name, text in flag_rows(layers)] or ["None."]
    return [*lines, ""]


def render_card(
    manifest: Mapping[str, Any],
    *,
    title: str | None,
    base_model: str,
    licence: Licence,
    weight_bytes: int,
) -> str:
    """The card's text; the same manifest gives the same text.

    Args:
        manifest: see `manifest.build_manifest`.
        title: the directory's name in examples; None for `SOURCE-IntN`.
        base_model: hub id or name of the source.
        licence: the source's.
        weight_bytes: of all safetensors files.
    """
    quant = manifest["quantization"]
    mixed = mixture_of(manifest)
    width = f"{mixed['target_bpw']:g}bpw" if mixed else f"Int{quant['bits']}"
    name = title or f"{manifest['source']['name']}-{width}"
    bits = f"{mixed['bits_per_weight']:.2f}" if mixed else str(quant["bits"])
    layers = layer_rows(manifest)
    before, after = human_bytes(manifest["source"]["tensor_bytes"]), human_bytes(weight_bytes)
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    machine = manifest["machine"]
    lines = [
        *front_lines(_tags(manifest), base_model, licence),
        f"# {name}",
        "",
        f"{base_model} with the weights of its {len(layers)} linears quantized to {bits} "
        f"bits by qquant: {after} of weights, {before} before.",
        licence_line(licence),
        "",
        *loading(manifest, name),
        *_quantization(manifest),
        *(_mixed(mixed) if mixed else []),
        *_calibration(manifest),
        *cost_lines(layers, quant["method"]),
        "## How to make it again",
        "",
        "```sh",
        reproduce_command(manifest, name),
        "```",
        "",
        f"Made with {versions}; on {machine['device']} ({machine['device_name']}, "
        f"{_computed(machine['compute_dtype'])}, {machine['threads']} threads).",
        f"`{MANIFEST}` has the hashes of the source, the calibration ids and every file here, and",
        "the loss of every linear.",
        "",
    ]
    return "\n".join(lines)
