"""How a card says its directory is loaded: by which reader, with what installed, and by which not.

What each reader takes is `readers.py`'s; here are the words and lines of code for a person, by
family, format and bits. A reader that was not tried when the card was written is said to be so.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .models.families import APART, FAMILIES

ORIGINAL = (
    "transformers has no class for original Qwen: the Python files in this directory are",
    "its code, and `trust_remote_code=True` runs them.",
    "",
)
PACKED_ZEROS = (
    "Zero points are packed, which this package (0.20.0) does not expect unless",
    "`quantization_config=CompressedTensorsConfig(dequantize=True)` is given besides.",
    "",
)
WITHOUT_A_GPU = (
    'Without a GPU write `device_map="cpu"`: for `auto`, gptqmodel (7.6) takes a kernel for GPUs',
    "where torch is built for CUDA, be there one or not.",
    "",
)


def is_compressed(manifest: Mapping[str, Any]) -> bool:
    """Whether the directory is in compressed-tensors' format."""
    return bool(manifest["output"].get("format") == "compressed-tensors")


def _widths(manifest: Mapping[str, Any]) -> set[int]:
    return {unit["bits"] for unit in manifest["mixed"]["units"]}


def mixture_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The choice of bits where linears do differ, else None."""
    return manifest["mixed"] if manifest.get("mixed") and len(_widths(manifest)) > 1 else None


def by_transformers(
    title: str, original: bool, package: Sequence[str] = (), apart: Sequence[str] = ()
) -> list[str]:
    """Code that loads the directory and says something.

    Args:
        original: it is original Qwen. package: lines in front of the imports. apart: behind them.
    """
    trust = ", trust_remote_code=True" if original else ""
    says = [
        'inputs = tokenizer("Hi", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
    ]
    if original:
        says = ['response, history = model.chat(tokenizer, "Hi", history=None)']
    return [
        "```python",
        *package,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *apart,
        f'tokenizer = AutoTokenizer.from_pretrained("{title}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{title}", device_map="auto"{trust})',
        *says,
        "```",
        "",
    ]


def loading(manifest: Mapping[str, Any], title: str) -> list[str]:
    """The section's lines; `title` is the directory's name in them."""
    original = manifest["source"]["model_type"] == "qwen"
    quant, dtype = manifest["quantization"], manifest["output"]["dtype"]
    family = FAMILIES[manifest["source"]["model_type"]]
    if is_compressed(manifest):
        needs = ["With transformers (needs `pip install compressed-tensors`):"]
    elif mixture_of(manifest):
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
    lines = ["## How to load it", "", *needs, "", *by_transformers(title, original, package, apart)]
    if not is_compressed(manifest):
        lines += WITHOUT_A_GPU
    elif not quant["sym"]:
        lines += PACKED_ZEROS
    lines += ORIGINAL if original else []
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
    elif _vllm_reads(manifest):
        kind = "symmetric, 4 or 8 bits" if quant["sym"] else "asymmetric, too"
        lines += [
            f"With vLLM, which reads this format ({kind}); not tried when this card",
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


def _vllm_reads(manifest: Mapping[str, Any]) -> bool:
    """By the rules of its kernels; `readers.py` has them of a directory's headers."""
    quant = manifest["quantization"]
    fits = quant["group_size"] in (-1, 32, 64, 128) and quant["bits"] in (4, 8)
    return is_compressed(manifest) or bool(fits and quant["sym"])


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
