"""One small directory of each kind, for the readers to read.

Random weights of few numbers in the real layout of each family: what a reader makes of names,
shapes, dtypes and configs does not depend on size. Configs are spelled as the published checkpoints
spell them (`rope_theta` at the top, not the `rope_parameters` that transformers 5 writes), with a
RoPE base that is not the default, so that a reader that drops it gives other logits. Where blocks
have linear attention, weights are small: with larger ones a random model is chaotic, and a rounding
to bfloat16 anywhere gives logits that say nothing of the reader.

`reference` is what every reader is compared with: the logits, in float32, of the plain model with
the weights that the codes stand for.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant import BnbSpec, QuantSpec
from qquant.bnb_check import read_parts
from qquant.bnb_layout import linears_of
from qquant.bnb_state import dequantize_rows
from qquant.checkpoint import Checkpoint
from qquant.config import OutputSpec
from qquant.methods import quantize
from qquant.models.qwen.configuration_qwen import QWenConfig
from qquant.models.qwen.modeling_qwen import QWenLMHeadModel
from qquant.native import convert_to_native
from qquant.runtime import load

VOCABULARY, LAYERS, HIDDEN, FFN, BASE = 320, 2, 128, 256, 1_000_000.0


@dataclass(frozen=True)
class Kind:
    """A kind of directory: from which family, quantized how.

    Attributes:
        family: its `model_type`.
        title: for the page.
        spec: what it is quantized with.
        format: of GPTQ's numbers on disk.
    """

    family: str
    title: str
    spec: QuantSpec | BnbSpec
    format: str = "gptq"


def _gptq(**settings: Any) -> QuantSpec:
    return QuantSpec(**{"group_size": 128, **settings})


def _steady() -> QuantSpec:
    """Without corrections between streams, which of random linear attention make no sense."""
    return _gptq(correct=0.0, correct_residual=0.0)


KINDS: dict[str, Kind] = {
    "qwen-int4": Kind("qwen", "original Qwen, int4", _gptq()),
    "qwen-int8": Kind("qwen", "original Qwen, int8", _gptq(bits=8)),
    "qwen-int3": Kind("qwen", "original Qwen, int3", _gptq(bits=3)),
    "qwen-int2": Kind("qwen", "original Qwen, int2", _gptq(bits=2)),
    "qwen-native": Kind("qwen", "original Qwen, int4, converted by `--to qwen2`", _gptq()),
    "qwen-nf4": Kind("qwen", "original Qwen, NF4", BnbSpec("nf4")),
    "qwen-bnb8": Kind("qwen", "original Qwen, Int8 (bitsandbytes)", BnbSpec("int8")),
    "qwen2-int4": Kind("qwen2", "Qwen2, int4", _gptq()),
    "qwen2-int8": Kind("qwen2", "Qwen2, int8", _gptq(bits=8)),
    "qwen2-int4-g64": Kind("qwen2", "Qwen2, int4, groups of 64", _gptq(group_size=64)),
    "qwen2-int4-g32": Kind("qwen2", "Qwen2, int4, groups of 32", _gptq(group_size=32)),
    "qwen2-int4-channel": Kind("qwen2", "Qwen2, int4, per channel", _gptq(group_size=-1)),
    "qwen2-int4-asym": Kind("qwen2", "Qwen2, int4, asymmetric", _gptq(sym=False)),
    "qwen2-mixed": Kind(
        "qwen2",
        "Qwen2, 4 and 8 bits by `dynamic`",
        _gptq(target_bpw=5.2, bit_choices=(4, 8)),
    ),
    "qwen2-nf4": Kind("qwen2", "Qwen2, NF4", BnbSpec("nf4")),
    "qwen2-bnb8": Kind("qwen2", "Qwen2, Int8 (bitsandbytes)", BnbSpec("int8")),
    "qwen2-int4-compressed": Kind(
        "qwen2", "Qwen2, int4, `--format compressed-tensors`", _gptq(), "compressed-tensors"
    ),
    "qwen3-int4": Kind("qwen3", "Qwen3, int4", _gptq()),
    "qwen2-moe-int4": Kind("qwen2_moe", "Qwen2-MoE, int4", _gptq()),
    "qwen3-moe-int4": Kind("qwen3_moe", "Qwen3-MoE, int4", _gptq()),
    "qwen3-next-int4": Kind("qwen3_next", "Qwen3-Next, int4", _steady()),
    "qwen3.5-int4": Kind("qwen3_5_text", "Qwen3.5, dense, text, int4", _steady()),
}


def source_qwen(path: Path) -> None:
    config = QWenConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        kv_channels=HIDDEN // 2,
        seq_length=64,
        max_position_embeddings=256,
        rotary_emb_base=BASE,
        initializer_range=0.1,
        eos_token_id=0,
        pad_token_id=0,
    )
    _save(QWenLMHeadModel(config), path, {})
    ranks = [base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256)]
    (path / "qwen.tiktoken").write_bytes(b"".join(ranks))


def _native(model_type: str, path: Path, **more: Any) -> None:
    """A checkpoint of one of transformers' own classes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "default", "rope_theta": BASE}
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rope_parameters": rope,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(settings | more))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # q, k and v have one that is not zero in real checkpoints
            torch.nn.init.normal_(parameter, std=0.1)
        elif ".experts." in name:  # the classes leave them as the memory was
            torch.nn.init.normal_(parameter, std=config.initializer_range)
        elif name.endswith(".gate.weight"):  # clear choices: no rounding makes another expert's
            torch.nn.init.normal_(parameter, std=1.0)
    flat = {"rope_theta": BASE, "rope_parameters": None}
    _save(model, path, flat if config.rope_parameters == rope else {})


