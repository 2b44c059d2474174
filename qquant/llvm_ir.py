"""What functions in LLVM's language are written with: constants, memory, loops, a thread's part,
exp.

llvmlite's builder writes one instruction at a time; here are the few patterns that the functions
of `avx2_ir.py`, `fused_ir.py`, `int8_*ir.py`, `int16_*_ir.py` and `solver_ir.py` have. Vectors are
as wide as whoever writes asks for: LLVM splits what a processor has no registers for, and the
results are the same.

Left out on purpose: what the functions compute, and compiling and calling them (`llvm_code.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# exp(x) = 2^n exp(r), |r| <= ln(2) / 2: coefficients of Cephes' expf (S. Moshier, 1989), which is
# within 2 units of the last place; ln(2) in two parts, of which the first is exact times n.
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LN2 = (0.693359375, -2.12194440e-4)
_LOG2E = 1.44269504088896341
_SHIFT = 1.5 * 2.0**23  # added to a number, leaves its nearest whole number in the last bits
_LOWEST, _HIGHEST = -88.0, 89.0  # where 2^n comes out as 0, and as infinity
LINE = 64  # bytes that a processor fetches together
THREAD, THREADS = "qquant_thread", "qquant_threads"  # functions that the code is linked to


class Emitter:
    """A module and the means to write functions into it.

    Args:
        lanes: 32-bit numbers in a vector.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self, lanes: int) -> None:
        from llvmlite import ir

        self.ir, self.lanes = ir, lanes
        self.i32, self.i64, self.f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        self.byte = ir.IntType(8)
        self.pointer = self.byte.as_pointer()
        self.ints, self.floats = ir.VectorType(self.i32, lanes), ir.VectorType(self.f32, lanes)
        self.module = ir.Module("qquant")

    def function(self, name: str, result: Any, *args: Any) -> Any:
        """A function of that name; an intrinsic that is there already is not declared again."""
        found = self.module.globals.get(name)
        return found or self.ir.Function(self.module, self.ir.FunctionType(result, args), name)

    def parallel(self, name: str, fields: Sequence[str], addresses: int) -> tuple[Any, Any]:
        """Begins a function that all threads run: what writes it, and its arguments by name.

        It takes the address of `fields`, 64 bits each, of which the first so many are addresses,
        and behind them of a count for `each`.
        """
        function = self.function(name, self.ir.VoidType(), self.i64.as_pointer())
        at = self.ir.IRBuilder(function.append_basic_block())
        self.taken = at.gep(function.args[0], [self.count(len(fields))])
        given = {
            field: at.load(at.gep(function.args[0], [self.count(i)]))
            for i, field in enumerate(fields)
        }
        for field in fields[:addresses]:
            given[field] = at.inttoptr(given[field], self.pointer)
        return at, given

    def thread(self, at: Any) -> tuple[Any, Any]:
        """The number of the thread that runs this, and how many there are."""
        own, total = (self.function(name, self.i32) for name in (THREAD, THREADS))
        return at.sext(at.call(own, []), self.i64), at.sext(at.call(total, []), self.i64)

    def own(self, at: Any, number: Any) -> tuple[Any, Any]:
        """Of so many, the first that is this thread's and the one behind its last."""
        thread, threads = self.thread(at)
        first = at.sdiv(at.mul(thread, number), threads)
        return first, at.sdiv(at.mul(at.add(thread, self.count(1)), number), threads)

    def shared(self, at: Any, number: Any, body: Callable[[Any, Any], Any]) -> None:
        """`body` as of `loop`, for each of so many that is this thread's."""
        first, stop = self.own(at, number)
        self.loop(at, stop, (), body, first)

    def each(self, at: Any, number: Any, task: Callable[[Any], None]) -> None:
        """Every task, by whichever thread comes to it first; once in a function.

        Threads are not equally fast: others run on their cores, or cores differ. So this is for
        what takes long beside an atomic addition, `shared` for the rest.
        """
        head, inner, after = (
            at.function.append_basic_block(name) for name in ("take", "do", "end")
        )
        at.branch(head)
        at.position_at_end(head)
        index = at.atomic_rmw("add", self.taken, self.count(1), "monotonic")
        at.cbranch(at.icmp_signed("<", index, number), inner, after)
        at.position_at_end(inner)
        task(index)
        at.branch(head)
        at.position_at_end(after)

    def each_panel(
        self, at: Any, panels: Any, rounds: Any, paired: Any, body: Callable[[Any, Any], None]
    ) -> None:
        """`body(round, panel)`, a task for every panel, with all rounds one after the other.

        Args:
            paired: whether each task has two panels, one from either end: of a triangle, whose rows
                are the shorter the later, all tasks are of one size then.
        """
        last, two = at.sub(panels, self.count(1)), self.count(2)

        def task(number: Any) -> None:
            back = at.sub(last, number)
            both = at.and_(paired, at.icmp_signed("<", number, back))
            more = at.select(both, two, self.count(1))

            def part(c: Any, _: Any) -> None:
                def one(which: Any, _: Any) -> None:
                    front = at.icmp_signed("==", which, self.count(0))
                    body(c, at.select(front, number, back))

                self.loop(at, more, (), one)

            self.loop(at, rounds, (), part)

        self.each(at, at.select(paired, self.upwards(at, panels, 2), panels), task)

    # Numbers and places.

    def least(self, at: Any, a: Any, b: Any) -> Any:
        return at.select(at.icmp_signed("<", a, b), a, b)

    def upwards(self, at: Any, value: Any, by: int) -> Any:
        """Divided, and rounded up."""
        return at.sdiv(at.add(value, self.count(by - 1)), self.count(by))

    def place(self, at: Any, base: Any, items: Any, size: int) -> Any:
        """The address of an item."""
        return at.gep(base, [at.mul(items, self.count(size))])

    def count(self, value: int) -> Any:
        return self.ir.Constant(self.i64, value)

    def same(self, kind: Any, value: float) -> Any:
        # Zeros have a short word, and are most of what is written.
        return self.ir.Constant(kind, [value] * kind.count if value else None)

    def load(self, at: Any, base: Any, index: Any, kind: Any, item: int) -> Any:
        """What lies `index` items of `item` bytes behind `base`."""
        place = at.gep(base, [at.mul(index, self.count(item))])
        found = at.load(at.bitcast(place, kind.as_pointer()))
        found.align = 1
        return found

    def store(self, at: Any, value: Any, base: Any, index: Any, item: int) -> None:
        place = at.gep(base, [at.mul(index, self.count(item))])
        at.store(value, at.bitcast(place, value.type.as_pointer())).align = 1

    def fetch(self, at: Any, address: Any) -> None:
        """Lets the processor fetch the line there, which need not be anyone's, for reading."""
        kinds = self.pointer, self.i32, self.i32, self.i32
        function = self.function("llvm.prefetch", self.ir.VoidType(), *kinds)
        at.call(function, [address, *(self.ir.Constant(self.i32, given) for given in (0, 3, 1))])

    def spread(self, at: Any, value: Any, kind: Any) -> Any:
        """A vector of one value."""
        ir = self.ir
        one = at.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(self.i32, 0))
        places = ir.Constant(ir.VectorType(self.i32, kind.count), None)
        return at.shuffle_vector(one, ir.Constant(kind, ir.Undefined), places)

    def part(self, at: Any, vector: Any, start: int, stop: int) -> Any:
        ir = self.ir
        places = ir.Constant(ir.VectorType(self.i32, stop - start), list(range(start, stop)))
        return at.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)

    def loop(
        self,
        at: Any,
        stop: Any,
        start: tuple[Any, ...],
        body: Callable[[Any, Any], Any],
        first: Any = None,
    ) -> Any:
        """`for i in range(first, stop): values = body(i, values)`; the values at the end."""
        head, inner, after = (at.function.append_basic_block(name) for name in ("for", "do", "end"))
        before = at.block
        at.branch(head)
        at.position_at_end(head)
        index = at.phi(self.i64)
        index.add_incoming(self.count(0) if first is None else first, before)
        values = tuple(at.phi(value.type) for value in start)
        for value, initial in zip(values, start, strict=True):
            value.add_incoming(initial, before)
        at.cbranch(at.icmp_signed("<", index, stop), inner, after)
        at.position_at_end(inner)
        changed = body(index, values) or ()
        index.add_incoming(at.add(index, self.count(1)), at.block)
        for value, new in zip(values, changed, strict=True):
            value.add_incoming(new, at.block)
        at.branch(head)
        at.position_at_end(after)
        return values

    def two(self, at: Any, base: Any, kind: Any = None) -> list[Any]:
        """The two vectors at an address, of float32 unless it says otherwise."""
        kind = kind or self.floats
        return [self.load(at, base, self.count(v), kind, 4 * self.lanes) for v in range(2)]

    def put(
        self,
        at: Any,
        found: Sequence[Any],
        step: Any,
        steps: Sequence[Any],
        out: Any,
        old: Sequence[Any],
    ) -> None:
        """Writes vectors of float32, times both steps, added to what is old."""
        fma = self.function(f"llvm.fma.v{self.lanes}f32", self.floats, *[self.floats] * 3)
        for v, total in enumerate(found):
            factor = at.fmul(self.spread(at, step, self.floats), steps[v])
            new = at.call(fma, [total, factor, old[v]])
            self.store(at, new, out, self.count(v), 4 * self.lanes)

    def folded(self, at: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """All of a vector's numbers in one, pairwise."""
        size = vector.type.count
        while size > 1:
            size //= 2
            vector = combine(self.part(at, vector, 0, size), self.part(at, vector, size, 2 * size))
        return at.extract_element(vector, self.ir.Constant(self.i32, 0))

    def widen(self, at: Any, bits: Any) -> Any:
        """A vector of bfloat16, the bits of each, as float32."""
        ints, floats = (self.ir.VectorType(kind, bits.type.count) for kind in (self.i32, self.f32))
        return at.bitcast(at.shl(at.zext(bits, ints), self.same(ints, 16)), floats)

    def narrow(self, at: Any, x: Any) -> Any:
        """A vector of float32 rounded to bfloat16: its bits, 16 of each number."""
        ints = self.ir.VectorType(self.i32, x.type.count)
        bits = at.lshr(self.rounded_bits(at, x), self.same(ints, 16))
        return at.trunc(bits, self.ir.VectorType(self.ir.IntType(16), x.type.count))

    def rounded_bits(self, at: Any, x: Any) -> Any:
        """The bits of numbers rounded to bfloat16, to even; the lower 16 mean nothing."""
        ints = self.ir.VectorType(self.i32, x.type.count)
        bits, above = at.bitcast(x, ints), self.same(ints, 16)
        odd = at.and_(at.lshr(bits, above), self.same(ints, 1))
        rounded = at.add(bits, at.add(odd, self.same(ints, 0x7FFF)))
        none = at.fcmp_unordered("uno", x, x)
        return at.select(none, self.same(ints, 0x7FC00000), rounded)

    def exp(self, at: Any, x: Any) -> Any:
        """Of a vector of float32."""
        kind, same = x.type, self.same
        ints = self.ir.VectorType(self.i32, kind.count)
        fma = self.function(f"llvm.fma.v{kind.count}f32", kind, kind, kind, kind)
        low, high = same(kind, _LOWEST), same(kind, _HIGHEST)
        x = at.select(at.fcmp_ordered("<", x, low), low, x)
        x = at.select(at.fcmp_ordered(">", x, high), high, x)
        shift = same(kind, _SHIFT)
        shifted = at.fadd(at.fmul(x, same(kind, _LOG2E)), shift)
        n = at.fsub(shifted, shift)
        r = x
        for part in _LN2:
            r = at.call(fma, [n, same(kind, -part), r])
        p = same(kind, _POLYNOMIAL[0])
        for factor in _POLYNOMIAL[1:]:
            p = at.call(fma, [p, r, same(kind, factor)])
        p = at.fadd(at.call(fma, [p, at.fmul(r, r), r]), same(kind, 1.0))
        power = at.shl(at.bitcast(shifted, ints), same(ints, 23))
        power = at.add(power, same(ints, 127 << 23))
        return at.fmul(p, at.bitcast(power, kind))
