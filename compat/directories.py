"""One small directory of each kind, for the readers to read.

Random weights of few numbers in the real layout of each family: what a reader makes of names,
shapes, dtypes and configs does not depend on size. Configs are spelled as the published checkpoints
spell them (`rope_theta` at the top, not the `rope_parameters` that transformers 5 writes), with a
RoPE base that is not the default, so that a reader that drops it gives other logits.

`reference` is what every reader is compared with: the logits, in float32, of the plain model with
the weights that the codes stand for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
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
        family: a key of `SOURCES`.
        title: for the page.
        spec: what it is quantized with.
    """

    family: str
    title: str
    spec: QuantSpec | BnbSpec


def _gptq(**settings: Any) -> QuantSpec:
    return QuantSpec(**{"group_size": 128, **settings})


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
    "qwen3-int4": Kind("qwen3", "Qwen3, int4", _gptq()),
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


def _native(config_name: str, model_name: str, path: Path, **more: Any) -> None:
    import transformers

    config = getattr(transformers, config_name)(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **more,
    )
    model = getattr(transformers, model_name)(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # q, k and v have one that is not zero in real checkpoints
            torch.nn.init.normal_(parameter, std=0.1)
    _save(model, path, {"rope_theta": BASE, "rope_parameters": None})


def source_qwen2(path: Path) -> None:
    _native("Qwen2Config", "Qwen2ForCausalLM", path)


def source_qwen3(path: Path) -> None:
    _native("Qwen3Config", "Qwen3ForCausalLM", path, head_dim=HIDDEN // 2)


SOURCES: dict[str, Callable[[Path], None]] = {
    "qwen": source_qwen,
    "qwen2": source_qwen2,
    "qwen3": source_qwen3,
}


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
            torch.manual_seed(0)
            SOURCES[kind.family](source)
        if not target.exists():
            if name == "qwen-native":
                convert_to_native(make(root, ["qwen-int4"])["qwen-int4"], target)
            elif isinstance(kind.spec, BnbSpec):
                quantize(source, target, kind.spec)
            else:
                ids = torch.randint(1, 256, (8, 64), generator=torch.Generator().manual_seed(1))
                quantize(source, target, kind.spec, tokens=ids, device="cpu")
        found[name] = target
    return found


def reference(path: Path) -> Tensor:
    """Logits, float32 [2, 24, VOCABULARY], of the plain model with the dequantized weights."""
    quantized = json.loads((path / "config.json").read_text())["quantization_config"]
    if quantized["quant_method"] == "gptq":
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
