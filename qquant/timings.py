"""Where a run's time went, and how fast that was beside what the machine can do.

Seconds by part come from a `Clock` that the run carries. Floating-point operations are counted
where they happen (`walk` counts its linears, `Hessian` its panels) from the shapes of what was
really multiplied: the panels on and above a Hessian's diagonal once and not twice, the
full-precision stream only where it ran, nothing that the last block leaves out. Attention is
counted by `attention_flops`, the causal half of it: kernels skip most of the rest. Norms, rotary
tables, rounding and moving activations count as time and not as work, so the rate is that of the
part as a whole. `matmul_gflops` is the yardstick: the best of a few square products of the same
dtype, in the same process and with the same threads.

Left out on purpose: rates on an accelerator, whose host returns before the work is done, and of
anything but forward and Hessian, which are not products for the most part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .report import text_table

if TYPE_CHECKING:
    import torch

ORDER = (
    "set-up",
    "estimate",
    "read",
    "calibrate",
    "sensitivity",
    "forward",
    "hessian",
    "exchange",
    "solve",
    "pack",
    "write",
    "commit",
    "verify",
    "other",
)
# Parts that the estimate of a run that has begun does not have.
NOT_FORESEEN = ("set-up", "estimate", "calibrate", "sensitivity")
_SIDE, _SECONDS = 1536, 0.4  # of the yardstick's matrices; how long they are multiplied
_COLD = 256 << 20  # bytes that are cleared
_CLEARED, _MOST_CLEARED = 4, 256  # how often: 4 times take some 300 us on an H200


@dataclass
class Clock:
    """Wall seconds by part, and operations for the parts that count theirs."""

    parts: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - start)

    def add(self, part: str, seconds: float, flops: int = 0) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        if flops:
            self.flops[part] = self.flops.get(part, 0) + flops


def attention_flops(config: Any, batch: int, tokens: int) -> int:
    """Of one block's causal attention: both products, each query with the keys up to its own.

    Args:
        config: the model's, under either generation of names.
        batch, tokens: sequences and their length.
    """
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None)
    width = int(width or config.hidden_size // heads)
    return 2 * 2 * batch * heads * width * tokens * (tokens + 1) // 2


def fastest_of(
    call: Callable[[], object],
    times: int,
    *,
    device: torch.device | None = None,
    warm: bool = True,
) -> float:
    """Seconds of the fastest of a few calls.

    Args:
        device: whose work is waited for, where it runs beside the host.
        warm: make one call more, first, which does not count.
    """

    def wait() -> None:
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    if warm:
        call()
    found = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return min(found)


def device_seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that a CUDA device, the current one, is at work: the fastest of a few calls.

    Its caches are cold. Nothing of what the host does beside it counts, as in a graph that is
    replayed: it hands the work over while the device still clears a buffer that no cache holds.
    """
    import torch

    event: Any = torch.cuda.Event
    cold = torch.empty(_COLD, dtype=torch.uint8, device=device)
    call()
    found: list[float] = []
    cleared = _CLEARED
    while len(found) < times:
        start, end = (event(enable_timing=True) for _ in range(2))
        for _ in range(cleared):
            cold.zero_()
        start.record()
        call()
        end.record()
        late = start.query()
        torch.cuda.synchronize(device)
        if late and cleared < _MOST_CLEARED:
            cleared *= 2  # the device had begun before all was handed over
            continue
        found.append(start.elapsed_time(end) / 1e3)
    return min(found)


def matmul_gflops(
    device: Any, dtype: Any, product: Callable[[Any], Callable[[], object]] | None = None
) -> float:
    """What this machine reaches in one large product, in 1e9 operations per second; takes 0.4 s.

    Args:
        product: gives, of a matrix, what multiplies it by itself; None for torch's.
    """
    import torch

    a = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    multiply = product(a) if product else lambda: a @ a
    multiply()  # threads and libraries start up
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best / 1e9


def rates(seconds: Mapping[str, float], flops: Mapping[str, int]) -> dict[str, float]:
    """1e9 operations per second of the parts that count theirs."""
    return {part: count / seconds[part] / 1e9 for part, count in flops.items() if seconds.get(part)}


def render(seconds: Mapping[str, float], flops: Mapping[str, int], yardstick: float | None) -> str:
    """The table: seconds and share of the run by part, rates beside the machine's matmul rate."""
    total = sum(seconds.values()) or 1.0
    speed = rates(seconds, flops) if yardstick else {}
    rows = []
    for part in sorted(seconds, key=lambda p: ORDER.index(p) if p in ORDER else len(ORDER)):
        rate, of = "", ""
        if yardstick and part in speed:
            rate, of = f"{speed[part]:.1f}", f"{speed[part] / yardstick:.0%}"
        share = f"{seconds[part] / total:.1%}"
        rows.append((part, f"{seconds[part]:.2f}", share, rate, of))
    rows.append(("total", f"{total:.2f}", "", "", ""))
    head = ("part", "seconds", "share", "GFLOP/s", "of matmul")
    lines = text_table(head, rows)
    if yardstick:
        lines += f"\nmatmul on this machine, same threads and dtype: {yardstick:.1f} GFLOP/s"
    return lines
