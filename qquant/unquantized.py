"""What is not quantized goes over as it is: cast, checked, in slices of rows.

Embedding, norms, head and biases. The large ones are never in memory as a whole. A value that does
not fit the target's dtype is refused with its tensor's name, since an infinity in an embedding
shows only when some user types that token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .finite import all_finite
from .models.skeleton import need_finite
from .shards import ShardWriter

_ROW_BYTES = 8 << 20  # converted at a time: memory that is given back is used again for the next


def copy_tensors(
    source: Checkpoint, names: Sequence[str], writer: ShardWriter, dtype: torch.dtype
) -> None:
    """Writes the tensors `names` of the source in `dtype`.

    Raises:
        CheckpointError: a value is not finite or does not fit `dtype`; the tensor is named.
    """
    for name in names:
        info = source.info(name)
        rows = max(1, _ROW_BYTES * info.shape[0] // max(1, info.nbytes)) if info.shape else 1
        for start in range(0, info.shape[0], rows):
            part = source.read_rows(name, start, min(start + rows, info.shape[0]))
            writer.write_rows(name, start, cast(name, part, dtype))


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, refusing what would become infinite or is not finite already.

    Raises:
        CheckpointError: names the tensor.
    """
    result = tensor.to(dtype)
    if not all_finite(result):
        need_finite(name, tensor)
        raise CheckpointError(
            name,
            expected=f"values that fit {str(dtype).removeprefix('torch.')}",
            got=f"a largest magnitude of {float(tensor.abs().max()):.3g}",
            cure="Use --dtype bfloat16",
        )
    return result
