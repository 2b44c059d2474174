"""GPTQ directories made by hand for the loading tests: random codes, packed bit by bit in numpy.

Nothing of qquant is used, so that a loader and a packer that share a mistake do not agree here: the
codes are packed along the input rows, lowest bits first; zeros along the outputs, stored minus one
in v1 files. Beside each quantized directory stands its twin with the dequantized weights (`dense`),
which any reader's logits must match.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] small integers -> int32 [R*bits/32, C], packed down each column, lowest bits first."""
    rows, cols = values.shape
    planes = (values[:, None, :].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    stream = planes.reshape(rows * bits // 32, 32, cols).astype(np.uint64)
    words = (stream << np.arange(32, dtype=np.uint64)[:, None]).sum(axis=1)
    return words.astype(np.uint32).view(np.int32)


def random_linear(
    out: int,
    inp: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    v2: bool = False,
    desc_act: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The four stored tensors of one linear and its weight, float64 [out, inp]."""
    rng = np.random.default_rng(seed)
    group = inp if group_size == -1 else group_size
    groups = -(-inp // group)
    codes = rng.integers(0, 2**bits, size=(inp, out))
    scales = rng.uniform(0.5, 1.5, size=(groups, out)) / (2**bits * np.sqrt(inp))
    scales = scales.astype(np.float16)
    # A v1 file cannot say zero 0 apart from zero 2**bits: stay above it.
    zeros = (
        np.full((groups, out), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (groups, out))
    )
    g_idx = np.arange(inp) // group
    if desc_act:
        g_idx = rng.permutation(g_idx)
    stored = zeros if v2 else zeros - 1
    weight = scales.astype(np.float64)[g_idx] * (codes - zeros[g_idx])
    tensors = {
        "qweight": torch.from_numpy(pack_rows(codes, bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(pack_rows(stored.T, bits).T)),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return tensors, torch.from_numpy(np.ascontiguousarray(weight.T))


def make_pair(
    model: nn.Module,
    root: Path,
    *,
    blocks: str,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    v2: bool = False,
    desc_act: bool = False,
    bias: bool = True,
    config_extra: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write `model` (randomly initialised, float32) as `root/gptq` and `root/dense`.

    Every `nn.Linear` below `blocks` gets random codes; `bias` adds a bias of zeros to those without
    one, as the published Qwen files have it. Everything else is stored in float16.
    """
    quantized: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    done: set[str] = set()
    for i, (name, module) in enumerate(model.named_modules()):
        if not (isinstance(module, nn.Linear) and name.startswith(blocks + ".")):
            continue
        tensors, weight = random_linear(
            module.out_features,
            module.in_features,
            bits=bits,
            group_size=group_size,
            sym=sym,
            v2=v2,
            desc_act=desc_act,
            seed=seed + i,
        )
        quantized |= {f"{name}.{k}": v for k, v in tensors.items()}
        dense[f"{name}.weight"] = weight.float()
        done.add(f"{name}.weight")
        if module.bias is None and bias:
            quantized[f"{name}.bias"] = torch.zeros(module.out_features, dtype=torch.float16)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        if name in done or (tied and name == "lm_head.weight"):
            continue
        quantized[name] = tensor.to(torch.float16).contiguous()
        dense[name] = quantized[name].float()

    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config.update(config_extra or {})
    config.pop("torch_dtype", None)
    quant = {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": desc_act,
        "static_groups": True,
        "sym": sym,
        "true_sequential": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    paths = []
    for kind, state, dtype in (("gptq", quantized, "float16"), ("dense", dense, "float32")):
        path = root / kind
        path.mkdir(parents=True)
        this = {**config, "dtype": dtype}
        if kind == "gptq":
            this["quantization_config"] = quant
            (path / "quantize_config.json").write_text(json.dumps(quant))
        (path / "config.json").write_text(json.dumps(this, indent=2))
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths[0], paths[1]


def tiny_qwen2(hidden: int = 128, ffn: int = 256, layers: int = 2, **extra: Any) -> nn.Module:
    """A random float32 Qwen2 for causal language modelling, vocabulary 320."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **extra,
    )
    return Qwen2ForCausalLM(config).eval()


def tiny_qwen1(hidden: int = 128, ffn: int = 256, layers: int = 2) -> nn.Module:
    """A random float32 original Qwen, vocabulary 320."""
    from qquant.models.qwen.configuration_qwen import QWenConfig
    from qquant.models.qwen.modeling_qwen import QWenLMHeadModel

    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * ffn,
        num_hidden_layers=layers,
        num_attention_heads=2,
        kv_channels=hidden // 2,
        seq_length=64,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return QWenLMHeadModel(config).eval()


def quantized_cache() -> str:
    """A kind of quantized cache that is there: an older transformers has no fp8, int8 needs hqq."""
    from transformers import cache_utils

    return "fp8" if hasattr(cache_utils, "Fp8QuantizedLayer") else "int8"
