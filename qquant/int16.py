"""Products in 16-bit integers, for a CPU that multiplies nothing narrower than float32 at speed.

A processor with AVX2 and no more has no instructions for bfloat16. It multiplies 16-bit integers
and adds them in pairs, though, at twice the operations of float32, and exactly. So here each row of
what is multiplied becomes integers with a step of its own for every 256 numbers, small enough that
no sum of 256 products leaves 32 bits (`int16_ir.py`). A product of normally distributed numbers is
off by 1.4e-4 of its norm then, and by 2.3e-3 with both rounded to bfloat16.

Measured on two cores of an AMD EPYC with AVX2, 1024 rows, beside `products.py`'s float32, medians
in GFLOP/s: 202 and 142 (512 to 1408), 197 and 139 (1408 to 512), 211 and 130 (2048 to 2048);
Hessians, by what float32 has to do: 242 and 121 (1408), 237 and 118 (2048).

Results are the same for every number of threads, since sums of integers are, and those of a row do
not depend on the rows beside it. A sum over rows has a step for every 256 of each `Columns`.

Left out on purpose: what the functions compute (`int16_products_ir.py`), compiling
(`llvm_code.py`), who multiplies so (`products.py`), attention (`int16_attention.py`),
processors with AVX-512, whose float32 is as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from . import llvm_code, pool
from .errors import RunError
from .int16_ir import AVX2, CHUNK, pairs_of
from .int16_products_ir import Writer
from .llvm_code import Program
from .scratch import scratch

WIDE, ROWS = AVX2.wide, AVX2.rows
_NEAR = 4e-4  # of the norm, of a result that is right
# A chunk's mean magnitude, but for its largest integer, below which rounding is felt: normally
# distributed numbers have 2300, beside six that are far above all others it is less.
_ROUGH = 400.0


@dataclass(frozen=True)
class Columns:
    """Numbers [rows, width] as integers, each column of `CHUNK` rows with a step of its own.

    Attributes:
        numbers: int16, as `int16_products_ir.ARRANGE` has them.
        steps: float32 [chunks, width].
        rows: of them.
    """

    WIDE = LEAST = WIDE  # widths are multiples of it
    rough = False  # never: see `int8.py`

    numbers: Tensor
    steps: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor, instead: Columns | None = None) -> Columns:
        """Of x [rows, width] float32, width a multiple of `WIDE`.

        Args:
            instead: whose memory is taken if it is of that size, and which is used up.

        Raises:
            RunError: it is not that.
        """
        _need(x.dim() == 2 and x.shape[1] % WIDE == 0 and x.dtype == torch.float32, x)
        rows, width = x.shape
        x = x.contiguous()
        if instead is not None and instead.shape == (width, rows):
            numbers, steps = instead.numbers, instead.steps
        else:
            numbers = torch.empty(2 * pairs_of(rows) * width, dtype=torch.int16, device="cpu")
            steps = torch.empty(-(-rows // CHUNK), width, dtype=torch.float32, device="cpu")
        _compiled().run("arrange", *_at(x, numbers, steps), rows, width)
        return cls(numbers, steps, rows)

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
        _need(fits and out.dtype == torch.float32, out)
        given = _at(self.numbers, self.steps, others.numbers, others.steps, out)
        _compiled().run("gather", *given, self.rows, lefts, rights, int(self is others))


class Weight:
    """A linear's weight for `multiply`.

    Attributes:
        shape: (N, K) of the weight.
    """

    def __init__(self, weight: Tensor) -> None:
        """Of a weight [N, K], floating, that `takes` says can be one.

        Raises:
            RunError: it cannot.
        """
        _need(takes(weight), weight)
        self.shape, self._exact = weight.shape, weight.float()
        n, k = weight.shape
        self._columns = Columns(
            torch.empty(2 * pairs_of(k) * n, dtype=torch.int16, device="cpu"),
            torch.empty(-(-k // CHUNK), n, dtype=torch.float32, device="cpu"),
            k,
        )
        for c, start in enumerate(range(0, k, CHUNK)):  # a copy of the whole would be large
            part = Columns.of(weight[:, start : start + CHUNK].float().t())
            self._columns.numbers[start * n :][: part.numbers.numel()] = part.numbers
            self._columns.steps[c] = part.steps[0]

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] by it, with a bias [N]: [..., N]; all float32.

        Rows with a few numbers far above all others are multiplied in float32: small weights of
        those, and the other numbers, would be rounded roughly.

        Raises:
            RunError: they do not fit together.
        """
        n, k = self.shape
        right = x.dtype == torch.float32 and x.shape[-1:] == (k,)
        _need(right and (bias is None or bias.shape == (n,)), x)
        rows = x.reshape(-1, k).contiguous()
        added = torch.zeros(n, device="cpu") if bias is None else bias.float().contiguous()
        count, chunks = len(rows), -(-k // CHUNK)
        numbers = scratch("numbers", torch.int16, -(-count // ROWS) * ROWS * k)
        steps = scratch("steps", torch.float32, count * chunks)
        rests = scratch("rests", torch.float32, count * chunks)
        out = pool.empty(count, n)
        program, columns = _compiled(), self._columns
        program.run("quantize", *_at(rows, numbers, steps, rests), count, k)
        given = _at(numbers, steps, columns.numbers, columns.steps, added, out)
        program.run("multiply", *given, count, k, n)
        rough = (rests > 0) & (rests < _ROUGH)
        if bool(rough.any()):
            places = rough.view(count, chunks).any(1).nonzero().squeeze(1)
            out[places] = F.linear(rows[places], self._exact, bias)
        return out.view(*x.shape[:-1], n)


def squaring(a: Tensor) -> Callable[[], Tensor]:
    """What multiplies a [N, N] by its transpose."""
    weight = Weight(a)
    return lambda: weight.multiply(a)


def takes(weight: Tensor) -> bool:
    """Whether a `Weight` can be made of it."""
    return weight.dim() == 2 and all(size % WIDE == 0 and size for size in weight.shape)


@cache
def unavailable() -> str | None:
    """Why nothing of this runs in this process, or None; tried once, on small tensors."""
    return llvm_code.against_results(_trial, _NEAR)


def _at(*tensors: Tensor) -> list[int]:
    for tensor in tensors:
        whole = tensor.is_contiguous() and not tensor.is_neg()
        _need(whole and tensor.device.type == "cpu", tensor)
        _need(tensor.dtype in (torch.float32, torch.int16), tensor)
    return [tensor.data_ptr() for tensor in tensors]


def _need(right: bool, given: Tensor) -> None:
    """Addresses are all that the code gets: what lies there has to be what it takes it for."""
    if not right:
        raise RunError(
            "products in 16-bit integers",
            expected="what `int16.py` says, on the CPU, row after row",
            got=f"{given.dtype} {list(given.shape)} on {given.device}",
        )


@cache
def _compiled() -> Program:
    return Program(Writer().text())


def _trial() -> list[float]:
    """How far each result is off, of the norm."""
    draw = torch.Generator(device="cpu").manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cpu", dtype=torch.float32)

    x, y, weight, bias = made(7, 528), made(7, 32), made(48, 528), made(48)
    out = torch.zeros(528, 32, device="cpu")
    columns = Columns.of(x)
    columns.add_products(Columns.of(y), out)
    square = torch.zeros(528, 528, device="cpu")
    columns.add_products(columns, square)
    pairs = (
        (Weight(weight).multiply(x, bias), x.double() @ weight.double().T + bias.double()),
        (out, x.double().T @ y.double()),
        (square.triu(), (x.double().T @ x.double()).triu()),
    )
    return [float((got - want).norm() / want.norm()) for got, want in pairs]
