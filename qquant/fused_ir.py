"""What stands between a block's linears, written in LLVM's language.

- `norm`: RMSNorm of rows, of which each is read twice and written once.
- `gate`: the gate's SiLU times what it lets through, where it lies.
- `softmax`: of causal scores, into probabilities of bfloat16.
- `narrow`: rounds float32 to bfloat16, once as float32 and once in half of the memory.
- `rotate`: RoPE, half of the channels against half. Of bfloat16 with angles in float32 there is
  one rounding, at the end; with angles in bfloat16 too every product is rounded.

Numbers are float32 or bfloat16 in memory and float32 in registers; they are rounded to bfloat16
wherever plain torch does so. Every sum is of `LANES` partial sums that are added pairwise at the
end, whatever the width of the processor's registers, so that all processors give the same bits.

Left out on purpose: compiling and calling them (`fused.py`).
"""

from __future__ import annotations

from typing import Any

from .llvm_ir import Emitter

LANES = 16
# Arguments, 64 bits each, in this order; the names of functions end in `16` for bfloat16,
# `rotate`'s in one more where its angles are.
NORM = (
    "values",  # address: [rows, width]
    "weight",  # address: [width]
    "out",  # address: [rows, width]
    "eps",  # address: one float32
    "rows",
    "width",  # a multiple of `LANES`
)
GATE = (
    "gate",  # address: [size], changed
    "through",  # address: [size]
    "size",  # a multiple of `LANES`
)
SOFTMAX = (
    "scores",  # address: float32 [batch, rows, width], used up
    "out",  # address: bfloat16 [batch, rows, width]
    "batch",
    "rows",
    "width",  # a multiple of `LANES`; the last row sees all of it, each before it one less
)
NARROW = (
    "values",  # address: float32 [size]
    "wide",  # address: float32 [size], which may be that of the values
    "out",  # address: bfloat16 [size]
    "size",  # a multiple of `LANES`
)
ROTATE = (
    "values",  # address: a head's channels side by side
    "cosines",  # address: of a token side by side
    "sines",  # address: likewise
    "out",  # address: [samples, tokens, heads, width]
    "samples",
    "tokens",
    "heads",
    "width",  # of a head, a multiple of `LANES`
    "half",  # of the channels that turn, a multiple of `LANES`
    "value_sample",  # strides, in numbers
    "value_head",
    "value_token",
    "angle_sample",  # of cosines and of sines
    "angle_token",
)


