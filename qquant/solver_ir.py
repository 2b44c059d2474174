"""The solver's loops over columns and over scales, written in LLVM's language.

- `gptq` and `descent` are the two loops of `columns.py` over one block of columns, the operations
  of its form `steps` in the same order, none contracted: bit for bit what that gives.
- `search` tries one grid after the other on every group and keeps the best (`grid.py`).

Outputs never meet in any of them, so a vector holds the same column of neighbouring outputs and
everything is summed column by column: neither the width of a vector nor the number of threads
changes a bit. A thread takes a tile of `VECTORS` vectors of outputs, copies its columns to memory
of its own (in the matrix they lie a power of two apart, which a cache does not like), and stays
there until it is done.

A column's change goes to the later ones of its stretch at once, and to those beyond it together
with the stretch's other changes, so that each is read and written once for a stretch.

Left out on purpose: compiling and calling them (`solver_code.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .llvm_ir import Emitter

VECTORS = 2  # of a tile
_TINY, _MOST = 2.0**-24, 65504.0  # the least and the largest that a float16 holds
# Arguments, 64 bits each, in this order. Strides are those of outputs, in numbers, of every matrix.
GPTQ = (
    "values",  # address: float32 [columns, outputs], what is wanted of each
    "coupling",  # address: float32 [columns, columns], of one column the factors of all earlier
    "weights",  # address: float32 [columns, outputs]
    "scales",  # address: float32 [groups, outputs]
    "zeros",  # address: float32 [groups, outputs]
    "group",  # address: int64 [columns]
    "codes",  # address: uint8 [columns, outputs]
    "moved",  # address: float32 [columns, outputs]
    "room",  # address: float32 [threads, columns, tile]
    "columns",
    "outputs",  # whole tiles
    "stride",
    "most",  # the largest code
)
DESCENT = (
    "values",  # as above: minus half the gradient
    "coupling",  # as above: the Hessian
    "factors",  # address: float32 [columns]
    "codes",  # address: float32 [columns, outputs], about their zero
    "scale",  # address: float32 [outputs]
    "inverse",  # address: float32 [outputs]
    "low",  # address: float32 [outputs], the least code
    "high",  # address: float32 [outputs]
    "moved",
    "room",
    "columns",
    "outputs",
    "stride",
)
SEARCH = (
    "weights",  # address: float32 [groups, inputs, outputs]
    "roots",  # address: float32 [groups, inputs], of the importance
    "low",  # address: float32 [groups, outputs], the least weight or zero
    "high",  # address: float32 [groups, outputs]
    "ratios",  # address: float32 [ratios, 3]: of the range, per step, per step of one less
    "scales",  # address: float32 [groups, outputs]
    "zeros",  # address: float32 [groups, outputs]
    "room",  # address: float32 [threads, inputs, tile]
    "inputs",  # of a group
    "groups",
    "outputs",
    "stride",
    "most",  # the largest code
    "first",  # ratios tried with every sign
    "all",  # ratios
)
Vectors = list[Any]  # a number of each output of a tile


class Writer(Emitter):
    """Writes the functions down.

    Args:
        lanes: of a vector.
        stretch: columns whose changes go on together.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self, lanes: int, stretch: int) -> None:
        super().__init__(lanes)
        self.stretch, self.tile = stretch, VECTORS * lanes
        floats, suffix = self.floats, f"v{lanes}f32"
        self.rint = self.function(f"llvm.rint.{suffix}", floats, floats)
        self.fabs = self.function(f"llvm.fabs.{suffix}", floats, floats)
        self.copysign = self.function(f"llvm.copysign.{suffix}", floats, floats, floats)
        self.fma = self.function(f"llvm.fma.{suffix}", floats, floats, floats, floats)

    def text(self) -> str:
        self._loop_of("gptq", GPTQ, 9, self._visit)
        self._loop_of("descent", DESCENT, 10, self._improve)
        self._search("search", sym=True, signs=False)
        self._search("search_signs", sym=True, signs=True)
        self._search("search_zeros", sym=False, signs=False)
        return str(self.module)

    # Vectors of a tile.

    def _get(self, at: Any, base: Any, first: Any) -> Vectors:
        places = [at.add(first, self.count(v * self.lanes)) for v in range(VECTORS)]
        return [self.load(at, base, place, self.floats, 4) for place in places]

    def _put(self, at: Any, values: Vectors, base: Any, first: Any) -> None:
        for v, value in enumerate(values):
            self.store(at, value, base, at.add(first, self.count(v * self.lanes)), 4)

    def _every(self, at: Any, base: Any, index: Any) -> Any:
        """One number for all outputs."""
        return self.spread(at, self.load(at, base, index, self.f32, 4), self.floats)

    def _number(self, at: Any, whole: Any) -> Any:
        """A count, for all outputs."""
        return self.spread(at, at.sitofp(whole, self.f32), self.floats)

    def _clamp(self, at: Any, value: Any, low: Any, high: Any) -> Any:
        """As torch does it: what is no number stays none."""
        value = at.select(at.fcmp_ordered("<", value, low), low, value)
        return at.select(at.fcmp_ordered(">", value, high), high, value)

    def _own_room(self, at: Any, room: Any, rows: Any) -> Any:
        """This thread's memory, for so many rows of a tile."""
        thread, _ = self.thread(at)
        size = at.mul(at.mul(thread, rows), self.count(4 * self.tile))
        return at.gep(room, [size])

    def _copy(self, at: Any, base: Any, first: Any, stride: Any, rows: Any, room: Any) -> None:
        """A tile of a matrix, to memory of one's own."""

        def row(j: Any, _: Any) -> None:
            values = self._get(at, base, at.add(first, at.mul(j, stride)))
            self._put(at, values, room, at.mul(j, self.count(self.tile)))

        self.loop(at, rows, (), row)

    # The column loops.

    def _loop_of(
        self,
        name: str,
        fields: tuple[str, ...],
        addresses: int,
        visit: Callable[[Any, dict[str, Any], Any, Any, Vectors], Vectors],
    ) -> None:
        """A block's columns in order; `visit(at, given, column, output, values)` gives changes.

        `output` is the tile's first.
        """
        at, given = self.parallel(name, fields, addresses)
        columns, stride = given["columns"], given["stride"]
        room = self._own_room(at, given["room"], columns)
        whole = at.mul(at.sdiv(columns, self.count(self.stretch)), self.count(self.stretch))

        def tile(t: Any, _: Any) -> None:
            first = at.mul(t, self.count(self.tile))
            self._copy(at, given["values"], first, stride, columns, room)

            def stretch(begin: Any, size: int) -> None:
                members = [at.add(begin, self.count(i)) for i in range(size)]
                places = [at.mul(m, self.count(self.tile)) for m in members]
                values = [self._get(at, room, place) for place in places]
                changes: list[Vectors] = []
                for i, member in enumerate(members):
                    place = at.add(first, at.mul(member, stride))
                    self._put(at, values[i], given["values"], place)
                    changes.append(visit(at, given, member, first, values[i]))
                    self._put(at, changes[i], given["moved"], place)
                    for j in range(i + 1, size):
                        row = at.mul(members[j], columns)
                        values[j] = self._less(
                            at, values[j], given["coupling"], at.add(row, member), changes[i]
                        )

                def later(j: Any, _: Any) -> None:
                    place, row = at.mul(j, self.count(self.tile)), at.mul(j, columns)
                    value = self._get(at, room, place)
                    for member, change in zip(members, changes, strict=True):
                        value = self._less(
                            at, value, given["coupling"], at.add(row, member), change
                        )
                    self._put(at, value, room, place)

                self.loop(at, columns, (), later, at.add(begin, self.count(size)))

            def several(s: Any, _: Any) -> None:
                stretch(at.mul(s, self.count(self.stretch)), self.stretch)

            def single(column: Any, _: Any) -> None:
                stretch(column, 1)

            self.loop(at, at.sdiv(columns, self.count(self.stretch)), (), several)
            self.loop(at, columns, (), single, whole)

        self.shared(at, at.sdiv(given["outputs"], self.count(self.tile)), tile)
        at.ret_void()

    def _less(self, at: Any, value: Vectors, coupling: Any, index: Any, change: Vectors) -> Vectors:
        factor = self._every(at, coupling, index)
        return [at.fsub(v, at.fmul(factor, c)) for v, c in zip(value, change, strict=True)]

    def _visit(
        self, at: Any, given: dict[str, Any], column: Any, output: Any, values: Vectors
    ) -> Vectors:
        """GPTQ's: rounds what is wanted to the column's grid."""
        place = at.add(output, at.mul(column, given["stride"]))
        none = self.same(self.floats, 0.0)
        most = self._number(at, given["most"])
        group = self.load(at, given["group"], column, self.i64, 8)
        of_group = at.add(output, at.mul(group, given["stride"]))
        scales, zeros = (self._get(at, given[name], of_group) for name in ("scales", "zeros"))
        weights = self._get(at, given["weights"], place)
        changes: Vectors = []
        for v, (value, scale, zero) in enumerate(zip(values, scales, zeros, strict=True)):
            code = at.call(self.rint, [at.fdiv(value, scale)])
            code = self._clamp(at, at.fadd(code, zero), none, most)
            stored = at.trunc(at.fptosi(code, self.ints), self.ir.VectorType(self.byte, self.lanes))
            self.store(at, stored, given["codes"], at.add(place, self.count(v * self.lanes)), 1)
            rounded = at.fmul(at.fsub(code, zero), scale)
            changes.append(at.fsub(rounded, weights[v]))
        return changes

    def _improve(
        self, at: Any, given: dict[str, Any], column: Any, output: Any, values: Vectors
    ) -> Vectors:
        """Descent's: the code that the gradient asks for."""
        place = at.add(output, at.mul(column, given["stride"]))
        factor = self._every(at, given["factors"], column)
        scale, inverse, low, high = (
            self._get(at, given[name], output) for name in ("scale", "inverse", "low", "high")
        )
        codes, new, changes = self._get(at, given["codes"], place), [], []
        for v, code in enumerate(codes):
            wanted = at.fmul(at.fmul(values[v], factor), inverse[v])
            wanted = at.call(self.rint, [at.fadd(wanted, code)])
            new.append(self._clamp(at, wanted, low[v], high[v]))
            changes.append(at.fmul(at.fsub(new[v], code), scale[v]))
        self._put(at, new, given["codes"], place)
        return changes

    # The search.

    def _search(self, name: str, *, sym: bool, signs: bool) -> None:
        """Of every group and output the grid with the least weighted error.

        Args:
            sym: zero in the middle. signs: scales of both signs.
        """
        at, given = self.parallel(name, SEARCH, addresses=8)
        inputs, stride = given["inputs"], given["stride"]
        room = self._own_room(at, given["room"], inputs)
        tiles = at.sdiv(given["outputs"], self.count(self.tile))
        top = self._number(at, given["most"])

        def unit(u: Any, _: Any) -> None:
            group = at.sdiv(u, tiles)
            output = at.mul(at.srem(u, tiles), self.count(self.tile))
            first_input = at.mul(group, inputs)
            self._copy(
                at,
                given["weights"],
                at.add(output, at.mul(first_input, stride)),
                stride,
                inputs,
                room,
            )
            place = at.add(output, at.mul(group, stride))
            lows, highs = (self._get(at, given[field], place) for field in ("low", "high"))

            def grids_of(r: Any) -> list[tuple[Any, Any]]:
                first = at.mul(r, self.count(3))
                places = [at.add(first, self.count(i)) for i in range(3)]
                factors = [self._every(at, given["ratios"], place) for place in places]
                pairs = zip(lows, highs, strict=True)
                return [self._grid(at, low, high, factors, top, sym) for low, high in pairs]

            def attempt(r: Any, best: tuple[Any, ...], every: bool) -> tuple[Any, ...]:
                least, scale, zero = (list(best[i::3]) for i in range(3))
                grids = grids_of(r)
                new = [s for s, _ in grids]
                if not every:
                    new = [at.call(self.copysign, pair) for pair in zip(new, scale, strict=True)]
                # Of codes about their zero; those of a negative scale have the other sign.
                zeros = [z for _, z in grids]
                bounds = [([at.fneg(z) for z in zeros], [at.fsub(top, z) for z in zeros])]
                if every and signs:
                    bounds.append(([at.fneg(b) for b in bounds[0][1]], zeros))
                roots = given["roots"], first_input
                errors = self._errors(at, room, inputs, roots, new, bounds)
                for turn, found in enumerate(errors):
                    for v, error in enumerate(found):
                        own = at.fneg(new[v]) if turn else new[v]
                        better = at.fcmp_ordered("<", error, least[v])
                        least[v] = at.select(better, error, least[v])
                        scale[v] = at.select(better, own, scale[v])
                        zero[v] = at.select(better, grids[v][1], zero[v])
                return tuple(x for three in zip(least, scale, zero, strict=True) for x in three)

            # Where no error is a finite number, the first grid stays.
            most = self.same(self.floats, float("inf"))
            best = tuple(x for grid in grids_of(self.count(0)) for x in (most, *grid))
            best = self.loop(at, given["first"], best, lambda r, b: attempt(r, b, True))
            if signs:
                rest = given["first"]
                best = self.loop(at, given["all"], best, lambda r, b: attempt(r, b, False), rest)
            self._put(at, list(best[1::3]), given["scales"], place)
            self._put(at, list(best[2::3]), given["zeros"], place)

        self.shared(at, at.mul(tiles, given["groups"]), unit)
        at.ret_void()

    def _grid(
        self, at: Any, low: Any, high: Any, factors: list[Any], top: Any, sym: bool
    ) -> tuple[Any, Any]:
        """Scale and zero of a range shrunk by a ratio, as `grid.find_scales` has them."""
        ratio, step, shorter = factors
        one = self.same(self.floats, 1.0)
        scale = self._half(at, at.fmul(at.fsub(high, low), step))
        if sym:
            return scale, at.fmul(at.fadd(top, one), self.same(self.floats, 0.5))
        zero = at.call(self.rint, [at.fdiv(at.fneg(at.fmul(low, ratio)), scale)])
        under = at.fcmp_ordered("<", zero, one)
        scale = at.select(under, self._half(at, at.fmul(high, shorter)), scale)
        return scale, self._clamp(at, zero, one, top)

    def _half(self, at: Any, scale: Any) -> Any:
        """Rounded to what a float16 can hold, as `grid.to_fp16`."""
        tiny, most = self.same(self.floats, _TINY), self.same(self.floats, _MOST)
        size = self._clamp(at, at.call(self.fabs, [scale]), tiny, most)
        halves = self.ir.VectorType(self.ir.HalfType(), self.lanes)
        size = at.fpext(at.fptrunc(size, halves), self.floats)
        return at.call(self.copysign, [size, scale])

    def _errors(
        self,
        at: Any,
        room: Any,
        inputs: Any,
        roots: tuple[Any, Any],
        scales: Vectors,
        bounds: list[tuple[Vectors, Vectors]],
    ) -> list[Vectors]:
        """Weighted squared errors of a group's inputs, one for each of the bounds of codes.

        roots: where they begin, and the group's first of them.
        """
        inverses = [at.fdiv(self.same(self.floats, 1.0), scale) for scale in scales]

        def add(k: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
            values = self._get(at, room, at.mul(k, self.count(self.tile)))
            root = self._every(at, roots[0], at.add(roots[1], k))
            new = []
            for v, value in enumerate(values):
                code = at.call(self.rint, [at.fmul(value, inverses[v])])
                for turn, (low, high) in enumerate(bounds):
                    held = self._clamp(at, code, low[v], high[v])
                    error = at.call(self.fma, [at.fneg(held), scales[v], value])
                    error = at.fmul(error, root)
                    new.append(at.call(self.fma, [error, error, sums[v * len(bounds) + turn]]))
            return tuple(new)

        none = (self.same(self.floats, 0.0),) * (VECTORS * len(bounds))
        sums = self.loop(at, inputs, none, add)
        return [list(sums[turn :: len(bounds)]) for turn in range(len(bounds))]
