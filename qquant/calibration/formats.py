"""Record layouts of calibration data: one JSON record in, documents out.

Owns the knowledge of how the field writes conversations down: Qwen's SFT json and ShareGPT (one
layout, two sets of role names), Alpaca, OpenAI messages, prompt-only turns as MT-bench has them,
and a plain `text` field. The layout is told by the keys of a record, never by the file's name,
and one source holds one layout: a record of another kind is refused with its number and its keys,
because half a file that went unread would be a quiet loss of calibration quality.

Leaves out: reading files (`sources`) and special tokens (`render`). Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CalibrationError

# Role names found in the wild -> the four that are rendered. Qwen's own run_gptq.py knows `user`
# and `assistant` only; the others are ShareGPT's and its descendants', and OpenAI's.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_HALF_PAIR = re.compile("[\ud800-\udfff]")
LAYOUTS = (
    '{"conversations": [{"from", "value"}]} (Qwen SFT, ShareGPT), '
    '{"messages": [{"role", "content"}]} (OpenAI), '
    '{"instruction", "output"} (Alpaca), {"turns": [text]} (prompts only) or {"text"}'
)


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: its text, as it was found.
        calls: `(name, arguments as JSON text)` of the functions an assistant turn calls.
    """

    role: str
    content: str
    calls: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Text:
    """A document without turns."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation, oldest turn first; never empty."""

    messages: tuple[Message, ...]


Document = Text | Chat


@dataclass
class Records:
    """What a run of records held.

    Attributes:
        format: `qwen-sft`, `sharegpt`, `openai`, `alpaca`, `prompts` or `text`.
        documents: in the order they were found.
        skipped: records with nothing to read in them (no turns, only white space).
    """

    format: str
    documents: list[Document] = field(default_factory=list)
    skipped: int = 0


def layout_of(record: object) -> str | None:
    """The layout of one record, or None when it is none that is known."""
    if not isinstance(record, Mapping):
        return None
    if isinstance(record.get("conversations"), list):
        return "conversations"
    if isinstance(record.get("messages"), list):
        return "openai"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if isinstance(record.get("turns"), list):
        return "prompts"
    if isinstance(record.get("text"), str):
        return "text"
    return None


def read_records(records: Iterable[object], where: str, unit: str = "record") -> Records:
    """Turn `records`, all of one layout, into documents.

    Args:
        where: the file or data set, for messages.
        unit: what a record is called there (`record`, or `line` in jsonl, where the number helps).

    Raises:
        CalibrationError: no records; a record of no known layout, or of another than the first;
            a turn whose role or content cannot be used. All but the first name the record's number
            (counted from 1).
    """
    out: Records | None = None
    first: str | None = None
    sharegpt = False
    for number, record in enumerate(records, 1):
        at = f"{where}, {unit} {number}"
        layout = layout_of(record)
        if layout is None or (first is not None and layout != first):
            cure = "Keep one of these layouts per file; plain text needs no JSON around it."
            if isinstance(record, Mapping) and {"role", "content"} <= set(record):
                cure = 'This looks like bare turns: put each conversation into {"messages": [...]}.'
            raise CalibrationError(
                f"{at} is in no layout that can be read" if layout is None else f"{at} differs",
                expected=LAYOUTS if layout is None else f"{first!r} like {unit} 1",
                got=_keys(record) if layout is None else f"{layout!r} ({_keys(record)})",
                cure=cure,
            )
        first = layout
        out = out or Records(layout)
        assert isinstance(record, Mapping)
        documents = _READERS[layout](record, at)
        if layout == "conversations":
            sharegpt = sharegpt or "system" in record or _foreign_to_qwen(record)
        out.documents += documents
        out.skipped += not documents
    if out is None:
        raise CalibrationError(
            f"{where} holds no records",
            expected=LAYOUTS,
            got="an empty list",
            cure="Give a file with data, or use the builtin set (--calib builtin).",
        )
    if first == "conversations":
        out.format = "sharegpt" if sharegpt else "qwen-sft"
    return out


def _keys(record: object) -> str:
    if isinstance(record, Mapping):
        names = ", ".join(repr(str(k)) for k in list(record)[:12])
        return f"keys {names}" if names else "an object without keys"
    return f"a JSON {type(record).__name__}"


def _foreign_to_qwen(record: Mapping[str, Any]) -> bool:
    return any(turn["from"] not in ("user", "assistant") for turn in record["conversations"])


def _role(name: object, at: str) -> str:
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise CalibrationError(
            f"{at}: role {name!r} is unknown",
            expected=f"one of {', '.join(ROLES)}",
            cure="Rename or remove that turn.",
        )
    return ROLES[name.lower()]


def _text(value: object, key: str, at: str) -> str:
    """A string, or a list of OpenAI content parts that are all text."""
    if isinstance(value, str):
        return _whole(value, key, at)
    if isinstance(value, list):
        parts = []
        for part in value:
            if isinstance(part, str):
                parts.append(part)
                continue
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            text = part.get("text") if isinstance(part, Mapping) else None
            if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
                raise CalibrationError(
                    f"{at}: {key!r} has a part of type {kind!r}",
                    expected="text parts",
                    cure="Remove the record: a text model cannot read it.",
                )
            parts.append(text)
        return _whole("".join(parts), key, at)
    raise CalibrationError(
        f"{at}: {key!r} is not text",
        expected="a string",
        got=type(value).__name__,
        cure="Mend or remove the record.",
    )


