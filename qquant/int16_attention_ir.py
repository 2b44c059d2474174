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

from .int16_ir import CHUNK, ROWS, WIDE, Integers

TILES = 4  # of queries that meet a panel of keys together
QUERIES = TILES * ROWS
# Arguments, 64 bits each, in this order. Strides are in numbers; a head's own are side by side.
PREPARE = (
    "keys",  # address: float32
    "values",  # address: float32
    "columns",  # address: int16 [samples, heads, n / WIDE upwards, width / 2, WIDE, 2]
    "key_steps",  # address: float32 [samples, heads, n upwards to WIDE]
    "panels",  # address: int16 [samples, heads], of each as of `int16_products_ir.ARRANGE`
    "value_steps",  # address: float32 [samples, heads, chunks of n, width]
    "samples",
    "heads",  # of keys and values
    "n",  # keys
    "width",  # of a head, a multiple of `WIDE`, at most `CHUNK`
    "key_sample",  # strides of keys, and of values
    "key_head",
    "key_token",
    "value_sample",
    "value_head",
    "value_token",
)
ATTEND = (
    "queries",  # address: float32
    "columns",  # addresses: of `prepare`, all four
    "key_steps",
    "panels",
    "value_steps",
    "room",  # address: float32 [threads, `room`]
    "out",  # address: float32 [samples, n, all_heads, width]
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


def room(n: int, width: int) -> int:
    """Numbers of 32 bits that a thread works in: scores, their shares, queries and their steps."""
    keys = -(-n // WIDE) * WIDE
    return QUERIES * (keys + keys // 2 + width // 2 + 2 + -(-n // CHUNK))


class Writer(Integers):
    """Writes the functions down.

    Raises:
        ImportError: there is no llvmlite.
    """

    def text(self) -> str:
        self._prepare()
        self._attend()
        return str(self.module)

    def _of_head(self, at: Any, given: Any, head: Any) -> dict[str, Any]:
        """Addresses of what `prepare` makes of a head."""
        n, width = given["n"], given["width"]
        keys = at.mul(self.upwards(at, n, WIDE), self.count(WIDE))
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
        vectors, panels = at.sdiv(width, self.count(WIDE)), self.upwards(at, n, WIDE)

        def head(number: Any) -> None:
            made = self._of_head(at, given, number)
            sample, own = at.sdiv(number, heads), at.srem(number, heads)

            def begin(name: str) -> Any:
                place = at.mul(sample, given[f"{name}_sample"])
                place = at.add(place, at.mul(own, given[f"{name}_head"]))
                return self.place(at, given[f"{name}s"], place, 4)

            keys, values = begin("key"), begin("value")

            def key(k: Any, _: Any) -> None:
                # The last panel is filled up with the last key, which nobody looks at there.
                there = self.least(at, k, at.sub(n, self.count(1)))
                x = self.place(at, keys, at.mul(there, given["key_token"]), 4)
                within = at.srem(k, self.count(WIDE))
                first = at.mul(at.sub(k, within), at.sdiv(width, self.count(2)))
                out = self.place(at, made["columns"], at.add(first, within), 4)
                step, _ = self.row(at, x, vectors, out, WIDE)
                self.store(at, step, made["key_steps"], k, 4)

            self.loop(at, at.mul(panels, self.count(WIDE)), (), key)

            def part(c: Any, _: Any) -> None:
                start = at.mul(c, self.count(CHUNK))
                size = self.least(at, self.count(CHUNK), at.sub(n, start))
                pairs = self.padded(at, size)

                def panel(p: Any, _: Any) -> None:
                    def read(r: Any) -> Any:
                        place = at.mul(at.add(start, r), given["value_token"])
                        place = at.add(place, at.mul(p, self.count(WIDE)))
                        return self.load(at, values, place, self.wide, 4)

                    earlier = at.mul(at.mul(c, self.count(CHUNK // 2)), vectors)
                    first = at.add(earlier, at.mul(p, pairs))
                    out = self.place(at, made["panels"], first, 4 * WIDE)
                    steps = self.panel(at, read, size, out)
                    place = at.add(at.mul(c, vectors), p)
                    self.store(at, steps, made["value_steps"], place, 4 * WIDE)

                self.loop(at, vectors, (), panel)

            self.loop(at, self.upwards(at, n, CHUNK), (), part)

        self.each(at, at.mul(given["samples"], heads), head)
        at.ret_void()

    def _attend(self) -> None:
        at, given = self.parallel("attend", ATTEND, addresses=8)
        n, width, all_heads = given["n"], given["width"], given["all_heads"]
        thread, _ = self.thread(at)
        keys = at.mul(self.upwards(at, n, WIDE), self.count(WIDE))
        chunks, pairs = self.upwards(at, n, CHUNK), at.sdiv(width, self.count(2))
        # The room's parts: see `room`.
        base, parts = at.mul(thread, given["size"]), {}
        for name, size in (
            ("scores", at.mul(keys, self.count(QUERIES))),
            ("shares", at.mul(keys, self.count(QUERIES // 2))),
            ("queries", at.mul(pairs, self.count(QUERIES))),
            ("query_steps", self.count(QUERIES)),
            ("totals", self.count(QUERIES)),
            ("share_steps", at.mul(chunks, self.count(QUERIES))),
        ):
            parts[name] = self.place(at, given["room"], base, 4)
            base = at.add(base, size)
        scaling = self.load(at, given["scaling"], self.count(0), self.f32, 4)
        blocks = self.upwards(at, n, QUERIES)
        shared = at.sdiv(all_heads, given["heads"])

        def task(number: Any) -> None:
            head, block = at.sdiv(number, blocks), at.srem(number, blocks)
            sample, own = at.sdiv(head, all_heads), at.srem(head, all_heads)
            of_sample = at.mul(sample, given["heads"])
            made = self._of_head(at, given, at.add(of_sample, at.sdiv(own, shared)))
            first = at.mul(block, self.count(QUERIES))
            count = self.least(at, self.count(QUERIES), at.sub(n, first))
            panels = self.upwards(at, at.add(first, count), WIDE)  # of keys that are seen
            place = at.mul(sample, given["query_sample"])
            place = at.add(place, at.mul(own, given["query_head"]))
            queries = self.place(at, given["queries"], place, 4)

            def query(q: Any, _: Any) -> None:
                place = at.mul(at.add(first, q), given["query_token"])
                x = self.place(at, queries, place, 4)
                out = self._of_tile(at, parts["queries"], q, pairs)
                step, _ = self.row(at, x, at.sdiv(width, self.count(WIDE)), out, ROWS)
                self.store(at, at.fmul(step, scaling), parts["query_steps"], q, 4)

            self.loop(at, count, (), query)
            self._scores(at, parts, made, panels, pairs, keys)

            def soften(q: Any, _: Any) -> None:
                self._soften(at, parts, q, at.add(first, q), panels, keys, chunks)

            self.loop(at, count, (), soften)
            out = at.add(at.mul(at.add(at.mul(sample, n), first), all_heads), own)
            out = self.place(at, given["out"], at.mul(out, width), 4)
            apart = at.mul(all_heads, width)
            self._values(at, given, parts, made, panels, keys, count, out, apart)

        self.each(at, at.mul(at.mul(given["samples"], all_heads), blocks), task)
        at.ret_void()

    def _of_tile(self, at: Any, base: Any, row: Any, pairs: Any) -> Any:
        """Where a row's first pair is, in tiles of `ROWS`."""
        within = at.srem(row, self.count(ROWS))
        return self.place(at, base, at.add(at.mul(at.sub(row, within), pairs), within), 4)

    def _scores(self, at: Any, parts: Any, made: Any, panels: Any, pairs: Any, keys: Any) -> None:
        """Of all queries of a block, whether they are there or not, with all keys that are seen."""
        none = [self.same(self.floats, 0.0)] * 2

        def panel(p: Any, _: Any) -> None:
            right = self.place(at, made["columns"], at.mul(p, pairs), 4 * WIDE)
            steps = self.two(at, self.place(at, made["key_steps"], p, 4 * WIDE))

            def tile(t: Any, _: Any) -> None:
                row = at.mul(t, self.count(ROWS))
                left = self.place(at, parts["queries"], at.mul(row, pairs), 4)
                found = self.sums(at, left, ROWS, ROWS, right, pairs)
                for i, products in enumerate(found):
                    own = at.add(row, self.count(i))
                    step = self.load(at, parts["query_steps"], own, self.f32, 4)
                    out = at.add(at.mul(own, keys), at.mul(p, self.count(WIDE)))
                    out = self.place(at, parts["scores"], out, 4)
                    self.put(at, products, step, steps, out, none)

            self.loop(at, self.count(TILES), (), tile)

        self.loop(at, panels, (), panel)

    def _soften(
        self, at: Any, parts: Any, q: Any, last: Any, panels: Any, keys: Any, chunks: Any
    ) -> None:
        """A query's scores become integers of exp(score - largest), those behind `last` zeros."""
        scores = self.place(at, parts["scores"], at.mul(q, keys), 4)
        number = self.ir.Constant(self.wide_ints, list(range(WIDE)))
        least, none = self.same(self.wide, -float("inf")), self.same(self.wide, 0.0)

        def seen(v: Any) -> Any:
            left = at.trunc(at.sub(last, at.mul(v, self.count(WIDE))), self.i32)
            return at.icmp_signed("<=", number, self.spread(at, left, self.wide_ints))

        def score(v: Any) -> Any:
            return self.load(at, scores, v, self.wide, 4 * WIDE)

        def look(v: Any, most: Any) -> Any:
            own = at.select(seen(v), score(v), least)
            # What is no number wins, and so gets into every share.
            return (at.select(at.fcmp_unordered(">", own, most[0]), own, most[0]),)

        (most,) = self.loop(at, panels, (least,), look)
        larger = lambda a, b: at.select(at.fcmp_unordered(">", a, b), a, b)  # noqa: E731
        top = self.spread(at, self.folded(at, most, larger), self.wide)
        whole = self.count(CHUNK // WIDE)

        def part(c: Any, total: Any) -> Any:
            begin = at.mul(c, whole)
            size = self.least(at, whole, at.sub(panels, begin))
            here = self.place(at, scores, begin, 4 * WIDE)

            def raise_(v: Any, before: Any) -> Any:
                place = at.add(begin, v)
                x = at.select(seen(place), self.exp(at, at.fsub(score(place), top)), none)
                self.store(at, x, here, v, 4 * WIDE)
                return (*self.seen(at, before[:2], x), at.fadd(before[2], x))

            *found, sums = self.loop(at, size, (*self.unseen, none), raise_)
            step, inverse = self.steps(at, self.together(at, found))
            out = self._of_tile(at, parts["shares"], q, at.sdiv(keys, self.count(2)))
            out = self.place(at, out, at.mul(begin, self.count(ROWS * WIDE // 2)), 4)
            self.write_row(at, here, size, inverse, out, ROWS)
            one = at.extract_element(step, self.ir.Constant(self.i32, 0))
            self.store(at, one, parts["share_steps"], at.add(at.mul(q, chunks), c), 4)
            return (at.fadd(total[0], sums),)

        used = self.upwards(at, panels, CHUNK // WIDE)
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
        vectors, chunks = at.sdiv(width, self.count(WIDE)), self.upwards(at, n, CHUNK)
        half, none = at.sdiv(keys, self.count(2)), self.same(self.floats, 0.0)

        def panel(p: Any, _: Any) -> None:
            def part(c: Any, _: Any) -> None:
                start = at.mul(c, self.count(CHUNK))
                pairs = self.padded(at, self.least(at, self.count(CHUNK), at.sub(n, start)))
                earlier = at.mul(at.mul(c, self.count(CHUNK // 2)), vectors)
                place = at.add(earlier, at.mul(p, pairs))
                right = self.place(at, made["panels"], place, 4 * WIDE)
                place = at.add(at.mul(c, vectors), p)
                steps = self.two(at, self.place(at, made["value_steps"], place, 4 * WIDE))
                begun = at.icmp_signed(">", c, self.count(0))
                used = at.sub(at.mul(panels, self.count(WIDE // 2)), at.sdiv(start, self.count(2)))
                used = self.least(at, pairs, used)

                def tile(t: Any, _: Any) -> None:
                    row = at.mul(t, self.count(ROWS))
                    left = at.add(at.mul(row, half), at.mul(start, self.count(ROWS // 2)))
                    left = self.place(at, parts["shares"], left, 4)
                    found = self.sums(at, left, ROWS, ROWS, right, used)
                    for i, products in enumerate(found):
                        own = at.add(row, self.count(i))
                        with at.if_then(at.icmp_signed("<", own, count), likely=True):
                            step = at.add(at.mul(own, chunks), c)
                            step = self.load(at, parts["share_steps"], step, self.f32, 4)
                            total = self.load(at, parts["totals"], own, self.f32, 4)
                            there = at.add(at.mul(own, apart), at.mul(p, self.count(WIDE)))
                            there = self.place(at, out, there, 4)
                            old = [at.select(begun, o, none) for o in self.two(at, there)]
                            self.put(at, products, at.fmul(step, total), steps, there, old)

                self.loop(at, self.upwards(at, count, ROWS), (), tile)

            self.loop(at, self.upwards(at, panels, CHUNK // WIDE), (), part)

        self.loop(at, vectors, (), panel)
