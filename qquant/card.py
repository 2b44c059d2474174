"""The model card: README.md of an exported directory, made from its manifest.

The front matter is what model hubs read (base model and relation, licence, tags); the body is what
a person needs: how to load it, how it was made, what it cost per kind of linear, and every linear
that did not go as configured, by name. The card says nothing that the manifest or the source's own
files do not: no accuracy is claimed, since none was measured here.

The licence is the source's: from its README's front matter if it has one, else recognised from its
LICENSE file, else `other`. A licence is never made up.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import RECIPES, CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
from .directory import contained
from .errors import CheckpointError
from .manifest import CARD, record_file
from .manifest import NAME as MANIFEST
from .models.families import APART, FAMILIES
from .report import flagged, human_bytes, losses_by_kind, markdown_table

_LICENCES = (
    (r"Tongyi\s+Qianwen\s+RESEARCH\s+LICENSE", "other", "tongyi-qianwen-research"),
    (r"Tongyi\s+Qianwen\s+LICENSE", "other", "tongyi-qianwen"),
    (r"Qwen\s+RESEARCH\s+LICENSE", "other", "qwen-research"),
    (r"Qwen\s+LICENSE\s+AGREEMENT", "other", "qwen"),
    (r"Apache\s+License,?\s+Version\s+2\.0", "apache-2.0", None),
    (r"\AMIT\s+License", "mit", None),
)
_OPTIONS = {
    "sym": ("--sym", "--asym"),
    "act_order": ("--act-order", "--no-act-order"),
    "negative_scales": ("--negative-scales", "--no-negative-scales"),
}


@dataclass(frozen=True)
class Licence:
    """As in a card's front matter: `id` (`other` if the hub has none), its name and link."""

    id: str = "other"
    name: str | None = None
    link: str | None = None


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


def base_model(path: Path) -> str:
    """The hub id where the path tells it (a hub cache's folder), else the directory's name."""
    for part in path.parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    return path.name


def front_matter(text: str) -> dict[str, str]:
    """Plain `key: value` lines of a README's front matter; anything nested is passed over."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|\Z)", text, re.DOTALL)
    found = {}
    for line in match[1].splitlines() if match else ():
        if len(line) > 1000:
            continue
        if pair := re.fullmatch(r"([A-Za-z_]+):\s*(\S.*?)\s*", line):
            found[pair[1]] = pair[2].strip("'\"")
    return found


def find_licence(path: Path) -> Licence:
    """The source's licence; see the module's opening."""
    given = front_matter(_beginning(path, "README.md"))
    if "license" in given:
        return Licence(given["license"], given.get("license_name"), given.get("license_link"))
    for file in sorted(path.glob("LICENSE*")):
        head = _beginning(path, file.name)[:4000].lstrip()
        for pattern, key, name in _LICENCES:
            if re.search(pattern, head, re.IGNORECASE):
                return Licence(key, name, file.name if key == "other" else None)
        return Licence(link=file.name)
    return Licence()


def _beginning(root: Path, name: str) -> str:
    """The first megabyte of a file of the directory, as text; nothing where it cannot be read."""
    try:
        with contained(root.resolve(), name).open("rb") as handle:
            return handle.read(1 << 20).decode("utf-8", "replace")
    except (CheckpointError, OSError):
        return ""


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


def _yaml(value: str) -> str:
    """A YAML scalar: plain where that is safe, else quoted (JSON strings are YAML)."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value)
    special = value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return value if plain and not special else json.dumps(value, ensure_ascii=False)


def front_lines(tags: Sequence[str], base: str, licence: Licence) -> list[str]:
    """The front matter, as hubs read it."""
    lines = ["---", f"base_model: {_yaml(base)}", "base_model_relation: quantized"]
    lines.append(f"license: {_yaml(licence.id)}")
    if licence.name:
        lines.append(f"license_name: {_yaml(licence.name)}")
    if licence.link:
        lines.append(f"license_link: {_yaml(licence.link)}")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {_yaml(tag)}" for tag in tags]
    return [*lines, "---", ""]


def licence_line(licence: Licence) -> str:
    """The sentence about the source's licence."""
    known = licence != Licence()
    text = (licence.name or licence.id) if known else "not stated in its directory"
    if licence.link and "://" not in licence.link:
        text += f" (see `{licence.link}`)"
    return f"Licence of the base model: {text}."


def _tags(manifest: Mapping[str, Any]) -> list[str]:
    quant = manifest["quantization"]
    width = "mixed-precision" if _mixture(manifest) else f"{quant['bits']}-bit"
    tags = ["qwen", "gptq", width, "quantized", "qquant"]
    if _compressed(manifest):
        tags.insert(2, "compressed-tensors")
    return tags + (["rtn"] if quant["method"] == "rtn" else [])


