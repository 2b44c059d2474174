# SPDX-License-Identifier: Apache-2.0 (part of qquant)
"""The original Qwen tokenizer: byte-level BPE by `tiktoken` over a ranks file, ChatML on top.

The ranks file (`qwen.tiktoken`) has one token per line, base64 of its bytes and its rank; rank i
stands on line i + 1. The ids of the special tokens follow the ranks directly:

    n_ranks + 0   <|endoftext|>    separator and end of text ("eod")
    n_ranks + 1   <|im_start|>     ChatML, starts a message
    n_ranks + 2   <|im_end|>       ChatML, ends a message
    n_ranks + 3   <|extra_0|> ... <|extra_204|>

so 151643 to 151850 with Qwen's own file. An optional second file of the same format may add merges
behind them (`extra_vocab_file`). Text is NFC-normalised, then split by a pattern in which digits
stand alone, then merged.

Injection: by default the surface forms of special tokens in text ARE read as special tokens, as
Qwen does it. Text from a user should be encoded with `allowed_special=set()` (or transformers'
`split_special_tokens=True`), which `model.chat` does. `disallowed_special` refuses such text
instead. `apply_chat_template` takes transformers' `sanitize_control_tokens=True` where transformers
has it (5.20 does, 5.19 does not) and refuses it elsewhere.

Regular tokens are shown as byte-level strings (each byte one printable character, as in GPT-2's
vocabulary), special tokens as themselves. The original showed raw `bytes`, which today's
transformers cannot handle in stop strings and vocabularies; `bytes` are still accepted.

This file travels with exported checkpoints: it imports only tiktoken and transformers.
"""

from __future__ import annotations

import base64
import inspect
import logging
import os
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Literal

import tiktoken
import transformers
from transformers import AddedToken, PreTrainedTokenizer

logger = logging.getLogger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken", "extra_vocab_file": "qwen_extra.tiktoken"}

PAT_STR = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """One printable character per byte: itself if printable Latin-1, else from U+0100 upward."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _utf8(text: str) -> bytes:
    """UTF-8; half of a surrogate pair gives bytes that are none, and that no token has."""
    return text.encode("utf-8", "surrogatepass")


LONGEST_LINE = 4096  # bytes; the longest of Qwen's own has 182
MOST_IDS = 2**31  # tiktoken counts in 32 bits


BYTE_TO_CHAR = _byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def _lines(path: str) -> Iterator[tuple[int, bytes, int]]:
    """Parse a ranks file into (line number, token bytes, rank), or name the line that is wrong."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"{where}: longer than {LONGEST_LINE} bytes. Is this a tiktoken ranks file?"
                )
            if not line.strip():
                continue
            fields = line.split()
            if len(fields) != 2:
                raise ValueError(
                    f"{where}: expected a base64 token and its rank, got {line[:80]!r}. "
                    "Is this a tiktoken ranks file, and complete?"
                )
            try:
                token = base64.b64decode(fields[0], validate=True)
            except ValueError as error:
                raise ValueError(
                    f"{where}: not base64: {fields[0][:40]!r} ({error}). "
                    "Is this a tiktoken ranks file, and complete?"
                ) from None
            if not token:
                raise ValueError(f"{where}: the token is empty")
            if not fields[1].isdigit() or len(fields[1]) > 10 or int(fields[1]) >= MOST_IDS:
                raise ValueError(
                    f"{where}: expected a whole number as rank, got {fields[1][:40]!r}"
                )
            yield number, token, int(fields[1])


