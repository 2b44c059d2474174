"""How many bytes a token takes, and how fast this machine moves bytes.

At batch 1 every weight is read once for each token that is generated, and little is computed with
it: decoding cannot be faster than memory. So beside tokens/s stand the bytes that a decoded token
has to read, as the kernels hold them (packed codes, scales, zero points, the vocabulary matrix; of
the embedding one row per token), and the cache at its length. Divided by the time of a token that
is a rate, and its share of what copying reached on the same device in the same run tells how much
of the memory's speed the model gets. What a kernel writes down and reads again in between (the
unpacked weights of a fallback) is not counted: it is the kernel's cost, and shows as a low share.

Copying is counted as a read and a write. Small models are read from the processor's caches, which
are faster than memory: their share may exceed 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .generation import clock
from .host import available_memory
from .kernels import QuantLinear
from .packed_head import held_weights

_COPY = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes copied at a time: far more than caches hold


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written per second by a copy within the device's memory, the best of some."""
    size = _COPY[device.type]
    if device.type == "cpu":
        size = min(size, max(available_memory() // 8, 1 << 20))
    now = clock(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        start = now()
        target.copy_(source)
        best = min(best, now() - start)
    return 2 * size / best


def weights_read(model: Any, rows: int = 1) -> int:
    """Bytes of weights that one decoded token of each row takes, for all rows together.

    Args:
        model: as `runtime.load` gives it.
        rows: sequences decoded side by side.
    """
    embedding = model.get_input_embeddings()
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.read_bytes(rows)
        elif module is embedding:
            total += rows * embedding.weight.shape[1] * embedding.weight.element_size()
        else:
            for tensor in _own(module):
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    total += tensor.numel() * tensor.element_size()
    return total


def _own(module: nn.Module) -> list[Tensor]:
    """What a module itself holds and computes with; of bitsandbytes' also scales and tables."""
    held: list[Any] = [*module.parameters(recurse=False), *held_weights(module)]
    weight = getattr(module, "weight", None)
    if (four := getattr(weight, "quant_state", None)) is not None:
        for state in (four, getattr(four, "state2", None)):  # the second: scales of the scales
            held += [getattr(state, "absmax", None), getattr(state, "code", None)]
    held += [getattr(weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


def cache_read(held: int, length: int, context: int, new_tokens: int, *, whole: bool) -> float:
    """Bytes of cache that one step of the decode reads, on the average.

    Args:
        held: bytes of the cache at the end of the run, when it has `length` tokens.
        context, new_tokens: of the run; the step to token i reads `context + i - 1` tokens of it.
        whole: a buffer of fixed size, which is read as a whole at every step.
    """
    return float(held) if whole else held / length * (context + new_tokens / 2)