def _loading(manifest: Mapping[str, Any], title: str) -> list[str]:
    original = manifest["source"]["model_type"] == "qwen"
    quant, dtype = manifest["quantization"], manifest["output"]["dtype"]
    trust = ", trust_remote_code=True" if original else ""
    family = FAMILIES[manifest["source"]["model_type"]]
    if _compressed(manifest):
        needs = ["With transformers (needs `pip install compressed-tensors`):"]
    elif _mixture(manifest):
        return _loading_mixed(manifest, title)
    elif family.experts and family.model_type not in APART:
        return _loading_experts(title)
    else:
        needs = [
            "With transformers (needs `pip install optimum gptqmodel`; on two CPU cores set",
            "`GPTQMODEL_CPU_WORKERS=2`):",
        ]
    package, apart = [], []
    if family.experts:
        package = [
            "from defuser import replace_fused_blocks  # comes with gptqmodel; takes experts apart"
        ]
        apart = [f'replace_fused_blocks("{family.model_type}")  # before the model is made']
    lines = [
        "## How to load it",
        "",
        *needs,
        "",
        "```python",
        *package,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *apart,
        f'tokenizer = AutoTokenizer.from_pretrained("{title}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{title}", device_map="auto"{trust})',
    ]
    if original:
        lines.append('response, history = model.chat(tokenizer, "Hi", history=None)')
    else:
        lines += [
            'inputs = tokenizer("Hi", return_tensors="pt").to(model.device)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        ]
    lines += ["```", ""]
    if _compressed(manifest) and not quant["sym"]:
        lines += [
            "Zero points are packed, which this package (0.20.0) does not expect unless",
            "`quantization_config=CompressedTensorsConfig(dequantize=True)` is given besides.",
            "",
        ]
    if original:
        lines += [
            "transformers has no class for original Qwen: the Python files in this directory are",
            "its code, and `trust_remote_code=True` runs them.",
            "",
        ]
    lines += _loading_qquant(title)
    if family.experts:
        lines += ["Without that line the experts would stay as they are made: random.", ""]
    # vLLM's GPTQ kernels: symmetric, 4 or 8 bits, these groups (`readers.py` has the rules).
    if original:
        lines += [
            "vLLM has had no class for original Qwen since 0.23.0; `qquant convert --to qwen2`",
            "makes a native directory of this one, which needs no code.",
            "",
        ]
    elif quant["sym"] and quant["bits"] in (4, 8) and quant["group_size"] in (-1, 32, 64, 128):
        lines += [
            "With vLLM, which reads this format (symmetric, 4 or 8 bits); not tried when this card",
            "was written:",
            "",
            "```sh",
            f"vllm serve {shlex.quote(title)} --dtype {dtype}",
            "```",
            "",
        ]
    else:
        lines += [
            "vLLM's GPTQ kernels read symmetric 4 and 8 bits only, in groups of 32, 64, 128 or per",
            "channel: not this directory.",
            "",
        ]
    return lines


def _compressed(manifest: Mapping[str, Any]) -> bool:
    return bool(manifest["output"].get("format") == "compressed-tensors")


def _widths(manifest: Mapping[str, Any]) -> set[int]:
    return {unit["bits"] for unit in manifest["mixed"]["units"]}


def _mixture(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The choice of bits where linears do differ, else None."""
    return manifest["mixed"] if manifest.get("mixed") and len(_widths(manifest)) > 1 else None


def _loading_qquant(title: str) -> list[str]:
    return [
        "With qquant, which needs neither optimum nor gptqmodel and runs no code from here:",
        "",
        "```python",
        "import qquant",
        "",
        f'model, tokenizer, kernel = qquant.load("{title}")',
        "print(kernel)  # which kernel runs which linears",
        "```",
        "",
    ]


def _loading_mixed(manifest: Mapping[str, Any], title: str) -> list[str]:
    """Bits differ between linears: other readers than for the plain format."""
    trust = ", trust_remote_code=True" if manifest["source"]["model_type"] == "qwen" else ""
    quant = manifest["quantization"]
    widths = _widths(manifest)
    lines = [
        "## How to load it",
        "",
        "**Not with plain transformers (nor optimum)**: linears have different bits, given as",
        "`dynamic` rules in the config, which those pass over.",
        "",
        *_loading_qquant(title),
        "With gptqmodel:",
        "",
        "```python",
        "from gptqmodel import GPTQModel",
        "",
        f'model = GPTQModel.load("{title}"{trust})',
        "```",
        "",
    ]
    if quant["sym"] and widths <= {4, 8} and quant["group_size"] in (-1, 32, 64, 128):
        return [
            *lines,
            "vLLM and SGLang parse these rules, and their kernels take symmetric 4 and 8 bits; not",
            "tried when this card was written.",
            "",
        ]
    return [
        *lines,
        "vLLM and SGLang parse these rules, too, but vLLM's kernels take symmetric 4 and 8 bits",
        "only: not this directory. (`--bit-choices 4,8` makes one for it.) SGLang was not tried.",
        "",
    ]


def _loading_experts(title: str) -> list[str]:
    """Experts that no package takes apart for transformers."""
    return [
        "## How to load it",
        "",
        "**Not with transformers**: it keeps experts in one piece, where this directory has them",
        "apart, as other readers want them.",
        "",
        *_loading_qquant(title),
        "With gptqmodel (not tried when this card was written):",
        "",
        "```python",
        "from gptqmodel import GPTQModel",
        "",
        f'model = GPTQModel.load("{title}")',
        "```",
        "",
    ]


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
    mixed = _mixture(manifest)
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
    if _compressed(manifest):
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
    unusual = flagged(layers)
    lines += [f"- `{name}`: {text}" for name, text in unusual] or ["None."]
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
    mixed = _mixture(manifest)
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
        *_loading(manifest, name),
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
        f"{machine['compute_dtype']}, {machine['threads']} threads).",
        f"`{MANIFEST}` has the hashes of the source, the calibration ids and every file here, and",
        "the loss of every linear.",
        "",
    ]
    return "\n".join(lines)
