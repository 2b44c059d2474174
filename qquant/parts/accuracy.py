"""Accuracy on held-out data: each file is a domain, and each domain a measurement.

The reference runs once over a domain: its last hidden states go into a file (`kept`), from which
its own figures are read and with which every candidate is compared on the same token ids. A
candidate that is added later finds them there, if they were kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import InputError, RunError, SpecError
from ..heldout import held_out_rows, read_held_out
from .base import Options, Part, Subject, option

KS = (5, 10)  # of the top-k overlaps


@dataclass(frozen=True)
class DomainPart(Part):
    """One file; stands in `accuracy.domains`.

    Attributes:
        path: of the file. sha256: of its bytes. chat: whether it holds conversations.
        seqlen, max_tokens: see `AccuracyOptions`.
    """

    path: str
    sha256: str
    chat: bool
    seqlen: int
    max_tokens: int

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def place(self) -> tuple[str, ...]:
        return ("accuracy", "domains", self.name)

    @property
    def label(self) -> str:
        return f"accuracy {self.name}"

    @property
    def compared(self) -> bool:
        return True

    def depends(self) -> object:
        return [self.sha256, self.chat, self.seqlen, self.max_tokens]

    def check(self, subjects: Sequence[Subject]) -> None:
        """The file is long enough for a row, and all read the same tokens in it."""
        first, *others = subjects
        ids, size = self._ids(first), _vocabulary(first)
        for other in others:
            its = self._ids(other)
            if not first.is_reference:
                continue  # each is measured by itself
            if not its.equal(ids):
                raise InputError(
                    f"token ids of {self.name} by {other.model.name}",
                    expected=f"those of {first.model.name}",
                    got="others",
                    cure="Compare models of one tokenizer, or measure it without --against",
                )
            if (got := _vocabulary(other)) != size:
                raise InputError(
                    f"vocab_size of {other.model.name}",
                    expected=f"{size}, as of {first.model.name}",
                    got=got,
                    cure="Compare models of one vocabulary, or measure it without --against",
                )

    def keep(self, subject: Subject, folder: Path, name: str) -> Any:
        from ..devices import choose_device
        from ..kept import KeptReference
        from ..profile import keep_reference

        kept = KeptReference.open(folder, name, choose_device(subject.device))
        if kept is not None:
            return kept
        ids = self._ids(subject)
        return keep_reference(subject.loaded.model, ids, folder, name, subject.advance)

    def measure(self, subject: Subject) -> dict[str, Any]:
        read = {"sha256": self.sha256, "chat": self.chat, "seqlen": self.seqlen}
        return read | self._measured(subject)

    def _measured(self, subject: Subject) -> dict[str, Any]:
        from .. import profile

        if subject.reference is None:
            alone = profile.losses(subject.loaded.model, self._ids(subject), subject.advance)
            return _alone(alone)
        kept = subject.kept.get(self.label)
        if kept is None:
            raise RunError(
                "the reference's states",
                expected="measured before",
                got="none",
                cure=f"Mend what failed of {subject.reference.name} first",
            )
        if subject.is_reference:
            return _alone(profile.losses(kept, kept.ids, subject.advance))
        name, ids = subject.model.name, self._ids(subject)
        model = {name: subject.loaded.model}
        found = profile.compare_all(kept, model, ids, ks=KS, advance=subject.advance)
        return _beside(found[name])

    def headline(self, found: Mapping[str, Any]) -> str:
        text = f"perplexity {_short(found['perplexity'])}"
        if "kl" not in found:
            return text
        return f"KL {_short(found['kl'])}, top-1 {100 * found['top1'][0]:.2f}%, {text}"

    def _ids(self, subject: Subject) -> Any:
        data = read_held_out(self.path, chat=self.chat)
        if data.sha256 != self.sha256:
            raise RunError(self.name, expected="the file as it was", got="another one")
        model_type = str(Checkpoint.open(subject.model.path).config.get("model_type"))
        return held_out_rows(data, subject.tokenizer, model_type, self.seqlen, self.max_tokens)


@dataclass(frozen=True)
class AccuracyOptions(Options):
    """What accuracy is measured on.

    Attributes:
        texts: files of text; each is a domain of its own.
        chats: files of conversations, likewise.
        seqlen: tokens of a row.
        max_tokens: of each file, at the most.
    """

    texts: tuple[str, ...] = ()
    chats: tuple[str, ...] = ()
    seqlen: int = 512
    max_tokens: int = 40960

    def __post_init__(self) -> None:
        for key in ("seqlen", "max_tokens"):
            if getattr(self, key) < 2:
                raise SpecError(option(key), expected="at least 2", got=getattr(self, key))
        names = [Path(path).name for path in (*self.texts, *self.chats)]
        if len(set(names)) < len(names):
            expected = "files of different names"
            raise SpecError("--text and --chat", expected=expected, got=", ".join(names))

    def parts(self) -> tuple[Part, ...]:
        files = [(path, False) for path in self.texts] + [(path, True) for path in self.chats]
        return tuple(
            DomainPart(path, read_held_out(path, chat=chat).sha256, chat, *self._cut())
            for path, chat in files
        )

    def _cut(self) -> tuple[int, int]:
        return self.seqlen, self.max_tokens

    def public(self) -> dict[str, Any]:
        names = {key: [Path(p).name for p in getattr(self, key)] for key in ("texts", "chats")}
        return {**asdict(self), **names}


def _vocabulary(subject: Subject) -> object:
    return Checkpoint.open(subject.model.path).config.get("vocab_size")


def _alone(found: Any) -> dict[str, Any]:
    from ..estimates import known

    return {
        "tokens": found.tokens,
        "perplexity": known(found.perplexity),
        "by_position": [_span(span) for span in found.by_position],
        "rows": {"nll": known(found.nll_per_row)},
    }


def _beside(found: Any) -> dict[str, Any]:
    from ..estimates import known

    return {
        "tokens": found.tokens,
        "perplexity": known(found.ppl_candidate),
        "nll_lost": known(found.nll_lost),
        "nll_lost_interval": known(found.nll_lost_interval),
        "kl": known(found.kl),
        "top1": known(found.top1),
        "topk": {str(k): known(value) for k, value in found.topk.items()},
        "by_position": [_span(span) for span in found.by_position],
        "rows": {
            "nll": known(found.nll_per_row),
            "kl": known(found.kl_per_row),
            "top1": known(found.top1_per_row),
        },
    }


def _span(span: Any) -> dict[str, Any]:
    from ..estimates import known

    values = {"kl": span.kl, "top1": span.top1, "nll_lost": span.nll_lost}
    found: dict[str, Any] = {"from": span.first, "to": span.last}
    found |= {key: known(value) for key, value in values.items() if value is not None}
    return {**found, "perplexity": known(span.perplexity)}


def _short(pair: list[float | None]) -> str:
    return "not finite" if pair[0] is None else f"{pair[0]:.4g}"
