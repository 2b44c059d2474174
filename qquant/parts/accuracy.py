"""Accuracy on held-out text: each file is a domain, and each domain a measurement.

With a reference, its hidden states are kept in a file (`profile.KeptReference`), one pass over the
text; each candidate is then compared with it on the same ids. The reference is measured against
itself, which has to come out at no distance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, SpecError
from .base import Options, Part, Subject


@dataclass(frozen=True)
class DomainPart(Part):
    """One text; stands in `accuracy.domains`.

    Attributes:
        path: of the file, in UTF-8. sha256: of the text.
        seqlen, max_tokens: see `AccuracyOptions`.
    """

    path: str
    sha256: str
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
        return [self.sha256, self.seqlen, self.max_tokens]

    def keep(self, subject: Subject, folder: Path) -> Any:
        from .. import profile

        return profile.KeptReference(subject.loaded.model, [self._ids(subject)], folder)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from .. import profile

        ids = self._ids(subject)
        result: dict[str, Any] = {"tokens": ids.shape[0] * (ids.shape[1] - 1)}
        if subject.reference is None:
            return result | {"perplexity": _known(profile.perplexity(subject.loaded.model, ids))}
        kept = subject.kept[self.label]
        pair = profile.compare_all(kept, {"it": subject.loaded.model}, ids)["it"]
        return result | {
            "perplexity": _known(pair.ppl_candidate),
            "nll_lost": _known(pair.nll_lost),
            "kl": _known(pair.kl),
            "top1": _known(pair.top1),
        }

    def headline(self, found: Mapping[str, Any]) -> str:
        text = f"perplexity {found['perplexity'][0]:.4g}"
        return f"KL {found['kl'][0]:.4g}, {text}" if "kl" in found else text

    def _ids(self, subject: Subject) -> Any:
        from .. import profile

        tokenizer = subject.loaded.tokenizer
        if tokenizer is None:
            raise InputError("tokenizer", expected="its files in the directory", got="none")
        return profile.heldout_ids(tokenizer, _read(self.path), self.seqlen, self.max_tokens)


@dataclass(frozen=True)
class AccuracyOptions(Options):
    """What accuracy is measured on.

    Attributes:
        texts: files in UTF-8; each is a domain of its own.
        seqlen: tokens of a row.
        max_tokens: of each text, at the most.
    """

    texts: tuple[str, ...] = ()
    seqlen: int = 512
    max_tokens: int = 40960

    def __post_init__(self) -> None:
        for key in ("seqlen", "max_tokens"):
            if getattr(self, key) < 2:
                raise SpecError(key, expected="at least 2", got=getattr(self, key))

    def parts(self) -> tuple[Part, ...]:
        names = [Path(text).name for text in self.texts]
        if len(set(names)) < len(names):
            raise SpecError("--text", expected="files of different names", got="equal ones")
        return tuple(
            DomainPart(
                text,
                hashlib.sha256(_read(text).encode()).hexdigest(),
                self.seqlen,
                self.max_tokens,
            )
            for text in self.texts
        )

    def public(self) -> dict[str, Any]:
        return {**asdict(self), "texts": [Path(text).name for text in self.texts]}


def _known(pair: tuple[float, float]) -> list[float | None]:
    """A value with its standard error, as JSON has it."""
    return [None if math.isnan(x) else x for x in pair]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"text {path}", expected="a text file in UTF-8", got=error, cure="Convert it first"
        ) from error
