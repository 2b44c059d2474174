"""Sums of products in 8-bit integers, for a CPU that multiplies those twice as fast as bfloat16.

A Hessian is a sum over thousands of tokens. What rounding adds to one number is as good as
independent of all others, so the sum's error falls with the root of their number: with 8 bits it is
7e-4 of H's norm after 4096 tokens of a test, where another 4096 tokens change H by a hundred times
that. So each column becomes integers with a step of its own for every 256 rows, and they are
multiplied by AVX-512's instructions for that (VNNI). Rounding changes a column by 0.7% of its norm
where numbers are normally distributed and by 6% at the most, since no largest one of 256 is above
16 times their root mean square; H stays positive semidefinite, being the square of what was
rounded.

Where a few of a column's numbers are so far above all others that those would become 0, rounding is
not independent of what is rounded any more. Where no more than one in 32 would be left, `Columns`
are rough, and whoever sums multiplies what they were made of.

Measured on two cores of an AMD EPYC (Zen 4), 2048 rows, beside `running_sum.py`'s bfloat16, medians
in GFLOP/s by what a whole square takes, layout included: 726 and 246 (512 columns), 755 and 292
(1408), 693 and 286 (2048).

Results are the same for every number of threads.

Left out on purpose: what the functions compute (`int8_ir.py`), compiling (`llvm_code.py`), who sums
so (`hessian.py`), and forwards, whose rounding no sum averages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import llvm_code
from .errors import RunError
from .int8_ir import CHUNK, WIDE, Writer, fours_of
from .llvm_code import Program

_NEAR = 2e-2  # of the norm, of sums of independent numbers over a chunk


@dataclass(frozen=True)
class Columns:
    """Numbers [rows, width] as integers, each column of `CHUNK` rows with a step of its own.

    Attributes:
        numbers: int8, as `int8_ir.ARRANGE` has them.
        steps: float32 [chunks, width].
        excess: int32 [chunks, width], what sums of the left side begin with.
        rough: any column of a chunk is.
        rows: of them.
    """

    WIDE = WIDE  # widths are multiples of it
    LEAST = 256  # inputs from which that is faster

    numbers: Tensor
    steps: Tensor
    excess: Tensor
    rough: bool
    rows: int

    @classmethod
    def of(cls, x: Tensor, instead: Columns | None = None) -> Columns:
        """Of x [rows, width] bfloat16, width a multiple of `WIDE`.

        Args:
            instead: whose memory is taken if it is of that size, and which is used up.

        Raises:
            RunError: it is not that.
        """
        whole = x.dim() == 2 and x.shape[1] % WIDE == 0 and not x.is_neg()
        _need(whole and x.dtype == torch.bfloat16 and x.device.type == "cpu", x)
        rows, width = x.shape
        chunks, x = -(-rows // CHUNK), x.contiguous()
        if instead is not None and instead.shape == (width, rows):
            numbers, steps, excess = instead.numbers, instead.steps, instead.excess
        else:
            numbers = torch.empty(4 * fours_of(rows) * width, dtype=torch.int8, device="cpu")
            steps = torch.empty(chunks, width, dtype=torch.float32, device="cpu")
            excess = torch.empty(chunks, width, dtype=torch.int32, device="cpu")
        rough = torch.empty(chunks, width // WIDE, dtype=torch.int32, device="cpu")
        given = (t.data_ptr() for t in (x, numbers, steps, excess, rough))
        _compiled().run("arrange", *given, rows, width)
        return cls(numbers, steps, excess, bool(rough.any()), rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(width, rows), as of a transposed tensor."""
        return self.steps.shape[1], self.rows

    def add_products(self, others: Columns, out: Tensor) -> None:
        """Adds selfᵀ others to `out` [width, width of theirs], float32 in one piece.

        Of a product with itself only what is on the diagonal and above is added, and some below.

        Raises:
            RunError: they do not fit together.
        """
        lefts, rights = self.shape[0], others.shape[0]
        fits = out.shape == (lefts, rights) and self.rows == others.rows
        fits = fits and out.dtype == torch.float32 and out.is_contiguous()
        _need(fits and out.device.type == "cpu", out)
        tensors = self.numbers, self.steps, self.excess, others.numbers, others.steps, out
        square = int(self is others)
        given = (t.data_ptr() for t in tensors)
        _compiled().run("gather", *given, self.rows, lefts, rights, square)


@cache
def unavailable() -> str | None:
    """Why nothing of this runs in this process, or None; tried once, on small tensors."""
    if why := llvm_code.against_vnni():
        return why
    return llvm_code.against_results(_trial, _NEAR)


def _need(right: bool, given: Tensor) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    if not right:
        raise RunError(
            "sums in 8-bit integers",
            expected="what `int8.py` says, on the CPU, row after row",
            got=f"{given.dtype} {list(given.shape)} on {given.device}",
        )


@cache
def _compiled() -> Program:
    return Program(Writer().text(), llvm_code.VNNI)


def _trial() -> list[float]:
    """How far each result is off, of the norm."""
    draw = torch.Generator(device="cpu").manual_seed(0)

    def made(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=draw, device="cpu", dtype=torch.float32)
        return x.bfloat16()

    x, y = made(CHUNK + 13, 96), made(CHUNK + 13, 32)
    out, square = (torch.zeros(96, n, dtype=torch.float32, device="cpu") for n in (32, 96))
    columns = Columns.of(x)
    columns.add_products(Columns.of(y), out)
    columns.add_products(columns, square)
    pairs = (
        (out, x.double().T @ y.double()),
        (square.triu(), (x.double().T @ x.double()).triu()),
    )
    return [float((got - want).norm() / want.norm()) for got, want in pairs]
