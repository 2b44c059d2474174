"""The functions of `avx2_code.py`, written in LLVM's language.

- `quantize` turns float32 inputs into integers of 16 bits, group by group, each with the largest of
  its magnitudes as 32767. What is not finite makes the group's step NaN, and so every result.
- `multiply` takes those and one part of the outputs, as the number of its thread says.

A word of 32 bits holds `32 / bits` codes of consecutive inputs. Shifted by `j * bits` and masked,
it is two 16-bit numbers, codes `j` and `j + 16 / bits`: so pairs of inputs lie that far apart.

Left out on purpose: compiling and calling them (`avx2_code.py`).
"""

from __future__ import annotations

from typing import Any

from .llvm_ir import Emitter

WORD = 32  # bits
LANES = 8  # words in a vector
ROWS, TILE = 4, 2  # rows and vectors whose sums are in registers, where there are so many rows
LINE, AHEAD = 64, 4096  # bytes
TOP = 32767  # what the largest magnitude of a group becomes
_TINY = 1e-30  # magnitudes below which a group counts as zero: 32767 over less is not finite
# Arguments of `multiply`, 64 bits each, in this order.
FIELDS = (
    "pairs",  # address: int16 [rows, groups, words per group, 16 / bits, 2]
    "steps",  # address: float32 [rows, groups], of the inputs
    "totals",  # address: int32 [rows, groups], sums of the integers
    "words",  # address: int32 [blocks, groups, words per group, block width]
    "scales",  # address: float16 or float32 [blocks, groups, block width]
    "zeros",  # address: uint8 [blocks, groups, block width]
    "out",  # address: float32 [rows, blocks, block width]
    "blocks",
    "groups",
    "size",  # words per group
    "rows",
)


