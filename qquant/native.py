"""One conversion, as a story: an original Qwen directory goes in, a native `qwen2` one comes out.

Unquantized directories (BF16, FP16, FP32) and GPTQ ones alike. No number is computed: what goes
where is settled from headers (`native_layout.py`), tensors are copied a slice at a time in the
dtype they are stored in, so memory is flat, and afterwards every byte is read back and compared
with the source's. The discipline of the directory is `convert`'s: refused before anything is
written, built beside the target, verified, renamed.

bitsandbytes directories are refused: a third of `c_attn` need not begin where a block of 64 weights
(or 256 of their scales) does, and the same directory comes out of converting the 16-bit checkpoint
and quantizing that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .card_loading import WITHOUT_A_GPU
from .checkpoint import Checkpoint
from .config import OutputSpec
from .conversion import Converted, conversion_manifest, loading_code, weight_bytes, write_card
from .directory import read_json
from .errors import CheckpointError
from .events import Event, Progress, Stage, Warned
from .export import check_side_files, copy_legal, write_configuration, write_json
from .fast_tokenizer import original_tokenizer, write_tokenizer
from .headers import TensorPlan
from .manifest import write_manifest
from .native_layout import TARGET, Part, Plan, native_plan
from .publish import WorkDir
from .readback import refuse
from .shards import ShardWriter
from .sums import write_sums
from .verify import verify

GENERATION = "generation_config.json"
_SLICE = 64 << 20  # bytes copied at a time
# Of the original's generation_config.json: read by its own code only.
_THEIR_OWN = ("chat_format", "max_window_size", "stop_words_ids")


def convert_to_native(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    shard_size: int = OutputSpec.shard_size,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Converts the original Qwen directory `src` into the new native directory `dst`.

    Args:
        src: original Qwen (`model_type: qwen`), unquantized or GPTQ.
        dst: must not exist, unless `overwrite` and a model directory.
        shard_size: bytes per safetensors file at the most.
        progress: called with each event.

    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run failed; the target is as it was before.
    """
    start = time.perf_counter()
    tell: Callable[[Event], None] = progress or (lambda _: None)
    tell(Stage("read"))
    out = OutputSpec(shard_size=shard_size)  # refuses a size out of range
    source = Checkpoint.open(src)
    plan = native_plan(source)
    check_side_files(source)
    tokenizer = original_tokenizer(source)
    generation, chat, told = native_generation(source, tokenizer)
    notes = plan.notes + told
    if tokenizer is None:
        notes += ("The source has no qwen.tiktoken, so there is no tokenizer here",)
    planned = [TensorPlan(p.name, source.info(p.source).dtype, p.shape) for p in plan.parts]
    with WorkDir(
        dst, source=source.path, need_bytes=sum(p.nbytes for p in planned), overwrite=overwrite
    ) as work:
        tell(Stage("write"))
        _need_zeros(source, plan)
        with ShardWriter(work.path, planned, out.shard_size) as writer:
            for name, parts in _by_source(plan).items():
                for part, rows, tensor in _pieces(source, name, parts):
                    writer.write_rows(part.name, rows, tensor)
        _write_beside(work.path, source, plan, generation, chat, tokenizer)
        for note in notes:
            tell(Warned(note))
        manifest = conversion_manifest(source, TARGET, notes, out.shard_size)
        write_manifest(work.path, manifest)
        _write_card(work.path, manifest, source, plan, chat)
        write_sums(work.path, manifest["files"])
        tell(Stage("verify"))
        _verify(work.path, source, plan)
        tell(Stage("publish"))
        size = sum(f.stat().st_size for f in work.path.iterdir() if f.is_file())
        path = work.publish()
    return Converted(path, time.perf_counter() - start, len(planned), size, notes)


def native_generation(
    source: Checkpoint, tokenizer: Any | None
) -> tuple[dict[str, Any], bool, tuple[str, ...]]:
    """(generation_config.json of the result, whether it is a chat model, what is not carried over).

    A chat model's answers end where the original's `chat` ends them: at `<|im_end|>`,
    `<|endoftext|>` and `<|im_start|>`; other text at `<|endoftext|>`; and both at whatever else the
    source's file names. Ids are the tokenizer's.
    """
    theirs = read_json(source.path, GENERATION) if (source.path / GENERATION).is_file() else {}
    chat = theirs.get("chat_format") == "chatml"
    config = {key: value for key, value in theirs.items() if key not in _THEIR_OWN}
    notes: tuple[str, ...] = ()
    if tokenizer is not None:
        end = tokenizer.eod_id
        ends = [tokenizer.im_end_id, end, tokenizer.im_start_id] if chat else [end]
        named = theirs.get("eos_token_id")
        named = [n for n in (named if isinstance(named, list) else [named]) if type(n) is int]
        more = [n for n in ends if n not in named]
        # Of a chat model it is as published: the file names fewer than its chat code ends at.
        if named and more and not (chat and set(named) <= set(ends)):
            notes += (f"Text also ends at {more}, which eos_token_id, {named}, does not name",)
        ends += [n for n in dict.fromkeys(named) if n not in ends]
        config["eos_token_id"] = ends if len(ends) > 1 else end
        config["pad_token_id"] = end
    if chat:
        window = theirs.get("max_window_size")
        notes += (
            f"The original's chat drops old turns to stay below max_window_size ({window}); here "
            "the caller does",
        )
    known = [[config["eos_token_id"]]] if isinstance(config.get("eos_token_id"), int) else []
    if (stops := theirs.get("stop_words_ids")) and stops != known:
        notes += (f"stop_words_ids {stops} are not carried over: give stop strings instead",)
    return config, chat, notes


