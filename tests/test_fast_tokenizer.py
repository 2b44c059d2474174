"""The converted tokenizer gives the original's ids, through the class that transformers picks."""

from __future__ import annotations

import base64
import gzip
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_tiny import GOLDEN, qwen_ranks, write_checkpoint
from transformers import AutoTokenizer

from qquant.calibration.sources import read_source
from qquant.checkpoint import Checkpoint
from qquant.errors import CheckpointError
from qquant.fast_tokenizer import fast_tokenizer, original_tokenizer, write_tokenizer
from qquant.models.qwen.qwen_generation_utils import make_context
from qquant.models.qwen.tokenization_qwen import QWenTokenizer
from qquant.native import convert_to_native

DEMO = Path(__file__).parents[1] / "demo" / "qwen-demo"
SHARED = json.loads((GOLDEN / "tokenizer_shared.json").read_text())
CHATS = json.loads((GOLDEN / "chat_context.json").read_text())

# Written for this test.
SAMPLE = [
    "Hello world, it's 2024! We'll see; they'RE here and I'D say 'tis 1,234.56e-7.",
    "def f(x):\n    return {k: v for k, v in x.items() if v is not None}\n\n\n# end\t\t\n",
    "今天天气很好，我们去公园散步吧。《红楼梦》共一百二十回！１２３ＡＢＣ",
    "これは日本語の文章です。カタカナ、ひらがな、漢字。한국어 문장입니다.",
    "Ça marche déjà? Größe, naïve, Ωμέγα, Привет мир, שלום, مرحبا بالعالم, हिन्दी, ไทย",
    "e\u0301 cafe\u0301 \u212b \ufb01 \u1100\u1161\u11a8 \u0958 \U0001d15e",
    "emoji 😀👩‍👩‍👧‍👦🇨🇳 and \u200b\u200d\ufeff zero width",
    "  leading\n\n  \n mixed \r\n\r\n line ends \u2028 \u00a0 nbsp   trailing   ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|extra_0|><|extra_204|><|extra_205|>",
    "<|im_start|>\u0338 <|im_start|\u0338> \u0338<|im_end|> <|im_end|",
    "it'ſ 'S 'T \u212a 'lL x'Vey",
    "\x00\x01\x7f\x80\x9f control",
    "",
    " ",
    "\n",
]
RUNS = ["a", " ", "\n", "=", "哈", "é", "😀", "ab", "0", "\u0301"]


class Pair:
    """The original, and its conversion as transformers loads it."""

    def __init__(self, root: Path, ranks: Path) -> None:
        root.mkdir()
        shutil.copyfile(ranks, root / "qwen.tiktoken")
        (root / "config.json").write_text('{"model_type": "qwen2"}')
        self.original = QWenTokenizer(root / "qwen.tiktoken")
        source = Checkpoint(root, {}, {}, {}, None)
        write_tokenizer(self.original, source, root, 32768, chat=True)
        self.fast = AutoTokenizer.from_pretrained(root, local_files_only=True)

    def check(self, text: str) -> int:
        """Ids and text are the same with and without special tokens; how many ids."""
        want = self.original.encode(text)
        assert self.fast.encode(text) == want, text
        plain = self.original.encode(text, allowed_special=set())
        assert self.fast.encode(text, split_special_tokens=True) == plain, text
        assert self.fast.decode(want) == self.original.decode(want)
        return len(want)


def conversations(pair: Pair) -> int:
    """Checks every message of the built-in set, which has 15 languages; how many ids."""
    chats = read_source("builtin").documents
    return sum(pair.check(turn.content) for chat in chats for turn in chat.messages)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("demo") / "tokenizer", DEMO / "qwen.tiktoken")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("qwen") / "tokenizer", qwen_ranks())


# --- any ranks ------------------------------------------------------------------------------------


