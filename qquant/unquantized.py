"""What is not quantized goes over as it is: cast, checked, in slices of rows.

Embedding, norms, head and biases. The large ones are never in memory as a whole. A value that does
not fit the target's dtype is refused with its tensor's name, since an infinity in an embedding
shows only when some user types that token. It is the first thing in a run's shards, so that this
comes before the long part.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .config import OutputSpec
from .errors import CheckpointError
from .finite import all_finite
from .headers import TensorPlan
from .models.skeleton import need_finite
from .shards import ShardWriter

_PIECE = 2 << 20  # bytes that are converted at a time, in memory that serves again


def begin_shards(
    path: Path,
    plan: Sequence[TensorPlan],
    source: Checkpoint,
    names: Sequence[str],
    out: OutputSpec,
    done: Mapping[str, str] | None,
) -> ShardWriter:
    """A writer of `plan` in the folder `path`, with the tensors `names` of the source written.

    What an earlier run left in `path` is removed, but for its shards where they are gone on with.

    Args:
        done: as in `ShardWriter`.

    Raises:
        CheckpointError: as in `copy_tensors`.
    """
    for old in path.iterdir():
        if done is None or not old.match("*.safetensors"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    writer = ShardWriter(path, plan, out.shard_size, done=done)
    try:
        copy_tensors(source, names, writer, getattr(torch, out.dtype))
    except BaseException:
        writer.abort()
        raise
    return writer


def copy_tensors(
    source: Checkpoint, names: Sequence[str], writer: ShardWriter, dtype: torch.dtype
) -> None:
    """Writes the tensors `names` of the source in `dtype`.

    Raises:
        CheckpointError: a value is not finite or does not fit `dtype`; the tensor is named.
    """
    read = torch.empty(_PIECE, dtype=torch.uint8)
    made = torch.empty(_PIECE, dtype=dtype)
    for name in names:
        info = source.info(name)
        if not info.shape:
            writer.write(name, cast(name, source.read(name), dtype))
            continue
        count = info.shape[0]
        row = info.nbytes // max(1, count)
        rows = max(1, _PIECE // max(1, row))
        into = read if row <= _PIECE else None
        for start in range(0, count, rows):
            part = source.read_rows(name, start, min(start + rows, count), into)
            writer.write_rows(name, start, cast(name, part, dtype, made))


def cast(name: str, tensor: Tensor, dtype: torch.dtype, made: Tensor | None = None) -> Tensor:
    """`tensor` in `dtype`, refusing what would become infinite or is not finite already.

    Args:
        made: memory in `dtype` that the result may be a view of.

    Raises:
        CheckpointError: names the tensor.
    """
    if made is None or tensor.dtype == dtype or tensor.numel() > made.numel():
        result = tensor.to(dtype)
    else:
        result = made[: tensor.numel()].view(tensor.shape).copy_(tensor)
    if not all_finite(result):
        need_finite(name, tensor)
        raise CheckpointError(
            name,
            expected=f"values that fit {str(dtype).removeprefix('torch.')}",
            got=f"a largest magnitude of {float(tensor.abs().max()):.3g}",
            cure="Use --dtype bfloat16",
        )
    return result
