"""Checkpoints to measure on: random weights of a chosen shape, and original Qwen in Qwen2's layout.

Speed does not depend on what the weights say, so the speed bars run on random ones: `small`
(seconds, for trying the harness), `speed` (8 blocks, hidden 512, ffn 1408), `wide` (2 blocks,
hidden 1024, ffn 2816) and `qwen-1.8b` (the shape of Qwen-1.8B, 3.7 GB, written one block at a
time). Accuracy needs a trained model, and the bundled one has the original Qwen layout, which the
other tools cannot read on today's transformers. The two layouts hold the same network (c_attn = q,
k, v; w2 = gate, w1 = up, c_proj = down), so `to_qwen2` rewrites it losslessly and every tool,
qquant too, is given the same converted directory.

Left out: tokenizers. The tools get token ids; a placeholder tokenizer of the right size is
written because some of them refuse to start without one. It cannot be used for text.

    python benchmarks/checkpoints.py speed DIR
    python benchmarks/checkpoints.py qwen-1.8b DIR --layout qwen --blocks 4
    python benchmarks/checkpoints.py convert ORIGINAL DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense Qwen with as many key/value heads as heads, as original Qwen has it."""

    blocks: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    positions: int = 8192
    rope_theta: float = 10000.0
    eps: float = 1e-6


PRESETS = {
    "small": Shape(blocks=2, hidden=128, ffn=384, heads=2, vocab=512),
    "speed": Shape(blocks=8, hidden=512, ffn=1408, heads=8, vocab=4096),
    "wide": Shape(blocks=2, hidden=1024, ffn=2816, heads=16, vocab=4096),
    "qwen-1.8b": Shape(blocks=24, hidden=2048, ffn=5504, heads=16, vocab=151936),
    "qwen-7b": Shape(blocks=32, hidden=4096, ffn=11008, heads=32, vocab=151936),
}

Make = Callable[[tuple[int, ...], str], Tensor]

# Original Qwen's name inside a block -> Qwen2's. c_attn is split and handled apart.
BLOCK_NAMES = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
TOP_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def rename(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Qwen2 names and tensors of one original Qwen tensor: one, or three for `c_attn`.

    None for a bias of zeros where Qwen2 has no bias: a quantized directory may have those.

    Raises:
        KeyError: the name is not one of original Qwen's.
        ValueError: such a bias is not zero.
    """
    if name in TOP_NAMES:
        yield TOP_NAMES[name], tensor
        return
    lead, _, rest = name.partition("transformer.h.")
    if lead or not rest:
        raise KeyError(f"{name} is not a tensor of original Qwen")
    index, _, inner = rest.partition(".")
    block = f"model.layers.{index}."
    if inner.startswith("attn.c_attn."):
        kind = inner.rsplit(".", 1)[1]
        for letter, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
            yield f"{block}self_attn.{letter}_proj.{kind}", part
    elif inner.endswith(".bias") and inner.replace(".bias", ".weight") in BLOCK_NAMES:
        if bool(tensor.any()):
            raise ValueError(f"{name} is not zero, and Qwen2 has no place for it")
    else:
        yield block + BLOCK_NAMES[inner], tensor


def qwen2_config(original: dict[str, Any]) -> dict[str, Any]:
    """Qwen2's `config.json` for an original Qwen one (both releases' key names).

    `max_position_embeddings` is the training length: beyond it original Qwen rescales (dynamic NTK,
    logn) and Qwen2 does not, so the two are the same network only up to there.
    """
    hidden = int(original.get("hidden_size") or original["n_embd"])
    ffn2 = int(original.get("intermediate_size") or original["ffn_hidden_size"])
    shape = Shape(
        blocks=int(original.get("num_hidden_layers") or original["n_layer"]),
        hidden=hidden,
        ffn=ffn2 // 2,
        heads=int(original.get("num_attention_heads") or original["n_head"]),
        vocab=int(original.get("padded_vocab_size") or original["vocab_size"]),
        positions=int(original["seq_length"]),
        rope_theta=float(original.get("rotary_emb_base", 10000)),
        eps=float(original.get("layer_norm_epsilon", 1e-6)),
    )
    return config_of(shape, "qwen2")


def config_of(shape: Shape, layout: str) -> dict[str, Any]:
    """`config.json` of a shape in the `qwen2` or the original `qwen` layout."""
    common: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocab,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if layout == "qwen2":
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **common,
            "intermediate_size": shape.ffn,
            "num_key_value_heads": shape.heads,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "max_position_embeddings": shape.positions,
            "rms_norm_eps": shape.eps,
            "rope_theta": shape.rope_theta,
            "use_sliding_window": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "tokenizer_class": "QWenTokenizer",
        **common,
        "intermediate_size": 2 * shape.ffn,
        "kv_channels": shape.hidden // shape.heads,
        "max_position_embeddings": shape.positions,
        "seq_length": shape.positions,
        "layer_norm_epsilon": shape.eps,
        "rotary_emb_base": shape.rope_theta,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": False,
        "scale_attn_weights": True,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "bf16": True,
        "fp16": False,
        "fp32": False,
    }


def random_parts(shape: Shape, make: Make) -> Iterator[dict[str, Tensor]]:
    """Original Qwen tensors in bfloat16, a part at a time: embedding, each block, head."""
    h, f = shape.hidden, shape.ffn
    yield {"transformer.wte.weight": make((shape.vocab, h), "weight")}
    for i in range(shape.blocks):
        block = {
            "ln_1.weight": make((h,), "norm"),
            "attn.c_attn.weight": make((3 * h, h), "weight"),
            "attn.c_attn.bias": make((3 * h,), "weight"),
            "attn.c_proj.weight": make((h, h), "weight"),
            "ln_2.weight": make((h,), "norm"),
            "mlp.w1.weight": make((f, h), "weight"),
            "mlp.w2.weight": make((f, h), "weight"),
            "mlp.c_proj.weight": make((h, f), "weight"),
        }
        yield {f"transformer.h.{i}.{name}": tensor for name, tensor in block.items()}
    yield {
        "transformer.ln_f.weight": make((h,), "norm"),
        "lm_head.weight": make((shape.vocab, h), "weight"),
    }


def write_random(
    shape: Shape, target: Path, *, layout: str = "qwen2", seed: int = 0, device: str = "cpu"
) -> Path:
    """Write a checkpoint of random bfloat16 weights; never more than one part in memory.

    Args:
        layout: `qwen2` or `qwen`; the same seed gives the same network in both.
        device: that draws the numbers, which differ from another's.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def make(size: tuple[int, ...], kind: str) -> Tensor:
        if kind == "norm":
            return (1 + 0.1 * drawn(size)).to(torch.bfloat16).cpu()
        return (0.02 * drawn(size)).to(torch.bfloat16).cpu()

    parts = random_parts(shape, make)
    if layout == "qwen2":
        parts = (_renamed(part) for part in parts)
    _write(target, config_of(shape, layout), parts, shape.vocab)
    return target


