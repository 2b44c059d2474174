"""How far a quantized directory is from its BF16 source: KL, top-1 agreement and perplexity.

Every candidate, whoever wrote it, is reduced to plain dequantized weights and run in float32 by
the same code, so that kernels and compute types play no part: what is compared is what each tool
stored. The readers here are written from the formats' descriptions and share no code with qquant
or with the tools measured; the arithmetic of KL and perplexity is `qquant.profile`'s. Three formats
are known: GPTQ (v1 and v2 zeros, any `g_idx`, 2/3/4/8 bits), compressed-tensors `pack-quantized`
(symmetric), and plain weights. Whatever a directory holds beside the quantized linears (embeddings,
norms, biases) is taken as stored there.

The reference is the source's own weights, BF16 values, computed in float32. KL is KL(source ||
candidate) per token in nats, over the whole vocabulary, in float64, at every position that predicts
a token of its sequence. (Results whose `tokens` is the number of all ids counted the last position
of a sequence, too.) The unit of the standard errors and of the paired intervals is the sequence,
since tokens of one are not independent.

    python benchmarks/evaluate.py SOURCE TOKENS.safetensors --candidates NAME=DIR ...
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import qwen2_config, rename
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qquant.profile import compare_all

MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Score:
    """One candidate against the source on the held-out tokens.

    Attributes:
        kl: mean KL(source || candidate) per token, nats; `kl_se` its standard error.
        top1: share of tokens where both put the same token first.
        ppl: the candidate's perplexity; `ppl_source` the source's.
        tokens: positions compared.
        kl_per_sequence: the mean KL of each sequence, for paired comparisons.
        bytes: size of its weight files.
    """

    kl: float
    kl_se: float
    top1: float
    ppl: float
    ppl_source: float
    tokens: int
    kl_per_sequence: list[float]
    bytes: int


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes from 32-bit words filled from the lowest bit up, along the first dimension.

    Args:
        words: int32 [ceil(count·bits/32), N].
        count: codes along the first dimension.

    Returns:
        int64 [count, N]. Codes may straddle two words, as 3-bit ones do.
    """
    wide = words.to(torch.int64) & MASK32
    start = torch.arange(count) * bits
    word, shift = start // 32, (start % 32)[:, None]
    after = (word + 1).clamp(max=wide.shape[0] - 1)
    both = wide[word] | (wide[after] << 32)
    # The shift may drag the sign down, never into the low bits that the mask keeps.
    return (both >> shift) & ((1 << bits) - 1)


def bits_of(module: str, quant: dict[str, Any]) -> int:
    """Of one linear: the first `dynamic` rule that matches, else the directory's."""
    for rule, changes in (quant.get("dynamic") or {}).items():
        if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), module):
            return int(changes.get("bits", quant["bits"]))
    return int(quant["bits"])


