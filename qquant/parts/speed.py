"""Speed: each setting is a measurement of its own, in a process that does nothing else.

Settings of a protocol share one process, and so one loading; a compiled one has its own (see
`speed.py`). Names of settings, the keys in `profile.json`, say what was run: `qwen-1-2048` is
Qwen's protocol, `modern-b1-c512-n128` the fair one, with `-compile` or `-kv-int4` where it differs
from the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from .base import Options, Part, Subject, option

if TYPE_CHECKING:
    from ..speed import Speed

MODERN, QWEN, NONE = "modern", "qwen", "none"


@dataclass(frozen=True)
class SpeedPart(Part):
    """One setting.

    Attributes:
        preset: `modern` or `qwen`.
        context, new_tokens, batch: tokens of the prompt and after it, and rows.
        repeats: runs that count; Qwen's protocol has one.
        cache: one of `caches`. compiled: whether the decode is compiled.
    """

    preset: str
    context: int
    new_tokens: int
    batch: int = 1
    repeats: int = 1
    cache: str = "dynamic"
    compiled: bool = False

    @property
    def name(self) -> str:
        if self.preset == QWEN:
            return f"qwen-{self.context}-{self.new_tokens}"
        name = f"modern-b{self.batch}-c{self.context}-n{self.new_tokens}"
        if self.compiled:
            return f"{name}-compile"
        return name if self.cache == "dynamic" else f"{name}-{kv_name(self.cache)}"

    @property
    def place(self) -> tuple[str, ...]:
        return ("speed", self.name)

    @property
    def process(self) -> str | None:
        return self.label if self.compiled else f"speed {self.preset}"

    def packages(self) -> tuple[str, ...]:
        return cache_packages(self.cache)

    def seeds(self) -> Mapping[str, int]:
        from ..generation import PROMPT_SEED, QWEN_SEED

        drawn = {"random_prompt": PROMPT_SEED}  # with Qwen's protocol where `我` is no token
        return drawn | {"qwen_sampling": QWEN_SEED} if self.preset == QWEN else drawn

    def measure(self, subject: Subject) -> dict[str, Any]:
        from ..bandwidth import copy_bandwidth, weights_read
        from ..compiling import check_compiler
        from ..slow import slow_kernel
        from ..speed import like_qwen, speed

        if self.compiled:
            check_compiler()  # before the model is loaded
        subject.compiled = self.compiled
        loaded = subject.loaded
        weights = weights_read(loaded.model, self.batch)
        about: dict[str, Any] = {}
        if self.preset == QWEN:
            found, about["prompt"] = like_qwen(
                loaded.model,
                loaded.tokenizer,
                self.context,
                self.new_tokens,
                told=subject.advance,
            )
            settings = getattr(loaded.model, "generation_config", None)
            about["sampled"] = bool(getattr(settings, "do_sample", False))
        else:
            found = speed(
                loaded.model,
                self.context,
                self.new_tokens,
                self.repeats,
                batch=self.batch,
                cache=self.cache,
                compiled=self.compiled,
                told=subject.advance,
            )
        kernel = loaded.kernel
        return {
            "preset": self.preset,
            "context": self.context,
            "new_tokens": self.new_tokens,
            "batch": self.batch,
            "compile": self.compiled,
            "cache": self.cache,
            "kernel": str(kernel),
            "slow_kernel": slow_kernel(kernel, self.batch),
            **about,
            **times(found, raw=self.preset == MODERN),
            **traffic(found, weights, copy_bandwidth(kernel.device), whole=self.cache == "static"),
            "notes": notes(loaded.model.config, self.context + self.new_tokens),
        }

    def headline(self, found: Mapping[str, Any]) -> str:
        if self.preset == QWEN:
            return f"{found['qwen_tokens_per_s']:.4g} tokens/s"
        if found["decode_tokens_per_s"] is None:
            return f"{1000 * found['ttft_s'][0]:.4g} ms to the token"
        return f"{found['decode_tokens_per_s']:.4g} tokens/s"


def times(found: Speed, *, raw: bool) -> dict[str, Any]:
    """A speed as `profile.json` has it; with `raw`, the time of every token."""
    runs = []
    for run in found.runs:
        seconds = {"prefill_s": run.prefill_s, "decode_s": run.decode_s, "total_s": run.total_s}
        steps = {"steps_ms": [round(1000 * step, 3) for step in run.steps_s]} if raw else {}
        runs.append({**seconds, **steps})
    first = [run.prefill_s for run in found.runs]
    result: dict[str, Any] = {
        "runs": runs,
        "warmup_s": found.warmup_s,
        "ttft_s": [found.prefill_s, max(first) - min(first)],
        "decode_tokens_per_s": found.decode_tokens_per_s,
        "decode_range": None,
        "qwen_tokens_per_s": found.qwen_tokens_per_s,
        "inter_token_ms": found.inter_token_ms(),
    }
    if found.new_tokens > 1:
        rates = [found.batch * (found.new_tokens - 1) / run.decode_s for run in found.runs]
        result["decode_range"] = [min(rates), max(rates)]
    if found.graphs is not None:
        result |= {"graphs": found.graphs, "graph_breaks": found.breaks}
    return result


def traffic(found: Speed, weights: int, copied: float, *, whole: bool) -> dict[str, Any]:
    """What decoding reads, beside what copying reached (see `bandwidth.py`).

    Args:
        weights: bytes of weights that a step reads. copied: bytes per second of copying.
        whole: whether a step reads the whole buffer of the cache.
    """
    from ..bandwidth import cache_read

    result: dict[str, Any] = {
        "weight_bytes_per_token": weights / found.batch,
        "cache_bytes": found.cache_bytes,
        "cache_bytes_per_token": None,
        "bytes_per_token": None,
        "copy_bytes_per_s": copied,
        "bandwidth_share": None,
    }
    if found.new_tokens > 1:
        length = found.context + found.new_tokens - 1
        cache = cache_read(found.cache_bytes, length, found.context, found.new_tokens, whole=whole)
        step = weights + cache
        result["cache_bytes_per_token"] = cache / found.batch
        result["bytes_per_token"] = step / found.batch
        result["bandwidth_share"] = step * (found.new_tokens - 1) / found.decode_s / copied
    return result


def notes(config: Any, length: int) -> list[str]:
    """What is to be said of a text of `length` tokens on this model."""
    most = getattr(config, "max_position_embeddings", None)
    trained = getattr(config, "seq_length", None) or most  # original Qwen has both
    if trained is not None and length > trained:
        return [
            f"{length} tokens are more than the {trained} that the model was made for: the work is "
            "the same, the text is not to be read"
        ]
    return []


def _flag(key: str) -> str:
    """The option that the field is given by."""
    return option({"contexts": "context", "batches": "batch"}.get(key, key))


def cache_packages(cache: str) -> tuple[str, ...]:
    """Packages that a cache of that kind is made by, beside transformers."""
    return ("hqq",) if cache.startswith("quantized-int") else ()


def kv_name(cache: str) -> str:
    """Of a quantized cache, in the name of a setting."""
    return cache.replace("quantized-", "kv-")


@dataclass(frozen=True)
class SpeedOptions(Options):
    """What speed is measured.

    Attributes:
        speed: presets: `modern`, `qwen`; `none` leaves speed out.
        contexts, new_tokens, batches: of `modern`, each with each.
        repeats: of `modern`, after one run to warm up.
        compiled: another row for each of these, decoding compiled on a static cache.
        kv_caches: another row for each of these and each of the caches: int8, int4, fp8.
        qwen_new_tokens: of `qwen`, generated from one token of context.
        qwen_context: of `qwen`, read to generate one token.
    """

    speed: tuple[str, ...] = (MODERN,)
    contexts: tuple[int, ...] = (512,)
    new_tokens: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    repeats: int = 3
    compiled: bool = False
    kv_caches: tuple[str, ...] = ()
    qwen_new_tokens: tuple[int, ...] = (2048, 8192)
    qwen_context: int = 2048

    def __post_init__(self) -> None:
        for name in self.speed:
            if name not in (MODERN, QWEN, NONE):
                raise SpecError("speed", expected=f"{MODERN}, {QWEN} or {NONE}", got=name)
        if NONE in self.speed and len(set(self.speed)) > 1:
            raise SpecError("speed", expected=f"{NONE} by itself", got=", ".join(self.speed))
        for key in ("contexts", "new_tokens", "batches", "qwen_new_tokens"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                got = ", ".join(map(str, values)) or "none"
                raise SpecError(_flag(key), expected="numbers of at least 1", got=got)
        for key in ("repeats", "qwen_context"):
            if getattr(self, key) < 1:
                raise SpecError(_flag(key), expected="at least 1", got=getattr(self, key))

    def parts(self) -> tuple[Part, ...]:
        """Raises also what `caches.check_quantized` and `compiling.check_compiler` raise: before
        hours are spent."""
        found: list[Part] = []
        if MODERN in self.speed:
            found += self._modern()
        if QWEN in self.speed:
            found += [SpeedPart(QWEN, 1, new) for new in self.qwen_new_tokens]
            found.append(SpeedPart(QWEN, self.qwen_context, 1))
        return tuple(dict.fromkeys(found))

    def _modern(self) -> list[SpeedPart]:
        caches = [("dynamic", False)]
        if self.kv_caches:
            from ..caches import PREFIX, check_quantized

            for kind in self.kv_caches:
                check_quantized(kind)
                caches.append((PREFIX + kind, False))
        if self.compiled:
            from ..compiling import check_compiler

            check_compiler()
            caches.append(("static", True))
        settings = product(caches, self.batches, self.contexts, self.new_tokens)
        return [
            SpeedPart(MODERN, context, new, batch, self.repeats, cache, compiled)
            for (cache, compiled), batch, context, new in settings
        ]
