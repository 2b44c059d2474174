"""Calibration text that the model writes itself: the source `self`.

For a model whose training data nobody has, its own samples are in its own domain by construction.
Half of the rows begin with an end-of-text token, as documents do in pretraining; half with an
opened user turn, which a chat model fills with a question and then answers. The first tokens are
drawn hot so that rows go different ways, then the temperature falls to where text stays sensible.
Nothing stops a row: after the end of one text the model begins the next, as it was trained to.

Every draw has a uniform number of its own, made beforehand on the CPU from the seed and looked up
in the cumulative distribution, so rows do not depend on how they are batched or on which device's
random generator happens to be in use (beyond float differences of the forward itself).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from .render import IM_END, IM_START, renderer_for

HOT, COOL, COOLING = (
    1.5,
    0.9,
    16,
)  # temperature of the first token, after COOLING tokens, and that number


@torch.inference_mode()
def sample_from_model(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    device: str | torch.device = "cpu",
    batch: int = 16,
) -> Tensor:
    """Sample `samples` rows of `seqlen` ids from a loaded causal language model.

    Args:
        model: in evaluation mode on `device`; called as `model(input_ids=, past_key_values=,
            use_cache=True)`, answers with `.logits` [b, t, vocab] and `.past_key_values`; its
            `config.model_type` decides the chat format.
        tokenizer: see `render.renderer_for`. Ids beyond its length (padding rows of the embedding)
            and special ids other than end of text and the ChatML markers are never drawn.
        samples: rows.
        seqlen: ids per row, the opening included.
        seed: of the draws.
        device: of the model's inputs.
        batch: rows per forward.

    Returns:
        [samples, seqlen] int64 on the CPU.

    Raises:
        NumericsError: the model's logits are not finite.
    """
    openings, allowed = _openings(tokenizer, str(model.config.model_type))
    banned = torch.tensor(sorted(_special_ids(tokenizer) - allowed), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(samples, seqlen, generator=generator, dtype=torch.float64)
    out = torch.empty(samples, seqlen, dtype=torch.int64)
    for kind, opening in enumerate(openings):
        # Rows with the same opening go together: one length per batch, so no padding.
        mine = torch.arange(kind, samples, len(openings))
        for rows in torch.split(mine, batch) if len(mine) else ():
            head = torch.tensor(opening[:seqlen], dtype=torch.int64).expand(len(rows), -1)
            out[rows] = _continue(model, head, draws[rows], len(tokenizer), banned, device)
    return out


def _continue(
    model: Any, head: Tensor, draws: Tensor, vocabulary: int, banned: Tensor, device: Any
) -> Tensor:
    """Continue `head` [b, t] to [b, seqlen], one number of `draws` [b, seqlen] for each new id."""
    ids = head.clone()
    cache = None
    fresh = ids
    for position in range(ids.shape[1], draws.shape[1]):
        answer = model(input_ids=fresh.to(device), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        logits = answer.logits[:, -1, :vocabulary].double().cpu()
        if not torch.isfinite(logits).all():
            raise NumericsError(
                f"the model's logits at position {position} are not finite while sampling "
                "calibration text",
                cure="Check the checkpoint (float16 overflows on some), or use builtin.",
            )
        logits[:, banned[banned < logits.shape[1]]] = -torch.inf
        done = min((position - head.shape[1]) / COOLING, 1.0)
        probabilities = torch.softmax(logits / (HOT + (COOL - HOT) * done), dim=-1)
        edges = probabilities.cumsum(-1)
        wanted = draws[:, position : position + 1] * edges[:, -1:]
        # The first edge above the number: an id of probability zero is never that.
        fresh = torch.searchsorted(edges, wanted, right=True).clamp_(max=logits.shape[1] - 1)
        ids = torch.cat((ids, fresh), dim=1)
    return ids


def _openings(tokenizer: Any, model_type: str) -> tuple[list[list[int]], set[int]]:
    """How rows may begin, and the special ids that may be drawn."""
    eot = renderer_for(tokenizer, model_type).eot
    if model_type == "qwen":
        options: dict[str, Any] = {"allowed_special": "all", "disallowed_special": ()}
    elif IM_START in tokenizer.get_vocab() and IM_END in tokenizer.get_vocab():
        options = {"add_special_tokens": False}
    else:
        return [[eot]], {eot}
    user = [int(i) for i in tokenizer.encode(f"{IM_START}user\n", **options)]
    end = int(tokenizer.encode(IM_END, **options)[0])
    return [[eot], user], {eot, user[0], end}


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {int(i) for i, token in added.items() if token.special}
    ids |= {int(i) for i in getattr(tokenizer, "all_special_ids", ())}
    table = getattr(tokenizer, "special_tokens", None)
    if isinstance(table, dict):  # original Qwen: form -> id
        ids |= {i for i in table.values() if isinstance(i, int)}
    return ids
