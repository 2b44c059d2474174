"""The functions of `int16_attention.py`, written in LLVM's language.

- `prepare` turns keys and values into integers: keys as columns that are as long as a head is wide,
  values as columns along the keys.
- `attend` takes some queries of a head at a time through scores, softmax and values, of which
  nothing but the result leaves the thread's own room: scores in float32, softmax in float32, both
  products of integers.

Left out on purpose: the means (`int16_ir.py`), compiling and calling them (`int16_attention.py`).
"""

from __future__ import annotations

from typing import Any

from .int16_ir import CHUNK, Form, Integers
from .llvm_ir import LINE

_AHEAD = 6  # rows that are fetched before they are read, each from another page
_TILES = 4  # of queries that meet a panel of keys together
# Arguments, 64 bits each, in this order. Strides are in numbers; a head's own are side by side.
# `wide` and `rows` are a form's; numbers from outside are bfloat16 where functions are for those.
PREPARE = (
    "keys",  # address: from outside
    "values",  # address: from outside
    "columns",  # address: int16 [samples, heads, n / wide upwards, width / 2, wide, 2]
    "key_steps",  # address: float32 [samples, heads, n upwards to wide]
    "panels",  # address: int16 [samples, heads], of each as of `int16_products_ir.ARRANGE`
    "value_steps",  # address: float32 [samples, heads, chunks of n, width]
    "samples",
    "heads",  # of keys and values
    "n",  # keys
    "width",  # of a head, a multiple of `wide`, at most `CHUNK`
    "key_sample",  # strides of keys, and of values
    "key_head",
    "key_token",
    "value_sample",
    "value_head",
    "value_token",
)
ATTEND = (
    "queries",  # address: from outside
    "columns",  # addresses: of `prepare`, all four
    "key_steps",
    "panels",
    "value_steps",
    "room",  # address: float32 [threads, `room`]
    "out",  # address: [samples, n, all_heads, width], as from outside
    "scaling",  # address: one float32
    "samples",
    "heads",
    "n",
    "width",
    "all_heads",  # of queries, a multiple of `heads`
    "query_sample",  # strides
    "query_head",
    "query_token",
    "size",  # of a thread's room
)


