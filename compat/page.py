"""docs/COMPATIBILITY.md from results.json. Standard library only; a test holds that they agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "COMPATIBILITY.md"
# A wrong zero point, scale or RoPE base moves the logits of these models by more than 20%.
READS = 0.05
TITLES = {
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
    "qquant": "qquant.load",
    "peft": "PEFT",
    "auto-gptq": "auto-gptq",
    "vllm": "vLLM, its validation",
    "sglang": "SGLang, by rules",
}
HEAD = """# What reads what

Made by `compat/run.py` from `compat/results.json`; do not edit. GPTQModel, auto-gptq and vLLM
ran in environments of their own (`compat/requirements/`), transformers, PEFT and `qquant.load`
in that of the tests, on one small directory of random weights of each kind
(`compat/directories.py`; mixtures of experts and compressed-tensors are not among them). A
percentage is the distance of its logits from those of the
dequantized model in float32, ‖a - b‖ / ‖b‖; the model then generated six tokens, and under PEFT
a gradient reached a LoRA adapter before. What a number is made of: a float16 or bfloat16
product is as far away as its rounding (`docs/READERS.md`). Everything ran on a CPU; **nothing
here has been run on a GPU.**

Two columns are no runs of a model. *vLLM, its validation* is vLLM's own code without a GPU: its
registry of model classes, its parsing of the config, its names for the linears, and its choice
of a kernel for compute capability 8.0 and 9.0. *SGLang, by rules* is this project's reading of
its loader (`qquant/readers.py`), which `qquant inspect DIR --readers` applies to any directory.
"""


def verdict(cell: Mapping[str, Any] | None) -> tuple[str, str]:
    """What stands in the table, and a longer reason where there is one."""
    if cell is None:
        return "not run", ""
    if cell.get("unknown"):
        return "not looked at", ""
    if "reads" in cell:
        return ("yes" if cell["reads"] else "no", "; ".join(cell["why"]) or cell["how"])
    if "error" in cell:
        return ("not looked at" if "only GPTQ is checked" in cell["error"] else "no", cell["error"])
    if "kernels_by_capability" in cell:
        found = {k: " and ".join(sorted(v)) for k, v in cell["kernels_by_capability"].items()}
        return "yes", "; ".join(f"{kernels} on {on}" for on, kernels in sorted(found.items()))
    distance = f"{100 * cell['distance']:.2g}%"
    if cell["distance"] > READS:
        return f"**loads wrong** ({distance})", "logits are of another model, without an error"
    if not cell["generates"]:
        return f"{distance}, no generate", cell.get("generate_error", "")
    return distance, ", ".join(sorted(cell["kernels"]))


def render(results: Mapping[str, Any]) -> str:
    """The page as text."""
    cells = results["cells"]
    lines = [HEAD]
    lines.append("| directory | " + " | ".join(TITLES.values()) + " |")
    lines.append("|---" * (len(TITLES) + 1) + "|")
    for kind, title in results["kinds"].items():
        row = [verdict(cells[kind].get(reader))[0] for reader in TITLES]
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
        said: dict[str, list[str]] = {}
        for kind, name in results["kinds"].items():
            short, long = verdict(cells[kind].get(reader))
            mark = "" if short not in ("no", "not looked at") else f"{short}: "
            if long:
                said.setdefault(mark + long, []).append(name)
        lines += [f"- {'; '.join(names)}: {text}" for text, names in said.items()]
        lines.append("")
    return "\n".join(lines)
