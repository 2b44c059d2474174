"""A `CalibrationSpec` to token ids: mix, shuffle, pack, hash.

The ids are a function of the spec, the bytes of the sources and the tokenizer, in any process on
any machine; their hash goes into the manifest, so that a published checkpoint says what it was
calibrated on. Documents of a source are shuffled with the seed, tokenized until there is enough,
put end to end with the end-of-text token between and cut into rows of exactly `seqlen`.

Why packing: Qwen's own run_gptq.py made one example of one conversation, of whatever length up to
8192, and averaged over examples. Rows of one length make every token weigh the same in the Hessian,
need no padding (which would otherwise be fed to the network, or masked and wasted), batch perfectly
and are what pretraining looked like. The price is that a row may begin inside a document; with
`seqlen` 512 that costs its first few tokens some context.

Sources mix by whole rows, so shares are exact to one row. Data is never repeated to fill up: what
is missing is said with the number that would do. Leaves out reading (`sources`) and chat formats
(`render`).
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationSpec
from ..errors import CalibrationError
from ..models.tokenizer import tokenizer_errors
from .formats import Document
from .render import Renderer, renderer_for
from .sampling import sample_from_model
from .sources import BUILTIN, SELF, Source, parse_sources, read_source

__all__ = [
    "CalibrationTokens",
    "calibration_tokens",
    "given_tokens",
    "ids_sha256",
    "sample_from_model",
]

log = logging.getLogger(__name__)

# (tokens wanted, seed) -> that many ids or more, from the model itself
Generate = Callable[[int, int], "Tensor | Sequence[int]"]


@dataclass(frozen=True)
class CalibrationTokens:
    """What the model will read.

    Attributes:
        ids: [samples, seqlen] int64, on the CPU.
        sha256: of `ids`, see `ids_sha256`.
        sources: one record per source, in the order given: `name`, `format`, `weight`, `rows`,
            `tokens` (in those rows), `documents` (begun in those rows), `available` (documents in
            the source), `skipped` (records with nothing in them), `sha256` of the file (None for
            `self`).
        notes: what a user should be told; may be empty.
    """

    ids: Tensor
    sha256: str
    sources: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """What one source contributes: `rows`, which are `part` (0 to 1) of all."""

    rows: int
    part: float


def calibration_tokens(
    tokenizer: Any,
    spec: CalibrationSpec,
    *,
    model_type: str,
    generate: Generate | None = None,
) -> CalibrationTokens:
    """The ids that `spec` asks for.

    Args:
        tokenizer: see `render.renderer_for`. spec: sources with weights, samples, seqlen, seed.
        model_type: of the checkpoint's config; decides the chat format. generate: called as
        `generate(tokens, seed)` for the source `self`; returns at least that many
            ids in a flat list or any tensor (`sample_from_model` makes them).

    Raises:
        CalibrationError: a source cannot be used (see `sources.read_source`), has fewer tokens than
            its share, would get no row at all, or `self` is asked for without `generate`.
        MissingDependencyError: `hf:` without `datasets`.
    """
    sources = parse_sources(spec.sources)
    rows = _share(sources, spec.samples)
    renderer = renderer_for(tokenizer, model_type)
    blocks, records, notes = [], [], []
    for index, (source, count) in enumerate(zip(sources, rows, strict=True)):
        seed = _seed(spec.seed, "documents", index)
        if source.name == SELF:
            block, record = _from_model(generate, count, spec, seed)
        else:
            share = Share(count, source.weight / math.fsum(s.weight for s in sources))
            block, record = _from_documents(source, renderer, share, spec, seed)
        blocks.append(block)
        records.append({"name": source.label, "weight": source.weight, **record})
        if record["skipped"]:
            notes.append(
                f"{source.label}: {record['skipped']} records held no text and were skipped."
            )
    ids = torch.cat(blocks)
    order = list(range(spec.samples))
    random.Random(_seed(spec.seed, "rows", 0)).shuffle(order)
    ids = ids[torch.tensor(order)].contiguous()
    notes = renderer.notes + notes
    for note in notes:
        log.info("calibration: %s", note)
    return CalibrationTokens(ids, ids_sha256(ids), tuple(records), tuple(notes))


def given_tokens(ids: Tensor) -> CalibrationTokens:
    """Of ids that the caller has, on whichever device, as they are.

    Raises:
        CalibrationError: they are not [samples, seqlen] int64, or there are none.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise CalibrationError(
            "tokens", expected="[samples, seqlen] int64", got=f"{list(ids.shape)} {ids.dtype}"
        )
    ids = ids.cpu()
    record = {"name": "tokens", "tokens": ids.numel(), "rows": ids.shape[0]}
    return CalibrationTokens(ids, ids_sha256(ids), (record,))


