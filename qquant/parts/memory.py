"""Memory: each row is a measurement of its own, in a process of its own (see `memory.py`).

`weights` is the model loaded and not run; `encode` reads a text and generates one token;
`generate` writes a text from one token. With Qwen's sizes, 2048 and 8192, they are the rows of its
published tables; other sizes have other names (`encode-64`). A quantized cache makes a row of its
own beside each of the last two, and there says what the model lost by it: its distance from itself
on the first text that accuracy is measured on, or on the built-in conversations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, SpecError
from .base import Options, Part, Subject, option
from .speed import cache_packages, kv_name, notes

WEIGHTS, ENCODE, GENERATE, NONE = "weights", "encode", "generate", "none"
BUILTIN = "builtin"
KL_ROWS, KL_PROMPT, KL_TOKENS = 8, 128, 256  # rows, tokens given at once, tokens one by one
_CHARACTERS = 16  # at the most in a token, on the average, so that a long text is not read whole


@dataclass(frozen=True)
class MemoryPart(Part):
    """One row.

    Attributes:
        what: `weights`, `encode` or `generate`.
        context, new_tokens: tokens read and tokens written; none for `weights`.
        cache: one of `caches`.
        text, text_sha256: a file, or `builtin`, to judge a quantized cache on.
    """

    what: str
    context: int = 0
    new_tokens: int = 0
    cache: str = "dynamic"
    text: str = ""
    text_sha256: str = ""

    @property
    def name(self) -> str:
        if self.what == WEIGHTS:
            return WEIGHTS
        name = f"{self.what}-{self.context if self.what == ENCODE else self.new_tokens}"
        return name if self.cache == "dynamic" else f"{name}-{kv_name(self.cache)}"

    @property
    def place(self) -> tuple[str, ...]:
        return ("memory", self.name)

    @property
    def process(self) -> str | None:
        return self.label

    def depends(self) -> object:
        return {key: value for key, value in asdict(self).items() if key != "text"}

    def packages(self) -> tuple[str, ...]:
        return cache_packages(self.cache)

    def seeds(self) -> Mapping[str, int]:
        from ..generation import PROMPT_SEED

        return {} if self.what == WEIGHTS else {"random_prompt": PROMPT_SEED}

    def measure(self, subject: Subject) -> dict[str, Any]:
        from ..memory import generating, memory_of, warm

        warm(subject.device)
        if subject.model.method:
            import bitsandbytes  # noqa: F401
        if self.cache != "dynamic":
            from ..caches import check_quantized

            check_quantized(self.cache.removeprefix("quantized-"))
        run = None
        if self.what != WEIGHTS:
            total = self.new_tokens + (KL_TOKENS if self.text else 0)

            def told(done: int) -> None:
                if done % 64 == 0:
                    subject.advance(done, total)

            run = generating(self.context, self.new_tokens, self.cache, told)
        found, loaded = memory_of(lambda: subject.loaded, run, subject.device)
        model = loaded.model
        result = {
            "what": f"{self.what} {self.context if self.what == ENCODE else self.new_tokens}"
            if run
            else WEIGHTS,
            "context": self.context,
            "new_tokens": self.new_tokens,
            "cache": self.cache,
            "kernel": str(loaded.kernel),
            "device": str(loaded.kernel.device),
            "weights_bytes": loaded.kernel.weight_bytes,
            "held_bytes": found.held,
            "loading_peak_bytes": found.loading_peak,
            "peak_bytes": found.peak if run else found.held,
            "allocator_peak_bytes": found.allocator_peak,
            "allocator_reserved_bytes": found.allocator_reserved,
            "process_peak_bytes": found.process_peak,
            "qwen_gib": found.qwen_gib,
            "notes": notes(model.config, self.context + self.new_tokens),
        }
        return result | self._distance(subject) if self.text else result

    def _distance(self, subject: Subject) -> dict[str, Any]:
        """What the cache costs in accuracy."""
        from ..caches import distance, make_cache

        model, length = subject.loaded.model, KL_PROMPT + KL_TOKENS
        ids = heldout(subject.loaded.tokenizer, self.text, length)
        kl = distance(
            model,
            ids,
            KL_PROMPT,
            lambda: make_cache(self.cache, model.config, length),
            lambda done: subject.advance(self.new_tokens + done, self.new_tokens + KL_TOKENS),
        )
        return {
            "kl": list(kl),
            "kl_tokens": ids.shape[0] * KL_TOKENS,
            "kl_text": Path(self.text).name,
        }

    def headline(self, found: Mapping[str, Any]) -> str:
        from ..report import human_bytes

        if found["peak_bytes"] is None:
            return "not told by the system"
        kl = ""
        if "kl" in found:
            value = found["kl"][0]
            kl = ", KL not finite" if value is None else f", KL {value:.3g}"
        return f"{human_bytes(found['peak_bytes'])}{kl}"


def heldout(tokenizer: Any, text: str, length: int) -> Any:
    """The beginning of a text, int64 [rows, length], at most `KL_ROWS` rows.

    Raises:
        InputError: there is no tokenizer, or the text is too short for one row.
    """
    from ..profile import heldout_ids

    if tokenizer is None:
        raise InputError("tokenizer", expected="its files in the directory", got="none")
    return heldout_ids(tokenizer, _read(text), length, KL_ROWS * length)


def _read(text: str) -> str:
    """The beginning of what a file or the built-in set says, conversations turn by turn."""
    from ..calibration.sources import read_source

    parts: list[str] = []
    for document in read_source(text).documents:
        turns = getattr(document, "messages", None)
        parts += [turn.content for turn in turns] if turns else [getattr(document, "text", "")]
    return "\n\n".join(parts)[: KL_ROWS * (KL_PROMPT + KL_TOKENS) * _CHARACTERS]


@dataclass(frozen=True)
class MemoryOptions(Options):
    """What memory is measured.

    Attributes:
        memory: `weights`, `encode`, `generate`; `none` leaves memory out.
        encode_tokens, generate_tokens: their sizes; Qwen's are the defaults.
        kv_caches: another row of `encode` and `generate` for each: int8, int4, fp8.
        texts: the first of them is what a quantized cache is judged on.
    """

    memory: tuple[str, ...] = (WEIGHTS, ENCODE)
    encode_tokens: int = 2048
    generate_tokens: int = 8192
    kv_caches: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.memory:
            if name not in (WEIGHTS, ENCODE, GENERATE, NONE):
                names = f"{WEIGHTS}, {ENCODE}, {GENERATE} or {NONE}"
                raise SpecError("memory", expected=names, got=name)
        if NONE in self.memory and len(set(self.memory)) > 1:
            raise SpecError("memory", expected=f"{NONE} by itself", got=", ".join(self.memory))
        for key in ("encode_tokens", "generate_tokens"):
            if getattr(self, key) < 1:
                raise SpecError(option(key), expected="at least 1", got=getattr(self, key))

    def parts(self) -> tuple[Part, ...]:
        """Raises also what `caches.check_quantized` raises."""
        rows = []
        if ENCODE in self.memory:
            rows.append((ENCODE, self.encode_tokens, 1))
        if GENERATE in self.memory:
            rows.append((GENERATE, 1, self.generate_tokens))
        found: list[Part] = [MemoryPart(WEIGHTS)] if WEIGHTS in self.memory else []
        found += [MemoryPart(*row) for row in rows]
        if not self.kv_caches or not rows:
            return tuple(found)
        from ..caches import PREFIX, check_quantized

        text = self.texts[0] if self.texts else BUILTIN
        digest = hashlib.sha256(_read(text).encode()).hexdigest()
        for kind in self.kv_caches:
            check_quantized(kind)
            found += [MemoryPart(*row, PREFIX + kind, text, digest) for row in rows]
        return tuple(found)

    def public(self) -> dict[str, Any]:
        found = asdict(self)
        del found["texts"]  # those of accuracy
        return found
