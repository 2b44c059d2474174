"""Everything of an exported directory that is not weights: configs, tokenizer, code, licence.

Readers find a GPTQ model by `quantization_config` in config.json (transformers, vLLM, SGLang) or by
`quantize_config.json` (auto-gptq, older vLLM and TGI); both are written, from one dict. Original
Qwen directories get our own code files and an `auto_map` to them; code that came with the source is
never copied, and an `auto_map` of a family that transformers knows is dropped.

Left out on purpose: the model card (`card.py`) and the manifest (`manifest.py`), which report what
was done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__, compressed_layout
from .checkpoint import Checkpoint
from .config import OutputSpec, QuantSpec
from .directory import read_json
from .models import AUTO_MAP, TOKENIZER_AUTO_MAP, export_files
from .models.families import Family

# Tokenizer and generation files of every Qwen, copied where the source has them.
COPIED = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "qwen.tiktoken",
    "qwen_extra.tiktoken",
)
_LEGAL = ("LICENSE", "NOTICE", "COPYING")


def quantization_config(
    spec: QuantSpec,
    family: Family,
    dynamic: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """What readers need to know, in auto-gptq's keys; GPTQModel's `dynamic` where there are rules.

    Where a block has linears that stay in 16 bits, optimum has to be told which are quantized: it
    would take a shared expert's gate for one of them. Names are ends of names, experts' without
    their number.

    `desc_act` is false whatever the visiting order was: groups were fixed beforehand, `g_idx` is
    trivial, and true would cost every reader its fast path (docs/FORMAT.md).
    """
    return {
        "quant_method": "gptq",
        "bits": spec.bits,
        **({"dynamic": dict(dynamic)} if dynamic else {}),
        "group_size": spec.group_size,
        "damp_percent": spec.damp or 0.01,  # auto-gptq refuses 0
        "desc_act": False,
        "static_groups": spec.act_order,
        "sym": spec.sym,
        "true_sequential": True,
        **({"modules_in_block_to_quantize": [family.ends]} if family.varied else {}),
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"qquant:{__version__}"]},
    }


def model_config(
    source: Mapping[str, Any], family: Family, quant: Mapping[str, Any], out: OutputSpec
) -> dict[str, Any]:
    """config.json of the exported directory.

    Original Qwen's code chooses its precision by the flags `bf16`/`fp16`/`fp32` and would cast to
    bfloat16 with none set, so exactly one is.
    """
    config = {k: v for k, v in source.items() if k not in ("dtype", "auto_map", "_name_or_path")}
    config["torch_dtype"] = out.dtype
    if family.remote_code:
        config["auto_map"] = dict(AUTO_MAP)
        config["architectures"] = ["QWenLMHeadModel"]
        config["fp16"] = out.dtype == "float16"
        config["bf16"] = out.dtype == "bfloat16"
        config["fp32"] = False
    config["quantization_config"] = dict(quant)
    return config


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_side_files(source: Checkpoint) -> None:
    """Refuses, before any work, files beside the weights that could not be read or exported.

    Raises:
        CheckpointError: one leads out of the directory, or is no JSON where it should be.
    """
    for name in COPIED:
        if os.path.lexists(source.path / name):
            source.file(name)
            if name.endswith(".json"):
                read_json(source.path, name)
    for path in _legal(source):
        source.file(path.name)


def write_side_files(
    source: Checkpoint,
    target: Path,
    family: Family,
    spec: QuantSpec,
    out: OutputSpec,
    dynamic: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Writes configs, tokenizer, generation, code and licence files of a GPTQ directory.

    Args:
        dynamic: rules for the linears that do not have the spec's bits (see `mixed`).

    Raises:
        CheckpointError: a file of the source leads out of its directory.
    """
    if out.format == compressed_layout.METHOD:
        quant = compressed_layout.quantization_config(
            bits=spec.bits, group_size=spec.group_size, sym=spec.sym, rules=dynamic or {}
        )
        write_common_files(source, target, family, quant, out)
        return  # quantize_config.json is what servers take for GPTQ's
    quant = quantization_config(spec, family, dynamic)
    write_common_files(source, target, family, quant, out)
    write_json(target / "quantize_config.json", quant)