class Writer(Emitter):
    """Writes the functions down.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self) -> None:
        super().__init__(LANES)
        self.shorts = self.ir.VectorType(self.ir.IntType(16), LANES)
        self.fma = self.function("llvm.fma.v16f32", self.floats, *[self.floats] * 3)
        self.root = self.function("llvm.sqrt.f32", self.f32, self.f32)

    def text(self) -> str:
        for half in (False, True):
            self._norm(half)
            self._gate(half)
        self._softmax()
        self._narrow()
        for half, narrow in ((False, False), (True, False), (True, True)):
            self._rotate(half, narrow)
        return str(self.module)

    # Vectors in memory and in registers.

    def _get(self, at: Any, base: Any, vector: Any, half: bool) -> Any:
        """Of the numbers behind `base` the vector of this number."""
        if not half:
            return self.load(at, base, vector, self.floats, 4 * LANES)
        return self.widen(at, self.load(at, base, vector, self.shorts, 2 * LANES))

    def _put(self, at: Any, value: Any, base: Any, vector: Any, half: bool) -> None:
        if not half:
            self.store(at, value, base, vector, 4 * LANES)
            return
        self.store(at, self.narrow(at, value), base, vector, 2 * LANES)

    def _rounded(self, at: Any, value: Any, half: bool) -> Any:
        """The number that memory would hold."""
        if not half:
            return value
        bits = at.and_(self.rounded_bits(at, value), self.same(self.ints, 0xFFFF0000))
        return at.bitcast(bits, self.floats)

    def _larger(self, at: Any, a: Any, b: Any) -> Any:
        """What is no number wins."""
        kept = at.fcmp_unordered(">", a, b)
        return at.select(kept, a, b)

    # The functions.

    def _norm(self, half: bool) -> None:
        at, given = self.parallel("norm16" if half else "norm", NORM, addresses=4)
        vectors = at.sdiv(given["width"], self.count(LANES))
        width = at.sitofp(given["width"], self.f32)
        eps = self.load(at, given["eps"], self.count(0), self.f32, 4)

        def row(i: Any, _: Any) -> None:
            first = at.mul(i, vectors)

            def square(k: Any, sums: Any) -> Any:
                x = self._get(at, given["values"], at.add(first, k), half)
                return (at.call(self.fma, [x, x, sums[0]]),)

            (sums,) = self.loop(at, vectors, (self.same(self.floats, 0.0),), square)
            mean = at.fdiv(self.folded(at, sums, at.fadd), width)
            root = at.call(self.root, [at.fadd(mean, eps)])
            scale = at.fdiv(self.ir.Constant(self.f32, 1.0), root)
            scale = self.spread(at, scale, self.floats)

            def write(k: Any, _: Any) -> None:
                x = at.fmul(self._get(at, given["values"], at.add(first, k), half), scale)
                x = at.fmul(self._rounded(at, x, half), self._get(at, given["weight"], k, half))
                self._put(at, x, given["out"], at.add(first, k), half)

            self.loop(at, vectors, (), write)

        self.shared(at, given["rows"], row)
        at.ret_void()

    def _gate(self, half: bool) -> None:
        at, given = self.parallel("gate16" if half else "gate", GATE, addresses=2)
        one = self.same(self.floats, 1.0)

        def vector(k: Any, _: Any) -> None:
            x = self._get(at, given["gate"], k, half)
            x = at.fdiv(x, at.fadd(one, self.exp(at, at.fneg(x))))
            x = at.fmul(self._rounded(at, x, half), self._get(at, given["through"], k, half))
            self._put(at, x, given["gate"], k, half)

        self.shared(at, at.sdiv(given["size"], self.count(LANES)), vector)
        at.ret_void()

    def _softmax(self) -> None:
        at, given = self.parallel("softmax", SOFTMAX, addresses=2)
        rows, scores, out = given["rows"], given["scores"], given["out"]
        vectors = at.sdiv(given["width"], self.count(LANES))
        none, least = self.same(self.floats, 0.0), self.same(self.floats, -float("inf"))
        number = self.ir.Constant(self.ints, list(range(LANES)))

        def row(i: Any, _: Any) -> None:
            first = at.mul(i, vectors)
            # How many keys this query does not see, and where the last vector of seen ones is.
            unseen = at.sub(at.sub(rows, self.count(1)), at.srem(i, rows))
            seen = at.sub(given["width"], unseen)
            last = at.sdiv(at.sub(seen, self.count(1)), self.count(LANES))
            left = at.trunc(at.sub(seen, at.mul(last, self.count(LANES))), self.i32)
            inside = at.icmp_signed("<", number, self.spread(at, left, self.ints))
            end = at.select(inside, self._get(at, scores, at.add(first, last), False), least)

            def largest(k: Any, most: Any) -> Any:
                return (self._larger(at, most[0], self._get(at, scores, at.add(first, k), False)),)

            (most,) = self.loop(at, last, (end,), largest)
            top = self.folded(at, most, lambda a, b: self._larger(at, a, b))
            top = self.spread(at, top, self.floats)
            end = at.select(inside, self.exp(at, at.fsub(end, top)), none)

            def raise_(k: Any, sums: Any) -> Any:
                place = at.add(first, k)
                x = self.exp(at, at.fsub(self._get(at, scores, place, False), top))
                self._put(at, x, scores, place, False)
                return (at.fadd(sums[0], x),)

            (sums,) = self.loop(at, last, (end,), raise_)
            share = at.fdiv(self.ir.Constant(self.f32, 1.0), self.folded(at, sums, at.fadd))
            share = self.spread(at, share, self.floats)

            def write(k: Any, _: Any) -> None:
                place = at.add(first, k)
                self._put(at, at.fmul(self._get(at, scores, place, False), share), out, place, True)

            self.loop(at, last, (), write)
            self._put(at, at.fmul(end, share), out, at.add(first, last), True)

            def clear(k: Any, _: Any) -> None:
                self._put(at, none, out, at.add(first, k), True)

            self.loop(at, vectors, (), clear, at.add(last, self.count(1)))

        self.shared(at, at.mul(given["batch"], rows), row)
        at.ret_void()

    def _narrow(self) -> None:
        at, given = self.parallel("narrow", NARROW, addresses=3)

        def vector(k: Any, _: Any) -> None:
            x = self._get(at, given["values"], k, False)
            self._put(at, x, given["out"], k, True)
            self._put(at, self._rounded(at, x, True), given["wide"], k, False)

        self.shared(at, at.sdiv(given["size"], self.count(LANES)), vector)
        at.ret_void()

    def _rotate(self, half: bool, narrow: bool) -> None:
        name = "rotate" + "16" * (half + narrow)
        at, given = self.parallel(name, ROTATE, addresses=4)
        tokens, heads, width = given["tokens"], given["heads"], given["width"]
        middle, vectors = given["half"], at.sdiv(given["half"], self.count(LANES))
        item, of_angle = (self.count(2 if short else 4) for short in (half, narrow))

        def token(i: Any, _: Any) -> None:
            sample, own = at.sdiv(i, tokens), at.srem(i, tokens)

            def begin(name: str, kind: str, size: Any) -> Any:
                place = at.mul(sample, given[f"{kind}_sample"])
                place = at.add(place, at.mul(own, given[f"{kind}_token"]))
                return at.gep(given[name], [at.mul(place, size)])

            values = begin("values", "value", item)
            cosines, sines = (begin(name, "angle", of_angle) for name in ("cosines", "sines"))
            cos_behind, sin_behind = (
                at.gep(base, [at.mul(middle, of_angle)]) for base in (cosines, sines)
            )

            def head(h: Any, _: Any) -> None:
                place = at.mul(h, given["value_head"])
                x = at.gep(values, [at.mul(place, item)])
                place = at.mul(at.add(at.mul(i, heads), h), width)
                out = at.gep(given["out"], [at.mul(place, item)])
                x_behind, out_behind = (at.gep(base, [at.mul(middle, item)]) for base in (x, out))

                def turn(k: Any, _: Any) -> None:
                    first, second = (self._get(at, base, k, half) for base in (x, x_behind))
                    for own, other, cos, sin, to in (
                        (first, at.fneg(second), cosines, sines, out),
                        (second, first, cos_behind, sin_behind, out_behind),
                    ):
                        turned = at.fmul(own, self._get(at, cos, k, narrow))
                        sine = self._get(at, sin, k, narrow)
                        if half:  # as torch rounds it, to the bit
                            added = self._rounded(at, at.fmul(other, sine), narrow)
                            turned = at.fadd(self._rounded(at, turned, narrow), added)
                        else:
                            turned = at.call(self.fma, [other, sine, turned])
                        self._put(at, turned, to, k, half)

                def keep(k: Any, _: Any) -> None:
                    self._put(at, self._get(at, x, k, half), out, k, half)

                self.loop(at, vectors, (), turn)
                rest = at.mul(vectors, self.count(2))
                self.loop(at, at.sdiv(width, self.count(LANES)), (), keep, rest)

            self.loop(at, heads, (), head)

        self.shared(at, at.mul(given["samples"], tokens), token)
        at.ret_void()
