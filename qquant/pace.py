"""What a run's parts cost on this CPU, told in half a second and without torch.

Three things are measured with numpy, over and over in turn: an operation of a matrix product
(`product`), an element of an elementwise operation that stays in the cache (`element`), and a call
that does next to nothing (`call`). A part of a run is so many of each: how many follows from the
shapes and the settings, and each number is multiplied by a factor, which says what torch takes for
it beside numpy (several operations per element, say, or Python around a call).

A shared machine's speed changes from one second to the next. Where the factors were fitted, a tenth
of all measurements of a third of a second fell into a phase in which products took half as long
again, and so came out as much too long. So the tenth of the rounds that were fastest is believed,
and a run with `--timings` measures for a second and a half.

The factors were fitted on logarithms: of the solve to 63 solves (64 to 4096 outputs, 256 to 4096
inputs, four recipes; 14% off on the average, small ones most) with its loops in machine code, and
to 38 without; of forward and Hessian to eight runs (hidden 256 to 2048, four recipes), and changed
by a few hundredths (a tenth with the code) after runs of `benchmarks/estimate.py`; on two cores of
an AMD EPYC (Zen 3) with torch 2.13. That of the forward's products was 1.2 with MKL and is set by
the rates in `products.py` since. They are the engine's: should it become faster,
`benchmarks/estimate.py` fails, prints what each part took beside its estimate, and they are to be
fitted again.

numpy and torch both take as many threads as `OMP_NUM_THREADS` or the processor say; a product is
measured with those, and what torch shares out is divided by them. Threads that a program sets in
torch alone are not seen.

Left out on purpose: other dtypes and accelerators, for which numpy cannot stand (`measured.py`).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .batching import tokens_per_unit
from .config import QuantSpec
from .costs import Costs
from .host import imports_hqq, threads, writes_code
from .models.shapes import Group, Shapes

QUICK, LONG = 0.35, 1.5  # seconds of measuring
_LEAST = 3  # rounds of it
_SIDE, _ELEMENTS, _CALLS = 1024, 1 << 16, 400  # of a round: widest matrix, numbers, calls
# Of the same machine, in seconds: what is imported first and the model built, and what hqq adds;
# per byte of output, the source read, and tensors hashed, written and read back.
_SET_UP, _HQQ, _WRITING = 4.4, 3.7, 2e-8


class _Solver(NamedTuple):
    """How many of each a solve takes, of n outputs and k inputs, by the form of its loops.

    Attributes:
        product: per operation of products by k x k matrices; cube: per k³ of factors and systems.
        call: per k, and a sweep. element: per nk, and a sweep. search: per nk and grid tried.
        once: calls of any solve.
    """

    product: float
    cube: float
    call: tuple[float, float]
    element: tuple[float, float]
    search: float
    once: float


class _Forward(NamedTuple):
    """How long a run's forward and sums take.

    Attributes:
        linear, attention: of the forward, in products of float32 as numpy makes them.
        hessian, difference: of the sums, likewise.
        numbers, sums: elements per number that goes in or out of a linear, and into a sum.
    """

    linear: float
    attention: float
    hessian: float
    difference: float
    numbers: float
    sums: float


_FLOAT32 = _Forward(1.0, 1.66, 1.35, 1.75, 44, 21.7)
_INT16 = _Forward(0.6, 1.0, 0.7, 0.95, 26, 13)
_IN_CODE = _Solver(1.6, 2.2, (26, 18), (160, 50), 0.12, 12_000)
_IN_CALLS = _Solver(1.59, 0.9, (91, 31), (162, 69), 16.6, 0)


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine.

    Attributes:
        product: of one floating-point operation in a matrix product, all threads at work.
        element: of one number in an elementwise operation of one thread.
        call: of a call on a handful of numbers.
        threads: that share out what is large.
        code: whether the solver's loops are machine code (`columns.py`).
        int16: whether large products are made of 16-bit integers (`int16.py`).
    """

    product: float
    element: float
    call: float
    threads: int
    code: bool = True
    int16: bool = False

    @classmethod
    def measure(cls, inputs: int, outputs: int, seconds: float = QUICK) -> Pace:
        """Of this machine, now.

        Args:
            inputs, outputs: of a typical linear of the model.
            seconds: how long to measure.
        """
        m, k, n = (min(_SIDE, size) for size in (_SIDE, inputs, outputs))
        a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
        c, x, small = np.empty((m, n), np.float32), np.ones(_ELEMENTS, np.float32), a[0, :64].copy()

        def product() -> None:
            np.matmul(a, b, out=c)

        def element() -> None:
            for _ in range(20):
                np.multiply(x, x, out=x)

        def call() -> None:
            for _ in range(_CALLS):
                np.multiply(small, small, out=small)

        parts = (product, element, call)
        found: list[list[float]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(found) <= _LEAST:
            times = [time.perf_counter()]
            for part in parts:
                part()
                times.append(time.perf_counter())
            found.append([after - before for before, after in itertools.pairwise(times)])
        # Threads and libraries start up in the first round.
        fast = np.quantile(np.array(found[1:]), 0.1, axis=0)
        return cls(
            product=float(fast[0]) / (2 * m * k * n),
            element=float(fast[1]) / (20 * _ELEMENTS),
            call=float(fast[2]) / _CALLS,
            threads=threads(),
            code=writes_code(),
        )

    @property
    def _large(self) -> _Forward:
        return _INT16 if self.int16 else _FLOAT32

    def forward(self, shapes: Shapes, seqlen: int, streams: int) -> float:
        """Of one token through all blocks, as the walk does it."""
        linear = sum(2 * g.times * g.share * g.rows * g.inputs for g in shapes.groups)
        attention = 2 * shapes.attended * seqlen  # the causal half
        numbers = sum(g.times * g.share * (g.rows + g.inputs) for g in shapes.groups)
        calls = shapes.blocks / max(tokens_per_unit("cpu", streams), seqlen)
        return (
            self.product * (self._large.linear * linear + self._large.attention * attention)
            + self.element * self._large.numbers * numbers / self.threads
            + self.call * 3800 * calls
        )

    def hessian(self, group: Group) -> tuple[float, float]:
        """Of one token's part in a Hessian, and in the streams' difference."""
        k = group.inputs
        numbers = self.element * self._large.sums * k / self.threads
        return (
            self.product * self._large.hessian * k**2 + numbers,
            self.product * self._large.difference * group.difference + 2 * numbers,
        )

    def solve(self, n: int, k: int, quant: QuantSpec) -> float:
        """Of one solve of n outputs and k inputs."""
        of = _IN_CODE if self.code else _IN_CALLS
        evaluations = 1
        if quant.scale_search:
            ratios = quant.scale_search + 1
            both = quant.sym and quant.negative_scales
            evaluations = ratios + (-(-ratios // 3) if both else 0)
        one = 2 / min(2, self.threads)  # the factors are of two
        search = self.element * of.search * n * k * evaluations * one
        if quant.method == "rtn":
            return search
        two = quant.streams == 2
        # In n k²: the pass and the norm; the factor times its errors and each sweep's product, of
        # the last one half; the correction's two triangular systems, or, with more outputs than
        # inputs, its product with the weights. Then the systems are k³ each, of which a Cholesky
        # factor is a third.
        products = 2 + 2 * quant.sweeps + 2 * two
        cubes = (1 + (two and quant.correct_damp != quant.damp)) / 3 + 2 * (two and n > k)
        return (
            self.product * (of.product * products * n * k**2 + of.cube * cubes * k**3)
            + self.call * (of.once + (of.call[0] + of.call[1] * quant.sweeps) * k)
            + self.element * (of.element[0] + of.element[1] * quant.sweeps) * n * k * one
            + search
        )


def numpy_costs(
    shapes: Shapes,
    quant: QuantSpec,
    seqlen: int,
    seconds: float = QUICK,
    *,
    int16: bool = False,
    begun: bool = False,
) -> Costs:
    """Measures this machine.

    Args:
        seqlen: tokens of a calibration sample. seconds: how long to measure.
        int16: as of a `place.Place`. begun: the run is behind its set-up.
    """

    def work(group: Group) -> float:
        return group.times * group.share * group.rows * group.inputs

    typical = max(shapes.groups, key=work)
    pace = replace(Pace.measure(typical.inputs, typical.rows, seconds), int16=int16)
    return Costs(
        measured_with=f"numpy, {pace.threads} threads",
        set_up=0.0 if begun else _SET_UP + (_HQQ if imports_hqq() else 0.0),
        forward=pace.forward(shapes, seqlen, quant.streams),
        hessian=pace.hessian,
        solve=lambda n, k: pace.solve(n, k, quant),
        writing=_WRITING,
    )