def write_common_files(
    source: Checkpoint, target: Path, family: Family, quant: Mapping[str, Any], out: OutputSpec
) -> None:
    """What every method's directory has beside its weights, with `quant` in config.json.

    Raises:
        CheckpointError: a file of the source leads out of its directory.
    """
    write_json(target / "config.json", model_config(source.config, family, quant, out))
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.file(name), target / name)
    copy_legal(source, target)
    write_configuration(target, _is_chat(source))
    for name in COPIED:
        if name.endswith("_config.json") and (target / name).is_file():
            kept = read_json(target, name)
            if kept.pop("auto_map", None) is not None:  # code that is not there, or elsewhere
                write_json(target / name, kept)
    if family.remote_code:
        for name, path in export_files().items():
            shutil.copyfile(path, target / name)
        config_file = target / "tokenizer_config.json"
        config = read_json(target, config_file.name) if config_file.is_file() else {}
        config["tokenizer_class"] = "QWenTokenizer"
        config["auto_map"] = dict(TOKENIZER_AUTO_MAP)
        write_json(config_file, config)
        _end_at_message_end(target)


def _end_at_message_end(target: Path) -> None:
    """Makes `<|im_end|>` end a chat model's answer for any reader, not for `model.chat` alone.

    Original Qwen's generation_config.json ends at `<|endoftext|>` only; that a message ends at
    `<|im_end|>` stands in its chat code. A server that follows the file would let the model write
    both sides of the conversation. Qwen's own later models list both ids, as is done here; what is
    no chat model, or says something else, is left as it is.
    """
    file = target / "generation_config.json"
    if not (file.is_file() and (target / "qwen.tiktoken").is_file()):
        return
    generation = read_json(target, file.name)
    with open(target / "qwen.tiktoken", "rb") as ranks:
        end_of_text = sum(1 for line in ranks if line.strip())  # ids of specials follow the ranks
    if generation.get("chat_format") == "chatml" and generation.get("eos_token_id") == end_of_text:
        generation["eos_token_id"] = [end_of_text + 2, end_of_text]
        write_json(file, generation)


def write_configuration(target: Path, chat: bool) -> None:
    """Writes `configuration.json`, by which ModelScope knows a model: framework and task.

    Its package reads both (`modelscope.pipelines.base`, `modelscope.utils.hub.read_config`, with
    the names of `modelscope.utils.constant`); without the file it takes the directory for another
    hub's.

    Args:
        chat: whether the model answers messages; else it goes on with text.
    """
    task = "chat" if chat else "text-generation"
    write_json(target / "configuration.json", {"framework": "pytorch", "task": task})


def _is_chat(source: Checkpoint) -> bool:
    """By what original Qwen's generation config says, or a chat template of another's."""
    if (source.path / "chat_template.jinja").is_file():
        return True
    found: dict[str, Any] = {}
    for name in ("generation_config.json", "tokenizer_config.json"):
        found |= read_json(source.path, name) if (source.path / name).is_file() else {}
    return found.get("chat_format") == "chatml" or bool(found.get("chat_template"))


def copy_legal(source: Checkpoint, target: Path) -> None:
    """Copies licences and notices.

    Raises:
        CheckpointError: one leads out of the source's directory.
    """
    for path in _legal(source):
        shutil.copyfile(source.file(path.name), target / path.name)


def _legal(source: Checkpoint) -> list[Path]:
    """Licences and notices; a link that leads out of the directory is among them, to be refused."""
    return sorted(
        path
        for path in source.path.iterdir()
        if path.is_file() and path.name.upper().startswith(_LEGAL) and path.suffix != ".py"
    )