def to_qwen2(source: Path, target: Path) -> Path:
    """Rewrite an original Qwen directory as the same network in the native Qwen2 layout.

    Raises:
        ValueError: the source is not original Qwen.
        KeyError: it has a tensor that is not part of it.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "qwen":
        raise ValueError(
            f"{source.name}: expected model_type 'qwen', got {config.get('model_type')!r}"
        )
    new = qwen2_config(config)

    def parts() -> Iterator[dict[str, Tensor]]:
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as reader:
                yield _renamed({name: reader.get_tensor(name) for name in reader.keys()})

    _write(target, new, parts(), int(new["vocab_size"]))
    return target


def _renamed(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """A part under Qwen2's names; slices are copied, since safetensors stores no views."""
    return {n: t.contiguous() for name, x in part.items() for n, t in rename(name, x)}


def _write(target: Path, config: dict[str, Any], parts: Any, vocab: int) -> None:
    """One safetensors file per part, numbered once their count is known, with an index."""
    target.mkdir(parents=True, exist_ok=False)
    names: list[list[str]] = []
    total = 0
    for number, part in enumerate(parts):
        save_file(part, str(target / f"part-{number}"), metadata={"format": "pt"})
        names.append(list(part))
        total += sum(t.numel() * t.element_size() for t in part.values())
    weight_map: dict[str, str] = {}
    for number, part_names in enumerate(names):
        file = (
            "model.safetensors"
            if len(names) == 1
            else f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        )
        (target / f"part-{number}").rename(target / file)
        weight_map.update(dict.fromkeys(part_names, file))
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": 0, "do_sample": False}
    (target / "generation_config.json").write_text(json.dumps(generation) + "\n")
    _placeholder_tokenizer(target, vocab)


def _placeholder_tokenizer(target: Path, vocab: int) -> None:
    """A `tokenizer.json` of `vocab` words (`w0`, `w1`, ...), only so that loaders find one."""
    words = {f"w{i}": i for i in range(vocab)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "w0",
        "pad_token": "w0",
        "model_max_length": 8192,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*PRESETS, "convert"])
    parser.add_argument("paths", nargs="+", type=Path, help="TARGET, or SOURCE TARGET to convert")
    parser.add_argument("--layout", choices=["qwen2", "qwen"], default="qwen2")
    parser.add_argument("--blocks", type=int, help="the first N blocks only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "convert":
        if len(args.paths) != 2:
            parser.error("convert needs SOURCE and TARGET")
        to_qwen2(args.paths[0], args.paths[1])
    else:
        shape = PRESETS[args.what]
        if args.blocks:
            shape = replace(shape, blocks=args.blocks)
        write_random(shape, args.paths[0], layout=args.layout, seed=args.seed)


if __name__ == "__main__":
    main()
