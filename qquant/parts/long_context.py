"""Perplexity over context lengths, with dynamic NTK and logn on and off: the shape of Qwen's table.

The same beginning of one text is cut into rows of each length, so that lengths differ by what a
token may look back on and by nothing else; every position of a row counts. Rows run one at a time,
without a cache, and logits a few positions at a time: memory grows with the longest row alone.

The switches are original Qwen's (`use_dynamic_ntk`, `use_logn_attn` of its config), set for the
measurement and put back. Neither does anything within the length the model was trained on
(`seq_length`), so there one run stands for all four rows. Other families have no such switches:
they get one row per length, with `switches` false.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import RunError, SpecError
from ..heldout import held_out_rows, read_held_out
from .base import Options, Part, Subject

# What the run adds to a result.
ABOUT = ("key", "under", "of", "on", "against", "seconds")
SWITCHES = ("use_dynamic_ntk", "use_logn_attn")
# As in Qwen's table: the original, with dynamic NTK, with logn as well; and logn alone.
SETTINGS = ((False, False), (True, False), (True, True), (False, True))


@dataclass(frozen=True)
class LengthPart(Part):
    """One length: up to four rows of `long_context.rows`, which share a key."""

    path: str
    sha256: str
    length: int
    tokens: int

    @property
    def place(self) -> tuple[str, ...]:
        return ("long_context", str(self.length))

    @property
    def label(self) -> str:
        return f"perplexity at {self.length}"

    def depends(self) -> object:
        return [self.sha256, self.length, self.tokens]

    def stored(self, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        found = entry.get("long_context") or {}
        own = [row for row in found.get("rows") or [] if row.get("length") == self.length]
        if not own:
            return None
        kept = {key: own[0][key] for key in ABOUT if key in own[0]}
        return {**kept, "text": own[0].get("text") or found.get("text"), "rows": own}

    def store(self, entry: dict[str, Any], result: dict[str, Any]) -> None:
        """Each row says of which text it is, since those of other lengths may be of another."""
        kept = {key: result[key] for key in ABOUT if key in result}
        own = [{**row, **kept, "text": result["text"]} for row in result["rows"]]
        there = entry.get("long_context") or {}
        rows = [row for row in there.get("rows") or [] if row.get("length") != self.length]
        entry["long_context"] = {
            "text": there.get("text") or result["text"],  # of rows that do not say
            "rows": sorted(rows + own, key=lambda row: row.get("length") or 0),
        }

    def drop(self, entry: dict[str, Any]) -> None:
        there = entry.get("long_context") or {}
        there["rows"] = [r for r in there.get("rows") or [] if r.get("length") != self.length]
        if not there["rows"]:
            entry.pop("long_context", None)

    def check(self, subjects: Sequence[Subject]) -> None:
        """The text is long enough."""
        for subject in subjects:
            self._ids(subject)

    def _ids(self, subject: Subject) -> Any:
        data = read_held_out(self.path, chat=False)
        if data.sha256 != self.sha256:
            raise RunError(data.name, expected="the file as it was", got="another one")
        model_type = str(Checkpoint.open(subject.model.path).config.get("model_type"))
        return held_out_rows(data, subject.tokenizer, model_type, self.length, self.tokens)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from ..estimates import known
        from ..profile import losses

        model, ids = subject.loaded.model, self._ids(subject)
        switches = all(hasattr(model.config, name) for name in SWITCHES)
        settings = SETTINGS if switches else SETTINGS[:1]
        once = switches and self.length <= model.config.seq_length
        runs = 1 if once else len(settings)
        rows: list[dict[str, Any]] = []
        for i, (ntk, logn) in enumerate(settings):
            if i < runs:

                def advance(done: int, total: int, before: int = i) -> None:
                    subject.advance(before * total + done, runs * total)

                with _switched(model.config, ntk, logn) if switches else _as_it_is():
                    found = losses(model, ids, advance)
            rows.append(
                {
                    "length": self.length,
                    "sha256": self.sha256,
                    "most_tokens": self.tokens,
                    "tokens": found.tokens,
                    "dynamic_ntk": ntk,
                    "logn": logn,
                    "switches": switches,
                    "perplexity": known(found.perplexity),
                }
            )
        return {"text": Path(self.path).name, "rows": rows}

    def headline(self, found: Mapping[str, Any]) -> str:
        values = [(row.get("perplexity") or [None])[0] for row in found["rows"]]
        shown = ["not finite" if value is None else f"{value:.4g}" for value in values]
        return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


@dataclass(frozen=True)
class LongContextOptions(Options):
    """Perplexity over lengths.

    Attributes:
        long_text: a file of text; None leaves this out.
        lengths: tokens of a row.
        long_tokens: of the text, at the most, for each length; None for twice the longest length.
    """

    long_text: str | None = None
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    long_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2 or len(set(self.lengths)) < len(self.lengths):
            got = ",".join(map(str, self.lengths))
            raise SpecError("--lengths", expected="different lengths of at least 2", got=got)
        if self.long_tokens is not None and self.long_tokens < max(self.lengths):
            expected = f"at least {max(self.lengths)}, the longest of --lengths"
            raise SpecError("--long-tokens", expected=expected, got=self.long_tokens)

    def parts(self) -> tuple[Part, ...]:
        if self.long_text is None:
            return ()
        sha256 = read_held_out(self.long_text, chat=False).sha256
        tokens = self.long_tokens or 2 * max(self.lengths)
        return tuple(LengthPart(self.long_text, sha256, n, tokens) for n in sorted(self.lengths))

    def public(self) -> dict[str, Any]:
        return {**asdict(self), "long_text": self.long_text and Path(self.long_text).name}


@contextmanager
def _switched(config: Any, *values: bool) -> Iterator[None]:
    before = [getattr(config, name) for name in SWITCHES]
    try:
        for name, value in zip(SWITCHES, values, strict=True):
            setattr(config, name, value)
        yield
    finally:
        for name, value in zip(SWITCHES, before, strict=True):
            setattr(config, name, value)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
