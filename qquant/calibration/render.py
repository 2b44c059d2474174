"""Documents to token ids, as the checkpoint's own chat format wants them.

Original Qwen has no chat template: its format is ChatML, written here from the pieces that
`make_context` of the original code encodes (role, newline, content apart from each other, the
markers as ids). Every later family brings a template, and the tokenizer renders it.

Both ways keep data from becoming structure: a `<|im_start|>` or `<|endoftext|>` inside a turn's
text is encoded as the characters it is made of. Qwen's own run_gptq.py parses it (the tokenizer's
default); that is the one deliberate difference, and `parse_special=True` gives it back. For
templates, which see the text before the tokenizer does, special forms in the content travel
through the template as private-use characters and are put back, split, afterwards.

Leaves out where documents come from (`sources`) and how rows are cut (`tokens`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import CalibrationError
from .formats import Chat, Document, Message, Text

DEFAULT_SYSTEM = "You are a helpful assistant."
IM_START, IM_END, ENDOFTEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # around the number of a special form, inside a template


class Renderer(Protocol):
    """What `tokens` needs of a format.

    Attributes:
        eot: id that separates documents.
        notes: what the user should know about how this checkpoint's documents are rendered.
    """

    eot: int
    notes: list[str]

    def ids(self, document: Document) -> list[int]:
        """Token ids of one document, without the separator."""
        ...


def renderer_for(tokenizer: Any, model_type: str, *, parse_special: bool = False) -> Renderer:
    """The renderer of a checkpoint.

    Args:
        tokenizer: for `qwen` an object with `encode(text, allowed_special=, disallowed_special=)`
            that knows the three ChatML markers (qquant's QWenTokenizer); otherwise a transformers
            tokenizer.
        model_type: of the checkpoint's config; `qwen` is original Qwen.
        parse_special: let special forms inside turns and texts become special ids, as Qwen's
            run_gptq.py does.

    Raises:
        CalibrationError: the tokenizer has no token to separate documents with.
    """
    if model_type == "qwen":
        return ChatMLRenderer(tokenizer, parse_special=parse_special)
    return TemplateRenderer(tokenizer, parse_special=parse_special)


def chatml_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """`(role, text)` of each ChatML turn of a conversation, the default system turn included.

    ChatML of original Qwen knows no tool turns: calls and results are written into the assistant's
    turn the ReAct way (`Action:`, `Action Input:`, `Observation:`), as the model was trained and as
    its openai_api.py does.

    Raises:
        CalibrationError: a tool's turn that follows no assistant turn.
    """
    turns: list[tuple[str, str]] = []
    if messages[0].role != "system":
        turns.append(("system", DEFAULT_SYSTEM))
    after_tool = False
    for message in messages:
        text = message.content
        for name, arguments in message.calls:
            text += f"{chr(10) if text else ''}Action: {name}\nAction Input: {arguments}"
        if message.role == "tool":
            if turns[-1][0] != "assistant":
                raise CalibrationError(
                    f"a 'tool' turn follows a {turns[-1][0]!r} turn",
                    expected="tool results after the assistant turn that asked for them",
                    got=repr(text[:40]),
                    cure="Mend or remove that conversation.",
                )
            turns[-1] = ("assistant", f"{turns[-1][1]}\nObservation: {text}")
            after_tool = True
            continue
        if after_tool and message.role == "assistant":
            turns[-1] = ("assistant", f"{turns[-1][1]}\n{text}")
        else:
            turns.append((message.role, text))
        after_tool = False
    return turns


def chatml_text(messages: Sequence[Message]) -> str:
    """The conversation as one ChatML string, for eyes and tests; ids come from a renderer.

    A conversation that does not end with the assistant ends with its opened turn.
    """
    turns = chatml_turns(messages)
    text = "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)
    return text if turns[-1][0] == "assistant" else f"{text}{IM_START}assistant\n"


@dataclass
class ChatMLRenderer:
    """ChatML as ids, for original Qwen (pieces as in its `make_context`)."""

    tokenizer: Any
    parse_special: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self._marker("im_start_id", IM_START)
        self.end = self._marker("im_end_id", IM_END)
        self.eot = self._marker("eod_id", ENDOFTEXT)

    def _marker(self, attribute: str, form: str) -> int:
        known = getattr(self.tokenizer, attribute, None)
        if isinstance(known, int):
            return known
        ids = self.tokenizer.encode(form, allowed_special="all", disallowed_special=())
        if len(ids) != 1:
            raise CalibrationError(
                f"the tokenizer does not know {form}",
                expected="one id",
                got=f"{len(ids)} ids",
                cure="Check the checkpoint's tokenizer files.",
            )
        return int(ids[0])

    def _encode(self, text: str) -> list[int]:
        allowed: Any = "all" if self.parse_special else set()
        return list(self.tokenizer.encode(text, allowed_special=allowed, disallowed_special=()))

    def ids(self, document: Document) -> list[int]:
        """See `Renderer.ids`."""
        if isinstance(document, Text):
            return self._encode(document.text)
        newline = self._encode("\n")
        out: list[int] = []
        turns = chatml_turns(document.messages)
        for role, content in turns:
            out += [self.start, *self._encode(role), *newline, *self._encode(content)]
            out += [self.end, *newline]
        if turns[-1][0] != "assistant":
            out += [self.start, *self._encode("assistant"), *newline]
        return out


@dataclass
class TemplateRenderer:
    """The checkpoint's own chat template, for every family that has one."""

    tokenizer: Any
    parse_special: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.special = _special_forms(self.tokenizer)
        self.template = bool(getattr(self.tokenizer, "chat_template", None))
        eot = self.tokenizer.convert_tokens_to_ids(ENDOFTEXT)
        if eot is None or eot == getattr(self.tokenizer, "unk_token_id", None):
            eot = getattr(self.tokenizer, "eos_token_id", None)
        if eot is None:
            raise CalibrationError(
                "the tokenizer has no token that ends a text",
                expected=f"{ENDOFTEXT} or an eos_token",
                cure="Check the checkpoint's tokenizer files.",
            )
        self.eot = int(eot)
        self._pattern = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")

    def _encode(self, text: str, *, parse: bool) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not parse)
        return list(ids)

    def ids(self, document: Document) -> list[int]:
        """See `Renderer.ids`."""
        if isinstance(document, Text):
            return self._encode(document.text, parse=self.parse_special)
        if not self.template:
            return self._without_template(document)
        forms: list[str] = []

        def hide(text: str) -> str:
            if self.parse_special:
                return text
            if _OPEN in text:  # the text's own private-use characters travel the same way
                text = text.replace(_OPEN, _mark(forms, _OPEN))
            return self._pattern.sub(lambda m: _mark(forms, m[0]), text)

        try:
            rendered = self.tokenizer.apply_chat_template(
                [_as_dict(m, hide) for m in document.messages],
                tokenize=False,
                add_generation_prompt=document.messages[-1].role != "assistant",
            )
        except Exception as error:  # a template may raise anything, jinja's own errors included
            raise CalibrationError(
                "the checkpoint's chat template",
                expected=f"one that takes the roles {[m.role for m in document.messages]}",
                got=str(error)[:200],
                cure="Use other calibration data, or mend the template",
            ) from error
        out: list[int] = []
        parts = re.split(f"{_OPEN}([0-9]+){_CLOSE}", rendered)
        for i, part in enumerate(parts):
            if i % 2:
                out += self._encode(forms[int(part)], parse=False)
            elif part:
                out += self._encode(part, parse=True)
        return out

    def _without_template(self, document: Chat) -> list[int]:
        """Base checkpoints of some families ship no template; they were still trained on ChatML."""
        note = "The checkpoint has no chat template: conversations were rendered as ChatML."
        if IM_START not in self.special or IM_END not in self.special:
            raise CalibrationError(
                "the checkpoint has no chat template and no ChatML tokens",
                expected="a chat_template in the tokenizer's files",
                cure="Calibrate with plain text, or add the template.",
            )
        if note not in self.notes:
            self.notes.append(note)
        out: list[int] = []
        turns = chatml_turns(document.messages)
        for role, content in turns:
            out += self._encode(f"{IM_START}{role}\n", parse=True)
            out += self._encode(content, parse=self.parse_special)
            out += self._encode(f"{IM_END}\n", parse=True)
        if turns[-1][0] != "assistant":
            out += self._encode(f"{IM_START}assistant\n", parse=True)
        return out


def _mark(forms: list[str], form: str) -> str:
    forms.append(form)
    return f"{_OPEN}{len(forms) - 1}{_CLOSE}"


def _special_forms(tokenizer: Any) -> list[str]:
    """Surface forms that the tokenizer turns into special ids, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    forms = {str(token.content) for token in added if token.special}
    forms |= {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    return sorted(forms, key=lambda form: (-len(form), form))


def _as_dict(message: Message, hide: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
    if message.calls:
        calls = []
        for name, arguments in message.calls:
            try:  # Qwen's templates write arguments as JSON, so they want the object
                value = json.loads(hide(arguments))
            except (ValueError, RecursionError):
                value = hide(arguments)
            calls.append({"type": "function", "function": {"name": hide(name), "arguments": value}})
        out["tool_calls"] = calls
    return out
