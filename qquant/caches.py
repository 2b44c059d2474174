"""The key/value caches that a model can generate on: by name, made, weighed, and judged.

- `dynamic` is transformers' default and grows by a token at a time.
- `static` is one buffer for the whole run, which a compiled decode needs.
- `quantized-int8`, `quantized-int4` and `quantized-fp8` are transformers' `QuantizedCache`. The
  integers come from hqq (the extra `kv`), in groups along the head's channels, the last 128 tokens
  in full precision; optimum-quanto, transformers' other way to them, builds a C++ extension when it
  is first used, minutes long, and so is left out. `fp8` is transformers' own arithmetic, from the
  version on that has it.

A quantized cache changes what the model says, so `distance` measures that: the model against
itself, both decoding the same held-out tokens one by one, one of them on the quantized cache. A
forward over the whole text would never read it (what was quantized is read only by later tokens),
and would run other kernels.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import MissingDependencyError, SpecError
from .estimates import known, mean
from .vocabulary import exact_logits

PLAIN = ("dynamic", "static")
QUANTIZED = ("int8", "int4", "fp8")  # as on the command line
PREFIX = "quantized-"
RECENT = 128  # tokens that stay in full precision; transformers' default


def check_quantized(kind: str) -> None:
    """Refuses a quantized cache that could not be made, before anything is loaded.

    Raises:
        SpecError: there is none of that name, or this transformers has it not.
        MissingDependencyError: hqq is not installed.
    """
    if kind not in QUANTIZED:
        raise SpecError("--kv-cache", expected=f"one of {', '.join(QUANTIZED)}", got=kind)
    if kind.startswith("int") and importlib.util.find_spec("hqq") is None:
        raise MissingDependencyError(
            f"--kv-cache {kind}",
            expected="hqq, which quantizes the cache",
            got="none installed",
            cure="pip install 'qquant[kv]', or use --kv-cache fp8",
        )
    if kind == "fp8":
        from transformers import cache_utils

        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            import transformers

            raise SpecError(
                "--kv-cache fp8",
                expected="a transformers that has it",
                got=transformers.__version__,
                cure="Use int8 or int4, or a newer transformers.",
            )


def make_cache(kind: str, config: Any, length: int) -> Any:
    """An empty cache.

    Args:
        kind: one of the names at the top.
        config: of the model.
        length: tokens that it will hold at the most; only `static` takes it into account.

    Raises:
        SpecError, MissingDependencyError: as `check_quantized`.
    """
    from transformers import DynamicCache, QuantizedCache, StaticCache

    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=length)
    short = kind.removeprefix(PREFIX)
    check_quantized(short)
    if short == "fp8":
        return QuantizedCache(backend="fp8", config=config)
    return QuantizedCache(
        backend="hqq",
        config=config,
        nbits=int(short.removeprefix("int")),
        axis_key=1,
        axis_value=1,
        q_group_size=group_size(config),
        residual_length=RECENT,
    )


def group_size(config: Any) -> int:
    """Channels that share a scale: at most 64, and an even number of groups per head and token,
    since hqq packs two of them into one row of bytes."""
    heads = config.num_attention_heads
    channels = (
        getattr(config, "head_dim", None)
        or getattr(config, "kv_channels", None)
        or config.hidden_size // heads
    )
    return math.gcd(64, channels // 2)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds; scales and zeros of quantized ones included."""
    held = {t.data_ptr(): t for layer in cache.layers for t in _tensors(vars(layer))}
    return sum(t.numel() * t.element_size() for t in held.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of one dimension or more in a nest of containers; counters are left out."""
    if isinstance(value, Tensor):
        if value.dim() and value.numel():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@torch.inference_mode()
def distance(
    model: Any,
    ids: Tensor,
    prompt: int,
    make: Callable[[], Any],
    told: Callable[[int], None] = lambda done: None,
) -> tuple[float | None, float | None]:
    """KL(on a dynamic cache || on `make()`), nats per decoded token, with its error over rows.

    Args:
        model: a causal language model of transformers, in eval mode.
        ids: int64 [rows, length]. The first `prompt` tokens are given at once, the others one by
            one, whatever the model would have said: each of those is a position that counts.
        make: an empty cache to be judged.
        told: the number of positions so far, after each.

    Raises:
        SpecError: no token is left to decode.
    """
    if not 0 < prompt < ids.shape[1]:
        raise SpecError("prompt", expected=f"1 to {ids.shape[1] - 1} tokens", got=prompt)
    ids = ids.to(model.get_input_embeddings().weight.device)
    caches = [make_cache("dynamic", model.config, ids.shape[1]), make()]
    for cache in caches:
        model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    sums = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
    with exact_logits(model):
        for at in range(prompt, ids.shape[1]):
            p, q = (
                model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                .logits[:, -1]
                .double()
                .log_softmax(-1)
                for cache in caches
            )
            sums += (p.exp() * (p - q)).sum(-1)
            told(at + 1 - prompt)
    rows = (sums / (ids.shape[1] - prompt)).tolist()
    value, error = known(mean(rows))
    return value, error
