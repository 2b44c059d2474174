"""What a run's parts cost where only torch can tell: on an accelerator, or in another dtype.

One batch through one block, one Hessian's product, and a few small solves, with this model's shapes
and made-up numbers, on the run's device in its dtype. Through the solves a cost in the shape's
terms (k, nk, nk², k³) is fitted and read off at the real shapes: small solves, since a real one of
a large model takes as long as a user waits for the whole answer. Importing torch and transformers
for it takes longer than measuring; on a CPU in float32 `pace.py` does without.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import gptq
from .batching import Batching
from .checkpoint import Checkpoint
from .config import QuantSpec
from .costs import Costs
from .devices import COMPUTE_DTYPES
from .hessian import Hessian
from .models.experts import Experts
from .models.families import Family
from .models.shapes import Group, Shapes
from .models.skeleton import Skeleton
from .place import Place
from .products import integers, linear, packed_codes
from .timings import fastest_of

_STOPS = 1.2  # what stopping, rounding and keeping adds to a plain forward; measured
_FLOPS = 6e10  # of the forward that is measured, at the most
_ROWS, _COLUMNS = 2048, 1536  # of the small solves, at the most


def torch_costs(
    source: Checkpoint, family: Family, shapes: Shapes, quant: QuantSpec, place: Place, seqlen: int
) -> Costs:
    """Measures; takes a few seconds.

    Args:
        seqlen: tokens of a calibration sample.

    Raises:
        CheckpointError: config.json does not make a model, or tensors do not fit it.
    """
    device = torch.device(place.device)
    start = time.perf_counter()
    skeleton = Skeleton(source, family, device, COMPUTE_DTYPES[place.dtype])
    set_up = time.perf_counter() - start  # mostly of importing what is used first
    solve = _solve_cost(device, quant, shapes.groups)
    if quant.method == "rtn":
        return Costs("torch", set_up, 0.0, lambda _: (0.0, 0.0), solve)
    forward, quantized = (
        shapes.blocks * seconds * _STOPS for seconds in _forward_seconds(skeleton, seqlen, quant)
    )
    two = quant.streams == 2
    widths = {group.inputs for group in shapes.groups}
    one = {k: _hessian_seconds(device, skeleton.dtype, k, two=two) for k in widths}

    def hessian(group: Group) -> tuple[float, float]:
        first, each = one[group.inputs]
        return first, each * group.difference

    return Costs("torch", set_up, forward, hessian, solve, quantized=quantized)


def _forward_seconds(skeleton: Skeleton, seqlen: int, quant: QuantSpec) -> tuple[float, float]:
    """Per token, through one block with made-up weights, as many at once as the run takes.

    Returns:
        through weights as they are, and through quantized ones.
    """
    largest = max(skeleton.blocks, key=lambda b: sum(p.numel() for p in b.parameters()))
    block = copy.deepcopy(largest).to(skeleton.dtype).to_empty(device=skeleton.device)
    weights = sum(p.numel() for p in block.parameters())
    most = max(1, int(_FLOPS / (2 * weights)) // seqlen)
    batch = min(Batching.of(skeleton.device.type, seqlen, quant.streams).batch, most)
    with torch.inference_mode():
        for p in block.parameters():
            p.fill_(0.01)
        x = torch.ones(
            batch, seqlen, skeleton.config.hidden_size, device=skeleton.device, dtype=skeleton.dtype
        )
        index = list(skeleton.blocks).index(largest)
        kwargs = skeleton.block_kwargs(batch, seqlen)[index]

        def measured() -> float:
            seconds = fastest_of(lambda: block(x, **kwargs), 2, device=skeleton.device)
            return seconds / (batch * seqlen)

        whole = measured()
        inside = {m for e in block.modules() if isinstance(e, Experts) for m in e.modules()}
        linears = {block.get_submodule(name) for name in skeleton.linears[index]} - inside
        codes = [_through_codes(m, quant) for m in linears if isinstance(m, nn.Linear)]
        return whole, measured() if any(codes) else whole


def _through_codes(module: nn.Linear, quant: QuantSpec) -> bool:
    """Has it multiply by a quantized weight, if the walk does that in another way.

    Of a mix of widths all count as the mean.
    """
    bits = min(8, round(quant.target_bpw or quant.bits))
    n, k = module.weight.shape
    groups = k // quant.group_of(k)
    zeros = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8, device="cpu")
    codes = torch.full((n, k), 2**bits - 1, dtype=torch.uint8, device=module.weight.device)
    weight = packed_codes(codes, torch.ones_like(zeros).float(), zeros, module.weight.dtype)
    if weight is None:
        return False
    module.__dict__["forward"] = lambda x: linear(x, weight, module.bias)
    return True


def _hessian_seconds(
    device: torch.device, dtype: torch.dtype, k: int, *, two: bool
) -> tuple[float, float]:
    """Per token: of the Hessian, and of a multiply-add of the streams' difference with it."""
    small, tokens = min(k, 2048), 1024
    x = torch.ones(tokens, small, device=device, dtype=dtype)
    weight = torch.zeros(small, small, device=device, dtype=dtype)
    kind = integers(device, dtype)
    one = Hessian(small, device, integers=kind)
    both = Hessian(small, device, weights=[weight], integers=kind)
    scale = (k / small) ** 2 / tokens
    # Each is called once before, and the fastest of three counts: the first batch of a sum, and
    # those with which it has doubled, may have more to do (`running_sum.py`).
    first = fastest_of(lambda: one.add(x), 3, device=device) * scale
    if not two:
        return first, 0.0
    second = fastest_of(lambda: both.add(x, x), 3, device=device) * scale
    return first, (second - first) / k**2


def _solve_cost(
    device: torch.device, quant: QuantSpec, groups: Sequence[Group]
) -> Callable[[int, int], float]:
    """Seconds of one solve by (outputs, inputs), from a few small ones."""
    rows: list[list[float]] = []
    seconds: list[float] = []
    unit = max(1, quant.group_size)
    wide = min(_COLUMNS, max(g.inputs for g in groups))
    tall = min(_ROWS, max(g.rows for g in groups))
    for n, k in ((64, 256), (512, 256), (64, wide), (512, wide), (tall, 384)):
        k = -(-k // unit) * unit
        gen = torch.Generator().manual_seed(0)
        w = torch.randn(n, k, generator=gen).to(device)
        x = torch.randn(2 * k, k, generator=gen).to(device)
        h = x.T @ x if quant.method == "gptq" else None
        more: dict[str, Any] = {}
        if quant.streams == 2 and h is not None:
            more = {"cross": 0.01 * h, "pull": None}
        rows.append(_terms(n, k))
        solve = partial(gptq.solve, w, h, quant, **more)
        seconds.append(fastest_of(solve, 1, device=device, warm=not seconds))
    fit = _fit(np.array(rows), np.array(seconds))
    return lambda n, k: float(np.dot(_terms(n, k), fit))


def _terms(n: int, k: int) -> list[float]:
    return [k / 1e3, n * k / 1e6, n * k * k / 1e9, k**3 / 1e9]


def _fit(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares, relative, with no negative cost: the best over all choices of terms."""
    a, one = a / b[:, None], np.ones(len(b))
    best, least = np.zeros(a.shape[1]), np.inf
    for count in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), count):
            found = np.linalg.lstsq(a[:, chosen], one, rcond=None)[0]
            error = float(np.square(a[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(a.shape[1]), error
                best[list(chosen)] = found
    return best