class Writer(Emitter):
    """Writes the functions down.

    Args:
        bits, vectors, half: as of `avx2_code.compiled`.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self, bits: int, vectors: int, half: bool) -> None:
        super().__init__(LANES)
        self.bits, self.vectors = bits, vectors
        self.codes = WORD // bits  # in a word
        self.shorts = self.ir.VectorType(self.ir.IntType(16), 2 * LANES)
        self.scale = self.ir.HalfType() if half else self.f32
        self.scale_bytes = 2 if half else 4

    def text(self) -> str:
        self._quantize()
        self._multiply()
        return str(self.module)

    def _quantize(self) -> None:
        """quantize(inputs, pairs, steps, totals, groups, size): addresses, then counts.

        `groups` of `size` words' inputs each, side by side; those of all rows together.
        """
        ir, n = self.ir, self.codes
        floats, ints = ir.VectorType(self.f32, n), ir.VectorType(self.i32, n)
        arguments = [self.pointer] * 4 + [self.i64] * 2
        function = self.function("quantize", ir.VoidType(), *arguments)
        inputs, pairs, steps, totals, groups, size = function.args
        at = ir.IRBuilder(function.append_basic_block())
        magnitude = self.function(f"llvm.fabs.v{n}f32", floats, floats)
        nearest = self.function(f"llvm.rint.v{n}f32", floats, floats)
        largest = self.function(f"llvm.vector.reduce.fmax.v{n}f32", self.f32, floats)
        together = self.function(f"llvm.vector.reduce.fadd.v{n}f32", self.f32, self.f32, floats)
        added = self.function(f"llvm.vector.reduce.add.v{n}i32", self.i32, ints)

        def group(g: Any, _: Any) -> None:
            start = at.mul(g, size)

            def measure(word: Any, values: Any) -> Any:
                most, spoilt = values
                x = self.load(at, inputs, at.add(start, word), floats, 4 * n)
                size_of_x = at.call(magnitude, [x])
                larger = at.select(at.fcmp_ordered(">", size_of_x, most), size_of_x, most)
                return larger, at.fadd(spoilt, at.fsub(x, x))  # 0, or NaN of what is not finite

            none = self.same(floats, 0.0)
            most, spoilt = self.loop(at, size, (none, none), measure)
            top = at.call(largest, [most])
            spoilt = at.call(together, [ir.Constant(self.f32, 0.0), spoilt])
            step = at.fdiv(top, ir.Constant(self.f32, float(TOP)))
            self.store(at, at.fadd(step, spoilt), steps, g, 4)
            inverse = at.fdiv(ir.Constant(self.f32, float(TOP)), top)
            some = at.fcmp_ordered(">", top, ir.Constant(self.f32, _TINY))
            inverse = at.select(some, inverse, ir.Constant(self.f32, 0.0))
            factor = self.spread(at, inverse, floats)

            def write(word: Any, values: Any) -> Any:
                at_word = at.add(start, word)
                x = self.load(at, inputs, at_word, floats, 4 * n)
                number = at.fptosi(at.call(nearest, [at.fmul(x, factor)]), ints)
                low, high = self.part(at, number, 0, n // 2), self.part(at, number, n // 2, n)
                low = at.and_(low, self.same(low.type, 0xFFFF))
                high = at.shl(high, self.same(high.type, 16))
                self.store(at, at.or_(low, high), pairs, at_word, 2 * n)
                return (at.add(values[0], number),)

            (total,) = self.loop(at, size, (self.same(ints, 0),), write)
            self.store(at, at.call(added, [total]), totals, g, 4)

        self.loop(at, groups, (), group)
        at.ret_void()

    def _multiply(self) -> None:
        """multiply(arguments): `FIELDS`; blocks of outputs that are this thread's, all rows."""
        at, given = self.parallel("multiply", FIELDS, addresses=7)
        blocks, rows = given["blocks"], given["rows"]
        first, stop = self.own(at, blocks)
        several = at.sdiv(rows, self.count(ROWS))

        def block(b: Any, _: Any) -> None:
            def tiles(r: Any, _: Any) -> None:
                row = at.mul(r, self.count(ROWS))
                for v in range(0, self.vectors, TILE):
                    self._tile(at, given, b, row, ROWS, range(v, min(v + TILE, self.vectors)))

            def single(row: Any, _: Any) -> None:
                self._tile(at, given, b, row, 1, range(self.vectors))

            self.loop(at, several, (), tiles)
            self.loop(at, rows, (), single, at.mul(several, self.count(ROWS)))

        self.loop(at, stop, (), block, first)
        at.ret_void()

    def _tile(
        self, at: Any, given: dict[str, Any], b: Any, r: Any, count: int, vectors: range
    ) -> None:
        """Results of `count` rows from `r` on, and of those vectors of a block of outputs."""
        groups, size, half = given["groups"], given["size"], self.codes // 2
        low = (1 << self.bits) - 1
        mask = self.same(self.ints, low | low << 16)
        multiply = self._pairwise()
        rows = [at.add(r, self.count(i)) for i in range(count)]
        width = self.count(self.vectors)

        def group(g: Any, sums: Any) -> Any:
            of_block = at.add(at.mul(b, groups), g)
            of_rows = [at.add(at.mul(row, groups), g) for row in rows]
            first_word = at.mul(of_block, size)
            first_pairs = [at.mul(of_row, size) for of_row in of_rows]

            def word(w: Any, sums: Any) -> Any:
                at_word = at.mul(at.add(first_word, w), width)
                at_pairs = [at.mul(at.add(pair, w), self.count(half)) for pair in first_pairs]
                places = [at.add(at_word, self.count(v)) for v in vectors]
                held = [self.load(at, given["words"], p, self.ints, 4 * LANES) for p in places]
                if not vectors.start:  # once for a block
                    self._fetch(at, given["words"], at_word)
                sums = list(sums)
                for j in range(half):
                    by = self.same(self.ints, j * self.bits)
                    moved = [at.lshr(h, by) if j else h for h in held]
                    codes = [at.bitcast(at.and_(m, mask), self.shorts) for m in moved]
                    for i, pairs in enumerate(at_pairs):
                        place = at.add(pairs, self.count(j))
                        pair = self.load(at, given["pairs"], place, self.i32, 4)
                        inputs = at.bitcast(self.spread(at, pair, self.ints), self.shorts)
                        for v, two in enumerate(codes):
                            k = i * len(vectors) + v
                            sums[k] = at.add(sums[k], at.call(multiply, [two, inputs]))
                return sums

            products = self.loop(at, size, (self.same(self.ints, 0),) * len(sums), word)
            return self._scaled(at, given, of_block, of_rows, vectors, products, sums)

        none = (self.same(self.floats, 0.0),) * (count * len(vectors))
        sums = self.loop(at, groups, none, group)
        for i, row in enumerate(rows):
            first = at.mul(at.add(at.mul(row, given["blocks"]), b), width)
            for v, which in enumerate(vectors):
                place = at.add(first, self.count(which))
                self.store(at, sums[i * len(vectors) + v], given["out"], place, 4 * LANES)

    def _scaled(
        self,
        at: Any,
        given: dict[str, Any],
        of_block: Any,
        of_rows: list[Any],
        vectors: range,
        products: tuple[Any, ...],
        sums: tuple[Any, ...],
    ) -> list[Any]:
        """`sums` and a group's products, less those with zero points, times both scales."""
        ir = self.ir
        new = list(sums)
        for v, which in enumerate(vectors):
            place = at.add(at.mul(of_block, self.count(self.vectors)), self.count(which))
            kind = ir.VectorType(self.scale, LANES)
            scale = self.load(at, given["scales"], place, kind, self.scale_bytes * LANES)
            scale = scale if kind == self.floats else at.fpext(scale, self.floats)
            kind = ir.VectorType(self.byte, LANES)
            zero = at.zext(self.load(at, given["zeros"], place, kind, LANES), self.ints)
            for i, of_row in enumerate(of_rows):
                k = i * len(vectors) + v
                step = self.spread(
                    at, self.load(at, given["steps"], of_row, self.f32, 4), self.floats
                )
                total = self.spread(
                    at, self.load(at, given["totals"], of_row, self.i32, 4), self.ints
                )
                whole = at.sub(products[k], at.mul(zero, total))
                factor = at.fmul(scale, step)
                new[k] = at.fadd(new[k], at.fmul(factor, at.sitofp(whole, self.floats)))
        return new

    def _fetch(self, at: Any, base: Any, vector: Any) -> None:
        """Asks for words `AHEAD` bytes later: by itself a processor stops at each page."""
        ir, number = self.ir, self.i32
        fetch = self.function(
            "llvm.prefetch.p0", ir.VoidType(), self.pointer, number, number, number
        )
        start = at.add(at.mul(vector, self.count(4 * LANES)), self.count(AHEAD))
        for line in range(0, 4 * LANES * self.vectors, LINE):
            later = at.gep(base, [at.add(start, self.count(line))])
            at.call(fetch, [later, *(ir.Constant(number, value) for value in (0, 3, 1))])

    def _pairwise(self) -> Any:
        """int16 [16] times int16 [16], neighbours added: int32 [8]."""
        return self.function("llvm.x86.avx2.pmadd.wd", self.ints, self.shorts, self.shorts)
