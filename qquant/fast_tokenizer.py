"""Original Qwen's tokenizer as a `tokenizers` file, so that no reader needs its Python code.

The original is a ranks file read by `tiktoken` (`models/qwen/tokenization_qwen.py`); today's
readers want `tokenizer.json`. The two think of byte-pair merging differently: tiktoken joins any
two neighbours whose bytes together are a token, lowest rank first, while `tokenizers` joins the
pairs of a list, in the order of the list. So the list has, for every token in the order of ranks,
*every* way to cut it into two tokens; with one way only (which is what is often published) a text
that reaches a token by another would come out otherwise.

What else decides ids: NFC before anything, the original's split pattern, and special tokens found
in the *normalised* text. The last is why they are marked `normalized`: in "<|im_start|>" followed
by U+0338 the last character composes to another one, and the original sees no special token there.

A file says all this, but transformers 5 does not take it whole: for `model_type: qwen2` it builds
`Qwen2Tokenizer` whatever class is named, keeps vocabulary and merges, and puts its own normaliser
and pattern in (they are the original's). So nothing here may rest on anything else: not on
`ignore_merges`, by which a piece that is a token would be found without merges. tiktoken does find
it so. Ranks with a token that merges do not reach are therefore refused by name; Qwen's have none.

Every tokenizer made here is compared with the original: each token by itself, and text made of
them. What stays different is told in docs/CONVERT.md.
"""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .directory import read_json
from .errors import CheckpointError
from .export import write_json
from .models.tokenizer import tokenizer_errors

RANKS, EXTRA = "qwen.tiktoken", "qwen_extra.tiktoken"
TEMPLATE = "chat_template.jinja"
FILES = ("tokenizer.json", "tokenizer_config.json")
_SAMPLE = 2000  # texts that the two are compared on
_TOKENS = 12  # in each, at the most


def original_tokenizer(source: Checkpoint) -> Any | None:
    """The `QWenTokenizer` of an original Qwen directory; None where it has no ranks file.

    Raises:
        CheckpointError: the ranks file is broken or leads out of the directory.
    """
    from .models.qwen.tokenization_qwen import QWenTokenizer

    if not (source.path / RANKS).is_file():
        return None
    extra = source.file(EXTRA) if (source.path / EXTRA).is_file() else None
    with tokenizer_errors(f"{RANKS} of {source.path.name}"):
        return QWenTokenizer(source.file(RANKS), extra_vocab_file=extra)


def fast_tokenizer(original: Any) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of `original`, a `QWenTokenizer`.

    Raises:
        CheckpointError: a token cannot be had by merges, or ids differ on text made of tokens; the
            token or the text is named.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    from .models.qwen.tokenization_qwen import BYTE_TO_CHAR, PAT_STR

    ids: dict[bytes, int] = original.mergeable_ranks | original.extra_ranks
    shown = {token: "".join([BYTE_TO_CHAR[byte] for byte in token]) for token in ids}
    vocab = {shown[token]: index for token, index in ids.items()}
    if original.extra_ranks:  # ids behind the special tokens: so those need theirs said
        vocab |= original.special_tokens
    merges = [
        (shown[token[:cut]], shown[token[cut:]])
        for token, _ in sorted(ids.items(), key=lambda item: item[1])
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    model = BPE(vocab=vocab, merges=merges)
    for token, text in shown.items():
        if len(found := model.tokenize(text)) != 1:
            raise CheckpointError(
                f"{RANKS}: token {ids[token]}, {token!r}",
                expected="one that merging two tokens at a time arrives at",
                got=f"{len(found)} tokens that do not merge",
                cure="No tokenizer.json can hold it: keep the original directory and its code",
            )
    made = Tokenizer(model)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PAT_STR), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=True) for token in original.special_tokens]
    )
    _compare(made, original)
    return made


def _compare(made: Any, original: Any) -> None:
    """Encodes text made of the original's own tokens both ways.

    Raises:
        CheckpointError: ids differ.
    """
    encoding = original.tokenizer
    tokens = list(original.mergeable_ranks | original.extra_ranks)
    rng = random.Random(0)
    texts = [*original.special_tokens, "e\u0301\u0338 <|im_end|>\u0338"]
    for _ in range(_SAMPLE):
        drawn = b"".join(rng.choices(tokens, k=rng.randint(1, _TOKENS)))
        texts.append(drawn.decode("utf-8", "ignore"))
    for text in texts:
        want = encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        got = made.encode(text, add_special_tokens=False).ids
        if got != want:
            raise CheckpointError(
                f"{RANKS}: {text!r}",
                expected=f"the ids {want}, as tiktoken has them",
                got=f"{got} from the tokenizers library",
                cure="These ranks have no such file: keep the original directory and its code",
            )


def tokenizer_config(original: Any, source: Checkpoint, longest: int, chat: bool) -> dict[str, Any]:
    """tokenizer_config.json beside the file.

    Args:
        original: the `QWenTokenizer`.
        source: its directory, whose own files may have a chat template and say whether special
            tokens are read in text.
        longest: tokens the model takes, the most that `model_max_length` may be.
        chat: whether answers end with `<|im_end|>`; else texts end with `<|endoftext|>`.

    Raises:
        CheckpointError: the source's tokenizer_config.json is no JSON object, or its
            chat_template.jinja no UTF-8 or out of the directory.
    """
    from .models.qwen.tokenization_qwen import CHAT_TEMPLATE, ENDOFTEXT, IM_END

    name = "tokenizer_config.json"
    theirs = read_json(source.path, name) if (source.path / name).is_file() else {}
    length = theirs.get("model_max_length")
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= longest:
        length = longest
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": length,
        "eos_token": IM_END if chat else ENDOFTEXT,
        # Other than the end, as batches need it to be.
        "pad_token": ENDOFTEXT if chat else "<|extra_0|>",
        "bos_token": None,
        "unk_token": None,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": theirs.get("split_special_tokens") is True,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": _template(source) or theirs.get("chat_template") or CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": True,
            }
            for token, index in original.special_tokens.items()
        },
    }


def _template(source: Checkpoint) -> str | None:
    """chat_template.jinja, which transformers reads before any other place; None without it."""
    if not (source.path / TEMPLATE).is_file():
        return None
    try:
        return source.file(TEMPLATE).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{source.path.name}: {TEMPLATE}", expected="UTF-8", got=str(error)
        ) from error


def write_tokenizer(
    original: Any, source: Checkpoint, target: Path, longest: int, chat: bool
) -> None:
    """Writes `FILES` into `target`; arguments as in `tokenizer_config`.

    Raises:
        CheckpointError: as in `fast_tokenizer` and `tokenizer_config`.
    """
    fast_tokenizer(original).save(str(target / FILES[0]), pretty=False)
    write_json(target / FILES[1], tokenizer_config(original, source, longest, chat))