def room(form: Form, n: int, width: int, half: bool) -> int:
    """Numbers of 32 bits that a thread works in: scores, their shares, queries and their steps; for
    bfloat16 also results before they are rounded."""
    keys = -(-n // form.wide) * form.wide
    own = keys + keys // 2 + width // 2 + 2 + -(-n // CHUNK) + (width if half else 0)
    return _TILES * form.rows * own


class Writer(Integers):
    """Writes the functions down.

    Raises:
        ImportError: there is no llvmlite.
    """

    def __init__(self, form: Form, half: bool) -> None:
        super().__init__(form, half)
        self.queries = _TILES * form.rows  # of a block

    def text(self) -> str:
        self._prepare()
        self._attend()
        return str(self.module)

    def _fetch(self, at: Any, row: Any, token: Any, width: Any) -> None:
        """Lets the processor fetch so many numbers of a row that will be read; none need be there.

        Args:
            row: address of the one that is read now. token: the stride.
        """
        later = self.place(at, row, at.mul(token, self.count(_AHEAD)), self.item)
        numbers = LINE // self.item

        def line(i: Any, _: Any) -> None:
            self.fetch(at, self.place(at, later, i, LINE))

        self.loop(at, self.upwards(at, width, numbers), (), line)

    def _of_head(self, at: Any, given: Any, head: Any) -> dict[str, Any]:
        """Addresses of what `prepare` makes of a head."""
        n, width = given["n"], given["width"]
        keys = at.mul(self.upwards(at, n, self.columns), self.count(self.columns))
        sizes = {
            "columns": at.mul(keys, width),
            "key_steps": keys,
            "panels": at.mul(at.mul(self.padded(at, n), self.count(2)), width),
            "value_steps": at.mul(self.upwards(at, n, CHUNK), width),
        }
        return {
            name: self.place(at, given[name], at.mul(head, size), 4 if "steps" in name else 2)
            for name, size in sizes.items()
        }

    def _prepare(self) -> None:
        at, given = self.parallel("prepare", PREPARE, addresses=6)
        n, width, heads = given["n"], given["width"], given["heads"]
        vectors, panels = (
            at.sdiv(width, self.count(self.columns)),
            self.upwards(at, n, self.columns),
        )

        def head(number: Any) -> None:
            made = self._of_head(at, given, number)
            sample, own = at.sdiv(number, heads), at.srem(number, heads)

            def begin(name: str) -> Any:
                place = at.mul(sample, given[f"{name}_sample"])
                place = at.add(place, at.mul(own, given[f"{name}_head"]))
                return self.place(at, given[f"{name}s"], place, self.item)

            keys, values = begin("key"), begin("value")

            def key(k: Any, _: Any) -> None:
                # The last panel is filled up with the last key, which nobody looks at there.
                there = self.least(at, k, at.sub(n, self.count(1)))
                x = self.place(at, keys, at.mul(there, given["key_token"]), self.item)
                self._fetch(at, x, given["key_token"], width)
                within = at.srem(k, self.count(self.columns))
                first = at.mul(at.sub(k, within), at.sdiv(width, self.count(2)))
                out = self.place(at, made["columns"], at.add(first, within), 4)
                step, _ = self.row(at, x, vectors, out, self.columns)
                self.store(at, step, made["key_steps"], k, 4)

            self.loop(at, at.mul(panels, self.count(self.columns)), (), key)

            def part(c: Any, _: Any) -> None:
                start = at.mul(c, self.count(CHUNK))
                size = self.least(at, self.count(CHUNK), at.sub(n, start))
                pairs = self.padded(at, size)

                def panel(p: Any, _: Any) -> None:
                    def read(r: Any) -> Any:
                        place = at.mul(at.add(start, r), given["value_token"])
                        place = at.add(place, at.mul(p, self.count(self.columns)))
                        first = self.place(at, values, place, self.item)
                        self._fetch(at, first, given["value_token"], self.count(1))
                        return self.outside(at, first, self.count(0))

                    earlier = at.mul(at.mul(c, self.count(CHUNK // 2)), vectors)
                    first = at.add(earlier, at.mul(p, pairs))
                    out = self.place(at, made["panels"], first, 4 * self.columns)
                    steps = self.panel(at, read, size, out)
                    place = at.add(at.mul(c, vectors), p)
                    self.store(at, steps, made["value_steps"], place, 4 * self.columns)

                self.loop(at, vectors, (), panel)

            self.loop(at, self.upwards(at, n, CHUNK), (), part)

        self.each(at, at.mul(given["samples"], heads), head)
        at.ret_void()

    def _attend(self) -> None:
        at, given = self.parallel("attend", ATTEND, addresses=8)
        n, width, all_heads = given["n"], given["width"], given["all_heads"]
        thread, _ = self.thread(at)
        keys = at.mul(self.upwards(at, n, self.columns), self.count(self.columns))
        chunks, pairs = self.upwards(at, n, CHUNK), at.sdiv(width, self.count(2))
        # The room's parts: see `room`.
        base, parts = at.mul(thread, given["size"]), {}
        for name, size in (
            ("scores", at.mul(keys, self.count(self.queries))),
            ("shares", at.mul(keys, self.count(self.queries // 2))),
            ("queries", at.mul(pairs, self.count(self.queries))),
            ("query_steps", self.count(self.queries)),
            ("totals", self.count(self.queries)),
            ("share_steps", at.mul(chunks, self.count(self.queries))),
            ("results", at.mul(width, self.count(self.queries))),
        ):
            parts[name] = self.place(at, given["room"], base, 4)
            base = at.add(base, size)
        scaling = self.load(at, given["scaling"], self.count(0), self.f32, 4)
        blocks = self.upwards(at, n, self.queries)
        shared = at.sdiv(all_heads, given["heads"])

        def task(number: Any) -> None:
            head, block = at.sdiv(number, blocks), at.srem(number, blocks)
            sample, own = at.sdiv(head, all_heads), at.srem(head, all_heads)
            of_sample = at.mul(sample, given["heads"])
            made = self._of_head(at, given, at.add(of_sample, at.sdiv(own, shared)))
            first = at.mul(block, self.count(self.queries))
            count = self.least(at, self.count(self.queries), at.sub(n, first))
            panels = self.upwards(at, at.add(first, count), self.columns)  # of keys that are seen
            place = at.mul(sample, given["query_sample"])
            place = at.add(place, at.mul(own, given["query_head"]))
            queries = self.place(at, given["queries"], place, self.item)

            def query(q: Any, _: Any) -> None:
                place = at.mul(at.add(first, q), given["query_token"])
                x = self.place(at, queries, place, self.item)
                self._fetch(at, x, given["query_token"], width)
                out = self._of_tile(at, parts["queries"], q, pairs)
                step, _ = self.row(at, x, at.sdiv(width, self.count(self.columns)), out, self.rows)
                self.store(at, at.fmul(step, scaling), parts["query_steps"], q, 4)

            self.loop(at, count, (), query)
            self._scores(at, parts, made, panels, pairs, keys)

            def soften(q: Any, _: Any) -> None:
                self._soften(at, parts, q, at.add(first, q), panels, keys, chunks)

            self.loop(at, count, (), soften)
            out = at.add(at.mul(at.add(at.mul(sample, n), first), all_heads), own)
            out = self.place(at, given["out"], at.mul(out, width), self.item)
            apart = at.mul(all_heads, width)
            if not self.half:
                self._values(at, given, parts, made, panels, keys, count, out, apart)
                return
            self._values(at, given, parts, made, panels, keys, count, parts["results"], width)

            def round_(q: Any, _: Any) -> None:
                own = self.place(at, parts["results"], at.mul(q, width), 4)
                there = self.place(at, out, at.mul(q, apart), self.item)

                def vector(v: Any, _: Any) -> None:
                    x = self.load(at, own, v, self.wide, 4 * self.columns)
                    self.store(at, self.narrow(at, x), there, v, 2 * self.columns)

                self.loop(at, at.sdiv(width, self.count(self.columns)), (), vector)

            self.loop(at, count, (), round_)

        self.each(at, at.mul(at.mul(given["samples"], all_heads), blocks), task)
        at.ret_void()

    def _of_tile(self, at: Any, base: Any, row: Any, pairs: Any) -> Any:
        """Where a row's first pair is, in tiles."""
        within = at.srem(row, self.count(self.rows))
        return self.place(at, base, at.add(at.mul(at.sub(row, within), pairs), within), 4)

    def _scores(self, at: Any, parts: Any, made: Any, panels: Any, pairs: Any, keys: Any) -> None:
        """Of all queries of a block, whether they are there or not, with all keys that are seen."""
        none = [self.same(self.floats, 0.0)] * 2

        def panel(p: Any, _: Any) -> None:
            right = self.place(at, made["columns"], at.mul(p, pairs), 4 * self.columns)
            steps = self.two(at, self.place(at, made["key_steps"], p, 4 * self.columns))

            def tile(t: Any, _: Any) -> None:
                row = at.mul(t, self.count(self.rows))
                left = self.place(at, parts["queries"], at.mul(row, pairs), 4)
                found = self.sums(at, left, self.rows, self.rows, right, pairs)
                for i, products in enumerate(found):
                    own = at.add(row, self.count(i))
                    step = self.load(at, parts["query_steps"], own, self.f32, 4)
                    out = at.add(at.mul(own, keys), at.mul(p, self.count(self.columns)))
                    out = self.place(at, parts["scores"], out, 4)
                    self.put(at, products, step, steps, out, none)

            self.loop(at, self.count(_TILES), (), tile)

        self.loop(at, panels, (), panel)

    def _soften(
        self, at: Any, parts: Any, q: Any, last: Any, panels: Any, keys: Any, chunks: Any
    ) -> None:
        """A query's scores become integers of exp(score - largest), those behind `last` zeros."""
        scores = self.place(at, parts["scores"], at.mul(q, keys), 4)
        number = self.ir.Constant(self.wide_ints, list(range(self.columns)))
        least, none = self.same(self.wide, -float("inf")), self.same(self.wide, 0.0)

        def seen(v: Any) -> Any:
            left = at.trunc(at.sub(last, at.mul(v, self.count(self.columns))), self.i32)
            return at.icmp_signed("<=", number, self.spread(at, left, self.wide_ints))

        def score(v: Any) -> Any:
            return self.load(at, scores, v, self.wide, 4 * self.columns)

        def look(v: Any, most: Any) -> Any:
            own = at.select(seen(v), score(v), least)
            # What is no number wins, and so gets into every share.
            return (at.select(at.fcmp_unordered(">", own, most[0]), own, most[0]),)

        (most,) = self.loop(at, panels, (least,), look)
        larger = lambda a, b: at.select(at.fcmp_unordered(">", a, b), a, b)  # noqa: E731
        top = self.spread(at, self.folded(at, most, larger), self.wide)
        whole = self.count(CHUNK // self.columns)

        def part(c: Any, total: Any) -> Any:
            begin = at.mul(c, whole)
            size = self.least(at, whole, at.sub(panels, begin))
            here = self.place(at, scores, begin, 4 * self.columns)

            def raise_(v: Any, before: Any) -> Any:
                place = at.add(begin, v)
                x = at.select(seen(place), self.exp(at, at.fsub(score(place), top)), none)
                self.store(at, x, here, v, 4 * self.columns)
                return (*self.seen(at, before[:2], x), at.fadd(before[2], x))

            *found, sums = self.loop(at, size, (*self.unseen, none), raise_)
            step, inverse = self.steps(at, self.together(at, found))
            out = self._of_tile(at, parts["shares"], q, at.sdiv(keys, self.count(2)))
            out = self.place(at, out, at.mul(begin, self.count(self.rows * self.columns // 2)), 4)
            self.write_row(
                at,
                lambda v: self.load(at, here, v, self.wide, 4 * self.columns),
                size,
                inverse,
                out,
                self.rows,
            )
            one = at.extract_element(step, self.ir.Constant(self.i32, 0))
            self.store(at, one, parts["share_steps"], at.add(at.mul(q, chunks), c), 4)
            return (at.fadd(total[0], sums),)

        used = self.upwards(at, panels, CHUNK // self.columns)
        (total,) = self.loop(at, used, (none,), part)
        share = at.fdiv(self.ir.Constant(self.f32, 1.0), self.folded(at, total, at.fadd))
        self.store(at, share, parts["totals"], q, 4)

    def _values(
        self,
        at: Any,
        given: Any,
        parts: Any,
        made: Any,
        panels: Any,
        keys: Any,
        count: Any,
        out: Any,
        apart: Any,
    ) -> None:
        """Shares by values, into the result."""
        n, width = given["n"], given["width"]
        vectors, chunks = at.sdiv(width, self.count(self.columns)), self.upwards(at, n, CHUNK)
        half, none = at.sdiv(keys, self.count(2)), self.same(self.floats, 0.0)

        def panel(p: Any, _: Any) -> None:
            def part(c: Any, _: Any) -> None:
                start = at.mul(c, self.count(CHUNK))
                pairs = self.padded(at, self.least(at, self.count(CHUNK), at.sub(n, start)))
                earlier = at.mul(at.mul(c, self.count(CHUNK // 2)), vectors)
                place = at.add(earlier, at.mul(p, pairs))
                right = self.place(at, made["panels"], place, 4 * self.columns)
                place = at.add(at.mul(c, vectors), p)
                steps = self.two(at, self.place(at, made["value_steps"], place, 4 * self.columns))
                begun = at.icmp_signed(">", c, self.count(0))
                used = at.sub(
                    at.mul(panels, self.count(self.columns // 2)), at.sdiv(start, self.count(2))
                )
                used = self.least(at, pairs, used)

                def tile(t: Any, _: Any) -> None:
                    row = at.mul(t, self.count(self.rows))
                    left = at.add(at.mul(row, half), at.mul(start, self.count(self.rows // 2)))
                    left = self.place(at, parts["shares"], left, 4)
                    found = self.sums(at, left, self.rows, self.rows, right, used)
                    for i, products in enumerate(found):
                        own = at.add(row, self.count(i))
                        with at.if_then(at.icmp_signed("<", own, count), likely=True):
                            step = at.add(at.mul(own, chunks), c)
                            step = self.load(at, parts["share_steps"], step, self.f32, 4)
                            total = self.load(at, parts["totals"], own, self.f32, 4)
                            there = at.add(at.mul(own, apart), at.mul(p, self.count(self.columns)))
                            there = self.place(at, out, there, 4)
                            old = [at.select(begun, o, none) for o in self.two(at, there)]
                            self.put(at, products, at.fmul(step, total), steps, there, old)

                self.loop(at, self.upwards(at, count, self.rows), (), tile)

            self.loop(at, self.upwards(at, panels, CHUNK // self.columns), (), part)

        self.loop(at, vectors, (), panel)
