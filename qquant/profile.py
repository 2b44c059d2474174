"""What quantization cost, measured: perplexity, and the distance from the original.

Both models go through the same functions, so that a difference is the models' and not the method's.
Accuracy is read off fixed token ids `[n, seq]`: every position of a row but the last predicts the
next token, given the row's beginning. Rows are independent, tokens of a row are not, so standard
errors are over row means. KL(reference || candidate) separates methods that perplexity cannot (on a
small model a 4-bit change of perplexity drowns in its standard error), top-1 agreement says how
often greedy decoding would go the other way.

Memory is bounded: the network's body runs on a few rows at a time, and the vocabulary matrix is
applied to as many positions as fit `CHUNK_BYTES` of float64 logits. Logits come in the model's own
dtype; everything after them is float64.

A model is anything with three things that transformers' causal language models have: `base_model`,
called with `input_ids` and `use_cache`, whose result has `last_hidden_state`;
`get_input_embeddings()`; and `get_output_embeddings()`. The benchmarks and the demo's scripts
measure through here too, so that one figure means one thing.

A reference need not stay in memory beside its candidates: `KeptReference` keeps its last hidden
states in a file and its vocabulary matrix, which is all that its logits need.

Speed is `speed.py`, memory `memory.py`; what is measured on which directories is `profiling.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calibration.hold import Holder
from .errors import InputError, SpecError
from .generation import device_of

CHUNK_BYTES = 1 << 26  # float64 logits at a time, per model
ROW_TOKENS = 4096  # tokens through the body at a time, whole rows


class Estimate(NamedTuple):
    """A mean with its standard error (NaN where a single row leaves it unknown)."""

    value: float
    stderr: float


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
    """

    kl: Estimate
    top1: Estimate
    ppl_reference: Estimate
    ppl_candidate: Estimate
    nll_lost: Estimate
    tokens: int
    kl_per_row: tuple[float, ...]


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
    return _exp(loss(model, ids))


def loss(model: Any, ids: Tensor) -> Estimate:
    """Mean negative log-likelihood per token, in nats.

    Args:
        model: see the module's opening; in eval mode.
        ids: int64 [n, seq], seq at least 2.
    """
    _check(ids)
    nll: list[float] = []
    for rows in _batches(ids):
        hidden = _body(model, rows)
        for row, states in zip(rows, hidden, strict=True):
            total = 0.0
            for at in _spans(model, len(row) - 1):
                total += _nll(_log_probs(model, states[at]), row[1:][at])
            nll.append(total / (len(row) - 1))
    return _mean(nll)


@dataclass
class _Rows:
    """Means over each row so far, of one candidate."""

    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)


def compare(reference: Any, candidate: Any, ids: Tensor) -> Comparison:
    """Both models over the same ids, streamed; see `compare_all`."""
    return compare_all(reference, {"candidate": candidate}, ids)["candidate"]


def compare_all(
    reference: Any, candidates: Mapping[str, Any], ids: Tensor
) -> dict[str, Comparison]:
    """Every candidate beside the reference on the same ids, streamed; the reference runs once.

    Args:
        reference, candidates: models (see the module's opening) over one vocabulary, in eval mode,
            on any devices.
        ids: int64 [n, seq], seq at least 2.

    Raises:
        SpecError: the vocabularies differ in size.
    """
    _check(ids)
    size = reference.get_output_embeddings().weight.shape[0]
    for name, candidate in candidates.items():
        if (got := candidate.get_output_embeddings().weight.shape[0]) != size:
            raise SpecError(f"vocabulary of {name}", expected=size, got=got)
    reference_nll: list[float] = []
    found = {name: _Rows() for name in candidates}
    for batch in _batches(ids):
        hidden = _body(reference, batch)
        others = {name: _body(model, batch) for name, model in candidates.items()}
        for i, row in enumerate(batch):
            count = len(row) - 1
            nll = 0.0
            sums = {name: [0.0, 0.0, 0.0] for name in candidates}
            for at in _spans(reference, count):
                target = row[1:][at]
                p = _log_probs(reference, hidden[i, at])
                weights, first = p.exp(), p.argmax(-1)
                nll += _nll(p, target)
                for name, model in candidates.items():
                    q = _log_probs(model, others[name][i, at]).to(p.device)
                    sums[name][0] += float((weights * (p - q)).sum())
                    sums[name][1] += int((first == q.argmax(-1)).sum())
                    sums[name][2] += _nll(q, target)
            reference_nll.append(nll / count)
            for name, rows in found.items():
                for values, total in zip((rows.kl, rows.top1, rows.nll), sums[name], strict=True):
                    values.append(total / count)
    return {
        name: Comparison(
            kl=_mean(rows.kl),
            top1=_mean(rows.top1),
            ppl_reference=_exp(_mean(reference_nll)),
            ppl_candidate=_exp(_mean(rows.nll)),
            nll_lost=_mean([q - p for p, q in zip(reference_nll, rows.nll, strict=True)]),
            tokens=ids.shape[0] * (ids.shape[1] - 1),
            kl_per_row=tuple(rows.kl),
        )
        for name, rows in found.items()
    }


class KeptReference:
    """A reference model without its body: stands in for it in `compare_all`, on the same ids.

    Args:
        model: see the module's opening; may be dropped afterwards.
        ids: each int64 [n, seq]; every row that will be asked for.
        folder: where the file with the states is made; it has no name and goes with this object.

    Raises:
        TargetError: the states do not fit the disk.
    """

    def __init__(self, model: Any, ids: Sequence[Tensor], folder: Path) -> None:
        self._head = model.get_output_embeddings()
        self._places: dict[bytes, int] = {}
        self._states: list[Tensor] = []
        holder = Holder(host_budget=0, spill_dir=folder, spill_outputs=True)
        for block in ids:
            for rows in _batches(block):
                self._places |= {_key(row): len(self._states) + i for i, row in enumerate(rows)}
                self._states += [holder.output(states) for states in _body(model, rows)]

    def get_output_embeddings(self) -> Any:
        return self._head

    def get_input_embeddings(self) -> Any:
        return self._head

    def base_model(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """What the model's body gave for these rows, as its result.

        Raises:
            SpecError: a row was not among the ids that were kept.
        """
        try:
            found = [self._states[self._places[_key(row.cpu())]] for row in input_ids]
        except KeyError as error:
            raise SpecError("ids", expected="rows that were kept", got="others") from error
        return SimpleNamespace(last_hidden_state=torch.stack(found).to(input_ids.device))


def _key(row: Tensor) -> bytes:
    return row.numpy().tobytes()


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


def _nll(log_probs: Tensor, target: Tensor) -> float:
    """Sum of the negative log-probabilities of `target` [t]."""
    picked = log_probs.gather(1, target.to(log_probs.device)[:, None])
    return -float(picked.sum())


def _mean(values: list[float]) -> Estimate:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan)
    return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)))


def _exp(nll: Estimate) -> Estimate:
    value = math.exp(nll.value) if nll.value < 700 else math.inf
    return Estimate(value, value * nll.stderr)
