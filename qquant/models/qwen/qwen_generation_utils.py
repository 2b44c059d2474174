# SPDX-License-Identifier: Apache-2.0 (part of qquant)
"""Chatting with original Qwen: prompts in ChatML, stop words, and reading the answer back.

A conversation is laid out as

    <|im_start|>system\n...<|im_end|>\n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n

Roles and contents are encoded with no special token allowed, so nothing a user writes can open or
close a message. Old turns are dropped, oldest first, when they do not fit `max_window_size`; the
system message and the query never are.

Three habits of the original code are not kept. A stop sequence ends generation at once (a
`StoppingCriteria`) instead of forcing an end token one step later; the stop words stay in the
answer, as they did. The caller's list of stop words is left alone. The answer is decoded from the
answer's own tokens, not cut out of the whole text by the length of the prompt, which went wrong
when the prompt was not NFC.

This file travels with exported checkpoints: it imports only torch and transformers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextIteratorStreamer

DEFAULT_SYSTEM = "You are a helpful assistant."
FIXED_ATTRIBUTE = "qwen_ntk_fixed"  # true on a cache while its NTK factor is said beforehand
DEFAULT_WINDOW = 6144  # tokens; what Qwen's chat models have in generation_config.json

History = Sequence[Sequence[str]]


def make_context(
    tokenizer: Any,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = DEFAULT_WINDOW,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """Lay out a conversation for the model to answer.

    Args:
        tokenizer: a `QWenTokenizer`.
        query: what the user says now.
        history: earlier turns, oldest first, each (query, response).
        system: the system message.
        max_window_size: tokens; a turn is kept while the system message, it and all later turns
            together stay below this (the query is not counted).
        chat_format: "chatml", or "raw" for the bare query (special tokens in it are then read).

    Returns:
        The prompt as text and as token ids.

    Raises:
        ValueError: another chat format.
    """
    if chat_format == "raw":
        return query, list(tokenizer.encode(query))
    if chat_format != "chatml":
        raise ValueError(f'chat_format: expected "chatml" or "raw", got {chat_format!r}')
    newline = list(tokenizer.encode("\n", allowed_special=set()))

    def message(role: str, content: str) -> tuple[str, list[int]]:
        ids = [
            tokenizer.im_start_id,
            *tokenizer.encode(role, allowed_special=set()),
            *newline,
            *tokenizer.encode(content, allowed_special=set()),
            tokenizer.im_end_id,
        ]
        return f"<|im_start|>{role}\n{content}<|im_end|>", ids

    text, ids = message("system", system)
    turns_text, turns_ids = "", list[int]()
    for asked, answered in reversed(history or []):
        user_text, user_ids = message("user", asked)
        reply_text, reply_ids = message("assistant", answered)
        turn_ids = [*newline, *user_ids, *newline, *reply_ids]
        if len(ids) + len(turn_ids) + len(turns_ids) >= max_window_size:
            break
        turns_text = f"\n{user_text}\n{reply_text}{turns_text}"
        turns_ids = turn_ids + turns_ids
    query_text, query_ids = message("user", query)
    opening = [tokenizer.im_start_id, *tokenizer.encode("assistant", allowed_special=set())]
    return (
        f"{text}{turns_text}\n{query_text}\n<|im_start|>assistant\n",
        [*ids, *turns_ids, *newline, *query_ids, *newline, *opening, *newline],
    )


def get_stop_words_ids(chat_format: str, tokenizer: Any) -> list[list[int]]:
    """The sequences that end an answer in this format.

    Raises:
        ValueError: an unknown chat format.
    """
    if chat_format == "raw":
        return [list(tokenizer.encode("Human:")), [tokenizer.eod_id]]
    if chat_format == "chatml":
        return [[tokenizer.im_end_id], [tokenizer.im_start_id]]
    raise ValueError(f'chat_format: expected "chatml" or "raw", got {chat_format!r}')


def decode_tokens(
    tokens: Tensor | Sequence[int],
    tokenizer: Any,
    raw_text_len: int | None = None,
    context_length: int = 0,
    chat_format: str = "chatml",
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> Any:
    """The answer in a sequence of prompt and answer tokens.

    Args:
        tokens: `[length]`, prompt first, no padding before it.
        raw_text_len: accepted because Qwen's examples pass it; not needed.
        context_length: tokens of the prompt.
        chat_format: what ends the answer: "chatml" any of `<|im_start|>`, `<|im_end|>`,
            `<|endoftext|>`; "raw" only `<|endoftext|>`.
        verbose: accepted as above; nothing is printed.
        return_end_reason: also return what ended the answer, as text.
        errors: as in `bytes.decode`.

    Returns:
        The answer, stripped; with `return_end_reason` a pair.

    Raises:
        ValueError: an unknown chat format.
    """
    if chat_format not in ("chatml", "raw"):
        raise ValueError(f'chat_format: expected "chatml" or "raw", got {chat_format!r}')
    ends = {tokenizer.eod_id}
    if chat_format == "chatml":
        ends |= {tokenizer.im_start_id, tokenizer.im_end_id}
    answer = [int(token) for token in tokens][context_length:]
    reason = f"length {context_length + len(answer)}"
    for position, token in enumerate(answer):
        if token in ends:
            reason = tokenizer.decode([token])
            answer = answer[:position]
            break
    text = tokenizer.decode(answer, errors=errors).strip()
    return (text, reason) if return_end_reason else text


class StopWordsCriteria(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """Ends a row of a batch when what is new in it has one of the stop sequences.

    New is usually one token. With candidates (`prompt_lookup_num_tokens`, `assistant_model`) it is
    several, and the sequence may end before the last. One object serves one `generate`.

    Args:
        stop_words_ids: sequences of token ids.
        prompt_length: tokens before the first generated one, into which no stop sequence reaches
            back; None where it is not known, and the first call sees one new token.

    Raises:
        ValueError: `stop_words_ids` is not a list of non-empty lists of token ids.

    Attributes:
        end: length of the first row up to and with its stop sequence, once it is found.
    """

    def __init__(
        self, stop_words_ids: Sequence[Sequence[int]], prompt_length: int | None = None
    ) -> None:
        for words in stop_words_ids:
            if isinstance(words, (int, str)) or not words:
                raise ValueError(
                    "stop_words_ids: expected a list of non-empty lists of token ids, got "
                    f'{words!r} in it. For text, give [tokenizer.encode("Observation:")]'
                )
        self.stop_words_ids = [[int(token) for token in words] for words in stop_words_ids]
        self.prompt_length = prompt_length or 0
        self.seen = prompt_length
        self.end: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`input_ids` `[batch, length]` -> which rows are done, `[batch]` bool."""
        length = input_ids.shape[1]
        if self.seen is None or self.seen >= length:
            self.seen = length - 1
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for stop in range(self.seen + 1, length + 1):
            for words in self.stop_words_ids:
                if stop - self.prompt_length >= len(words):
                    there = input_ids[:, stop - len(words) : stop]
                    done |= (there == torch.tensor(words, device=input_ids.device)).all(dim=-1)
            if stop < length and self.end is None and bool(done[0]):
                self.end = stop
        self.seen = length
        return done


