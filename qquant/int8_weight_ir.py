"""The functions of `int8_weight.py`, written in LLVM's language.

- `quantize` turns rows of bfloat16 into integers of 8 bits.
- `multiply` is the product of those and of a quantized weight: rows of bfloat16.

Both sides have a step for every chunk of inputs: a row's own, and a group's scale. Products within
a chunk are added as integers of 32 bits (256 x 255 x 127 < 2^31), and chunks in float32. One side
has to be without sign: it is the weight, 128 more than its code is above the zero, for which every
sum begins with what that is too much for its row, as `quantize` has counted.

Rows lie in panels of `ROWS`, of each a chunk's numbers one after the other: fours of them are read
where they are, since a chunk's length is known when this is written. A weight lies in panels of
`WIDE` outputs, in fours along the inputs.

Left out on purpose: compiling and calling them (`int8_weight.py`).
"""

from __future__ import annotations

from typing import Any

from .llvm_ir import Emitter

ROWS = 12  # of a tile, whose sums are in 24 of 32 registers
WIDE = 32  # outputs of a panel: two vectors
CHUNKS = (32, 64, 128, 256)  # how many inputs may have a step together
TOP = 127  # the largest integer
# A row is rough where its rounding comes to more than so much of its small numbers: those up to so
# much of their chunk's largest. By mean magnitudes, in which a few large ones do not hide others.
ROUGH, SMALL = 0.1, 0.5
_FOURS = 4  # in one round of a loop
_SHIFT = 1.5 * 2.0**23  # added to a number, leaves its nearest whole number in the last bits
_SHIFT_BITS = 0x4B400000
_MAGNITUDE = 0x7FFFFFFF
# Arguments, 64 bits each, in this order.
QUANTIZE = (
    "x",  # address: bfloat16 [rows, chunks, chunk]
    "numbers",  # address: int8 [panels, chunks, ROWS, chunk]
    "steps",  # address: float32 [panels, chunks, ROWS]
    "excess",  # address: int32 [panels, chunks, ROWS]: what a row's sums are to begin with
    "rough",  # address: int32 [panels, ROWS]: whether a row's rounding is above `ROUGH`
    "rows",
    "chunks",
)
MULTIPLY = (
    "numbers",  # address: of `quantize`
    "steps",  # address: likewise
    "excess",  # address: likewise
    "weight",  # address: uint8 [outputs / WIDE, chunks, chunk / 4, WIDE, 4]
    "scales",  # address: float32 [outputs / WIDE, chunks, WIDE]
    "bias",  # address: float32 [outputs]
    "out",  # address: bfloat16 [rows, outputs]
    "rows",
    "chunks",
    "outputs",  # a multiple of `WIDE`
    "tall",  # panels of rows that are multiplied together
    "broad",  # panels of outputs that are
)


