"""Tokens per second, fairly: prefill and decode apart, each token timed, repeats with their spread.

`speed` is the modern protocol, one function for every model, quantized or not: a run to warm up,
then runs that count, the device synchronized around every token (`generation.py`). `like_qwen` is
the one that Qwen's published tables are made with, as it was: one run, no warm-up, the prompt's
time in the denominator and not its tokens in the numerator. Both give a `Speed`, which computes
what is told of the times; `bandwidth.py` adds what memory could have given.

Compiled decoding is transformers' own: a static cache, and the model's compiled call for every
token but the first, as in its `generate` (CUDA graphs on a GPU; needs a C++ compiler). A compiled
graph is specialized on the cache's size, so runs of several sizes in one process slow each other
down: give each its own process, as `qquant profile` does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .caches import PREFIX, cache_bytes, make_cache
from .compiling import check_compiler, compile_config
from .errors import RunError, SpecError
from .generation import (
    PROMPT_SEED,
    Now,
    Run,
    generate,
    generate_like_qwen,
    qwen_prompt,
    random_prompt,
)

PERCENTILES = (50, 90, 99)
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Speed:
    """Generation, prefill and decode apart; figures are medians over the runs.

    Attributes:
        context, new_tokens, batch: what was run: tokens of the prompt and after it, and rows.
        runs: those that count.
        warmup_s: seconds of the run before them, compiling included; None where there was none.
        cache_bytes: of the last run, at its end.
        graphs, breaks: of a compiled decode: graphs made, and places where Python came between.
    """

    context: int
    new_tokens: int
    batch: int
    runs: tuple[Run, ...]
    warmup_s: float | None = None
    cache_bytes: int = 0
    graphs: int | None = None
    breaks: int | None = None

    @property
    def prefill_s(self) -> float:
        """Seconds to the first token."""
        return statistics.median(run.prefill_s for run in self.runs)

    @property
    def decode_s(self) -> float:
        """Seconds of the tokens after the first."""
        return statistics.median(run.decode_s for run in self.runs)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of all rows together, the first token left out; None where there was no other."""
        return self.batch * (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    @property
    def qwen_tokens_per_s(self) -> float:
        """As Qwen counts: all tokens generated over all of the time, summed over the runs."""
        total = sum(run.total_s for run in self.runs)
        return len(self.runs) * self.batch * self.new_tokens / total

    def inter_token_ms(self) -> dict[str, float | None]:
        """Percentiles of the time between two tokens, over all runs: p50, p90, p99, and max."""
        steps = [1000 * step for run in self.runs for step in run.steps_s]
        names = [f"p{q}" for q in PERCENTILES]
        if not steps:
            return dict.fromkeys([*names, "max"])
        values = numpy.percentile(steps, PERCENTILES)
        return {**dict(zip(names, map(float, values), strict=True)), "max": max(steps)}


@torch.inference_mode()
def speed(
    model: Any,
    context: int,
    new_tokens: int,
    repeats: int = 3,
    *,
    batch: int = 1,
    cache: str = "dynamic",
    compiled: bool = False,
    seed: int = PROMPT_SEED,
    now: Now | None = None,
    told: Told = lambda done, total: None,
) -> Speed:
    """Greedy generation of random ids, after one run to warm up.

    Args:
        model: a causal language model of transformers, in eval mode; called with its cache.
        context: tokens of the prompt, at least 1; random ids (`seed`).
        new_tokens: tokens to generate, at least 1 (the first belongs to the prefill).
        repeats: runs that count.
        batch: rows, all of one length.
        cache: one of `caches`; `compiled` needs `static`.
        compiled: decode through the model's compiled call.
        now: as in `generation.generate`. told: runs done, of how many; called between runs.

    Raises:
        SpecError: a count is too small, or the cache does not go with `compiled`.
        MissingDependencyError: there is no compiler, or no hqq.
        RunError: compiling made no graph.
    """
    for name, value in (
        ("context", context),
        ("new_tokens", new_tokens),
        ("repeats", repeats),
        ("batch", batch),
    ):
        if value < 1:
            raise SpecError(name, expected="at least 1", got=value)
    if compiled and cache != "static":
        raise SpecError("cache", expected="static, to decode compiled", got=cache)
    if compiled:
        check_compiler()
    prompt = random_prompt(model, batch, context, seed)
    kept = make_cache(cache, model.config, context + new_tokens) if cache == "static" else None
    step = _compiled(model) if compiled else None
    before = _compile_counts() if compiled else (0, 0)
    runs: list[Run] = []
    for done in range(repeats + 1):
        told(done, repeats + 1)
        held: Any = None
        if kept is not None:
            kept.reset()
            held = kept
        elif cache.startswith(PREFIX):
            held = make_cache(cache, model.config, context + new_tokens)
        run, held = generate(model, prompt, new_tokens, cache=held, step=step, now=now)
        runs.append(run)
    graphs = breaks = None
    if compiled:
        graphs, breaks = (b - a for a, b in zip(before, _compile_counts(), strict=True))
        if new_tokens > 1 and not graphs:
            raise RunError("--compile", expected="a compiled graph", got="none")
    return Speed(
        context,
        new_tokens,
        batch,
        tuple(runs[1:]),
        warmup_s=runs[0].total_s,
        cache_bytes=cache_bytes(held),
        graphs=graphs,
        breaks=breaks,
    )


def like_qwen(
    model: Any,
    tokenizer: Any,
    context: int,
    new_tokens: int,
    *,
    now: Now | None = None,
    told: Told = lambda done, total: None,
) -> tuple[Speed, str]:
    """One run of Qwen's protocol, and what its context was.

    Raises:
        SpecError: a count is too small.
        RunError: the length could not be forced.
    """
    for name, value in (("context", context), ("new_tokens", new_tokens)):
        if value < 1:
            raise SpecError(name, expected="at least 1", got=value)
    prompt, what = qwen_prompt(model, tokenizer, context)
    run, held = generate_like_qwen(
        model,
        prompt,
        new_tokens,
        now=now,
        told=lambda done: told(done, new_tokens) if done % 64 == 0 else None,
    )
    return Speed(context, new_tokens, 1, (run,), cache_bytes=cache_bytes(held)), what


def _compiled(model: Any) -> Callable[..., Any]:
    call: Callable[..., Any] = model.get_compiled_call(compile_config())
    return call


def _compile_counts() -> tuple[int, int]:
    """Graphs made and graph breaks so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
