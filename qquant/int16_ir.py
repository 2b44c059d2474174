"""Products of 16-bit integers, written in LLVM's language.

- `quantize` turns rows into integers, each part of `CHUNK` numbers with a step of its own.
- `arrange` does so with columns, and lays pairs of rows side by side, as `vpmaddwd` takes them.
- `multiply` is the product of rows and columns: a linear's.
- `gather` adds the product of columns and columns to a sum: a Hessian's.

One instruction multiplies sixteen 16-bit integers by sixteen and adds neighbours into eight of 32
bits; those are added up over a whole chunk, exactly. They cannot overflow: with steps such that the
integers of a chunk have a norm of at most `NORM`, no sum over any of its places is larger than
NORM² < 2^31 (Cauchy and Schwarz), in whatever order it is made. So the same bits come out for every
number of threads.

Left out on purpose: compiling and calling them, and who may be multiplied like this (`int16.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .llvm_ir import Emitter

CHUNK = 256  # numbers that have a step together, and whose products are added as integers
WIDE = 16  # columns side by side: two vectors of 8
NORM = 46300.0  # of a chunk's integers before they are rounded, which adds at most sqrt(CHUNK) / 2
TOP = 32767.0  # the largest integer
TINY = 1e-16  # magnitudes that count as zero: their squares would no longer add up to a norm
ROWS = 6  # whose sums are in registers, by two vectors: with two columns' and a row's, all sixteen
UNROLLED = 2  # pairs in one round of a loop
_TILES = 32  # of rows that go through a panel of columns together, which stay in a cache
_OF_PANEL = (6, 5, 5)  # a panel's columns as the rows of tiles
QUANTIZE = (
    "x",  # address: float32 [rows, width]
    "out",  # address: int16 [rows / ROWS upwards, width / 2, ROWS, 2], some rows unused
    "steps",  # address: float32 [rows, chunks of width]
    "rows",
    "width",  # a multiple of `WIDE`
)
ARRANGE = (
    "x",  # address: float32 [rows, width]
    "out",  # address: int16, of each chunk of rows [width / WIDE, pairs, WIDE, 2], its pairs
    # those of its rows, upwards to a multiple of `UNROLLED`
    "steps",  # address: float32 [chunks of rows, width]
    "rows",
    "width",  # a multiple of `WIDE`
)
MULTIPLY = (
    "rows",  # address: of `quantize`
    "row_steps",  # address: float32 [rows, chunks]
    "columns",  # address: of `arrange`, of as many rows as these are wide
    "column_steps",  # address: float32 [chunks, outputs]
    "bias",  # address: float32 [outputs]
    "out",  # address: float32 [rows, outputs]
    "count",  # rows
    "width",
    "outputs",  # a multiple of `WIDE`
)
GATHER = (
    "left",  # address: of `arrange`
    "left_steps",  # address: float32 [chunks, lefts]
    "right",  # address: of `arrange`, of as many rows
    "right_steps",  # address: float32 [chunks, rights]
    "out",  # address: float32 [lefts, rights], added to
    "rows",
    "lefts",  # a multiple of `WIDE`
    "rights",  # likewise
    "square",  # 1: left is right, and of the sums only panels on and above the diagonal are made
)


class Writer(Emitter):
    """Writes the functions down.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self) -> None:
        super().__init__(8)
        ir = self.ir
        self.shorts = ir.VectorType(ir.IntType(16), 16)
        self.wide, self.wide_ints = (ir.VectorType(kind, WIDE) for kind in (self.f32, self.i32))
        self.pairwise = self.function("llvm.x86.avx2.pmadd.wd", self.ints, self.shorts, self.shorts)
        self.fma = self.function("llvm.fma.v16f32", self.wide, *[self.wide] * 3)
        self.nearest = self.function("llvm.rint.v16f32", self.wide, self.wide)
        self.magnitude = self.function("llvm.fabs.v16f32", self.wide, self.wide)
        self.root = self.function("llvm.sqrt.v16f32", self.wide, self.wide)

    def text(self) -> str:
        self._quantize()
        self._arrange()
        self._multiply()
        self._gather()
        return str(self.module)

    # Steps.

    def _least(self, at: Any, a: Any, b: Any) -> Any:
        return at.select(at.icmp_signed("<", a, b), a, b)

    def _upwards(self, at: Any, value: Any, by: int) -> Any:
        """Divided, and rounded up."""
        return at.sdiv(at.add(value, self.count(by - 1)), self.count(by))

    def _padded(self, at: Any, rows: Any) -> Any:
        """Pairs of so many rows, and of zeros."""
        return at.mul(self._upwards(at, rows, 2 * UNROLLED), self.count(UNROLLED))

    def _seen(self, at: Any, seen: tuple[Any, Any], x: Any) -> tuple[Any, Any]:
        """Largest magnitudes and sums of squares, with one more number each."""
        most, squares = seen
        size = at.call(self.magnitude, [x])
        return at.select(at.fcmp_ordered(">", size, most), size, most), at.call(
            self.fma, [x, x, squares]
        )

    def _steps(self, at: Any, most: Any, squares: Any) -> tuple[Any, Any]:
        """Of what was seen: (steps, their inverses); NaN and 0 where something was not finite."""
        same = self.same
        by_norm = at.fmul(at.call(self.root, [squares]), same(self.wide, 1 / NORM))
        by_most = at.fmul(most, same(self.wide, 1 / TOP * (1 + 2e-7)))
        step = at.select(at.fcmp_ordered(">", by_most, by_norm), by_most, by_norm)
        # What is infinite becomes NaN, and stays that, as do NaN.
        spoilt = at.fsub(squares, squares)
        some = at.fcmp_ordered(">", most, same(self.wide, TINY))
        some = at.and_(some, at.fcmp_ordered("==", spoilt, same(self.wide, 0.0)))
        one, none = same(self.wide, 1.0), same(self.wide, 0.0)
        inverse = at.select(some, at.fdiv(one, step), none)
        step = at.select(some, step, none)
        return at.fadd(step, spoilt), inverse

    def _folded(self, at: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """All of a vector's numbers in one, pairwise, spread again."""
        size = WIDE
        while size > 1:
            size //= 2
            vector = combine(self.part(at, vector, 0, size), self.part(at, vector, size, 2 * size))
        one = at.extract_element(vector, self.ir.Constant(self.i32, 0))
        return self.spread(at, one, self.wide)

    def _whole(self, at: Any, x: Any, inverse: Any) -> Any:
        return at.fptosi(at.call(self.nearest, [at.fmul(x, inverse)]), self.wide_ints)

    def _quantize(self) -> None:
        at, given = self.parallel("quantize", QUANTIZE, addresses=3)
        width, chunk = given["width"], self.count(CHUNK)
        chunks, wide = self._upwards(at, width, CHUNK), self.count(WIDE)
        halves = self.ir.VectorType(self.ir.IntType(16), WIDE)
        none = self.same(self.wide, 0.0)

        def row(r: Any, _: Any) -> None:
            within = at.srem(r, self.count(ROWS))
            tile = at.mul(at.sub(r, within), at.sdiv(width, self.count(2)))  # in pairs

            def part(c: Any, _: Any) -> None:
                start = at.mul(c, chunk)
                vectors = at.sdiv(self._least(at, chunk, at.sub(width, start)), wide)
                first = at.add(at.mul(r, width), start)

                def place(v: Any) -> Any:
                    return at.add(first, at.mul(v, wide))

                def look(v: Any, seen: Any) -> Any:
                    x = self.load(at, given["x"], place(v), self.wide, 4)
                    return self._seen(at, seen, x)

                most, squares = self.loop(at, vectors, (none, none), look)
                larger = lambda a, b: at.select(at.fcmp_ordered(">", a, b), a, b)  # noqa: E731
                step, inverse = self._steps(
                    at, self._folded(at, most, larger), self._folded(at, squares, at.fadd)
                )
                zero = self.ir.Constant(self.i32, 0)
                place_of_step = at.add(at.mul(r, chunks), c)
                self.store(at, at.extract_element(step, zero), given["steps"], place_of_step, 4)

                def write(v: Any, _: Any) -> None:
                    x = self.load(at, given["x"], place(v), self.wide, 4)
                    number = at.trunc(self._whole(at, x, inverse), halves)
                    both = at.bitcast(number, self.ints)
                    pair = at.add(at.sdiv(start, self.count(2)), at.mul(v, self.count(WIDE // 2)))
                    for i in range(WIDE // 2):
                        one = at.extract_element(both, self.ir.Constant(self.i32, i))
                        own = at.mul(at.add(pair, self.count(i)), self.count(ROWS))
                        self.store(at, one, given["out"], at.add(at.add(tile, own), within), 4)

                self.loop(at, vectors, (), write)

            self.loop(at, chunks, (), part)

        first, stop = self.own(at, given["rows"])
        self.loop(at, stop, (), row, first)
        at.ret_void()

    def _arrange(self) -> None:
        at, given = self.parallel("arrange", ARRANGE, addresses=3)
        rows, width, chunk = given["rows"], given["width"], self.count(CHUNK)
        panels = at.sdiv(width, self.count(WIDE))
        none, low = self.same(self.wide, 0.0), self.same(self.wide_ints, 0xFFFF)
        high = self.same(self.wide_ints, 16)

        def panel(task: Any, _: Any) -> None:
            c, p = at.sdiv(task, panels), at.srem(task, panels)
            start = at.mul(c, chunk)
            size = self._least(at, chunk, at.sub(rows, start))
            column = at.mul(p, self.count(WIDE))

            def read(r: Any) -> Any:
                place = at.add(at.mul(at.add(start, r), width), column)
                return self.load(at, given["x"], place, self.wide, 4)

            most, squares = self.loop(
                at, size, (none, none), lambda r, seen: self._seen(at, seen, read(r))
            )
            step, inverse = self._steps(at, most, squares)
            self.store(at, step, given["steps"], at.add(at.mul(c, width), column), 4)
            # In vectors of `WIDE` pairs: earlier chunks are whole.
            pairs = self._padded(at, size)
            first = at.add(at.mul(at.mul(c, self.count(CHUNK // 2)), panels), at.mul(p, pairs))

            def put(pair: Any, a: Any, b: Any) -> None:
                both = at.or_(at.and_(a, low), at.shl(b, high))
                self.store(at, both, given["out"], at.add(first, pair), 4 * WIDE)

            def write(pair: Any, _: Any) -> None:
                r = at.mul(pair, self.count(2))
                a, b = (self._whole(at, read(at.add(r, self.count(i))), inverse) for i in (0, 1))
                put(pair, a, b)

            whole, some = at.sdiv(size, self.count(2)), self._upwards(at, size, 2)
            self.loop(at, whole, (), write)
            zero = self.same(self.wide_ints, 0)

            def odd(pair: Any, _: Any) -> None:
                put(pair, self._whole(at, read(at.mul(pair, self.count(2))), inverse), zero)

            self.loop(at, some, (), odd, whole)
            self.loop(at, pairs, (), lambda pair, _: put(pair, zero, zero), some)

        first, stop = self.own(at, at.mul(self._upwards(at, rows, CHUNK), panels))
        self.loop(at, stop, (), panel, first)
        at.ret_void()

    # Products.

    def _sums(
        self, at: Any, lefts: Sequence[Any], stride: int, right: Any, pairs: Any
    ) -> list[list[Any]]:
        """Of each left [pairs] with each of a panel of `right`: of each left two vectors, float32.

        Args:
            lefts: addresses of the first pair. stride: bytes from one to the next.
            right: address of a panel.
        """
        zero = (self.same(self.ints, 0),) * (2 * len(lefts))

        def several(k: Any, sums: Any) -> Any:
            for own in range(UNROLLED):
                sums = step(at.add(at.mul(k, self.count(UNROLLED)), self.count(own)), sums)
            return sums

        def step(k: Any, sums: Any) -> Any:
            base = at.mul(k, self.count(2))
            both = [
                at.bitcast(
                    self.load(at, right, at.add(base, self.count(v)), self.ints, 32), self.shorts
                )
                for v in range(2)
            ]
            new = []
            for i, left in enumerate(lefts):
                pair = self.load(at, left, k, self.i32, stride)
                pair = at.bitcast(self.spread(at, pair, self.ints), self.shorts)
                for v in range(2):
                    new.append(at.add(sums[2 * i + v], at.call(self.pairwise, [pair, both[v]])))
            return new

        sums = self.loop(at, at.sdiv(pairs, self.count(UNROLLED)), zero, several)
        found = [at.sitofp(total, self.floats) for total in sums]
        return [found[2 * i : 2 * i + 2] for i in range(len(lefts))]

    def _vectors(self, at: Any, base: Any) -> list[Any]:
        """The two of a panel."""
        return [self.load(at, base, self.count(v), self.floats, 32) for v in range(2)]

    def _place(self, at: Any, base: Any, items: Any, size: int) -> Any:
        return at.gep(base, [at.mul(items, self.count(size))])

    def _put(
        self, at: Any, found: Sequence[Any], step: Any, steps: Sequence[Any], old: Any, out: Any
    ) -> None:
        """Adds products of integers, times both steps, to the numbers at `old`, into `out`."""
        fma = self.function("llvm.fma.v8f32", self.floats, *[self.floats] * 3)
        for v, total in enumerate(found):
            factor = at.fmul(self.spread(at, step, self.floats), steps[v])
            before = self.load(at, old, self.count(v), self.floats, 32)
            self.store(at, at.call(fma, [total, factor, before]), out, self.count(v), 32)

    def _multiply(self) -> None:
        at, given = self.parallel("multiply", MULTIPLY, addresses=6)
        count, width, outputs = given["count"], given["width"], given["outputs"]
        tiles, panels = self._upwards(at, count, ROWS), at.sdiv(outputs, self.count(WIDE))

        def task(number: Any, _: Any) -> None:
            first = at.mul(at.sdiv(number, panels), self.count(_TILES))
            last = self._least(at, tiles, at.add(first, self.count(_TILES)))
            column = at.mul(at.srem(number, panels), self.count(WIDE))

            def part(c: Any, _: Any) -> None:
                # Places in pairs; earlier chunks are whole.
                before = at.mul(c, self.count(CHUNK // 2))
                all_pairs = at.sdiv(width, self.count(2))
                pairs = self._least(at, self.count(CHUNK // 2), at.sub(all_pairs, before))
                start = at.add(at.mul(before, outputs), at.mul(column, pairs))
                right = self._place(at, given["columns"], start, 4)
                of_column = at.add(at.mul(c, outputs), column)
                steps = self._vectors(at, self._place(at, given["column_steps"], of_column, 4))
                begun = at.icmp_signed(">", c, self.count(0))
                bias = self._place(at, given["bias"], column, 4)

                def tile(t: Any, _: Any) -> None:
                    row = at.mul(t, self.count(ROWS))
                    start = at.add(at.mul(row, all_pairs), at.mul(before, self.count(ROWS)))
                    left = self._place(at, given["rows"], start, 4)
                    lefts = [at.gep(left, [self.count(4 * i)]) for i in range(ROWS)]
                    found = self._sums(at, lefts, 4 * ROWS, right, pairs)
                    for i, products in enumerate(found):
                        own = at.add(row, self.count(i))
                        with at.if_then(at.icmp_signed("<", own, count), likely=True):
                            of_row = at.add(at.mul(own, self._upwards(at, width, CHUNK)), c)
                            step = self.load(at, given["row_steps"], of_row, self.f32, 4)
                            place = at.add(at.mul(own, outputs), column)
                            out = self._place(at, given["out"], place, 4)
                            old = at.select(begun, out, bias)
                            self._put(at, products, step, steps, old, out)

                self.loop(at, last, (), tile, first)

            self.loop(at, self._upwards(at, width, CHUNK), (), part)

        first, stop = self.own(at, at.mul(self._upwards(at, tiles, _TILES), panels))
        self.loop(at, stop, (), task, first)
        at.ret_void()

    def _gather(self) -> None:
        at, given = self.parallel("gather", GATHER, addresses=5)
        rows, chunk = given["rows"], self.count(CHUNK)
        lefts, rights = (at.sdiv(given[name], self.count(WIDE)) for name in ("lefts", "rights"))
        square = at.icmp_signed("==", given["square"], self.count(1))

        def of_panel(c: Any, i: Any) -> None:
            size = self._least(at, chunk, at.sub(rows, at.mul(c, chunk)))
            pairs = self._padded(at, size)
            earlier = at.mul(c, self.count(CHUNK // 2))

            def panel(name: str, panels: Any, p: Any) -> tuple[Any, Any]:
                """Where its numbers and its steps are."""
                first = at.add(at.mul(earlier, panels), at.mul(p, pairs))
                own = at.add(at.mul(c, panels), p)
                steps = self._place(at, given[f"{name}_steps"], own, 4 * WIDE)
                return self._place(at, given[name], first, 4 * WIDE), steps

            left, left_steps = panel("left", lefts, i)

            def other(j: Any, _: Any) -> None:
                right, right_steps = panel("right", rights, j)
                steps = self._vectors(at, right_steps)
                begin = 0
                for size in _OF_PANEL:
                    own = range(begin, begin + size)
                    begin += size
                    addresses = [at.gep(left, [self.count(4 * n)]) for n in own]
                    found = self._sums(at, addresses, 4 * WIDE, right, pairs)
                    for n, products in zip(own, found, strict=True):
                        step = self.load(at, left_steps, self.count(n), self.f32, 4)
                        row = at.add(at.mul(i, self.count(WIDE)), self.count(n))
                        place = at.add(at.mul(row, rights), j)
                        out = self._place(at, given["out"], place, 4 * WIDE)
                        self._put(at, products, step, steps, out, out)

            self.loop(at, rights, (), other, at.select(square, i, self.count(0)))

        chunks = self._upwards(at, rows, CHUNK)
        last = at.sub(lefts, self.count(1))

        def task(number: Any, _: Any) -> None:
            # One panel from the front, and where sums are a triangle one from the back, of which
            # there are the fewer the more there are of the first: tasks are of one size.
            back = at.sub(last, number)
            both = at.and_(square, at.icmp_signed("<", number, back))
            more = at.select(both, self.count(2), self.count(1))

            def part(c: Any, _: Any) -> None:
                def one(which: Any, _: Any) -> None:
                    front = at.icmp_signed("==", which, self.count(0))
                    of_panel(c, at.select(front, number, back))

                self.loop(at, more, (), one)

            self.loop(at, chunks, (), part)

        first, stop = self.own(at, at.select(square, self._upwards(at, lefts, 2), lefts))
        self.loop(at, stop, (), task, first)
        at.ret_void()