def prepare_chat(
    tokenizer: Any,
    query: str,
    history: History | None,
    system: str,
    stop_words_ids: Sequence[Sequence[int]] | None,
    generation_config: Any,
    kwargs: dict[str, Any],
) -> tuple[list[int], dict[str, Any]]:
    """Check a chat request and turn it into prompt ids and keywords for `generate`.

    `kwargs` may carry `max_window_size`; generation settings in it go into a copy of the generation
    config, the rest is handed to `generate`.

    Raises:
        ValueError: the model is not a ChatML chat model, or `stream=` was given.
    """
    if "stream" in kwargs:
        raise ValueError(
            "chat takes no stream=: use model.chat_stream(tokenizer, query, history=history)"
        )
    chat_format = getattr(generation_config, "chat_format", None)
    if chat_format != "chatml":
        raise ValueError(
            f'chat needs generation_config.chat_format "chatml", got {chat_format!r}. Base models '
            "have no chat format (use generate); for a chat model without generation_config.json "
            'set model.generation_config.chat_format = "chatml"'
        )
    options = dict(kwargs)
    window = options.pop("max_window_size", None)
    if window is None:
        window = getattr(generation_config, "max_window_size", None) or DEFAULT_WINDOW
    _, ids = make_context(
        tokenizer,
        query,
        history=history,
        system=system,
        max_window_size=window,
        chat_format=chat_format,
    )
    settings = copy.deepcopy(generation_config)
    options = settings.update(**options, return_dict_in_generate=False)  # gives back what is left
    if settings.stop_strings is not None:
        options.setdefault("tokenizer", tokenizer)
    options["stop_words_ids"] = [
        *(stop_words_ids or ()),
        *get_stop_words_ids(chat_format, tokenizer),
    ]
    options["generation_config"] = settings
    return ids, options


def extend_history(history: History | None, query: str, response: str) -> list[Any]:
    """A copy of `history` with one more turn."""
    return [*copy.deepcopy(list(history or [])), (query, response)]


