"""The functions of `int16.py`, written in LLVM's language.

- `quantize` turns rows into integers.
- `arrange` does so with columns.
- `multiply` is the product of rows and columns: a linear's.
- `gather` adds the product of columns and columns to a sum: a Hessian's.

Left out on purpose: the means (`int16_ir.py`), compiling and calling them (`int16.py`).
"""

from __future__ import annotations

from typing import Any

from .int16_ir import AVX2, CHUNK, Integers

WIDE, ROWS, _ = AVX2
_TILES = 32  # of rows that go through a panel of columns together, which stay in a cache
_OF_PANEL = (6, 5, 5)  # a panel's columns as the rows of tiles
# Arguments, 64 bits each, in this order. Chunks are of `CHUNK`, the last one of what is left.
QUANTIZE = (
    "x",  # address: float32 [rows, width]
    "out",  # address: int16 [rows / ROWS upwards, width / 2, ROWS, 2], some rows unused
    "steps",  # address: float32 [rows, chunks of width]
    "rests",  # address: float32, likewise: mean magnitudes of all but a chunk's largest integer
    "rows",
    "width",  # a multiple of `WIDE`
)
ARRANGE = (
    "x",  # address: float32 [rows, width]
    "out",  # address: int16, of each chunk of rows [width / WIDE, pairs (`padded`), WIDE, 2]
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


class Writer(Integers):
    """Writes the functions down.

    Raises:
        ImportError: there is no llvmlite.
    """

    def text(self) -> str:
        self._quantize()
        self._arrange()
        self._multiply()
        self._gather()
        return str(self.module)

    def _quantize(self) -> None:
        at, given = self.parallel("quantize", QUANTIZE, addresses=4)
        width, chunk = given["width"], self.count(CHUNK)
        chunks = self.upwards(at, width, CHUNK)

        def row(r: Any, _: Any) -> None:
            within = at.srem(r, self.count(ROWS))
            tile = at.mul(at.sub(r, within), at.sdiv(width, self.count(2)))  # in pairs

            def part(c: Any, _: Any) -> None:
                start = at.mul(c, chunk)
                size = self.least(at, chunk, at.sub(width, start))
                x = self.place(at, given["x"], at.add(at.mul(r, width), start), 4)
                pairs = at.mul(at.sdiv(start, self.count(2)), self.count(ROWS))
                out = self.place(at, given["out"], at.add(at.add(tile, pairs), within), 4)
                step, rest = self.row(at, x, at.sdiv(size, self.count(WIDE)), out, ROWS)
                place = at.add(at.mul(r, chunks), c)
                self.store(at, step, given["steps"], place, 4)
                self.store(at, rest, given["rests"], place, 4)

            self.loop(at, chunks, (), part)

        self.shared(at, given["rows"], row)
        at.ret_void()

    def _arrange(self) -> None:
        at, given = self.parallel("arrange", ARRANGE, addresses=3)
        rows, width, chunk = given["rows"], given["width"], self.count(CHUNK)
        panels = at.sdiv(width, self.count(WIDE))

        def panel(task: Any, _: Any) -> None:
            c, p = at.sdiv(task, panels), at.srem(task, panels)
            start, column = at.mul(c, chunk), at.mul(p, self.count(WIDE))
            size = self.least(at, chunk, at.sub(rows, start))

            def read(r: Any) -> Any:
                place = at.add(at.mul(at.add(start, r), width), column)
                return self.load(at, given["x"], place, self.wide, 4)

            # In vectors of `WIDE` pairs; earlier chunks are whole.
            earlier = at.mul(at.mul(c, self.count(CHUNK // 2)), panels)
            first = at.add(earlier, at.mul(p, self.padded(at, size)))
            out = self.place(at, given["out"], first, 4 * WIDE)
            steps = self.panel(at, read, size, out)
            self.store(at, steps, given["steps"], at.add(at.mul(c, width), column), 4)

        self.shared(at, at.mul(self.upwards(at, rows, CHUNK), panels), panel)
        at.ret_void()

    def _multiply(self) -> None:
        at, given = self.parallel("multiply", MULTIPLY, addresses=6)
        count, width, outputs = given["count"], given["width"], given["outputs"]
        tiles, panels = self.upwards(at, count, ROWS), at.sdiv(outputs, self.count(WIDE))
        chunks, all_pairs = self.upwards(at, width, CHUNK), at.sdiv(width, self.count(2))

        def task(number: Any) -> None:
            first = at.mul(at.sdiv(number, panels), self.count(_TILES))
            last = self.least(at, tiles, at.add(first, self.count(_TILES)))
            column = at.mul(at.srem(number, panels), self.count(WIDE))

            def part(c: Any, _: Any) -> None:
                # Places in pairs; earlier chunks are whole.
                before = at.mul(c, self.count(CHUNK // 2))
                pairs = self.least(at, self.count(CHUNK // 2), at.sub(all_pairs, before))
                start = at.add(at.mul(before, outputs), at.mul(column, pairs))
                right = self.place(at, given["columns"], start, 4)
                of_column = at.add(at.mul(c, outputs), column)
                steps = self.two(at, self.place(at, given["column_steps"], of_column, 4))
                begun = at.icmp_signed(">", c, self.count(0))
                bias = self.place(at, given["bias"], column, 4)

                def tile(t: Any, _: Any) -> None:
                    row = at.mul(t, self.count(ROWS))
                    start = at.add(at.mul(row, all_pairs), at.mul(before, self.count(ROWS)))
                    left = self.place(at, given["rows"], start, 4)
                    found = self.sums(at, left, ROWS, ROWS, right, pairs)
                    for i, products in enumerate(found):
                        own = at.add(row, self.count(i))
                        with at.if_then(at.icmp_signed("<", own, count), likely=True):
                            of_row = at.add(at.mul(own, chunks), c)
                            step = self.load(at, given["row_steps"], of_row, self.f32, 4)
                            out = at.add(at.mul(own, outputs), column)
                            out = self.place(at, given["out"], out, 4)
                            old = self.two(at, at.select(begun, out, bias))
                            self.put(at, products, step, steps, out, old)

                self.loop(at, last, (), tile, first)

            self.loop(at, chunks, (), part)

        self.each(at, at.mul(self.upwards(at, tiles, _TILES), panels), task)
        at.ret_void()

    def _gather(self) -> None:
        at, given = self.parallel("gather", GATHER, addresses=5)
        rows, chunk = given["rows"], self.count(CHUNK)
        lefts, rights = (at.sdiv(given[name], self.count(WIDE)) for name in ("lefts", "rights"))
        square = at.icmp_signed("==", given["square"], self.count(1))

        def with_others(c: Any, i: Any) -> None:
            """A panel of the left, and all of the right that it meets, of a chunk."""
            pairs = self.padded(at, self.least(at, chunk, at.sub(rows, at.mul(c, chunk))))
            earlier = at.mul(c, self.count(CHUNK // 2))

            def panel(name: str, panels: Any, p: Any) -> tuple[Any, Any]:
                """Where its numbers and its steps are."""
                first = at.add(at.mul(earlier, panels), at.mul(p, pairs))
                steps = at.add(at.mul(c, panels), p)
                found = (given[name], first), (given[f"{name}_steps"], steps)
                return tuple(self.place(at, *where, 4 * WIDE) for where in found)

            left, left_steps = panel("left", lefts, i)

            def other(j: Any, _: Any) -> None:
                right, right_steps = panel("right", rights, j)
                steps = self.two(at, right_steps)
                begin = 0
                for size in _OF_PANEL:
                    tile = at.gep(left, [self.count(4 * begin)])
                    found = self.sums(at, tile, size, WIDE, right, pairs)
                    for n, products in enumerate(found, begin):
                        step = self.load(at, left_steps, self.count(n), self.f32, 4)
                        row = at.add(at.mul(i, self.count(WIDE)), self.count(n))
                        out = at.add(at.mul(row, rights), j)
                        out = self.place(at, given["out"], out, 4 * WIDE)
                        self.put(at, products, step, steps, out, self.two(at, out))
                    begin += size

            self.loop(at, rights, (), other, at.select(square, i, self.count(0)))

        self.each_panel(at, lefts, self.upwards(at, rows, CHUNK), square, with_others)
        at.ret_void()
