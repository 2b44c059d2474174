"""What quantization cost, measured: perplexity, and the distance from the original.

Both models go through the same functions, so that a difference is the models' and not the method's.
Accuracy is read off fixed token ids `[n, seq]`: every position of a row but the last predicts the
next token, given the row's beginning. Rows are independent, tokens of a row are not, so standard
errors are over row means. KL(reference || candidate) separates methods that perplexity cannot (on a
small model a 4-bit change of perplexity drowns in its standard error), top-1 agreement says how
often greedy decoding would go the other way, top-k overlap how much of what sampling draws from is
the same. Each is also told by how much of the row had been read.

One pass, and memory is bounded: the network's body runs on a few rows at a time, the vocabulary
matrix is applied to as many positions as fit `CHUNK_BYTES` of float64 logits, and what is left of a
row is a few means. Logits come in the model's own dtype; everything after them is float64.

A model is anything with three things that transformers' causal language models have: `base_model`,
called with `input_ids` and `use_cache`, whose result has `last_hidden_state`;
`get_input_embeddings()`; and `get_output_embeddings()`. The benchmarks and the demo's scripts
measure through here too, so that one figure means one thing.

A reference need not stay in memory beside its candidates: see `kept.KeptReference`. Speed is
`speed`'s, memory `memory`'s; what is measured on which directories is `profiling`'s, and what is
written about it `profile_report`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, SpecError
from .estimates import Estimate, differences, exp, interval, mean
from .generation import device_of
from .kept import KeptReference

CHUNK_BYTES = 1 << 26  # float64 logits at a time, per model
ROW_TOKENS = 4096  # tokens through the body at a time, whole rows
FIRST_SPAN = 16  # positions of the first of `by_position`; each later one ends at twice the last

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Span:
    """Positions of a row: predictions made from `first` to `last` tokens, both included.

    Attributes:
        perplexity: of the candidate. nll_lost, kl, top1: as in `Comparison`; None without a
            reference.
    """

    first: int
    last: int
    perplexity: Estimate
    nll_lost: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """A candidate beside its reference on the same ids.

    Attributes:
        kl: KL(reference || candidate), nats per token.
        top1: share of positions where both have the same most likely token.
        ppl_reference, ppl_candidate: perplexity of each.
        nll_lost: the candidate's mean negative log-likelihood less the reference's, nats per token,
            with the standard error of the paired difference.
        tokens: positions that were compared.
        kl_per_row: the mean KL of each row, to compare candidates row by row.
        topk: share of the reference's k most likely tokens that are among the candidate's k, by k.
        nll_lost_interval: of the paired difference, 95 %.
        by_position: how all this depends on what had been read.
        nll_per_row, top1_per_row: means of each row, of the candidate.
    """

    kl: Estimate
    top1: Estimate
    ppl_reference: Estimate
    ppl_candidate: Estimate
    nll_lost: Estimate
    tokens: int
    kl_per_row: tuple[float, ...]
    topk: Mapping[int, Estimate] = field(default_factory=dict)
    nll_lost_interval: tuple[float, float] = (math.nan, math.nan)
    by_position: tuple[Span, ...] = ()
    nll_per_row: tuple[float, ...] = ()
    top1_per_row: tuple[float, ...] = ()


@dataclass(frozen=True)
class Losses:
    """One model alone.

    Attributes:
        loss: mean negative log-likelihood per token, nats. perplexity: exp of it.
        tokens, by_position, nll_per_row: as in `Comparison`.
    """

    loss: Estimate
    perplexity: Estimate
    tokens: int
    by_position: tuple[Span, ...]
    nll_per_row: tuple[float, ...]


def heldout_ids(tokenizer: Any, text: str, seqlen: int, max_tokens: int | None = None) -> Tensor:
    """`text` as rows to measure on: int64 [n, seqlen], the remainder dropped.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        max_tokens: take no more than this many (rounded down to whole rows); None for all.

    Raises:
        SpecError: a row of fewer than two tokens predicts nothing.
        InputError: the text is too short for one row.
    """
    if seqlen < 2:
        raise SpecError("seqlen", expected="at least 2", got=seqlen)
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(found[:max_tokens], dtype=torch.int64)
    rows = ids.numel() // seqlen
    if rows == 0:
        raise InputError(
            "held-out text",
            expected=f"at least {seqlen} tokens",
            got=ids.numel(),
            cure="Give a longer text, or a smaller sequence length.",
        )
    return ids[: rows * seqlen].view(rows, seqlen)


def perplexity(model: Any, ids: Tensor) -> Estimate:
    """exp of `loss`; the standard error by the delta method. Arguments as there."""
    return losses(model, ids).perplexity


def loss(model: Any, ids: Tensor) -> Estimate:
    """Mean negative log-likelihood per token, in nats. Arguments as in `losses`."""
    return losses(model, ids).loss


def losses(model: Any, ids: Tensor, advance: Advance = lambda done, total: None) -> Losses:
    """What the model makes of the ids, streamed.

    Args:
        model: see the module's opening; in eval mode.
        ids: int64 [n, seq], seq at least 2.
        advance: told how many rows are done, of how many.
    """
    _check(ids)
    count = ids.shape[1] - 1
    rows = _Rows(count)
    for batch in _batches(ids):
        for row, states in zip(batch, _body(model, batch), strict=True):
            nll = torch.empty(1, count, dtype=torch.float64)
            for at in _spans(model, count):
                nll[0, at] = _nll(_log_probs(model, states[at]), row[1:][at])
            rows.add(nll)
            advance(len(rows.whole), len(ids))
    own = [row[0] for row in rows.whole]
    spans = tuple(
        Span(first, last, exp(mean(rows.of(0, i))))
        for i, (first, last) in enumerate(positions(count))
    )
    return Losses(mean(own), exp(mean(own)), len(ids) * count, spans, tuple(own))


def positions(count: int) -> list[tuple[int, int]]:
    """The spans of `by_position`, first and last both included: 1 to 15, 16 to 31, 32 to 63, ...

    Args:
        count: predictions of a row; the last is made from so many tokens.
    """
    edges = [1]
    edge = FIRST_SPAN
    while edge <= count:
        edges.append(edge)
        edge *= 2
    return [(a, b - 1) for a, b in zip(edges, [*edges[1:], count + 1], strict=True)]


@dataclass
class _Rows:
    """Means of some metrics over each row so far, and over its spans of positions."""

    count: int
    whole: list[list[float]] = field(default_factory=list)
    spans: list[list[list[float]]] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        """`values`: [metrics, count] float64, of one row."""
        self.whole.append(values.mean(1).tolist())
        cut = [values[:, a - 1 : b].mean(1).tolist() for a, b in positions(self.count)]
        self.spans.append(cut)

    def of(self, metric: int, span: int | None = None) -> list[float]:
        if span is None:
            return [row[metric] for row in self.whole]
        return [row[span][metric] for row in self.spans]


def compare(reference: Any, candidate: Any, ids: Tensor) -> Comparison:
    """Both models over the same ids, streamed; see `compare_all`."""
    return compare_all(reference, {"candidate": candidate}, ids)["candidate"]


def compare_all(
    reference: Any,
    candidates: Mapping[str, Any],
    ids: Tensor,
    *,
    ks: Sequence[int] = (),
    advance: Advance = lambda done, total: None,
) -> dict[str, Comparison]:
    """Every candidate beside the reference on the same ids, streamed; the reference runs once.

    Args:
        reference, candidates: models (see the module's opening) over one vocabulary, in eval mode,
            on any devices.
        ids: int64 [n, seq], seq at least 2.
        ks: of the top-k overlaps.
        advance: told how many rows are done, of how many.

    Raises:
        SpecError: the vocabularies differ in size.
    """
    _check(ids)
    size = reference.get_output_embeddings().weight.shape[0]
    for name, candidate in candidates.items():
        if (got := candidate.get_output_embeddings().weight.shape[0]) != size:
            raise SpecError(f"vocabulary of {name}", expected=size, got=got)
    ks = [k for k in ks if k <= size]
    count = ids.shape[1] - 1
    theirs = _Rows(count)
    found = {name: _Rows(count) for name in candidates}
    for batch in _batches(ids):
        hidden = _body(reference, batch)
        others = {name: _body(model, batch) for name, model in candidates.items()}
        for i, row in enumerate(batch):
            nll = torch.empty(1, count, dtype=torch.float64)
            values = {
                name: torch.empty(3 + len(ks), count, dtype=torch.float64) for name in candidates
            }
            for at in _spans(reference, count):
                target = row[1:][at]
                p = _log_probs(reference, hidden[i, at])
                weights, first = p.exp(), p.argmax(-1)
                likely = p.topk(max(ks), dim=-1).indices if ks else None
                nll[0, at] = _nll(p, target)
                for name, model in candidates.items():
                    q = _log_probs(model, others[name][i, at]).to(p.device)
                    values[name][0, at] = _nll(q, target)
                    values[name][1, at] = (weights * (p - q)).sum(-1).cpu()
                    values[name][2, at] = (first == q.argmax(-1)).double().cpu()
                    if likely is not None:
                        values[name][3:, at] = _overlaps(likely, q, ks).cpu()
            theirs.add(nll)
            for name, rows in found.items():
                rows.add(values[name])
            advance(len(theirs.whole), len(ids))
    return {name: _comparison(theirs, rows, ks, ids) for name, rows in found.items()}


def _overlaps(likely: Tensor, q: Tensor, ks: Sequence[int]) -> Tensor:
    """[t, max k] of the reference, most likely first -> shares of it in q's, [len(ks), t]."""
    own = q.topk(likely.shape[-1], dim=-1).indices
    shares = []
    for k in ks:
        same = likely[:, :k, None] == own[:, None, :k]
        shares.append(same.sum((1, 2)).double() / k)
    return torch.stack(shares)


def _comparison(theirs: _Rows, rows: _Rows, ks: Sequence[int], ids: Tensor) -> Comparison:
    spans = []
    for i, (first, last) in enumerate(positions(theirs.count)):
        nll, kl, top1 = (rows.of(metric, i) for metric in range(3))
        lost = mean(differences(theirs.of(0, i), nll))
        spans.append(Span(first, last, exp(mean(nll)), lost, mean(kl), mean(top1)))
    nll, kl, top1 = (rows.of(metric) for metric in range(3))
    added = differences(theirs.of(0), nll)
    return Comparison(
        kl=mean(kl),
        top1=mean(top1),
        ppl_reference=exp(mean(theirs.of(0))),
        ppl_candidate=exp(mean(nll)),
        nll_lost=mean(added),
        tokens=ids.shape[0] * (ids.shape[1] - 1),
        kl_per_row=tuple(kl),
        topk={k: mean(rows.of(3 + i)) for i, k in enumerate(ks)},
        nll_lost_interval=interval(added),
        by_position=tuple(spans),
        nll_per_row=tuple(nll),
        top1_per_row=tuple(top1),
    )


def keep_reference(
    model: Any,
    ids: Tensor,
    folder: Path,
    name: str,
    advance: Advance = lambda done, total: None,
) -> KeptReference:
    """The model's states on `ids`, as what `compare_all` takes for a reference.

    Args:
        as in `kept.KeptReference.keep` and `losses`.

    Raises:
        TargetError: the states do not fit the disk.
    """
    _check(ids)

    def states() -> Iterator[Tensor]:
        done = 0
        for batch in _batches(ids):
            yield _body(model, batch)
            done += len(batch)
            advance(done, len(ids))

    return KeptReference.keep(model, ids, states(), folder, name)


def _check(ids: Tensor) -> None:
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise SpecError("ids", expected="[n, seq] with seq at least 2", got=list(ids.shape))


def _batches(ids: Tensor) -> Iterator[Tensor]:
    step = max(ROW_TOKENS // ids.shape[1], 1)
    for start in range(0, ids.shape[0], step):
        yield ids[start : start + step]


@torch.inference_mode()
def _body(model: Any, rows: Tensor) -> Tensor:
    """Hidden states before the vocabulary matrix, [b, seq, hidden]."""
    out = model.base_model(input_ids=rows.to(device_of(model)), use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


def _spans(model: Any, count: int) -> Iterator[slice]:
    """0 to `count` in runs whose logits fit `CHUNK_BYTES`."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    step = max(CHUNK_BYTES // (8 * vocabulary), 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@torch.inference_mode()
def _log_probs(model: Any, states: Tensor) -> Tensor:
    """[t, hidden] -> log-probabilities [t, vocabulary] float64."""
    head = model.get_output_embeddings()
    logits = head(states.to(head.weight.device))
    return torch.log_softmax(logits.double(), dim=-1)


def _nll(log_probs: Tensor, target: Tensor) -> Tensor:
    """Negative log-probabilities of `target` [t], [t] on the CPU."""
    picked = log_probs.gather(1, target.to(log_probs.device)[:, None])
    return -picked[:, 0].cpu()