class _SoFar(TextIteratorStreamer):  # type: ignore[misc,unused-ignore]
    """Hands out the whole text so far whenever a token added to it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.waiting_for_prompt = True
        self.open_line: list[int] = []  # tokens since the last line end
        self.finished_lines = ""
        self.text = ""

    def put(self, value: Tensor) -> None:
        if self.waiting_for_prompt:
            self.waiting_for_prompt = False
            return
        self.open_line.extend(value.flatten().tolist())
        line = self.tokenizer.decode(self.open_line, skip_special_tokens=True, errors="ignore")
        text = self.finished_lines + line
        if line.endswith("\n"):  # a whole character ends here: no need to decode this again
            self.finished_lines, self.open_line = text, []
        if text != self.text:
            self.text = text
            self.on_finalized_text(text)

    def end(self) -> None:
        self.text_queue.put(self.stop_signal)


class _Abandoned(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """Ends generation once nobody reads the stream any more."""

    def __init__(self) -> None:
        self.flag = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(
            (input_ids.shape[0],), self.flag.is_set(), dtype=torch.bool, device=input_ids.device
        )


def stream_text(generate: Callable[..., Any], tokenizer: Any, **options: Any) -> Iterator[str]:
    """Run `generate(streamer=..., **options)` in a thread and yield the answer so far.

    Each text begins with the one before it; special tokens and unfinished characters are left out.
    Closing the generator ends the generation.

    Raises:
        Exception: whatever `generate` raised, in the reader's thread.
    """
    streamer = _SoFar(tokenizer)
    abandoned = _Abandoned()
    failure: list[BaseException] = []
    options["stopping_criteria"] = [*options.pop("stopping_criteria", ()), abandoned]

    def work() -> None:
        try:
            generate(streamer=streamer, **options)
        except BaseException as error:  # handed to the reader below, whatever it is
            failure.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, name="qwen-chat-stream", daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.flag.set()
        thread.join()
    if failure:
        raise failure[0]


def refuse_packing(config: Any) -> None:
    """Refuse continuous batching where the tricks for long prompts are on.

    Raises:
        ValueError: one is; says how to do without.
    """
    if on := [name for name in ("use_dynamic_ntk", "use_logn_attn") if getattr(config, name)]:
        raise ValueError(
            f"continuous batching packs requests into one row, where {' and '.join(on)} cannot "
            f"tell prompts apart. Use generate, or set {' and '.join(on)} of model.config to "
            f"False, for texts of up to seq_length ({config.seq_length}) tokens"
        )


class QWenChatMixin:
    """What `QWenLMHeadModel` has beside transformers' generation; stands before it in the bases."""

    generation_config: Any
    device: Any
    transformer: Any
    config: Any

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and stop sequences by token ids.

        Args:
            stop_words_ids: lists of token ids; a row ends when its newest tokens are one of them,
                which stay in the output. By default those of the generation config, if any.

        Where several tokens come at once, those behind a stop sequence are cut off; not from what
        `return_dict_in_generate` returns, nor from a streamer or a cache that was given.
        """
        config = kwargs.get("generation_config")
        if config is None:
            config = args[0] if args and args[0] is not None else self.generation_config
        stop_words_ids = kwargs.pop("stop_words_ids", None)
        if stop_words_ids is None:
            stop_words_ids = getattr(config, "stop_words_ids", None)
        criteria = None
        if stop_words_ids:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
            length = prompt.shape[1] if prompt is not None else 0
            criteria = StopWordsCriteria(stop_words_ids, length)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), criteria]
        try:
            found = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:  # the caller's cache may be reset and read into by hand
            if hasattr(kwargs.get("past_key_values"), FIXED_ATTRIBUTE):
                setattr(kwargs["past_key_values"], FIXED_ATTRIBUTE, False)
        # With candidates, and so of one row, tokens may have come behind the stop sequence.
        if criteria and criteria.end and isinstance(found, Tensor) and found.shape[0] == 1:
            return found[:, : criteria.end]
        return found

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; then the cache knows how long the prompt is that will be read."""
        made = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache, positions = model_kwargs.get("past_key_values"), model_kwargs.get("position_ids")
        # An assistant is asked again and again, each time with a longer prompt on the same cache.
        assists = getattr(generation_config, "is_assistant", False)
        if cache is not None and positions is not None and not assists:
            self.transformer.expect_prompt(cache, positions.amax(dim=-1) + 1)
        return made

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for a model that does without dynamic NTK and logn.

        Raises:
            ValueError: it does not.
        """
        refuse_packing(self.config)
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> tuple[str, list[Any]]:
        """Answer one query.

        Args:
            tokenizer: a `QWenTokenizer`.
            query: what the user says; special tokens in it are plain text.
            history: earlier turns, oldest first, each (query, response); not changed.
            system: the system message.
            stop_words_ids: more stop sequences, e.g. `[tokenizer.encode("Observation:"),
                tokenizer.encode("Observation:\\n")]` for ReAct; not changed. They stay in the
                answer.
            generation_config: instead of the model's own.
            kwargs: `max_window_size` and anything `generate` takes (`top_p=0.5`, ...).

        Returns:
            The response and the history with this turn added.

        Raises:
            ValueError: not a ChatML chat model.
        """
        config = self.generation_config if generation_config is None else generation_config
        ids, options = prepare_chat(
            tokenizer, query, history, system, stop_words_ids, config, kwargs
        )
        input_ids = torch.tensor([ids], device=self.device)
        output = self.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
        response: str = decode_tokens(output[0], tokenizer, context_length=len(ids))
        return response, extend_history(history, query, response)

    def chat_stream(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """As `chat`, but an iterator over the growing answer: each item is the whole text so far.

        What `generate` raises is raised from the iterator; closing it ends the generation.

        Raises:
            ValueError: not a ChatML chat model.
        """
        config = self.generation_config if generation_config is None else generation_config
        ids, options = prepare_chat(
            tokenizer, query, history, system, stop_words_ids, config, kwargs
        )
        input_ids = torch.tensor([ids], device=self.device)
        mask = torch.ones_like(input_ids)
        return stream_text(
            self.generate, tokenizer, inputs=input_ids, attention_mask=mask, **options
        )
