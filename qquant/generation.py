"""Text generated and timed: a prompt at once, then one token after another on a cache.

A token has come when the host can read it: the device is synchronized after each, as it is for
anybody who reads along or stops at the end of a sentence. So there is one figure for every token,
the first apart from the others.

Two loops. `generate` is the plainest there is: the model's forward and an argmax, so that what it
times is the model. `generate_like_qwen` is what Qwen's own speed script ran (`profile.py` among the
files that Qwen published beside the models): `model.generate` with the checkpoint's own sampling,
the length forced, seed 1024, no warm-up; what generation costs beside the model is part of it.
Ours differs from theirs in that it waits for the device at the end, and notes when tokens came.

What is computed from the times is `speed.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import RunError

QWEN_SEED = 1024
PROMPT_SEED = 0  # of random ids
QWEN_CHARACTER = "我"  # one token of Qwen's; its script's context is this, repeated

Now = Callable[[], float]
Told = Callable[[int], None]


@dataclass(frozen=True)
class Run:
    """When the tokens of one run came.

    Attributes:
        prefill_s: seconds from the prompt to the first token.
        steps_s: seconds from each token to the next, `new_tokens - 1` of them.
        total_s: all of it; with `generate_like_qwen` also what is done before and after the tokens.
    """

    prefill_s: float
    steps_s: tuple[float, ...]
    total_s: float

    @property
    def decode_s(self) -> float:
        """The tokens after the first."""
        return sum(self.steps_s)


def clock(device: torch.device) -> Now:
    """Seconds at which everything that the device was given is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def device_of(model: Any) -> torch.device:
    """Where a model takes its ids."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def random_prompt(model: Any, batch: int, length: int, seed: int = PROMPT_SEED) -> Tensor:
    """Ids from the whole vocabulary, int64 [batch, length], on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (batch, length), generator=generator).to(device_of(model))


def qwen_prompt(model: Any, tokenizer: Any, length: int) -> tuple[Tensor, str]:
    """The context of Qwen's script, int64 [1, length], and what it is in words.

    Where there is no tokenizer, or one that makes fewer tokens of it, the ids are random.
    """
    if tokenizer is not None:
        found = tokenizer(QWEN_CHARACTER * length, add_special_tokens=False)["input_ids"]
        if len(found) >= length:
            ids = torch.tensor([list(found[:length])], dtype=torch.int64)
            return ids.to(device_of(model)), f"{QWEN_CHARACTER}, repeated"
    return random_prompt(model, 1, length), "random ids"


@torch.inference_mode()
def generate(
    model: Any,
    prompt: Tensor,
    new_tokens: int,
    *,
    cache: Any = None,
    step: Callable[..., Any] | None = None,
    now: Now | None = None,
    told: Told = lambda done: None,
) -> tuple[Run, Any]:
    """Greedy generation of exactly `new_tokens` per row.

    Args:
        model: a causal language model of transformers, in eval mode.
        prompt: int64 [batch, length], on the model's device.
        cache: an empty cache of transformers'; None for the one that the model makes itself.
        step: what decodes in the model's place, such as its compiled call; the prompt goes through
            the model.
        now: seconds, once the device is done; tests give their own.
        told: the number of tokens so far, after each; keep it cheap.

    Returns:
        When the tokens came, and the cache as it is at the end.
    """
    now = now or clock(prompt.device)
    decode = step or model
    marks = [now()]
    out = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    marks.append(now())
    told(1)
    for done in range(2, new_tokens + 1):
        out = decode(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        marks.append(now())
        told(done)
    return _run(marks, marks[-1] - marks[0]), out.past_key_values


def generate_like_qwen(
    model: Any,
    prompt: Tensor,
    new_tokens: int,
    *,
    now: Now | None = None,
    told: Told = lambda done: None,
) -> tuple[Run, Any]:
    """`generate` as Qwen's script calls it; arguments and result as above, batch 1.

    Raises:
        RunError: another number of tokens came than was forced.
    """
    tick = now or clock(prompt.device)
    marks: list[float] = []

    class Stamps:
        """transformers' streamer: `put` gets the prompt first, then every token, on the host."""

        def put(self, value: Any) -> None:
            marks.append(tick())
            told(len(marks) - 1)

        def end(self) -> None:
            pass

    devices = [prompt.device] if prompt.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(QWEN_SEED)
        start = tick()
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            streamer=Stamps(),
            use_cache=True,
            return_dict_in_generate=True,
        )
        end = tick()
    came = found.sequences.shape[1] - prompt.shape[1]
    if came != new_tokens or len(marks) != new_tokens + 1:
        raise RunError("generation of a forced length", expected=new_tokens, got=came)
    return _run([start, *marks[1:]], end - start), found.past_key_values


def _run(marks: list[float], total: float) -> Run:
    steps = tuple(b - a for a, b in pairwise(marks[1:]))
    return Run(marks[1] - marks[0], steps, total)
