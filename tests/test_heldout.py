"""What models are measured on is what the file says, in its order and in the chat format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from qwen_tiny import N_RANKS, write_checkpoint

from qquant.calibration.render import chatml_text
from qquant.checkpoint import Checkpoint
from qquant.errors import InputError, SpecError
from qquant.heldout import held_out_rows, read_held_out
from qquant.models.tokenizer import load_tokenizer

CHAT = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("Who?", "The fox."), ("<|im_end|>?", "No."), ("Where?", "There."))
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_is_its_beginning(tokenizer: Any, tmp_path: Path, packed: bool) -> None:
    text = "\n\n".join(f"Paragraph {i} of the user." for i in range(3000))
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    data = read_held_out(str(path), chat=False)
    ids = held_out_rows(data, tokenizer, "qwen", 30, 100)
    assert ids.shape == (3, 30)  # 100 tokens, in whole rows
    assert ids.flatten().tolist() == tokenizer.encode(text)[:90]
    whole = held_out_rows(data, tokenizer, "qwen", 30, 10**9)
    assert whole.numel() == len(tokenizer.encode(text)) // 30 * 30


def test_conversations_in_order_and_in_the_chat_format(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in CHAT))
    data = read_held_out(str(path), chat=True)
    ids = held_out_rows(data, tokenizer, "qwen", 2, 10**6).flatten().tolist()
    expected = "".join(chatml_text(d.messages) + "<|endoftext|>" for d in data.documents)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown in (expected, expected.removesuffix("<|endoftext|>"))  # whole rows of two
    # A marker inside a turn is text; three turns of each conversation end in a real one.
    assert ids.count(N_RANKS + 2) == 9 and ids.count(N_RANKS) in (2, 3)
    short = held_out_rows(data, tokenizer, "qwen", 10, 35)
    assert short.flatten().tolist() == ids[:30]


def test_records_of_text_are_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "user"}\n{"text": "the"}')
    ids = held_out_rows(read_held_out(str(path), chat=False), tokenizer, "qwen", 2, 100)
    user, the = tokenizer.encode("user"), tokenizer.encode("the")
    stream = [*user, N_RANKS, *the, N_RANKS]
    assert ids.flatten().tolist() == stream[: len(stream) // 2 * 2]


def test_refusals(tokenizer: Any, tmp_path: Path) -> None:
    text, chat, broken = (tmp_path / name for name in ("a.txt", "a.json", "b.json"))
    text.write_text("The fox.")
    chat.write_text(json.dumps(CHAT))
    broken.write_text('{"a"')
    for path, as_chat, said in (
        (text, True, "expected conversations, got text. Give it as --text"),
        (chat, False, "expected text, got conversations. Give it as --chat"),
        (broken, False, "not JSON"),
        (tmp_path / "no.txt", False, "expected a file"),
        (tmp_path, False, "expected a file"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            read_held_out(str(path), chat=as_chat)
        assert "builtin" not in str(caught.value)
    data = read_held_out(str(text), chat=False)
    with pytest.raises(InputError, match="at least 100 tokens"):
        held_out_rows(data, tokenizer, "qwen", 100, 1000)
    with pytest.raises(InputError, match="tokenizer"):
        held_out_rows(data, None, "qwen", 2, 1000)
    with pytest.raises(SpecError, match="seqlen"):
        held_out_rows(data, tokenizer, "qwen", 1, 1000)
