"""Byte-level BPE for the demo checkpoint, written as a tiktoken ranks file like Qwen's.

Owns the training of the merges (by the `tokenizers` library), their translation to ranks and the
`base64 rank` file.  A ranks file says less than a merge list: tiktoken merges the adjacent pair
whose *joined bytes* have the lowest rank, wherever the pair came from.  So every merge must make a
new byte string, which is checked here; a test compares the two on held-out text.

Leaves out special tokens: as with Qwen they are not in the file, their ids follow the last rank.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text before merging (QWenTokenizer's `PAT_STR`)."""

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
"""Qwen's special tokens in id order; the first id is the number of ranks."""


def train_bpe(texts: Iterable[str], ranks: int) -> Tokenizer:
    """Train `ranks` byte-level tokens (256 bytes and the merges) on texts cut by Qwen's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=ranks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def to_ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The tokenizer's vocabulary as tiktoken ranks: bytes 0..255 first, then the merges in order.

    Raises `ValueError` when the vocabulary is not 256 bytes and distinct merges.
    """
    letters = _byte_letters()
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(letters[c] for c in token) for token, _ in ordered if len(token) > 1]
    tokens = [bytes([value]) for value in range(256)] + merged
    if len(set(tokens)) != len(tokens) or len(tokens) != len(ordered):
        raise ValueError(
            f"expected 256 bytes and distinct merges, got {len(ordered)} tokens; train on more text"
        )
    return {token: rank for rank, token in enumerate(tokens)}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Write `base64 rank` lines in rank order, the form tiktoken and QWenTokenizer read."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines), encoding="ascii")


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a ranks file back."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The tiktoken encoding of the ranks with Qwen's pattern and special tokens."""
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding(
        "qwen-demo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-in letter for each byte: printable bytes stand for themselves, the
    others take the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(value): value for value in printable}
    rest = [value for value in range(256) if value not in set(printable)]
    letters.update({chr(0x100 + i): value for i, value in enumerate(rest)})
    return letters