def test_transformers_picks_a_fast_class_with_our_specials(demo: Pair) -> None:
    assert demo.fast.is_fast and len(demo.fast) == len(demo.original)
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"):
        assert demo.fast.convert_tokens_to_ids(name) == demo.original.special_tokens[name]
    assert (demo.fast.eos_token, demo.fast.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert demo.fast.padding_side == "left" and demo.fast.model_max_length == 32768


@pytest.mark.parametrize("text", SAMPLE, ids=lambda text: repr(text[:20]))
def test_sample_has_the_originals_ids(demo: Pair, text: str) -> None:
    demo.check(text)


@pytest.mark.parametrize("text", RUNS, ids=repr)
def test_long_runs_have_the_originals_ids(demo: Pair, text: str) -> None:
    for length in (2, 3, 17, 128, 129, 257, 5000):
        demo.check(text * length)


def test_many_characters_have_the_originals_ids(demo: Pair) -> None:
    """Every 61st code point of all planes."""
    for code in range(0, 0x110000, 61):
        if not 0xD800 <= code < 0xE000:
            text = f"a{chr(code)}b {chr(code)}"
            assert demo.fast.encode(text) == demo.original.encode(text), hex(code)


def test_many_languages_have_the_originals_ids(demo: Pair) -> None:
    assert conversations(demo) > 100_000


@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_any_text_has_the_originals_ids(demo: Pair, text: str) -> None:
    demo.check(text)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 30))
def test_any_row_of_tokens_has_the_originals_ids(demo: Pair, seed: int, count: int) -> None:
    """Whatever bytes the tokens are: boundaries that merging has to find again."""
    drawn = random.Random(seed).choices(list(demo.original.mergeable_ranks), k=count)
    demo.check(b"".join(drawn).decode("utf-8", "ignore"))


def test_decoding_skips_specials_and_mends_cut_characters(demo: Pair) -> None:
    ids = [*demo.original.encode("naïve 你"), demo.original.im_end_id]
    assert demo.fast.decode(ids, skip_special_tokens=True) == "naïve 你"
    for cut in range(len(ids)):
        want = demo.original.decode(ids[:cut], skip_special_tokens=True)
        assert demo.fast.decode(ids[:cut], skip_special_tokens=True) == want


def test_where_the_two_part_ways(demo: Pair) -> None:
    """As docs/CONVERT.md says."""
    with pytest.raises((TypeError, UnicodeEncodeError)):
        demo.fast.encode("half a pair: \ud800")
    assert demo.original.decode(demo.original.encode("\ud800")) == "\ufffd"
    nothing = [len(demo.original) + 5]
    assert (demo.fast.decode(nothing), demo.original.decode(nothing)) == ("", "\ufffd")
    # The class marks the tokens for end and padding anew, not as the file has them.
    text, file = "<|im_end|>\u0338", fast_tokenizer(demo.original)
    assert file.encode(text).ids == demo.original.encode(text)
    assert demo.fast.encode(text)[0] == demo.original.im_end_id != demo.original.encode(text)[0]


def test_saved_again_it_is_the_same(demo: Pair, tmp_path: Path) -> None:
    demo.fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in SAMPLE:
        assert again.encode(text) == demo.fast.encode(text)
    assert again.chat_template == demo.fast.chat_template


def test_batches_pad_left(demo: Pair) -> None:
    batch = demo.fast(["a", "def f"], padding=True)
    assert batch["input_ids"][0][0] == demo.original.eod_id and batch["attention_mask"][0][0] == 0


def test_chat_text_that_begins_with_a_line_end_is_said_to_differ(demo: Pair) -> None:
    """The original encodes a message apart from what surrounds it; a template makes one text."""
    for content, same in (("Hi", True), (" x", True), ("123", True), ("\n\nHi", False)):
        ids = demo.fast.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )["input_ids"]
        text, want = make_context(
            demo.original, content, None, "You are a helpful assistant.", 6144
        )
        assert demo.fast.decode(ids) == text
        assert (ids == want) is same


