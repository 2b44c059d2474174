"""Reads directories with one reader, in the environment of that reader; imports nothing of ours.

    python read.py READER JOBS.json RESULT.json

JOBS names the directories and the token ids; RESULT gets, for each, what was seen: the kernels that
ran (the classes of the quantized modules), logits as nested lists, whether it generates, or the
error. Runs under the old versions that some readers need, so it is plain Python 3.10 and torch 2.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Families whose experts transformers holds in one piece, and which defuser takes apart: what the
# model card of such a directory tells its user to do.
APART = ("qwen2_moe", "qwen3_moe", "qwen3_next")


def take_apart(directory: str) -> None:
    """Changes transformers' class of the directory's family, where its card says so."""
    family = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    if family in APART:
        from defuser import replace_fused_blocks

        replace_fused_blocks(family)


def plain_transformers(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    take_apart(directory)
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", trust_remote_code=True)


def gptqmodel(directory: str) -> Any:
    from gptqmodel import GPTQModel

    return GPTQModel.load(directory, device="cpu", trust_remote_code=True).model


def auto_gptq(directory: str) -> Any:
    """In float32: its CPU kernel has no half precision product in torch 2.3."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        directory,
        device="cpu",
        use_safetensors=True,
        trust_remote_code=True,
        torch_dtype=torch.float32,
        inject_fused_attention=False,
        inject_fused_mlp=False,
    ).model


def peft(directory: str) -> Any:
    """The model with a LoRA adapter on its linears, which begins as no change; it must train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        CompressedTensorsConfig,
        GPTQConfig,
    )

    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    settings = dict(config.quantization_config)
    more = {}
    if settings["quant_method"] == "gptq":
        more["quantization_config"] = GPTQConfig(
            bits=settings["bits"],
            group_size=settings["group_size"],
            sym=settings["sym"],
            desc_act=False,
            backend="auto_trainable",
        )
    elif settings["quant_method"] == "compressed-tensors":
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    take_apart(directory)
    base = AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", trust_remote_code=True, **more
    )
    targets = ["q_proj", "up_proj"]
    if config.model_type == "qwen":
        targets = ["c_attn", "w1"]
    elif config.model_type in APART:  # PEFT takes an expert's name for the fused one's
        targets = ["q_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    ids = torch.arange(1, 17)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    if not any(grad is not None and grad.abs().sum() > 0 for grad in grads):
        raise RuntimeError("no gradient reached the adapter")
    return model.eval()


def qquant_load(directory: str) -> Any:
    import qquant

    return qquant.load(directory, device="cpu").model


_OTHERS = ("bitsandbytes", "compressed-tensors")
READERS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "transformers": (
        plain_transformers,
        ("transformers", "optimum", "gptqmodel", "defuser", *_OTHERS, "torch"),
    ),
    "gptqmodel": (gptqmodel, ("gptqmodel", "transformers", "compressed-tensors", "torch")),
    "peft": (
        peft,
        ("peft", "transformers", "optimum", "gptqmodel", "defuser", *_OTHERS, "torch"),
    ),
    "qquant": (qquant_load, ("qquant", "torch", "transformers", "bitsandbytes")),
    "auto-gptq": (auto_gptq, ("auto_gptq", "transformers", "torch")),
}
_PACKAGES = ("gptqmodel", "bitsandbytes", "auto_gptq", "qquant")


def kernels(model: Any) -> dict[str, int]:
    """How many modules of each quantized class there are."""
    found: dict[str, int] = {}
    for module in model.modules():
        kind, name = type(module), getattr(module, "kernel", None)
        package = kind.__module__.split(".")[0]
        if package == "qquant" and name is None:  # a norm of original Qwen's
            continue
        if hasattr(module, "weight_packed"):
            found["Linear, compressed"] = found.get("Linear, compressed", 0) + 1
        if package in _PACKAGES and (hasattr(module, "weight") or hasattr(module, "qweight")):
            name = str(name or kind.__name__)
            found[name] = found.get(name, 0) + 1
    return found


def read(reader: str, directory: str, ids: Any) -> dict[str, Any]:
    import torch

    model = READERS[reader][0](directory)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    seen = {"kernels": kernels(model), "logits": logits.tolist()}
    try:
        with torch.no_grad():
            made = model.generate(
                input_ids=ids[:1, :4],
                attention_mask=torch.ones_like(ids[:1, :4]),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
            )
        seen["generated"] = made[0].tolist()
    except Exception as error:
        seen["generate_error"] = f"{type(error).__name__}: {error}"
    return seen


def versions(reader: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in READERS[reader][1]:
        try:
            found[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    reader, jobs, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    import torch

    todo = json.loads(jobs.read_text())
    ids = torch.tensor(todo["ids"])
    found: dict[str, Any] = {}
    for name, directory in todo["directories"].items():
        try:
            found[name] = read(reader, directory, ids)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    result.write_text(json.dumps({"versions": versions(reader), "found": found}))


if __name__ == "__main__":
    main()