def _whole(text: str, key: str, at: str) -> str:
    """`text`, unless it has half a surrogate pair, which JSON can escape and no encoding holds."""
    if not text.isascii() and (half := _HALF_PAIR.search(text)):
        raise CalibrationError(
            f"{at}: {key!r} is not text at character {half.start()}",
            expected="whole characters",
            got=f"half a surrogate pair, \\u{ord(half[0]):04x}",
            cure="Mend or remove the record: it was cut within a character.",
        )
    return text


def _turns(record: Mapping[str, Any], list_key: str, who: str, what: str, at: str) -> list[Message]:
    turns = []
    for i, turn in enumerate(record[list_key]):
        if (
            not isinstance(turn, Mapping)
            or who not in turn
            or not ({what, "tool_calls"} & set(turn))
        ):
            raise CalibrationError(
                f"{at}: turn {i + 1} of {list_key!r} lacks {who!r} or {what!r}",
                expected=f'{{"{who}": ..., "{what}": ...}}',
                got=_keys(turn),
                cure="Mend or remove the record.",
            )
        role = _role(turn[who], f"{at}, turn {i + 1}")
        calls = _calls(turn.get("tool_calls") or (), f"{at}, turn {i + 1}")
        value = turn.get(what)
        text = "" if value is None and calls else _text(value, what, f"{at}, turn {i + 1}")
        turns.append(Message(role, text, calls))
    return turns


def _calls(raw: object, at: str) -> tuple[tuple[str, str], ...]:
    calls = []
    for call in raw if isinstance(raw, (list, tuple)) else [raw]:
        body = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise CalibrationError(
                f"{at}: 'tool_calls' has an entry without a function name",
                expected='{"function": {"name", "arguments"}}',
                got=_keys(call),
                cure="Mend or remove the record.",
            )
        arguments = body.get("arguments", "{}")
        if not isinstance(arguments, str):
            try:
                arguments = json.dumps(arguments, ensure_ascii=False)
            except RecursionError:
                raise CalibrationError(
                    f"{at}: the arguments of a function call are nested too deep",
                    cure="Mend or remove the record.",
                ) from None
        with contextlib.suppress(ValueError, RecursionError):  # templates are given the object
            _whole(json.dumps(json.loads(arguments), ensure_ascii=False), "arguments", at)
        calls.append((_whole(body["name"], "name", at), _whole(arguments, "arguments", at)))
    return tuple(calls)


def _chat(messages: list[Message]) -> list[Document]:
    """One document, or none where nothing is said.

    Turns before the first `user` (or `system`) turn are dropped, as Qwen's run_gptq.py drops a
    leading assistant turn and as cut-up ShareGPT records need it.
    """
    messages = _from_question(messages)
    said = [m for m in messages if m.role != "system" and (m.content.strip() or m.calls)]
    return [Chat(tuple(messages))] if said else []


def _from_question(messages: list[Message]) -> list[Message]:
    while messages and messages[0].role in ("assistant", "tool"):
        messages = messages[1:]
    return messages


def _conversations(record: Mapping[str, Any], at: str) -> list[Document]:
    messages = _from_question(_turns(record, "conversations", "from", "value", at))
    system = record.get("system")
    if (
        isinstance(system, str)
        and system.strip()
        and (not messages or messages[0].role != "system")
    ):
        messages.insert(0, Message("system", _whole(system, "system", at)))
    return _chat(messages)


def _openai(record: Mapping[str, Any], at: str) -> list[Document]:
    return _chat(_turns(record, "messages", "role", "content", at))


def _alpaca(record: Mapping[str, Any], at: str) -> list[Document]:
    messages = []
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        messages.append(Message("system", _whole(system, "system", at)))
    history = record.get("history") or ()
    if not isinstance(history, (list, tuple)):
        raise CalibrationError(
            f"{at}: 'history' is no list", expected="[[question, answer], ...]", got=_keys(history)
        )
    for i, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CalibrationError(
                f"{at}: 'history' entry {i + 1} is no pair",
                expected="[question, answer]",
                got=_keys(pair),
                cure="Mend or remove the record.",
            )
        messages.append(Message("user", _text(pair[0], "history", at)))
        messages.append(Message("assistant", _text(pair[1], "history", at)))
    asked = [_text(record["instruction"], "instruction", at)]
    if record.get("input"):
        asked.append(_text(record["input"], "input", at))
    question = "\n".join(part for part in asked if part)
    answer = _text(record["output"], "output", at)
    messages.append(Message("user", question))
    if answer.strip():
        messages.append(Message("assistant", answer))
    return _chat(messages) if question.strip() else []


def _prompts(record: Mapping[str, Any], at: str) -> list[Document]:
    # Without the answers the turns are no conversation, so each is a document of its own.
    turns = [_text(turn, "turns", at) for turn in record["turns"]]
    return [Chat((Message("user", turn),)) for turn in turns if turn.strip()]


def _plain(record: Mapping[str, Any], at: str) -> list[Document]:
    text = _text(record["text"], "text", at)
    return [Text(text)] if text.strip() else []


_READERS = {
    "conversations": _conversations,
    "openai": _openai,
    "alpaca": _alpaca,
    "prompts": _prompts,
    "text": _plain,
}
