"""Numbers as 16-bit integers and sums of their products, written in LLVM's language.

One instruction multiplies sixteen 16-bit integers by sixteen and adds neighbours into eight of 32
bits (AVX2), or twice as many, adding to earlier sums too (AVX-512's VNNI); those are added up over
a whole chunk, exactly. They cannot overflow: with steps such that the
integers of a chunk have a norm of at most `NORM`, no sum over any of its places is larger than
NORM² < 2^31 (Cauchy and Schwarz), in whatever order it is made.

What is multiplied lies in pairs of neighbours along what is summed over: some rows side by side on
the left of a product, panels of columns on its right, how many of either a `Form` says. So one pair
of a row meets those of a panel in two vectors.

Left out on purpose: whole functions (`int16_products_ir.py`, `int16_attention_ir.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .llvm_ir import Emitter

CHUNK = 256  # numbers that have a step together, and whose products are added as integers
UNROLLED = 2  # pairs in one round of a loop
NORM = 46300.0  # of a chunk's integers before they are rounded, which adds at most sqrt(CHUNK) / 2
TOP = 32767.0  # the largest integer
# Magnitudes that count as zero: their squares would no longer add up to a norm. Of numbers above
# 1e18 they would add up to infinity, and what is not finite is NaN in the result.
TINY = 1e-16


class Form(NamedTuple):
    """What a processor's instructions ask for.

    Attributes:
        wide: columns side by side, two vectors.
        rows: whose sums are in registers, by two vectors, beside two columns' and a row's.
        summed: instructions add to earlier sums.
    """

    wide: int
    rows: int
    summed: bool = False


AVX2 = Form(16, 6)  # fifteen of sixteen registers
VNNI = Form(32, 12, summed=True)  # 27 of 32


def pairs_of(rows: int) -> int:
    """As `Integers.padded`, in numbers."""
    return -(-rows // (2 * UNROLLED)) * UNROLLED


class Integers(Emitter):
    """The means to write such functions.

    Args:
        half: what comes from outside and goes there is bfloat16, not float32.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self, form: Form = AVX2, half: bool = False) -> None:
        super().__init__(form.wide // 2)
        ir = self.ir
        self.columns, self.rows, self.summed = form
        self.half = half
        self.item = 2 if half else 4  # bytes of a number outside
        self.shorts = ir.VectorType(ir.IntType(16), form.wide)
        self.wide, self.wide_ints = (
            ir.VectorType(kind, form.wide) for kind in (self.f32, self.i32)
        )
        self.fma_wide = self._of_wide("fma", 3)

    def _of_wide(self, name: str, arguments: int = 1) -> Any:
        """An intrinsic of panels' width."""
        name = f"llvm.{name}.v{self.columns}f32"
        return self.function(name, self.wide, *[self.wide] * arguments)

    def outside(self, at: Any, base: Any, vector: Any) -> Any:
        """Of the numbers behind `base`, which come from outside, the vector of this number."""
        if not self.half:
            return self.load(at, base, vector, self.wide, 4 * self.columns)
        return self.widen(at, self.load(at, base, vector, self.shorts, 2 * self.columns))

    # Counts.

    def padded(self, at: Any, rows: Any) -> Any:
        """Pairs of so many rows, and of zeros, for whole rounds of a loop."""
        return at.mul(self.upwards(at, rows, 2 * UNROLLED), self.count(UNROLLED))

    # Steps.

    @property
    def unseen(self) -> tuple[Any, Any]:
        """For `seen`, of no numbers."""
        return (self.same(self.wide, 0.0),) * 2

    def seen(self, at: Any, before: Sequence[Any], x: Any) -> tuple[Any, Any]:
        """Largest magnitudes and sums of squares, with a vector of numbers more."""
        most, squares = before
        magnitude = self._of_wide("fabs")
        more = self._larger(at, at.call(magnitude, [x]), most)
        return more, at.call(self.fma_wide, [x, x, squares])

    def together(self, at: Any, seen: Sequence[Any]) -> tuple[Any, Any]:
        """Of what was seen in vectors, as one number each, spread again."""
        most = self.folded(at, seen[0], lambda a, b: self._larger(at, a, b))
        squares = self.folded(at, seen[1], at.fadd)
        return self.spread(at, most, self.wide), self.spread(at, squares, self.wide)

    def steps(self, at: Any, seen: Sequence[Any]) -> tuple[Any, Any]:
        """(Steps, their inverses); NaN and 0 where something was not finite."""
        most, squares = seen
        same, one, none = self.same, self.same(self.wide, 1.0), self.same(self.wide, 0.0)
        root = self._of_wide("sqrt")
        by_norm = at.fmul(at.call(root, [squares]), same(self.wide, 1 / NORM))
        by_most = at.fmul(most, same(self.wide, (1 + 2e-7) / TOP))
        step = self._larger(at, by_most, by_norm)
        spoilt = at.fsub(squares, squares)  # 0, or NaN
        some = at.fcmp_ordered(">", most, same(self.wide, TINY))
        some = at.and_(some, at.fcmp_ordered("==", spoilt, none))
        inverse = at.select(some, at.fdiv(one, step), none)
        return at.fadd(at.select(some, step, none), spoilt), inverse

    def whole(self, at: Any, x: Any, inverse: Any) -> Any:
        """Of a vector, the nearest integers, 32 bits each."""
        nearest = self._of_wide("rint")
        return at.fptosi(at.call(nearest, [at.fmul(x, inverse)]), self.wide_ints)

    def _larger(self, at: Any, a: Any, b: Any) -> Any:
        return at.select(at.fcmp_ordered(">", a, b), a, b)

    # Layouts.

    def row(self, at: Any, x: Any, vectors: Any, out: Any, apart: int) -> tuple[Any, Any]:
        """Turns a row into integers; its step, and the mean magnitude of all but the largest.

        Args:
            x: address of its numbers, from outside, so many vectors, at most a chunk.
            out: address of its first pair. apart: pairs from one of its pairs to the next.
        """
        magnitude = self._of_wide("fabs")
        none, first = self.same(self.wide, 0.0), self.ir.Constant(self.i32, 0)

        def look(v: Any, seen: Any) -> Any:
            own = self.outside(at, x, v)
            return (*self.seen(at, seen[:2], own), at.fadd(seen[2], at.call(magnitude, [own])))

        *seen, sums = self.loop(at, vectors, (*self.unseen, none), look)
        most, squares = self.together(at, seen)
        step, inverse = self.steps(at, (most, squares))
        self.write_row(at, lambda v: self.outside(at, x, v), vectors, inverse, out, apart)
        total = self.spread(at, self.folded(at, sums, at.fadd), self.wide)
        rest = at.fmul(at.fsub(total, most), inverse)
        count = at.sitofp(at.mul(vectors, self.count(self.columns)), self.f32)
        rest = at.fdiv(rest, self.spread(at, count, self.wide))
        return at.extract_element(step, first), at.extract_element(rest, first)

    def write_row(
        self,
        at: Any,
        read: Callable[[Any], Any],
        vectors: Any,
        inverse: Any,
        out: Any,
        apart: int,
    ) -> None:
        """As `row`, with the step's inverse at hand and numbers wherever they are read."""

        def write(v: Any, _: Any) -> None:
            number = at.trunc(self.whole(at, read(v), inverse), self.shorts)
            pairs = at.bitcast(number, self.ints)
            for i in range(self.lanes):
                pair = at.add(at.mul(v, self.count(self.lanes)), self.count(i))
                one = at.extract_element(pairs, self.ir.Constant(self.i32, i))
                self.store(at, one, out, pair, 4 * apart)

        self.loop(at, vectors, (), write)

    def panel(self, at: Any, read: Callable[[Any], Any], size: Any, out: Any) -> Any:
        """Turns a chunk of a panel's columns into integers; their steps, a vector.

        Args:
            read: gives a row's numbers. size: rows. out: address of the first pairs, of which
                there will be `padded`.
        """
        seen = self.loop(at, size, self.unseen, lambda r, seen: self.seen(at, seen, read(r)))
        step, inverse = self.steps(at, seen)
        zero, low, high = (self.same(self.wide_ints, value) for value in (0, 0xFFFF, 16))

        def put(pair: Any, a: Any, b: Any) -> None:
            both = at.or_(at.and_(a, low), at.shl(b, high))
            self.store(at, both, out, pair, 4 * self.columns)

        def two(pair: Any, _: Any) -> None:
            first = at.mul(pair, self.count(2))
            rows = first, at.add(first, self.count(1))
            put(pair, *(self.whole(at, read(r), inverse) for r in rows))

        def last(pair: Any, _: Any) -> None:
            put(pair, self.whole(at, read(at.mul(pair, self.count(2))), inverse), zero)

        whole, some = at.sdiv(size, self.count(2)), self.upwards(at, size, 2)
        self.loop(at, whole, (), two)
        self.loop(at, some, (), last, whole)
        self.loop(at, self.padded(at, size), (), lambda pair, _: put(pair, zero, zero), some)
        return step

    # Products.

    def sums(
        self, at: Any, left: Any, rows: int, apart: int, right: Any, pairs: Any
    ) -> list[list[Any]]:
        """The products of some rows with a panel: of each row two vectors, float32.

        Args:
            left: address of the first row's first pair, with the other rows' behind it.
            apart: pairs from one of a row's pairs to the next.
            right: address of the panel. pairs: to be summed, a multiple of `UNROLLED`.
        """
        add_pairs = self._pairwise(at)
        lefts = [at.gep(left, [self.count(4 * i)]) for i in range(rows)]

        def step(k: Any, sums: list[Any]) -> list[Any]:
            places = (at.add(at.mul(k, self.count(2)), self.count(v)) for v in range(2))
            both = [
                at.bitcast(self.load(at, right, p, self.ints, 4 * self.lanes), self.shorts)
                for p in places
            ]
            new = []
            for i, base in enumerate(lefts):
                pair = self.spread(at, self.load(at, base, k, self.i32, 4 * apart), self.ints)
                pair = at.bitcast(pair, self.shorts)
                for v in range(2):
                    new.append(add_pairs(sums[2 * i + v], pair, both[v]))
            return new

        def several(k: Any, sums: Any) -> Any:
            for i in range(UNROLLED):
                sums = step(at.add(at.mul(k, self.count(UNROLLED)), self.count(i)), sums)
            return sums

        none = (self.same(self.ints, 0),) * (2 * rows)
        sums = self.loop(at, at.sdiv(pairs, self.count(UNROLLED)), none, several)
        found = [at.sitofp(total, self.floats) for total in sums]
        return [found[2 * i : 2 * i + 2] for i in range(rows)]

    def _pairwise(self, at: Any) -> Callable[[Any, Any, Any], Any]:
        """What adds the products of pairs to sums."""
        ints = self.ints
        if not self.summed:
            product = self.function("llvm.x86.avx2.pmadd.wd", ints, self.shorts, self.shorts)
            return lambda sums, a, b: at.add(sums, at.call(product, [a, b]))
        bits = 32 * self.lanes
        add = self.function(f"llvm.x86.avx512.vpdpwssd.{bits}", ints, ints, ints, ints)
        return lambda sums, a, b: at.call(add, [sums, at.bitcast(a, ints), at.bitcast(b, ints)])
