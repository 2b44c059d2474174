"""docs/COMPATIBILITY.md from results.json. Standard library only; a test holds that they agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "COMPATIBILITY.md"
# A wrong zero point, scale or RoPE base moves the logits of these models by more than 20%; rounding
# to bfloat16 by 1 to 3%, and by up to 7% where a mixture's token near a tie takes another expert.
READS = 0.1
TITLES = {
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
    "qquant": "qquant.load",
    "peft": "PEFT",
    "auto-gptq": "auto-gptq",
    "vllm": "vLLM, its loader",
    "sglang": "SGLang, by rules",
}
HEAD = """# What reads what

Made by `compat/run.py` from `compat/results.json`; do not edit. {environments}
Each was given one small directory of random weights of each of {count} kinds
(`compat/directories.py`). A percentage is the distance of its logits from those of the dequantized
model in float32, ‖a - b‖ / ‖b‖; the model then generated six tokens, and under PEFT a gradient
reached a LoRA adapter before. What a number is made of: a float16 or bfloat16 product is as far
away as its rounding ([READERS.md](READERS.md)), and in a mixture a rounding may send a token to
another expert. Everything ran on a CPU with AVX2, where `qquant.load` computes in float32 under its
kernel `avx2` (on one with bfloat16 instructions its distances are the others'); **nothing here has
been run on a GPU.**

Each reader did what the directory's model card tells its user to do. So transformers and PEFT had
the experts of Qwen2-MoE, Qwen3-MoE and Qwen3-Next taken apart first
(`defuser.replace_fused_blocks`); without that line they do not read them. There is no such line for
Qwen3.5's mixture, whose card says to use GPTQModel or `qquant.load`: what transformers makes of it
is shown all the same. PEFT's adapters are on attention alone in mixtures, because it takes the
names of experts for those of transformers' fused ones, and a compressed-tensors directory is
dequantized for it, because LoRA asks each linear for its `weight`.

Two columns are no runs of a model. *vLLM, its loader* is vLLM's own code without a GPU, up to where
a kernel would run (`compat/read_vllm.py`): its registry of model classes, its config and
validation, its model built for compute capability 8.0 and 9.0 with the kernels it chose, and its
loader, by its own names. "Yes" says that every parameter was filled, and with the packed numbers of
the files. *SGLang, by rules* is this project's reading of its loader (`qquant/readers.py`), which
`qquant inspect DIR --readers` applies to any GPTQ directory.
"""
# Plain words for errors that do not speak for themselves: (reader, part of the error, why). What
# is said of a reader's code was read in the version that ran.
REASONS = (
    (
        "auto-gptq",
        "dtype is not JSON serializable",
        "the Python files beside the weights are for today's transformers; 4.40 prints the config "
        "that it has read as JSON, and does not know that `dtype` is no text. `qquant convert --to "
        "qwen2` makes a directory that needs no code",
    ),
    (
        "auto-gptq",
        "Trying to set a tensor of shape",
        "it passes over `dynamic`: every linear is made for the directory's own bits",
    ),
    (
        "auto-gptq",
        "quantize_config.json",
        "it reads GPTQ only, whose settings are in `quantize_config.json`",
    ),
    (
        "auto-gptq",
        "does not recognize this architecture",
        "transformers 4.40, which it needs, has no class of this family",
    ),
    ("auto-gptq", "isn't supported yet", "its own list of models ends at qwen2 (and gemma)"),
    (
        "gptqmodel",
        "must be one of {fp4, nf4}",
        "it knows bitsandbytes directories by a `format` of its own, which transformers' config "
        "does not have",
    ),
    (
        "gptqmodel",
        "sym=False",
        "asymmetric v1 zeros are refused unless `meta.quantizer` says that GPTQModel made them",
    ),
    (
        "gptqmodel",
        "ignore_mismatched_sizes",
        "zero points are packed, which needs `CompressedTensorsConfig(dequantize=True)` in the "
        "transformers under it",
    ),
    (
        "transformers",
        "ignore_mismatched_sizes",
        "it passes over `dynamic`: every linear is made for the directory's own bits",
    ),
    (
        "peft",
        "ignore_mismatched_sizes",
        "transformers, under it, passes over `dynamic`",
    ),
    ("vllm", "no model class", "it has had no class of original Qwen since 0.23.0"),
    ("vllm", "sym=False", "its GPTQ kernels are for symmetric grids"),
    ("vllm", "Unknown quantization method: bitsandbytes", "0.33.0 has no such method"),
)


def verdict(reader: str, cell: Mapping[str, Any] | None) -> tuple[str, str]:
    """What stands in the table, and a longer reason where there is one."""
    if cell is None:
        return "not looked at", "not run on this kind"
    if cell.get("unknown"):
        return "not looked at", "its loader of this format was not read"
    if "reads" in cell:
        return ("yes" if cell["reads"] else "no", "; ".join(cell["why"]) or cell["how"])
    if "error" in cell:
        return "no", reason(reader, cell["error"]) or cell["error"]
    if "kernels_by_capability" in cell:
        found_on = {k: " and ".join(sorted(v)) for k, v in cell["kernels_by_capability"].items()}
        return "yes", "; ".join(f"{kernels} on {on}" for on, kernels in sorted(found_on.items()))
    distance = f"{100 * cell['distance']:.2g}%"
    if cell["distance"] > READS:
        return f"**loads wrong** ({distance})", "logits are of another model, without an error"
    if not cell["generates"]:
        return f"{distance}, no generate", cell.get("generate_error", "")
    return distance, ", ".join(sorted(cell["kernels"])) or "dequantized, in plain linears"


def reason(reader: str, error: str) -> str | None:
    """The plain words for an error, where there are some."""
    found = (why for who, part, why in REASONS if who == reader and part in error)
    return next(found, None)


def environments(found: Mapping[str, str]) -> str:
    """Which readers ran in an environment made for them, and which in one that was there."""
    own = [title for reader, title in TITLES.items() if found.get(reader) == "own"]
    given = [title for reader, title in TITLES.items() if found.get(reader) == "given"]
    said = []
    if own:
        each = "each in an environment" if len(own) > 1 else "in an environment"
        said.append(f"{_listed(own)} ran {each} of its own (`compat/requirements/`)")
    if given:
        said.append(f"{_listed(given)} {'' if own else 'ran '}in that of the tests")
    return f"{', '.join(said)}." if said else "No reader has run."


def _listed(names: list[str]) -> str:
    short = [name.partition(",")[0] for name in names]
    return short[0] if len(short) == 1 else f"{', '.join(short[:-1])} and {short[-1]}"


def render(results: Mapping[str, Any]) -> str:
    """The page as text."""
    cells, kinds = results["cells"], results["kinds"]
    lines = [HEAD.format(environments=environments(results["environments"]), count=len(kinds))]
    lines.append("| directory | " + " | ".join(TITLES.values()) + " |")
    lines.append("|---" * (len(TITLES) + 1) + "|")
    for kind, title in kinds.items():
        row = [verdict(reader, cells[kind].get(reader))[0] for reader in TITLES]
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    lines.append("\n## Versions\n")
    for reader, title in TITLES.items():
        found = results["versions"].get(reader)
        if found:
            named = ", ".join(f"{name} {version}" for name, version in found.items())
            lines.append(f"- {title}: {named}")
    lines.append("- SGLang, by rules: those of 0.5.23")
    lines.append("\n## Kernels, and why not\n")
    for reader, title in TITLES.items():
        lines.append(f"### {title}\n")
        lines += [*details(reader, results), ""]
    return "\n".join(lines)


def details(reader: str, results: Mapping[str, Any]) -> list[str]:
    """A line for the kinds of which a reader says the same, with the first error of them."""
    said: dict[str, list[str]] = {}
    quoted: dict[str, str] = {}
    for kind, name in results["kinds"].items():
        cell = results["cells"][kind].get(reader)
        short, long = verdict(reader, cell)
        if not long:
            continue
        text = f"{short}: {long}" if short in ("no", "not looked at") else long
        said.setdefault(text, []).append(name)
        error = (cell or {}).get("error", long)
        if error != long:
            first = error[:117] + "..." if len(error) > 120 else error
            quoted.setdefault(text, f" (``{first}``)")
    return [f"- {'; '.join(names)}: {text}{quoted.get(text, '')}" for text, names in said.items()]
