"""Tables of speed, memory and kernels.

Speed and memory come in the shape of Qwen's own tables where their protocol was measured (one token
of context, a forced length; github.com/QwenLM/Qwen), and in full for every other setting. GiB in
those tables, as there, whatever they call it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from .figures import Cell, Table, gib, models_of, name, number, pair, size
from .schema import of

_INSTANT = 1e-9  # seconds: nothing was timed
_LINEARS = re.compile(r"[^;]+ for \d+ linears")  # of a kernel's description (`KernelReport`)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Every table of speed and memory that the profile has figures for."""
    made = [sizes(found), speed_qwen(found), speed(found), latency(found)]
    made += [memory(found), memory_full(found)]
    return [table.filled() for table in made if table.rows]


def sizes(found: Mapping[str, Any]) -> Table:
    """Files, weights in memory, kernel: of every model, also where nothing else was measured."""
    rows = []
    for model in models_of(found):
        load = of(found["models"][model], "load")
        if not load:
            continue
        slow = "; ".join(dict.fromkeys(why_slow(found["models"][model])))
        ran = Cell(load.get("kernel") or "", tone="warn" if slow else "")
        cells = [size(load.get("file_bytes")), size(load.get("weight_bytes"))]
        warned = Cell(f"slow: {slow}", tone="warn") if slow else Cell("")
        rows.append((name(model), Cell(load.get("method") or ""), *cells, ran, warned))
    head = ("model", "method", "files", "weights in memory", "kernel", "called out")
    return Table("sizes", "Size and kernels", head, tuple(rows))


def kernel(*described: str | None) -> Cell:
    """Which kernels ran, beside what was timed: names alone, the whole description as raw text."""
    whole = list(dict.fromkeys(text for text in described if text))
    names: dict[str, None] = {}
    for text in whole:
        parts = text.split("; ")
        names |= dict.fromkeys(
            [p for p in parts if _LINEARS.fullmatch(p)] or parts[0].split(", ")[:1]
        )
    short, raw = ", ".join(names), " / ".join(whole)
    return Cell(short, None, raw if raw != short else "")


