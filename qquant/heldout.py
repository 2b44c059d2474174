"""Held-out data to token ids: a text, or conversations in the checkpoint's own chat format.

What models are measured on is read by the readers of calibration data (layouts, encodings, gzip)
and rendered by its renderers, so that `--text` and `--chat` take whatever `--calib` takes. It is
cut otherwise: nothing is shuffled, and the beginning is what is taken, so that every model and
every later run reads the same. A plain text goes through the tokenizer as one; conversations, and
texts that come as records, are put end to end with the end-of-text token after each. Then rows of
equal length are cut, so a row may begin inside a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration.formats import Chat, Text
from .calibration.render import renderer_for
from .calibration.sources import read_source
from .errors import CalibrationError, InputError, QQuantError, SpecError
from .models.tokenizer import tokenizer_errors

_CHARS = 32  # of text, at the most, that are looked at for a token; where too few, all of it


@dataclass(frozen=True)
class HeldOut:
    """A file's documents.

    Attributes:
        documents: texts or conversations, in file order. sha256: of the file.
    """

    name: str
    documents: tuple[Text | Chat, ...]
    sha256: str


def read_held_out(path: str, *, chat: bool) -> HeldOut:
    """The texts of a file, or its conversations.

    Args:
        path: plain text or records, see `calibration.sources`.
        chat: conversations, and nothing else, are wanted.

    Raises:
        InputError: it cannot be read, or holds the other.
    """
    flag, other = ("--chat", "--text") if chat else ("--text", "--chat")
    name = Path(path).name
    if not Path(path).is_file():
        got = "a directory" if Path(path).is_dir() else "none of that name"
        raise InputError(f"{flag} {path}", expected="a file", got=got)
    try:
        data = read_source(str(Path(path).absolute()))
    except CalibrationError as error:
        raise _reworded(error, f"{flag} {name}") from error
    if any(isinstance(document, Chat) != chat for document in data.documents):
        raise InputError(
            f"{flag} {path}",
            expected="conversations" if chat else "text",
            got="text" if chat else "conversations",
            cure=f"Give it as {other}",
        )
    documents = data.documents
    if data.prose:  # cut into pieces for the shuffle of calibration
        documents = (Text("".join(d.text for d in documents if isinstance(d, Text))),)
    return HeldOut(name, documents, data.sha256)


def held_out_rows(
    data: HeldOut, tokenizer: Any, model_type: str, seqlen: int, max_tokens: int
) -> Tensor:
    """The beginning of the data in rows: int64 [n, seqlen], what is left over dropped.

    Args:
        tokenizer: the checkpoint's; None where it has none. model_type: of its config.
        max_tokens: at the most, rounded down to whole rows.

    Raises:
        SpecError: a row of fewer than two tokens predicts nothing.
        InputError: the data is too short for a row; the tokenizer is missing or cannot read it.
    """
    if seqlen < 2:
        raise SpecError("seqlen", expected="at least 2", got=seqlen)
    if tokenizer is None:
        raise InputError("tokenizer", expected="its files in the directory", got="none")
    ids: list[int] = []
    try:
        renderer = renderer_for(tokenizer, model_type)
        with tokenizer_errors("the checkpoint's tokenizer, reading held-out data"):
            if len(data.documents) == 1 and isinstance(text := data.documents[0], Text):
                ids = renderer.ids(Text(text.text[: _CHARS * max_tokens]))
                if len(ids) < max_tokens:
                    ids = renderer.ids(text)
            else:
                for document in data.documents:
                    ids += [*renderer.ids(document), renderer.eot]
                    if len(ids) >= max_tokens:
                        break
    except CalibrationError as error:
        raise _reworded(error, data.name) from error
    rows = min(len(ids), max_tokens) // seqlen
    if rows == 0:
        raise InputError(
            f"held-out data {data.name}",
            expected=f"at least {seqlen} tokens",
            got=min(len(ids), max_tokens),
            cure="Give more of it, or rows of fewer tokens (--seqlen, --lengths)",
        )
    return torch.tensor(ids[: rows * seqlen], dtype=torch.int64).view(rows, seqlen)


def _reworded(error: QQuantError, name: str) -> InputError:
    """The readers speak of calibration; what they say of the data is true here, too."""
    what = error.what.replace("calibration source", "held-out data")
    cure = (error.cure or "").partition(", or use the builtin set")[0]
    return InputError(f"{name}: {what}", expected=error.expected, got=error.got, cure=cure or None)
