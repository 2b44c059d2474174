"""What the results have to show: the accuracy bars, each with what was measured.

A bar holds a candidate against the best of the GPTQ tools or against AutoRound, in KL or in time,
on one result (a checkpoint with calibration `in` or `out` of its domain). It is passed when the
measured ratio is at most its limit; the paired 95% interval is printed beside it, so that a pass
by luck can be seen. A bar whose candidates were not measured is not passed, nor is one in time
where the machine was not idle. Time is wall time, of whole processes. Standard library only.

    python benchmarks/bars.py benchmarks/results/accuracy-*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_table import GPTQ_PEERS, IDLE_CORES, best_row, others_cores, paired_ratio

DEFAULT, BEST, AUTOROUND = "qquant", "qquant:recipe=best", "autoround"
MINIMUM_TOKENS = 40_000
# Bits: how much of the best GPTQ tool's KL the default recipe may have.
OF_PEER = {"in": {4: 0.75, 3: 0.60, 2: 0.60}, "out": {4: 0.92}}
# Candidate: how much of AutoRound's KL and of its time it may have, at 4, 3 and 2 bits.
OF_AUTOROUND = {DEFAULT: (1.0, 0.2), BEST: (0.85, 1.0)}


@dataclass(frozen=True)
class Bar:
    """`candidate`'s `quantity` (kl or wall) is at most `limit` times that of `against` (`peer` is
    the best GPTQ tool) at `bits`."""

    candidate: str
    against: str
    quantity: str
    bits: int
    limit: float


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured: the ratio and, for KL, its interval; or why there is none."""

    bar: Bar
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the ratio was measured and is within the limit."""
        return self.ratio is not None and self.ratio <= self.bar.limit

    def line(self) -> str:
        """One line for the terminal."""
        bar = self.bar
        found = self.note
        if self.ratio is not None:
            found = f"{self.ratio:.3f}"
            if self.low is not None:
                found += f" ({self.low:.3f} to {self.high:.3f})"
            found += f" {self.note}".rstrip()
        what = f"{bar.bits} bits, {bar.candidate}: {bar.quantity} / {bar.against}'s"
        return f"{'pass' if self.passed else 'FAIL'}  {what} at most {bar.limit:g}: {found}"


def bars_for(calibration: str) -> list[Bar]:
    """The bars of a result with calibration `in` or `out` of the domain; none for others."""
    bars = [
        Bar(DEFAULT, "peer", "kl", bits, limit)
        for bits, limit in OF_PEER.get(calibration, {}).items()
    ]
    if calibration == "in":
        for candidate, (kl, wall) in OF_AUTOROUND.items():
            for bits in (4, 3, 2):
                bars.append(Bar(candidate, AUTOROUND, "kl", bits, kl))
                bars.append(Bar(candidate, AUTOROUND, "wall", bits, wall))
    return bars


def judge(bar: Bar, rows: Iterable[dict[str, Any]]) -> Verdict:
    """A bar against the rows of a result (as `quantize.py` writes them)."""
    rows = [row for row in rows if row["bits"] == bar.bits]
    ours = _row(rows, bar.candidate)
    theirs = best_row(rows, GPTQ_PEERS) if bar.against == "peer" else _row(rows, bar.against)
    for name, row in ((bar.candidate, ours), (bar.against, theirs)):
        if row is None or not row.get("runs"):
            why = (row or {}).get("failed") or (row or {}).get("skipped")
            return Verdict(bar, note=f"{name} was not measured" + (f" ({why})" if why else ""))
        if bar.quantity == "kl" and not row.get("score"):
            return Verdict(bar, note=f"{name} has no accuracy")
    assert ours is not None and theirs is not None
    if bar.quantity == "wall":
        if (others := others_cores((ours, theirs))) > IDLE_CORES:
            return Verdict(bar, note=f"not timed idle (others used {others:.2f} processors)")
        mine, other = (
            statistics.median(run["wall_s"] for run in row["runs"]) for row in (ours, theirs)
        )
        return Verdict(bar, mine / other, note=f"{mine:.1f} s of {other:.1f} s")
    ratio = paired_ratio(ours["score"]["kl_per_sequence"], theirs["score"]["kl_per_sequence"])
    note = f"of {theirs['candidate']}" if bar.against == "peer" else ""
    return Verdict(bar, *ratio, note=note)


def _row(rows: list[dict[str, Any]], candidate: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["candidate"] == candidate), None)


def report(result: dict[str, Any]) -> tuple[list[str], bool]:
    """The lines of all bars of a result, and whether all were passed."""
    source = str(result["calibration"].get("source", ""))
    verdicts = [judge(bar, result["rows"]) for bar in bars_for(source)]
    scored = [row["score"] for row in result["rows"] if row.get("score")]
    tokens = min((score["tokens"] for score in scored), default=0)
    enough = tokens >= MINIMUM_TOKENS
    lines = [f"{result['checkpoint']}, calibration {source or 'unnamed'}:"]
    if not verdicts:
        return [*lines, "no bars: calibration is neither `in` nor `out` of the domain"], False
    lines += [verdict.line() for verdict in verdicts]
    lines.append(
        f"{'pass' if enough else 'FAIL'}  held-out tokens at least {MINIMUM_TOKENS}: {tokens}"
    )
    return lines, enough and all(verdict.passed for verdict in verdicts)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} RESULT.json ...")
    passed = True
    for path in map(Path, sys.argv[1:]):
        lines, good = report(json.loads(path.read_text(encoding="utf-8")))
        print("\n".join(lines) + "\n")
        passed = passed and good
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
