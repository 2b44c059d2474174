"""Products with quantized weights in 8-bit integers, on a CPU that multiplies those fastest.

A batch that goes on through solved linears meets weights of few bits. As bfloat16 those are rounded
and multiplied at half the rate of 8-bit integers, which hold their codes exactly. So here inputs
become such integers too, with a step of a row's own for each group of inputs that has a scale
(`int8_weight_ir.py`). A product of normally distributed rows is off by 6.6e-3 of its norm then,
and by 2.4e-3 with both sides as bfloat16. Weights of 8 bits, whose own error is no larger than
that, are not multiplied so.

It is rounding that nothing averages, and of a row that has a few numbers far above all others
(massive activations) it would leave only those. So for each row it is known what its rounding comes
to. Where that is more than a tenth of its numbers that are at most half as large as their group's
largest, what is left of the row is multiplied as well, and it is as good as of 16 bits.

Measured on two cores of an AMD EPYC (Zen 4), 2048 rows, beside `products.py`'s bfloat16, medians in
GFLOP/s with the rounding of rows: 703 and 446 (512 to 512), 750 and 434 (512 to 1408), 721 and 438
(1408 to 512), 770 and 448 (2048 to 2048), 796 and 447 (2048 to 5504).

Results are the same for every number of threads, and those of a row do not depend on the rows
beside it.

Left out on purpose: what the functions compute (`int8_weight_ir.py`), compiling
(`llvm_code.py`), who multiplies so (`calibration/walk.py`), weights that are not quantized, whose
rounding would be felt too, and kernels that serve a model (`avx2.py`), which take its files as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from . import llvm_code, pool
from .errors import RunError
from .int8_weight_ir import CHUNKS, ROWS, WIDE, Writer
from .llvm_code import Program
from .scratch import scratch

BITS = 4  # of a code, at the most

_STRIP = 172 * ROWS  # rows that are rounded before they are multiplied
_TALL = 256 << 10  # bytes of them that are multiplied together: a core's caches have those,
_BROAD = 8  # and the weights of so many panels
_CHUNK = 128  # inputs that have a step together where there is no group, or a larger one
_SLICE = 1 << 21  # weights that are laid out at a time
_NEAR = 2e-2  # of the norm, of a result that is right


class Weight:
    """A quantized linear's weight for `multiply`.

    Attributes:
        shape: (N, K) of the weight.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Of codes [N, K] uint8, scales [N, G] float32 and zeros [N, G] uint8.

        The weight is `scales * (codes - zeros)`.

        Raises:
            RunError: they are none that `takes` says can be one.
        """
        _need(_fits(codes, scales, zeros), codes)
        self.shape = codes.shape
        (n, k), self._chunk = codes.shape, _chunk_of(codes, scales)
        self._chunks = chunks = k // self._chunk
        panels, fours = n // WIDE, k // 4
        # Four integers of an output are moved as one.
        self._numbers = torch.empty(panels, fours, WIDE, dtype=torch.int32, device="cpu")
        self._scales = torch.empty(panels, chunks, WIDE, dtype=torch.float32, device="cpu")
        repeated = chunks // scales.shape[1]
        scales = scales.repeat_interleave(repeated, 1).view(panels, WIDE, chunks)
        self._scales.copy_(scales.transpose(1, 2))
        more = (128 - zeros.int()).to(torch.uint8)[..., None]  # sums of bytes begin again at 256
        for own in _slices(panels, WIDE * k):
            rows = slice(own.start * WIDE, own.stop * WIDE)
            above = codes[rows].reshape(*zeros[rows].shape, -1) + more[rows]
            part = above.view(-1, k).view(torch.int32).view(-1, WIDE, fours)
            self._numbers[own].copy_(part.transpose(1, 2))

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] bfloat16 by it, with a bias [N]: [..., N] bfloat16.

        Raises:
            RunError: they do not fit together.
        """
        n, k = self.shape
        right = x.dtype == torch.bfloat16 and x.shape[-1:] == (k,) and x.device.type == "cpu"
        _need(right and not x.is_neg() and (bias is None or bias.shape == (n,)), x)
        rows = x.reshape(-1, k).contiguous()
        added = torch.zeros(n, device="cpu") if bias is None else bias.float().contiguous()
        out = pool.empty(len(rows), n, dtype=torch.bfloat16)
        for first in range(0, len(rows), _STRIP):
            strip = slice(first, first + _STRIP)
            self._multiply(rows[strip], added, out[strip])
        return out.view(*x.shape[:-1], n)

    def _multiply(self, rows: Tensor, bias: Tensor, out: Tensor, again: bool = False) -> None:
        """Writes the products of rows [R, K] to `out` [R, N], all of them in one piece.

        Args:
            again: these are what is left of others, and nothing is left of these.
        """
        (n, k), count, chunks = self.shape, len(rows), self._chunks
        panels = -(-count // ROWS)
        numbers = scratch("numbers", torch.int8, panels * ROWS * k)
        steps = scratch("steps", torch.float32, panels * ROWS * chunks)
        excess = scratch("excess", torch.int32, panels * ROWS * chunks)
        rough = scratch("rough", torch.int32, panels * ROWS)
        program = _compiled(self._chunk)
        program.run("quantize", *_at(rows, numbers, steps, excess, rough), count, chunks)
        together = max(1, _TALL // (ROWS * k))
        given = _at(numbers, steps, excess, self._numbers, self._scales, bias, out)
        program.run("multiply", *given, count, chunks, n, together, _BROAD)
        if again:
            return
        places = rough[:count].nonzero().squeeze(1)
        if len(places):
            panel, row = places // ROWS, places % ROWS
            known = numbers.view(panels, chunks, ROWS, -1)[panel, :, row].float()
            known *= steps.view(panels, chunks, ROWS)[panel, :, row][..., None]
            left = (rows[places].float() - known.view(-1, k)).to(torch.bfloat16)
            more = torch.empty(len(places), n, dtype=torch.bfloat16, device="cpu")
            self._multiply(left, torch.zeros_like(bias), more, again=True)
            out.index_add_(0, places, more)


def takes(codes: Tensor, scales: Tensor, zeros: Tensor) -> bool:
    """Whether a `Weight` can be made of these, as it has them, and multiplied by here."""
    return _fits(codes, scales, zeros) and not unavailable()


@cache
def unavailable() -> str | None:
    """Why nothing of this runs in this process, or None; tried once, on small tensors."""
    if why := llvm_code.against_vnni():
        return why
    return llvm_code.against_results(_trial, _NEAR)


def _fits(codes: Tensor, scales: Tensor, zeros: Tensor) -> bool:
    if any(t.device.type != "cpu" or not t.numel() for t in (codes, scales, zeros)):
        return False
    (n, k), groups = codes.shape, scales.shape[1]
    if (
        not codes.is_contiguous()
        or n % WIDE
        or k % groups
        or scales.shape != (n, groups)
        or zeros.shape != (n, groups)
    ):
        return False
    if (codes.dtype, scales.dtype, zeros.dtype) != (torch.uint8, torch.float32, torch.uint8):
        return False
    # As far as 128 below its zero an integer of 8 bits holds a code.
    few = int(codes.max()) < 2**BITS and int(zeros.max()) <= 128
    return few and _chunk_of(codes, scales) in CHUNKS


def _chunk_of(codes: Tensor, scales: Tensor) -> int:
    """Inputs of a weight [N, K] that have a step together; 0 if there is no such number."""
    k = codes.shape[1]
    group = k // scales.shape[1]
    if group in CHUNKS:
        return group
    return 0 if group % _CHUNK else _CHUNK


def _slices(panels: int, size: int) -> Iterable[slice]:
    step = max(1, _SLICE // size)
    return (slice(i, min(i + step, panels)) for i in range(0, panels, step))


def _at(*tensors: Tensor) -> list[int]:
    for tensor in tensors:
        _need(tensor.is_contiguous() and tensor.device.type == "cpu", tensor)
    return [tensor.data_ptr() for tensor in tensors]


def _need(right: bool, given: Tensor) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    if not right:
        raise RunError(
            "products of quantized weights in 8-bit integers",
            expected="what `int8_weight.py` says, on the CPU, row after row",
            got=f"{given.dtype} {list(given.shape)} on {given.device}",
        )


@cache
def _compiled(chunk: int) -> Program:
    return Program(Writer(chunk).text(), llvm_code.VNNI)


def _trial() -> list[float]:
    """How far each row is off, of its norm."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    n, k, groups = 2 * WIDE, 3 * _CHUNK, 3
    x = torch.randn(ROWS + 3, k, generator=draw, device="cpu", dtype=torch.float32).bfloat16()
    codes = torch.randint(0, 16, (n, k), generator=draw, device="cpu").to(torch.uint8)
    x[2, 5], codes[:, 5] = 1e3, 8  # a rough row, of which what is left is all that comes out
    scales = torch.rand(n, groups, generator=draw, device="cpu", dtype=torch.float32) + 0.5
    zeros = torch.full((n, groups), 8, dtype=torch.uint8, device="cpu")
    bias = torch.ones(n, dtype=torch.bfloat16, device="cpu")
    weight = (codes.view(n, groups, -1).double() - 8) * scales.double()[..., None]
    want = x.double() @ weight.view(n, k).T + 1
    off = (Weight(codes, scales, zeros).multiply(x, bias) - want).norm(dim=1) / want.norm(dim=1)
    return list(map(float, off))