def load_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Read a main ranks file: token bytes -> rank, ranks 0, 1, 2, ... in the order of the lines.

    Raises:
        ValueError: a malformed line, a token that was there before, a rank that is not the next
            one (each names the line), or a file without all 256 single bytes.
    """
    ranks: dict[bytes, int] = {}
    path = os.fspath(path)
    for number, token, rank in _lines(path):
        if rank != len(ranks):
            raise ValueError(
                f"{path}, line {number}: expected rank {len(ranks)}, got {rank}; "
                "ranks must count up from 0 without gaps"
            )
        if token in ranks:
            raise ValueError(
                f"{path}, line {number}: token {token!r} was already given rank {ranks[token]}"
            )
        ranks[token] = rank
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise ValueError(
            f"{path}: {missing} of the 256 single bytes have no rank, so some text could not be "
            f"encoded; the file has {len(ranks)} tokens and is probably cut off"
        )
    return ranks


def load_extra_ranks(path: str | os.PathLike[str], ranks: dict[bytes, int]) -> dict[bytes, int]:
    """Read additional merges whose ids start behind the special tokens.

    Args:
        ranks: the main ranks; a token that is already among them is skipped with a log line.

    Raises:
        ValueError: a malformed line, an id that is taken, or a token given twice (named by line).
    """
    extra: dict[bytes, int] = {}
    used: set[int] = set()
    path = os.fspath(path)
    first = len(ranks) + len(SPECIAL_TOKENS)
    for number, token, rank in _lines(path):
        if rank < first or rank in used:
            raise ValueError(
                f"{path}, line {number}: id {rank} is taken; additional merges have ids of their "
                f"own from {first}"
            )
        if token in extra:
            raise ValueError(
                f"{path}, line {number}: token {token!r} was already given id {extra[token]}"
            )
        used.add(rank)
        if token in ranks:
            logger.info("%s, line %d: %r is token %d already", path, number, token, ranks[token])
        else:
            extra[token] = rank
    return extra


class QWenTokenizer(PreTrainedTokenizer):  # type: ignore[misc,unused-ignore]
    """Tokenizer of the original Qwen models.

    Args:
        vocab_file: the ranks file.
        errors: what `decode` does with bytes that are not UTF-8 and with ids that stand for
            nothing: "replace", "ignore" or "strict", as in `bytes.decode`.
        extra_vocab_file: additional merges; reading and saving a directory keeps them.
        kwargs: as for any transformers tokenizer. Without them the end of text is `<|endoftext|>`,
            padding is `<|extra_0|>` (so that it differs from the end) and goes to the left, and the
            chat template is ChatML.

    Raises:
        ValueError: no ranks file, a broken one, or a special token that Qwen does not have.
    """

    vocab_files_names: ClassVar[dict[str, str]] = VOCAB_FILES_NAMES
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        errors: str = "replace",
        extra_vocab_file: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise ValueError(
                f"the tokenizer needs its ranks file: no {VOCAB_FILES_NAMES['vocab_file']} was "
                "found in the directory and no vocab_file= was given"
            )
        self.vocab_file = os.fspath(vocab_file)
        self.errors = errors
        self.mergeable_ranks = load_ranks(vocab_file)
        n_ranks = len(self.mergeable_ranks)
        self.extra_ranks = (
            load_extra_ranks(extra_vocab_file, self.mergeable_ranks) if extra_vocab_file else {}
        )
        self.special_tokens = {token: n_ranks + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IM_START]
        self.im_end_id = self.special_tokens[IM_END]
        self._special_by_id = {index: token for token, index in self.special_tokens.items()}
        self._ids = self.mergeable_ranks | self.extra_ranks
        self._bytes = {index: token for token, index in self._ids.items()}
        self._vocab: dict[str, int] | None = None
        self.tokenizer = tiktoken.Encoding(
            "qwen",
            pat_str=PAT_STR,
            mergeable_ranks=self._ids,
            special_tokens=self.special_tokens,
        )
        for name, default in {"eos_token": ENDOFTEXT, "pad_token": "<|extra_0|>"}.items():
            if kwargs.get(name) is None:
                kwargs[name] = default
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHAT_TEMPLATE
        for index, token in kwargs.get("added_tokens_decoder", {}).items():
            if self.special_tokens.get(str(token)) != int(index):
                raise ValueError(
                    f"tokenizer_config.json gives token {str(token)!r} the id {index}, with this "
                    f"ranks file it would be {self.special_tokens.get(str(token))}"
                )
        super().__init__(errors=errors, **kwargs)
        self._add_tokens(SPECIAL_TOKENS, special_tokens=True)

    # --- vocabulary -------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (the embedding may have more rows)."""
        return int(self.tokenizer.n_vocab)

    def __len__(self) -> int:
        return self.vocab_size

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Every token as a string (regular ones byte-level) -> its id."""
        if self._vocab is None:
            self._vocab = {self._show(token): index for token, index in self._ids.items()}
            self._vocab |= self.special_tokens
        return dict(self._vocab)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Mark Qwen's own special tokens as such for transformers; the vocabulary never grows.

        Raises:
            ValueError: any other token.
        """
        for token in new_tokens or []:
            index = self.special_tokens.get(str(token))
            if index is None:
                raise ValueError(
                    f"Qwen's tokenizer has no special token {str(token)!r} and cannot grow; use "
                    f"one of {ENDOFTEXT}, {IM_START}, {IM_END}, <|extra_0|> to <|extra_204|>, or "
                    "give merges with extra_vocab_file="
                )
            self._added_tokens_decoder[index] = AddedToken(
                str(token), lstrip=False, rstrip=False, normalized=False, special=True
            )
            self._added_tokens_encoder[str(token)] = index
        self._update_total_vocab_size()
        return 0

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the ranks file, and the additional merges if there are any; returns the paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        written = []
        for kind, ranks in (
            ("vocab_file", self.mergeable_ranks),
            ("extra_vocab_file", self.extra_ranks),
        ):
            if not ranks:
                continue
            path = os.path.join(save_directory, prefix + VOCAB_FILES_NAMES[kind])
            with open(path, "wb") as file:
                for token, rank in ranks.items():
                    file.write(base64.b64encode(token) + f" {rank}\n".encode())
            written.append(path)
        return tuple(written)

    # --- text to ids ------------------------------------------------------------------------

    def tokenize(
        self,
        text: str,
        allowed_special: Literal["all"] | Collection[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = (),
        **kwargs: Any,
    ) -> list[str]:
        """Text -> tokens as strings. `tokenizer(text)` and `encode` take the same two arguments.

        Args:
            allowed_special: special tokens to recognise in the text; `set()` for none, which is
                the right choice for text from outside.
            disallowed_special: special tokens whose surface form is refused; "all" means all that
                are not allowed.

        Raises:
            ValueError: the text has the surface form of a disallowed special token.
        """
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            allowed_special = set()
        ids = self.tokenizer.encode(
            unicodedata.normalize("NFC", text),
            allowed_special=allowed_special if allowed_special == "all" else set(allowed_special),
            disallowed_special=disallowed_special,
        )
        return [self._convert_id_to_token(index) for index in ids]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: `sanitize_control_tokens=True`, and this transformers would pass over it.
        """
        base = super().apply_chat_template
        name = "sanitize_control_tokens"
        if kwargs.get(name) and name not in inspect.signature(base).parameters:
            raise ValueError(
                f"apply_chat_template: this transformers ({transformers.__version__}) does not "
                f"know {name} and would read special tokens in messages as such. Update "
                "transformers to 5.20 or later, or use make_context of qwen_generation_utils.py"
            )
        return base(conversation, *args, **kwargs)

    def _convert_token_to_id_with_added_voc(self, token: str | bytes) -> int | None:
        return self._convert_token_to_id(token)

    def _convert_token_to_id(self, token: str | bytes) -> int | None:
        if isinstance(token, bytes):
            return self._ids.get(token)
        if token in self.special_tokens:
            return self.special_tokens[token]
        try:
            return self._ids.get(bytes(CHAR_TO_BYTE[char] for char in token))
        except KeyError:  # not byte-level: the text itself
            return self._ids.get(_utf8(unicodedata.normalize("NFC", token)))

    # --- ids to text ------------------------------------------------------------------------

    def _show(self, token: bytes) -> str:
        return "".join([BYTE_TO_CHAR[byte] for byte in token])

    def _convert_id_to_token(self, index: int) -> str:
        token = self._bytes.get(index)
        if token is not None:
            return self._show(token)
        special = self._special_by_id.get(index)
        if special is None:
            raise ValueError(f"no token has id {index}: ids end at {self.vocab_size - 1}")
        return special

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Ids -> tokens as strings; a single id gives a single token.

        Raises:
            ValueError: an id that stands for no token.
        """
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        return [
            self._convert_id_to_token(int(index))
            for index in ids
            if not (skip_special_tokens and int(index) in self._special_by_id)
        ]

    def convert_tokens_to_string(self, tokens: list[str | bytes]) -> str:
        """Tokens (byte-level strings, special tokens, or `bytes`) -> text."""
        parts = []
        for token in tokens:
            if isinstance(token, str):
                if token not in self.special_tokens and all(char in CHAR_TO_BYTE for char in token):
                    token = bytes(CHAR_TO_BYTE[char] for char in token)
                else:
                    token = _utf8(token)
            parts.append(token)
        return b"".join(parts).decode("utf-8", errors=self.errors)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Ids -> text. Nothing is cleaned up or stripped.

        Args:
            skip_special_tokens: drop special tokens, and ids behind them that stand for nothing
                (the padding rows of the embedding).
            errors: instead of the tokenizer's own `errors`.

        Raises:
            ValueError: with "strict", bytes that are not UTF-8 or an id that stands for nothing.
        """
        errors = self.errors if errors is None else errors
        parts = []
        for index in [token_ids] if isinstance(token_ids, int) else token_ids:
            token = self._bytes.get(index)
            if token is not None:
                parts.append(token)
            elif not skip_special_tokens:
                special = self._special_by_id.get(index)
                if special is None and errors == "strict":
                    raise ValueError(f"no token has id {index}: ids end at {self.vocab_size - 1}")
                unknown = "\ufffd" if errors == "replace" else ""
                parts.append((unknown if special is None else special).encode())
        return b"".join(parts).decode("utf-8", errors=errors)