_HEADS = {"head_dim": HIDDEN // 2}
_MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN,
}
_SHARED = {"shared_expert_intermediate_size": FFN}
_LINEAR = {
    "initializer_range": 0.02,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
# What each family of transformers' own has beside `_native`'s settings.
NATIVE: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen2_moe": _MIXTURE | _SHARED,
    "qwen3_moe": _HEADS | _MIXTURE,
    "qwen3_next": _HEADS | _MIXTURE | _SHARED | _LINEAR,
    "qwen3_5_text": _HEADS | _LINEAR,
}


def source_of(family: str, path: Path) -> None:
    """Write the unquantized checkpoint of a family."""
    torch.manual_seed(0)
    if family == "qwen":
        source_qwen(path)
    else:
        _native(family, path, **NATIVE[family])


def _save(model: Any, path: Path, config: dict[str, Any]) -> None:
    """In bfloat16, as checkpoints are; `config` changes config.json, None removes a key."""
    model.to(torch.bfloat16).eval().save_pretrained(path)
    file = path / "config.json"
    written = json.loads(file.read_text()) | config
    file.write_text(json.dumps({k: v for k, v in written.items() if v is not None}, indent=2))


def token_ids() -> Tensor:
    """What the readers are given, [2, 24]."""
    return torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def make(root: Path, names: list[str] | None = None) -> dict[str, Path]:
    """The directories of `names` (default: all) below `root`, made where they are not there."""
    found = {}
    for name in names or KINDS:
        kind, target = KINDS[name], root / name
        source = root / f"source-{kind.family}"
        if not source.exists():
            source_of(kind.family, source)
        if not target.exists():
            if name == "qwen-native":
                convert_to_native(make(root, ["qwen-int4"])["qwen-int4"], target)
            elif isinstance(kind.spec, BnbSpec):
                quantize(source, target, kind.spec)
            else:
                ids = torch.randint(1, 256, (8, 64), generator=torch.Generator().manual_seed(1))
                out = OutputSpec(format=kind.format)
                quantize(source, target, kind.spec, out=out, tokens=ids, device="cpu")
        found[name] = target
    return found


def reference(path: Path) -> Tensor:
    """Logits, float32 [2, 24, VOCABULARY], of the plain model with the dequantized weights."""
    quantized = json.loads((path / "config.json").read_text())["quantization_config"]
    if quantized["quant_method"] != "bitsandbytes":
        model = load(path, device="cpu", kernel="dense", dtype="float32").model
    else:
        model = _dequantized(path)
    with torch.no_grad():
        logits: Tensor = model(input_ids=token_ids()).logits.float()
    return logits


def _dequantized(path: Path) -> Any:
    """A bitsandbytes directory's model, its linears made plain ones, by qquant's own reading."""
    checkpoint = Checkpoint.open(path)
    source = path.parent / f"source-{KINDS[path.name].family}"
    model = load(source, device="cpu", dtype="float32").model
    state = model.state_dict()
    for name in linears_of(checkpoint.tensors):
        weight = state[f"{name}.weight"]
        weight.copy_(dequantize_rows(read_parts(checkpoint, name), 0, weight.shape[0]))
    return model