def test_additional_merges_keep_their_ids(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "src")
    first = len(QWenTokenizer(path / "qwen.tiktoken"))
    lines = [(b"ab", first), (b"abc", first + 1)]
    extra = b"".join(base64.b64encode(t) + f" {i}\n".encode() for t, i in lines)
    (path / "qwen_extra.tiktoken").write_bytes(extra)
    original = original_tokenizer(Checkpoint.open(path))
    made = convert_to_native(path, tmp_path / "dst").path
    fast = AutoTokenizer.from_pretrained(made, local_files_only=True)
    for text in ("abc the user<|im_end|>", "ab abcab<|extra_204|>", "你\n\n"):
        assert fast.encode(text) == original.encode(text)
    assert first + 1 in fast.encode("abc")


def test_a_token_that_merges_do_not_reach_is_refused_by_name(tmp_path: Path) -> None:
    """tiktoken finds " the" as a whole; with "th" first, merging stops at " ", "th", "e"."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b" t", b"he", b" the"]
    lines = [base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    original = QWenTokenizer(tmp_path / "qwen.tiktoken")
    assert original.encode(" the") == [259]
    with pytest.raises(CheckpointError, match=r"token 259, b' the'.*merging two tokens"):
        fast_tokenizer(original)


# --- Qwen's own ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHARED["cases"], ids=lambda case: repr(case["text"][:20]))
def test_golden_ids(qwen: Pair, case: dict[str, Any]) -> None:
    assert qwen.fast.encode(case["text"]) == case["input_ids"]
    plain = qwen.fast.encode(case["text"], split_special_tokens=True)
    assert plain == case["no_special_ids"]
    assert qwen.fast.decode(case["input_ids"]) == case["decoded"]


@pytest.mark.parametrize("case", CHATS, ids=lambda case: case["query"])
def test_golden_chats(qwen: Pair, case: dict[str, Any]) -> None:
    if case["max_window_size"] < 100:
        case = case | {"history": case["history"][1:]}  # dropping turns is the caller's
    messages = [{"role": "system", "content": case["system"]}]
    for query, response in case["history"]:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    messages.append({"role": "user", "content": case["query"]})
    options = {"add_generation_prompt": True}
    assert qwen.fast.apply_chat_template(messages, tokenize=False, **options) == case["raw_text"]
    ids = qwen.fast.apply_chat_template(messages, **options)["input_ids"]
    assert ids == case["context_tokens"]


def texts(root: Path) -> Iterator[str]:
    """English and Chinese Wikipedia, code, chats and instructions in both languages."""
    yield (root / "text" / "wikitext2-valid.txt").read_text()
    for name in ("text/cmrc2018_dev_paragraphs.txt.gz", "eval/HumanEval.jsonl.gz"):
        with gzip.open(root / name, "rt", encoding="utf-8") as file:
            yield file.read()
    for path in sorted((root / "calibration").iterdir()):
        yield path.read_text()


def test_large_sample_has_the_originals_ids(qwen: Pair) -> None:
    """A quarter of the texts: the whole has 1,077,941 tokens and takes four times as long."""
    total = 0
    for text in texts(qwen_ranks().parent):
        for start in range(0, len(text), 8000):
            piece = text[start : start + 2000]
            want = qwen.original.tokenizer.encode(piece, allowed_special="all")
            assert qwen.fast.encode(piece) == want
            total += len(want)
    assert total > 200_000


def test_many_languages_have_the_originals_ids_with_qwens_ranks(qwen: Pair) -> None:
    assert conversations(qwen) > 50_000


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_with_qwens_ranks(qwen: Pair, text: str) -> None:
    qwen.check(text)


@pytest.mark.parametrize(
    "text", [*SAMPLE, *(run * 3000 for run in RUNS)], ids=lambda t: repr(t[:9])
)
def test_sample_with_qwens_ranks(qwen: Pair, text: str) -> None:
    qwen.check(text)