def dequantize_gptq(part: dict[str, Tensor], bits: int, *, zero_offset: int) -> Tensor:
    """Weight float32 [out, in] of one GPTQ linear.

    Args:
        part: `qweight` int32 [in·bits/32, out], `qzeros` int32 [groups, out·bits/32], `scales`
            [groups, out], and `g_idx` int32 [in] (without it: equal groups in order).
        zero_offset: what the writer took off the zeros, 1 in v1 files and 0 in v2.
    """
    scales = part["scales"].float()
    groups, out = scales.shape
    size = part["qweight"].shape[0] * 32 // bits
    codes = unpack(part["qweight"], bits, size)
    zeros = unpack(part["qzeros"].T.contiguous(), bits, out).T
    zeros = (zeros + zero_offset) & ((1 << bits) - 1)
    g_idx = part.get("g_idx", torch.arange(size) // math.ceil(size / groups)).long()
    return ((codes - zeros[g_idx]).float() * scales[g_idx]).T.contiguous()


def dequantize_compressed(part: dict[str, Tensor], bits: int) -> Tensor:
    """Weight float32 [out, in] of one `pack-quantized` linear: words along the input, codes stored
    with half the range added, symmetric only.

    Raises:
        ValueError: the linear has zero points or an order of groups.
    """
    if extra := set(part) - {"weight_packed", "weight_scale", "weight_shape", "bias"}:
        raise ValueError(f"pack-quantized linear with {sorted(extra)} is not known here")
    out, size = (int(n) for n in part["weight_shape"])
    scale = part["weight_scale"].float()
    codes = unpack(part["weight_packed"].T.contiguous(), bits, size).T - (1 << (bits - 1))
    group = size // scale.shape[1]
    return (codes.view(out, -1, group).float() * scale[:, :, None]).reshape(out, size)


def read_dense(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and float32 tensors of a directory in Qwen2-like layout, quantized or not.

    Raises:
        ValueError: the quantization or its format is not one of those known here.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quant = config.pop("quantization_config", None)
    raw: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as reader:
            raw.update({name: reader.get_tensor(name) for name in reader.keys()})
    dense = dict(_dense_tensors(raw, quant))
    if config["model_type"] == "qwen":
        dense = {new: t for name, x in dense.items() for new, t in rename(name, x)}
        config = qwen2_config(config)
    return config, dense


def _dense_tensors(
    raw: dict[str, Tensor], quant: dict[str, Any] | None
) -> Iterator[tuple[str, Tensor]]:
    linears: dict[str, dict[str, Tensor]] = {}
    for name in raw:
        stem, _, kind = name.rpartition(".")
        if kind in ("qweight", "weight_packed"):
            linears[stem] = {}
    for name, tensor in raw.items():
        stem, _, kind = name.rpartition(".")
        if stem in linears and kind != "bias":
            linears[stem][kind] = tensor
        else:
            yield name, tensor.float()
    if not linears:
        return
    method = (quant or {}).get("quant_method")
    if quant is not None and method == "gptq":
        form = quant.get("checkpoint_format") or quant.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format {form!r} is not known here")
        for stem, part in linears.items():
            offset, bits = (1 if form == "gptq" else 0), bits_of(stem, quant)
            yield f"{stem}.weight", dequantize_gptq(part, bits, zero_offset=offset)
    elif quant is not None and method == "compressed-tensors":
        (group,) = quant["config_groups"].values()
        if quant["format"] != "pack-quantized" or not group["weights"]["symmetric"]:
            raise ValueError("expected symmetric pack-quantized weights")
        for stem, part in linears.items():
            yield f"{stem}.weight", dequantize_compressed(part, int(group["weights"]["num_bits"]))
    else:
        raise ValueError(f"quant_method {method!r} is not known here")


def build(path: Path) -> Any:
    """The directory's network in float32 with its dequantized weights.

    Raises:
        ValueError: a tensor is missing or left over (a bias of zeros may be: original Qwen's
            writers store one for every linear).
    """
    config, dense = read_dense(path)
    kind = config.pop("model_type")
    for key in ("torch_dtype", "dtype", "transformers_version", "architectures"):
        config.pop(key, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **config), dtype=torch.float32
        )
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        dense.setdefault("lm_head.weight", dense["model.embed_tokens.weight"])
    missing = sorted(state.keys() - dense.keys())
    left = sorted(
        name
        for name in dense.keys() - state.keys()
        if not name.endswith(".bias") or dense[name].any()
    )
    if left or missing:
        raise ValueError(f"{path.name}: left over {left[:3]}, missing {missing[:3]}")
    model.load_state_dict({name: dense[name] for name in state})
    return model.eval()


def evaluate(source: Path, candidates: dict[str, Path], tokens: Tensor) -> dict[str, Score]:
    """Scores of all candidates; they are held in memory together, the source is run once.

    Args:
        tokens: int64 [n, seq] held-out ids. Each sequence is read alone from its start.
    """
    models = {name: build(path) for name, path in candidates.items()}
    return {
        name: Score(
            kl=found.kl.value,
            kl_se=found.kl.stderr,
            top1=found.top1.value,
            ppl=found.ppl_candidate.value,
            ppl_source=found.ppl_reference.value,
            tokens=found.tokens,
            kl_per_sequence=list(found.kl_per_row),
            bytes=sum(f.stat().st_size for f in candidates[name].glob("*.safetensors")),
        )
        for name, found in compare_all(build(source), models, tokens).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--candidates", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    named = {n: Path(d) for n, _, d in (c.partition("=") for c in args.candidates)}
    scores = evaluate(args.source, named, load_file(str(args.tokens))["tokens"])
    if args.output:
        text = json.dumps({name: asdict(s) for name, s in scores.items()}, indent=1)
        args.output.write_text(text + "\n")
    for name, s in scores.items():
        print(
            f"{name}: KL {s.kl:.6f} ± {s.kl_se:.6f}, top-1 {s.top1:.4f}, "
            f"perplexity {s.ppl:.4f} (source {s.ppl_source:.4f})"
        )


if __name__ == "__main__":
    main()