def _write_beside(
    target: Path,
    source: Checkpoint,
    plan: Plan,
    generation: dict[str, Any],
    chat: bool,
    tokenizer: Any | None,
) -> None:
    """Everything but weights, card and manifest."""
    config = dict(plan.config)
    if generation:
        ends = generation.get("eos_token_id")
        config["eos_token_id"] = ends[0] if isinstance(ends, list) else ends
        config["pad_token_id"] = generation.get("pad_token_id")
        write_json(target / GENERATION, generation)
    if plan.quantization is not None:
        config["quantization_config"] = plan.quantization
        write_json(target / "quantize_config.json", plan.quantization)
    write_json(target / "config.json", config)
    write_configuration(target, chat)
    copy_legal(source, target)
    if tokenizer is not None:
        write_tokenizer(tokenizer, source, target, plan.longest, chat)


def _write_card(
    path: Path, manifest: dict[str, Any], source: Checkpoint, plan: Plan, chat: bool
) -> None:
    quant = plan.quantization
    loading = loading_code(chat)
    if quant is not None:
        needs = "With transformers (needs `pip install optimum gptqmodel`):"
        loading = [needs, "", *loading, "", *WITHOUT_A_GPU]
    write_card(
        path,
        manifest,
        source,
        suffix=TARGET,
        tags=[TARGET, *(["gptq", f"{quant['bits']}-bit"] if quant is not None else [])],
        what=[
            f"The weights of {source.path.name}, bit for bit ({weight_bytes(path)}), under the",
            "names of the native `qwen2` architecture: no reader needs code from this directory,",
            "nor `trust_remote_code`. Converted by qquant.",
        ],
        loading=loading,
        difference=[
            "## What is not as in the original",
            "",
            *(f"- {note}." for note in manifest["conversion"]["notes"]),
            "",
            f"Up to {plan.longest} tokens the logits are the original's within rounding.",
            "",
        ],
    )


def _by_source(plan: Plan) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in plan.parts:
        found.setdefault(part.source, []).append(part)
    return found


def _pieces(source: Checkpoint, name: str, parts: list[Part]) -> Iterator[tuple[Part, int, Tensor]]:
    """(part, its first row, rows of it) until all parts of a source tensor are covered.

    The tensor is read once, in slices of rows.
    """
    info = source.info(name)
    rows = info.shape[0]
    step = max(1, _SLICE * rows // max(1, info.nbytes))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tensor = source.read_rows(name, start, stop)
        for part in parts:
            low, high = max(start, part.rows[0]), min(stop, part.rows[1])
            if low < high:
                piece = tensor[low - start : high - start]
                if part.columns is not None:
                    piece = piece[:, slice(*part.columns)]
                yield part, low - part.rows[0], piece


def _need_zeros(source: Checkpoint, plan: Plan) -> None:
    """Biases that are left out say nothing.

    Raises:
        CheckpointError: one has other numbers than zero.
    """
    for name in plan.zeros:
        if bool(source.read(name).any()):
            raise CheckpointError(
                name,
                expected="zeros, as qwen2 has no bias there",
                got="other numbers",
                cure="This model needs the original's code: it cannot be converted",
            )


def _verify(path: Path, source: Checkpoint, plan: Plan) -> None:
    """Reads everything back and compares it with the source, byte by byte.

    Raises:
        VerifyError: something is not what was meant.
    """
    stored = Checkpoint.open(path)
    problems = []
    if plan.quantization is not None:
        problems = [str(problem) for problem in verify(path).problems]
    for name, parts in _by_source(plan).items():
        for part, start, tensor in _pieces(source, name, parts):
            there = stored.read_rows(part.name, start, start + tensor.shape[0])
            if not torch.equal(_bytes(there), _bytes(tensor)):
                problems.append(f"{part.name} is not what {name} has")
                break
    refuse(problems)


def _bytes(tensor: Tensor) -> Tensor:
    """As bytes: NaN equals itself then, and zero is not minus zero."""
    return tensor.contiguous().view(-1).view(torch.uint8)