def slow_kernels(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each model that ran on a slow fallback."""
    return [
        f"{model} ran on a slow kernel, so its speed is not the method's: {slow}."
        for model in models_of(found)
        for slow in dict.fromkeys(why_slow(found["models"][model]))
    ]


def why_slow(entry: Mapping[str, Any]) -> Iterator[str]:
    """Why slow kernels ran, as they were loaded and as they were timed."""
    if slow := of(entry, "load", "slow_kernel"):
        yield slow
    for got in (of(entry, "speed") or {}).values():
        if slow := got.get("slow_kernel"):
            yield slow


def of_preset(found: Mapping[str, Any], preset: str) -> list[str]:
    """Settings of a preset, in the order they were measured."""
    seen: dict[str, None] = {}
    for model in models_of(found):
        for setting, got in (of(found["models"][model], "speed") or {}).items():
            if got.get("preset") == preset:
                seen[setting] = None
    return list(seen)


def speed_qwen(found: Mapping[str, Any]) -> Table:
    """Qwen's table of speed: generated tokens over all of the time, a column per length."""
    settings = of_preset(found, "qwen")
    heads: dict[str, str] = {}
    rows = []
    for model in models_of(found):
        measured = of(found["models"][model], "speed") or {}
        if not any(s in measured for s in settings):
            continue
        cells: list[Cell] = []
        for setting in settings:
            got = measured.get(setting) or {}
            cells.append(number(got.get("qwen_tokens_per_s"), 2))
            if got.get("new_tokens") is not None:
                heads[setting] = f"{got.get('context')} + {got['new_tokens']}"
        ran = kernel(*(of(measured, s, "kernel") for s in settings if s in measured))
        rows.append((name(model), *cells, ran))
    head = ("model", *(heads.get(s, s) for s in settings), "kernel")
    notes = (
        "Tokens per second, batch 1: generated tokens over the whole time of a call, prompt "
        "included. Columns: tokens of context + tokens generated.",
    )
    return Table("speed-qwen", "Speed, Qwen's protocol", head, tuple(rows), notes)


def rates(got: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Tokens per second while decoding: as reported, and of the slowest and the fastest run."""
    value = got.get("decode_tokens_per_s")
    if value is None:
        return None
    ends = got.get("decode_range") or (None, None)
    if ends[0] is not None and ends[1] is not None:
        return value, min(ends[0], value), max(ends[1], value)
    times = [r["decode_s"] for r in got.get("runs") or [] if (r.get("decode_s") or 0) > _INSTANT]
    if not times:
        return value, value, value
    usual = median(times)
    return value, value * usual / max(times), value * usual / min(times)


def speed(found: Mapping[str, Any]) -> Table:
    """Everything that was timed, a row per model and setting."""
    rows = []
    for model in models_of(found):
        for setting, got in (of(found["models"][model], "speed") or {}).items():
            rate = rates(got)
            if got.get("preset") == "qwen" or (rate is None and got.get("ttft_s") is None):
                continue  # Qwen's figure, not warmed up, which has its own table
            spread = f" ({rate[1]:.2f} to {rate[2]:.2f})" if rate and rate[1] != rate[2] else ""
            decode = Cell(f"{rate[0]:.2f}{spread}", rate[0], repr(rate[0])) if rate else Cell()
            shape = f"{got.get('context')} tokens of context and {got.get('new_tokens')} generated"
            shape += f", {got.get('batch')} at a time"
            extra = [w for w in (got.get("cache"),) if w and w != "dynamic"]
            extra += ["compiled"] if got.get("compile") else []
            rows.append(
                (
                    name(model),
                    Cell(setting, None, ", ".join([shape, *extra])),
                    _first_token(got.get("ttft_s")),
                    decode,
                    size(got.get("bytes_per_token")),
                    number(got.get("bandwidth_share"), 1, "%", 100),
                    kernel(got.get("kernel")),
                )
            )
    head = (
        *("model", "setting", "first token, ms", "decode tokens/s", "bytes per token"),
        *("of bandwidth", "kernel"),
    )
    bandwidths = {
        got["copy_bytes_per_s"]
        for m in models_of(found)
        for got in (of(found["models"][m], "speed") or {}).values()
        if got.get("copy_bytes_per_s")
    }
    notes = [
        "Settings: b is the batch, c the tokens of context, n those generated.",
        "Prefill and decode are timed apart, after warming up, with the device synchronized; in "
        "brackets the slowest and the fastest run.",
    ]
    if bandwidths:
        ends = dict.fromkeys(f"{b / 1e9:.1f}" for b in (min(bandwidths), max(bandwidths)))
        notes.append(
            f"Of bandwidth: bytes read per token, times tokens per second, over what a copy in the "
            f"same run reached ({' to '.join(ends)} GB/s)."
        )
    return Table("speed", "Speed", head, tuple(rows), (*notes, *_remarks(found, "speed")))


def latency(found: Mapping[str, Any]) -> Table:
    """Percentiles of the time between two tokens, where they were timed one by one."""
    rows = []
    for model in models_of(found):
        for setting, got in (of(found["models"][model], "speed") or {}).items():
            inter = got.get("inter_token_ms") or {}
            cells = [number(inter.get(key), 2) for key in ("p50", "p90", "p99", "max")]
            if any(cell.text for cell in cells):
                rows.append((name(model), Cell(setting), *cells))
    head = ("model", "setting", "p50 ms", "p90 ms", "p99 ms", "max ms")
    return Table("speed-latency", "Time between two tokens", head, tuple(rows))


def _remarks(found: Mapping[str, Any], part: str) -> Iterator[str]:
    """What a measurement remarked on, a sentence for each model and setting."""
    for model in models_of(found):
        told: dict[str, list[str]] = {}
        for setting, got in (of(found["models"][model], part) or {}).items():
            for note in got.get("notes") or []:
                told.setdefault(note, []).append(setting)
        for note, settings in told.items():
            yield f"{model}, {', '.join(settings)}: {note}."


def _first_token(given: Sequence[float] | None) -> Cell:
    """Milliseconds, with the spread over the runs, which is no standard error."""
    if given is None:
        return Cell()
    spread = f" (spread {1000 * given[1]:.1f})" if given[1] else ""
    return Cell(f"{1000 * given[0]:.1f}{spread}", given[0], f"{given[0]!r} s")


def whats(found: Mapping[str, Any]) -> list[str]:
    """What memory was measured at, without rows for other caches, in the order measured."""
    seen: dict[str, None] = {}
    for model in models_of(found):
        for setting, got in (of(found["models"][model], "memory") or {}).items():
            if not str(got.get("cache") or "").startswith("quantized"):
                seen[got.get("what") or setting] = None
    return list(seen)


def peaks(found: Mapping[str, Any], model: str) -> dict[str, Mapping[str, Any]]:
    """The model's memory rows by what they measure, other caches left out."""
    rows: dict[str, Mapping[str, Any]] = {}
    for setting, got in (of(found["models"][model], "memory") or {}).items():
        if not str(got.get("cache") or "").startswith("quantized"):
            rows.setdefault(got.get("what") or setting, got)
    return rows


def memory(found: Mapping[str, Any]) -> Table:
    """Qwen's table of memory: the peak, in GiB, a column per use."""
    columns = whats(found)
    rows = []
    for model in models_of(found):
        got = peaks(found, model)
        if got:
            cells = [gib(peak_of(got[what])) if what in got else Cell() for what in columns]
            rows.append((name(model), *cells))
    notes = (
        "GiB above what stood before the model was loaded, at the peak: of the device's allocator "
        "on a GPU, of the process's resident memory on a CPU.",
    )
    return Table("memory", "Memory", ("model", *columns), tuple(rows), notes)


def peak_of(got: Mapping[str, Any]) -> float | None:
    """The peak of a memory row; where only weights were placed, these. None where the system does
    not tell."""
    peak = got.get("peak_bytes")
    return got.get("weights_bytes") if peak is None and got.get("what") == "weights" else peak


def memory_full(found: Mapping[str, Any]) -> Table:
    """Every memory row: both peaks, Qwen's way of counting, other caches with what they cost."""
    rows = []
    for model in models_of(found):
        for setting, got in (of(found["models"][model], "memory") or {}).items():
            rows.append(
                (
                    name(model),
                    Cell(got.get("what") or setting),
                    Cell(got.get("cache") or ""),
                    gib(got.get("weights_bytes")),
                    gib(got.get("peak_bytes")),
                    gib(got.get("allocator_peak_bytes")),
                    gib(got.get("process_peak_bytes")),
                    number(got.get("qwen_gib"), 2),
                    pair(got.get("kl"), 5),
                )
            )
    head = (
        *("model", "use", "cache", "weights", "peak", "allocator", "process", "Qwen's way"),
        "KL of the cache",
    )
    notes = (
        "GiB. Qwen's way is the allocator's peak with loading included. KL of the cache: against "
        "the same model with its usual cache, in nats per token.",
    )
    remarks = tuple(_remarks(found, "memory"))
    return Table("memory-full", "Memory in full", head, tuple(rows), notes + remarks)