class Writer(Emitter):
    """Writes the functions down.

    Args:
        chunk: inputs that have a step together, of `CHUNKS`.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__(16)
        ir = self.ir
        self.chunk = chunk
        self.shorts = ir.VectorType(ir.IntType(16), self.lanes)
        self.bytes = ir.VectorType(self.byte, self.lanes)
        self.fma = self.function("llvm.fma.v16f32", self.floats, *[self.floats] * 3)
        name = "llvm.x86.avx512.vpdpbusd.512"
        self.dot = self.function(name, self.ints, self.ints, self.ints, self.ints)

    def text(self) -> str:
        self._quantize()
        self._multiply()
        return str(self.module)

    # Rows.

    def _quantize(self) -> None:
        at, given = self.parallel("quantize", QUANTIZE, addresses=5)
        rows, chunks = given["rows"], given["chunks"]

        def panel(p: Any) -> None:
            def row(r: Any, _: Any) -> None:
                # Behind the last row stands that row again, which nobody multiplies by.
                here = at.add(at.mul(p, self.count(ROWS)), r)
                here = self.least(at, here, at.sub(rows, self.count(1)))

                def part(c: Any, sums: Any) -> Any:
                    number = at.add(at.mul(here, chunks), c)
                    x = self.place(at, given["x"], number, 2 * self.chunk)
                    to = at.add(at.mul(at.add(at.mul(p, chunks), c), self.count(ROWS)), r)
                    out = self.place(at, given["numbers"], to, self.chunk)
                    step, excess, noise, rest = self._round(at, x, out)
                    self.store(at, step, given["steps"], to, 4)
                    self.store(at, excess, given["excess"], to, 4)
                    return at.fadd(sums[0], noise), at.fadd(sums[1], rest)

                none = self.f32(0.0)
                noise, rest = self.loop(at, chunks, (none, none), part)
                rough = at.fcmp_ordered(">", noise, at.fmul(rest, self.f32(ROUGH**2)))
                rough = at.and_(rough, at.fcmp_ordered(">", rest, none))
                to = at.add(at.mul(p, self.count(ROWS)), r)
                self.store(at, at.zext(rough, self.i32), given["rough"], to, 4)

            self.loop(at, self.count(ROWS), (), row)

        self.each(at, self.upwards(at, rows, ROWS), panel)
        at.ret_void()

    def _round(self, at: Any, x: Any, out: Any) -> tuple[Any, Any, Any, Any]:
        """Writes a chunk of a row as integers.

        Returns:
            its step (NaN where something is not finite); what its sums begin with; what the squares
            of its rounding come to; the same of its small numbers, by their mean magnitude.
        """
        same = self.same
        vectors = self.chunk // self.lanes

        def read(v: Any) -> Any:
            return self.widen(at, self.load(at, x, v, self.shorts, 2 * self.lanes))

        def magnitude(number: Any) -> Any:
            return at.and_(at.bitcast(number, self.ints), same(self.ints, _MAGNITUDE))

        def larger(a: Any, b: Any) -> Any:
            return at.select(at.icmp_unsigned(">", a, b), a, b)

        def look(v: Any, seen: Any) -> Any:
            return (larger(magnitude(read(v)), seen[0]),)

        (found,) = self.loop(at, self.count(vectors), (same(self.ints, 0),), look)
        most = at.bitcast(self.folded(at, found, larger), self.f32)
        spoilt = at.fsub(most, most)  # 0, or NaN
        step = at.fmul(most, self.f32(1 / TOP))
        # Below that an inverse would be infinite.
        some = at.fcmp_ordered(">", most, self.f32(1e-35))
        some = at.and_(some, at.fcmp_ordered("==", spoilt, self.f32(0.0)))
        inverse = at.select(some, at.fdiv(self.f32(1.0), step), self.f32(0.0))
        step = at.fadd(at.select(some, step, self.f32(0.0)), spoilt)
        inverse, shift = self.spread(at, inverse, self.floats), same(self.floats, _SHIFT)
        none = same(self.floats, 0.0)
        small = at.bitcast(at.fmul(most, self.f32(SMALL)), self.i32)
        small = self.spread(at, small, self.ints)

        def write(v: Any, sums: Any) -> Any:
            total, size = sums
            number = read(v)
            bits = at.bitcast(at.call(self.fma, [number, inverse, shift]), self.ints)
            self.store(at, at.trunc(bits, self.bytes), out, v, self.lanes)
            number = magnitude(number)
            few = at.icmp_unsigned("<=", number, small)
            kept = at.select(few, at.bitcast(number, self.floats), none)
            return at.add(total, bits), at.fadd(size, kept)

        first = same(self.ints, 0), none
        total, size = self.loop(at, self.count(vectors), first, write)
        total, size = self.folded(at, total, at.add), self.folded(at, size, at.fadd)
        # The bits of what was added are in each of the numbers, but for multiples of 2^32.
        shifts = (self.chunk * _SHIFT_BITS + 2**31) % 2**32 - 2**31
        total = at.sub(total, self.ir.Constant(self.i32, shifts))
        excess = at.mul(total, self.ir.Constant(self.i32, -128))
        noise = at.fmul(at.fmul(step, step), self.f32(self.chunk / 12))
        return step, excess, noise, at.fmul(at.fmul(size, size), self.f32(1 / self.chunk))

    # Products.

    def _multiply(self) -> None:
        at, given = self.parallel("multiply", MULTIPLY, addresses=7)
        rows, tall, broad = given["rows"], given["tall"], given["broad"]
        panels = self.upwards(at, rows, ROWS)
        others = at.sdiv(given["outputs"], self.count(WIDE))
        sums = at.alloca(self.floats, ROWS * 2)
        sums.align = 64
        sums = at.bitcast(sums, self.pointer)
        strips = at.sdiv(at.sub(at.add(others, broad), self.count(1)), broad)
        blocks = at.sdiv(at.sub(at.add(panels, tall), self.count(1)), tall)

        def task(number: Any) -> None:
            first = at.mul(at.sdiv(number, strips), tall)
            other = at.mul(at.srem(number, strips), broad)
            last = self.least(at, at.add(first, tall), panels)
            end = self.least(at, at.add(other, broad), others)

            def outputs(j: Any, _: Any) -> None:
                def tile(i: Any, _: Any) -> None:
                    self._tile(at, given, i, j, sums)

                self.loop(at, last, (), tile, first)

            self.loop(at, end, (), outputs, other)

        self.each(at, at.mul(blocks, strips), task)
        at.ret_void()

    def _tile(self, at: Any, given: Any, i: Any, j: Any, sums: Any) -> None:
        """Rows of a panel by outputs of a panel."""
        chunks = given["chunks"]
        bias = self.two(at, self.place(at, given["bias"], j, 4 * WIDE))
        for r in range(ROWS):
            for v, own in enumerate(bias):
                self.store(at, own, sums, self.count(2 * r + v), 4 * self.lanes)
        first, other = at.mul(i, chunks), at.mul(j, chunks)

        def part(c: Any, _: Any) -> None:
            here, there = at.add(first, c), at.add(other, c)
            numbers = self.place(at, given["numbers"], here, ROWS * self.chunk)
            weight = self.place(at, given["weight"], there, WIDE * self.chunk)
            excess = self.place(at, given["excess"], here, 4 * ROWS)
            found = self._sums(at, numbers, excess, weight)
            steps = self.place(at, given["steps"], here, 4 * ROWS)
            scales = self.two(at, self.place(at, given["scales"], there, 4 * WIDE))
            for r, products in enumerate(found):
                step = self.load(at, steps, self.count(r), self.f32, 4)
                to = self.place(at, sums, self.count(2 * r), 4 * self.lanes)
                totals = [at.sitofp(total, self.floats) for total in products]
                self.put(at, totals, step, scales, to, self.two(at, to))

        self.loop(at, chunks, (), part)
        row = at.mul(i, self.count(ROWS))
        inside = self.least(at, self.count(ROWS), at.sub(given["rows"], row))

        def write(r: Any, _: Any) -> None:
            to = at.add(at.mul(at.add(row, r), at.sdiv(given["outputs"], self.count(WIDE))), j)
            to = self.place(at, given["out"], to, 2 * WIDE)
            for v, total in enumerate(self.two(at, self.place(at, sums, r, 4 * WIDE))):
                self.store(at, self.narrow(at, total), to, self.count(v), 2 * self.lanes)

        self.loop(at, inside, (), write)

    def _sums(self, at: Any, numbers: Any, excess: Any, weight: Any) -> list[list[Any]]:
        """The products of a chunk: of each row two vectors, int32."""

        def step(k: Any, sums: Any) -> list[Any]:
            above = self.two(at, self.place(at, weight, k, 4 * WIDE), self.ints)
            own, new = self.place(at, numbers, k, 4), []
            for r in range(ROWS):
                four = self.load(at, own, self.count(r * self.chunk // 4), self.i32, 4)
                four = self.spread(at, four, self.ints)
                for v, part in enumerate(above):
                    new.append(at.call(self.dot, [sums[2 * r + v], part, four]))
            return new

        def several(k: Any, sums: Any) -> Any:
            for i in range(_FOURS):
                sums = step(at.add(at.mul(k, self.count(_FOURS)), self.count(i)), sums)
            return sums

        begin: list[Any] = []
        for r in range(ROWS):
            own = self.load(at, excess, self.count(r), self.i32, 4)
            begin += [self.spread(at, own, self.ints)] * 2
        rounds = self.count(self.chunk // 4 // _FOURS)
        found = self.loop(at, rounds, tuple(begin), several)
        return [list(found[2 * r : 2 * r + 2]) for r in range(ROWS)]