def ids_sha256(ids: Tensor) -> str:
    """sha256 over the ids as little-endian int64 in row order, then the shape likewise."""
    digest = hashlib.sha256(ids.to("cpu", torch.int64).numpy().astype("<i8").tobytes())
    for size in ids.shape:
        digest.update(int(size).to_bytes(8, "little"))
    return digest.hexdigest()


def _seed(seed: int, purpose: str, index: int) -> int:
    """A seed of its own for each use, so that adding a source leaves the others' order alone."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _share(sources: Sequence[Source], samples: int) -> list[int]:
    """Rows per source, proportional to the weights (largest remainder; ties to the first)."""
    total = math.fsum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    rows = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(rows)), key=lambda i: (rows[i] - exact[i], i))
    for i in by_remainder[: samples - sum(rows)]:
        rows[i] += 1
    for source, count in zip(sources, rows, strict=True):
        if count == 0:
            raise CalibrationError(
                f"calibration source {source.name!r} would get none of the {samples} samples",
                expected="at least one sample for each source",
                got=f"weight {source.weight:g} of {total:g}",
                cure="Raise --samples or its weight, or leave it out.",
            )
    return rows


def _from_documents(
    source: Source, renderer: Renderer, share: Share, spec: CalibrationSpec, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    data = read_source(source.name)
    documents: list[Document] = list(data.documents)
    random.Random(seed).shuffle(documents)
    need = share.rows * spec.seqlen
    stream: list[int] = []
    used = 0
    for document in documents:
        if len(stream) >= need:
            break
        if stream:
            stream.append(renderer.eot)
            if len(stream) == need:
                break
        try:
            with tokenizer_errors("the checkpoint's tokenizer, reading calibration text"):
                stream += renderer.ids(document)
        except CalibrationError as error:
            what = f"calibration source {source.name!r}: {error.what}"
            raise CalibrationError(
                what, expected=error.expected, got=error.got, cure=error.cure
            ) from error
        used += 1
    if len(stream) < need:
        raise _too_short(source, share, spec, len(stream), len(documents))
    block = torch.tensor(stream[:need], dtype=torch.int64).view(share.rows, spec.seqlen)
    return block, {
        "format": data.format,
        "rows": share.rows,
        "tokens": need,
        "documents": used,
        "available": len(documents),
        "skipped": data.skipped,
        "sha256": data.sha256,
    }


def _too_short(
    source: Source, share: Share, spec: CalibrationSpec, tokens: int, documents: int
) -> CalibrationError:
    """The error that says how much there is, how much was wanted and what would fit."""
    mixed = share.part < 1
    cures = []
    if samples := math.floor(tokens // spec.seqlen / share.part + 1e-9):
        cures.append(f"--samples {samples}")
    if (seqlen := tokens // share.rows) >= 32:
        cures.append(f"--seqlen {seqlen}")
    smaller = f"Use {' or '.join(cures)}, or give" if cures else "Give"
    return CalibrationError(
        f"calibration source {source.name!r} is too short",
        expected=f"{share.rows * spec.seqlen:,} tokens for {share.rows} samples of {spec.seqlen}"
        + (f" (its share of {spec.samples})" if mixed else ""),
        got=f"{tokens:,} tokens in {documents:,} documents",
        cure=f"{smaller} more data{', or lower its weight' if mixed else ''}"
        f"{'' if source.name == BUILTIN else '; the builtin set needs no file'}. "
        "Nothing is repeated to fill up.",
    )


def _from_model(
    generate: Generate | None, rows: int, spec: CalibrationSpec, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    need = rows * spec.seqlen
    if generate is None:
        raise CalibrationError(
            "calibration source 'self' needs the model loaded to sample from it",
            expected="a caller that gives one",
            cure="Use builtin, or quantize where the original model fits the memory.",
        )
    ids = torch.as_tensor(generate(need, seed), dtype=torch.int64).reshape(-1).cpu()
    if len(ids) < need:
        raise CalibrationError(
            "calibration source 'self' gave too few tokens",
            expected=f"{need:,}",
            got=f"{len(ids):,}",
            cure="Lower --samples or --seqlen.",
        )
    return ids[:need].view(rows, spec.seqlen), {
        "format": "sampled",
        "rows": rows,
        "tokens": need,
        "documents": rows,
        "available": rows,
        "skipped": 0,
        "sha256": None,
    }
