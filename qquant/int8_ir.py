"""The functions of `int8.py`, written in LLVM's language.

- `arrange` turns columns of bfloat16 into integers.
- `gather` adds the product of columns and columns to a sum: a Hessian's.

One instruction (AVX-512's VNNI) multiplies 64 integers of 8 bits by as many and adds fours of
neighbours to 16 sums of 32 bits. No sum over a chunk leaves 32 bits: 256 x 255 x 127 < 2^31. One
side has to be without sign: it is 128 more than it should be, for which every sum begins with what
that is too much for its row, as `arrange` has counted.

What is multiplied lies in fours along what is summed over, in panels of `WIDE` columns. A four of
one column of the left meets those of 32 columns in two instructions.

Left out on purpose: compiling and calling them (`int8.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .llvm_ir import Emitter

CHUNK = 256  # numbers that have a step together, and whose products are added as integers
WIDE = 32  # columns side by side: two vectors of 16
TOP = 127  # the largest integer
SPARED = 32  # of so many numbers that are not 0 more than one has to stay so, or a column is rough
_UNROLLED = 2  # fours in one round of a loop
_OF_PANEL = (11, 11, 10)  # a panel's columns in tiles, whose sums are in 22 of 32 registers
_INFINITE = 0x7F80  # a bfloat16's bits without its sign, from which it is no number
_SHIFT = 1.5 * 2.0**23  # added to a number, leaves its nearest whole number in the last bits
_SIGNS = -0x7F7F7F80  # the highest bit of each byte: 0x80808080
_ONES = 0x01010101
# Arguments, 64 bits each, in this order. Chunks are of `CHUNK` rows, the last one of what is left.
ARRANGE = (
    "x",  # address: bfloat16 [rows, width]
    "out",  # address: int8, of each chunk [width / WIDE, fours (`padded`), WIDE, 4]
    "steps",  # address: float32 [chunks, width]
    "excess",  # address: int32 [chunks, width]: what a column's sums are to begin with
    "rough",  # address: int32 [chunks, width / WIDE]: whether any column is
    "rows",
    "width",  # a multiple of `WIDE`
)
GATHER = (
    "left",  # address: of `arrange`
    "left_steps",  # address: float32 [chunks, lefts]
    "left_excess",  # address: int32 [chunks, lefts]
    "right",  # address: of `arrange`, of as many rows
    "right_steps",  # address: float32 [chunks, rights]
    "out",  # address: float32 [lefts, rights], added to
    "rows",
    "lefts",  # a multiple of `WIDE`
    "rights",  # likewise
    "square",  # 1: left is right, and of the sums only panels on and above the diagonal are made
)


def fours_of(rows: int) -> int:
    """As `Writer.padded`, in numbers."""
    return -(-rows // (4 * _UNROLLED)) * _UNROLLED


class Writer(Emitter):
    """Writes the functions down.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self) -> None:
        super().__init__(16)
        ir = self.ir
        self.shorts = ir.VectorType(ir.IntType(16), self.lanes)
        self.fma = self.function("llvm.fma.v16f32", self.floats, *[self.floats] * 3)
        name = "llvm.x86.avx512.vpdpbusd.512"
        self.dot = self.function(name, self.ints, self.ints, self.ints, self.ints)

    def text(self) -> str:
        self._arrange()
        self._gather()
        return str(self.module)

    def _padded(self, at: Any, rows: Any) -> Any:
        """Fours of so many rows, and of zeros, for whole rounds of a loop."""
        return at.mul(self.upwards(at, rows, 4 * _UNROLLED), self.count(_UNROLLED))

    # Columns.

    def _arrange(self) -> None:
        at, given = self.parallel("arrange", ARRANGE, addresses=5)
        rows, width, chunk = given["rows"], given["width"], self.count(CHUNK)
        panels = at.sdiv(width, self.count(WIDE))

        def panel(task: Any) -> None:
            c, p = at.sdiv(task, panels), at.srem(task, panels)
            start = at.mul(c, chunk)
            size = self.least(at, chunk, at.sub(rows, start))
            first = at.add(at.mul(start, width), at.mul(p, self.count(WIDE)))
            x = self.place(at, given["x"], first, 2)
            # In fours of `WIDE`; earlier chunks are whole.
            earlier = at.mul(at.mul(c, self.count(CHUNK // 4)), panels)
            first = at.add(earlier, at.mul(p, self._padded(at, size)))
            out = self.place(at, given["out"], first, 4 * WIDE)
            rough: Any = self.ir.Constant(self.i32, 0)
            for v in range(WIDE // self.lanes):
                begin = self.place(at, x, self.count(v), 2 * self.lanes)

                def read(r: Any, begin: Any = begin) -> Any:
                    place = self.place(at, begin, at.mul(r, width), 2)
                    return self.widen(at, self.load(at, place, self.count(0), self.shorts, 2))

                steps, inverse, some = self._steps(at, read, size)
                here = self.place(at, out, self.count(v), 4 * self.lanes)
                excess, left = self._write(at, read, size, inverse, here)
                spared = at.mul(left, self.same(self.ints, SPARED))
                lost = at.zext(at.icmp_signed("<", spared, some), self.ints)
                rough = at.or_(rough, self.folded(at, lost, at.or_))
                at_column = at.add(at.mul(c, width), at.mul(p, self.count(WIDE)))
                at_column = at.add(at_column, self.count(v * self.lanes))
                self.store(at, steps, given["steps"], at_column, 4)
                self.store(at, excess, given["excess"], at_column, 4)
            self.store(at, rough, given["rough"], task, 4)

        self.each(at, at.mul(self.upwards(at, rows, CHUNK), panels), panel)
        at.ret_void()

    def _steps(self, at: Any, read: Callable[[Any], Any], size: Any) -> tuple[Any, Any, Any]:
        """Of a vector of columns: (steps, their inverses, how many numbers are not 0).

        Steps are NaN and inverses 0 where something is not finite.
        """
        same, none = self.same, self.same(self.floats, 0.0)
        magnitude = self.function("llvm.fabs.v16f32", self.floats, self.floats)

        def look(r: Any, seen: Any) -> Any:
            most, total, count = seen
            x = at.call(magnitude, [read(r)])
            some = at.zext(at.fcmp_unordered("!=", x, none), self.ints)
            larger = at.select(at.fcmp_ordered(">", x, most), x, most)
            return larger, at.fadd(total, x), at.add(count, some)

        most, total, count = self.loop(at, size, (none, none, same(self.ints, 0)), look)
        spoilt = at.fsub(total, total)  # 0, or NaN
        step = at.fmul(most, same(self.floats, 1 / TOP))
        # Below that an inverse would be infinite.
        some = at.fcmp_ordered(">", most, same(self.floats, 1e-35))
        some = at.and_(some, at.fcmp_ordered("==", spoilt, none))
        inverse = at.select(some, at.fdiv(same(self.floats, 1.0), step), none)
        return at.fadd(at.select(some, step, none), spoilt), inverse, count

    def _write(
        self, at: Any, read: Callable[[Any], Any], size: Any, inverse: Any, out: Any
    ) -> tuple[Any, Any]:
        """Writes a vector of columns in fours; (what their sums begin with, how many are not 0).

        Args:
            out: address of the first fours.
        """
        same, ints = self.same, self.ints
        shift, byte = same(self.floats, _SHIFT), same(ints, 0xFF)
        none, ones = same(ints, 0), same(ints, _ONES)

        def bits(x: Any) -> Any:
            return at.and_(at.bitcast(at.call(self.fma, [x, inverse, shift]), ints), byte)

        def put(four: Any, numbers: list[Any], sums: Any) -> Any:
            both, (total, count) = none, sums
            for i, number in enumerate(numbers):
                both = at.or_(both, at.shl(number, same(ints, 8 * i)))
                count = at.add(count, at.zext(at.icmp_signed("!=", number, none), ints))
            self.store(at, both, out, four, 4 * WIDE)
            return at.call(self.dot, [total, ones, both]), count

        def whole(four: Any, sums: Any) -> Any:
            first = at.mul(four, self.count(4))
            numbers = [bits(read(at.add(first, self.count(i)))) for i in range(4)]
            return put(four, numbers, sums)

        def last(four: Any, sums: Any) -> Any:
            """What is behind the last row is 0; the row itself is read instead."""
            numbers = []
            for i in range(4):
                r = at.add(at.mul(four, self.count(4)), self.count(i))
                inside = at.icmp_signed("<", r, size)
                r = at.select(inside, r, at.sub(size, self.count(1)))
                numbers.append(at.select(inside, bits(read(r)), none))
            return put(four, numbers, sums)

        full = at.sdiv(size, self.count(4))
        sums = self.loop(at, full, (none, none), whole)
        total, count = self.loop(at, self._padded(at, size), sums, last, full)
        return at.sub(none, at.shl(total, same(ints, 7))), count

    # Products.

    def _gather(self) -> None:
        at, given = self.parallel("gather", GATHER, addresses=6)
        rows, chunk = given["rows"], self.count(CHUNK)
        lefts, rights = (at.sdiv(given[name], self.count(WIDE)) for name in ("lefts", "rights"))
        square = at.icmp_signed("==", given["square"], self.count(1))

        def with_others(c: Any, i: Any) -> None:
            """A panel of the left, and all of the right that it meets, of a chunk."""
            fours = self._padded(at, self.least(at, chunk, at.sub(rows, at.mul(c, chunk))))
            earlier = at.mul(c, self.count(CHUNK // 4))

            def numbers(name: str, panels: Any, p: Any) -> Any:
                first = at.add(at.mul(earlier, panels), at.mul(p, fours))
                return self.place(at, given[name], first, 4 * WIDE)

            def of_columns(name: str, panels: Any, p: Any) -> Any:
                return self.place(at, given[name], at.add(at.mul(c, panels), p), 4 * WIDE)

            left = numbers("left", lefts, i)
            left_steps, excess = (of_columns(f"left_{n}", lefts, i) for n in ("steps", "excess"))

            def other(j: Any, _: Any) -> None:
                right, begin = numbers("right", rights, j), 0
                steps = self.two(at, of_columns("right_steps", rights, j))
                for size in _OF_PANEL:
                    columns = range(begin, begin + size)
                    found = self._sums(at, left, columns, excess, right, fours)
                    for n, products in zip(columns, found, strict=True):
                        step = self.load(at, left_steps, self.count(n), self.f32, 4)
                        row = at.add(at.mul(i, self.count(WIDE)), self.count(n))
                        out = at.add(at.mul(row, rights), j)
                        out = self.place(at, given["out"], out, 4 * WIDE)
                        totals = [at.sitofp(total, self.floats) for total in products]
                        self.put(at, totals, step, steps, out, self.two(at, out))
                    begin += size

            self.loop(at, rights, (), other, at.select(square, i, self.count(0)))

        self.each_panel(at, lefts, self.upwards(at, rows, CHUNK), square, with_others)
        at.ret_void()

    def _sums(
        self, at: Any, left: Any, columns: range, excess: Any, right: Any, fours: Any
    ) -> list[list[Any]]:
        """The products of some columns of a panel with a panel: of each two vectors, int32."""
        signs = self.same(self.ints, _SIGNS)

        def step(k: Any, sums: Any) -> list[Any]:
            here = self.place(at, right, k, 4 * WIDE)
            above = [at.xor(part, signs) for part in self.two(at, here, self.ints)]
            own, new = self.place(at, left, k, 4 * WIDE), []
            for i, n in enumerate(columns):
                four = self.load(at, own, self.count(n), self.i32, 4)
                four = self.spread(at, four, self.ints)
                for v, part in enumerate(above):
                    new.append(at.call(self.dot, [sums[2 * i + v], part, four]))
            return new

        def several(k: Any, sums: Any) -> Any:
            for i in range(_UNROLLED):
                sums = step(at.add(at.mul(k, self.count(_UNROLLED)), self.count(i)), sums)
            return sums

        begin: list[Any] = []
        for n in columns:
            own = self.load(at, excess, self.count(n), self.i32, 4)
            begin += [self.spread(at, own, self.ints)] * 2
        found = self.loop(at, at.sdiv(fours, self.count(_UNROLLED)), tuple(begin), several)
        return [list(found[2 * i : 2 * i + 2]) for i in range(len(columns))]
