"""Mixed precision: which linears get how many bits, so that the whole stays within a size.

Linears that share an input form one unit and get equal bits: readers load q/k/v and gate/up (w1/w2
of original Qwen) as one matrix. For each unit and each width there is a size and a measured loss
(`sensitivity.py`, in nats of KL per token, so that losses of different units can be added), and one
unit's choice does not change another's loss. To choose is then a knapsack with one pick per unit,
solved by dynamic programming over the bits spent, for every budget at once: exact where the sizes'
common measure leaves at most `_CELLS` budgets (all published Qwens in groups of 128), and otherwise
with sizes rounded up to such a measure, so that the budget holds in any case; what the rounding
leaves over is spent afterwards. Small gaps between units make the usual greedy choice (upgrade
where a bit buys most) nearly as good; it was left out because the exact one is as short.

**Size** is what the linear's tensors take on disk: codes, and per group a 16-bit scale and a zero
point. `g_idx` (32 bits per input, the same at any width) and biases are left out, as everywhere
where bits per weight are quoted; uniform 4 bits in groups of 128 are 4.156 bits per weight.

**In the files** exceptions from the most common width are GPTQModel's `dynamic` rules: regular
expressions, matched from the start of a module's name, the first match deciding. vLLM and SGLang
look a fused matrix up by their own name for it (`qkv_proj`; newer vLLM tries the parts, too), so a
rule matches that name as well as the parts'. Sources: GPTQModel 7.6 `quantization/config.py`, vLLM
and SGLang `gptq_utils.py`. Plain transformers and optimum pass over `dynamic` and so cannot read
such a directory.

Left out on purpose: measuring (`sensitivity.py`) and what else a format could vary (group size,
symmetry, single linears left unquantized).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

import numpy as np

from .config import QuantSpec
from .errors import SpecError
from .models.families import Family
from .report import text_table

_CELLS = 1 << 15  # budgets told apart
_STEP = 0.25  # bits per weight between the targets of the curve
_SCALE = 16  # bits of a scale


@dataclass(frozen=True)
class Unit:
    """Linears that get equal bits, in one block.

    Attributes:
        block: its index.
        names: the linears' names within the block.
        weights: of all of them together.
        size: bits on disk, by width.
        loss: estimated KL in nats per token, by width.
    """

    block: int
    names: tuple[str, ...]
    weights: int
    size: Mapping[int, int]
    loss: Mapping[int, float]


@dataclass(frozen=True)
class Point:
    """One choice: what it was to stay within, what it takes, what it costs.

    Attributes:
        target: bits per weight allowed; None for a uniform width.
        bits_per_weight: what it takes.
        loss: summed over the units.
        widths: by unit.
    """

    target: float | None
    bits_per_weight: float
    loss: float
    widths: tuple[int, ...]

    @property
    def uniform(self) -> int | None:
        """The width where there is only one."""
        return self.widths[0] if len(set(self.widths)) == 1 else None


@dataclass(frozen=True)
class Mixed:
    """The chosen widths and what they were chosen from.

    Attributes:
        units: in the order of the model.
        chosen: the widths that the run writes.
        curve: uniform widths and a grid of targets, by falling size.
        choices: widths chosen from.
        tokens, gradient_tokens: that the losses were measured on.
    """

    units: tuple[Unit, ...]
    chosen: Point
    curve: tuple[Point, ...]
    choices: tuple[int, ...]
    tokens: int
    gradient_tokens: int

    @property
    def base(self) -> int:
        """The most common width over the linears; of equals the one with more weights."""
        linears: Counter[int] = Counter()
        weights: Counter[int] = Counter()
        for unit, bits in zip(self.units, self.chosen.widths, strict=True):
            linears[bits] += len(unit.names)
            weights[bits] += unit.weights
        return max(linears, key=lambda b: (linears[b], weights[b], -b))

    def bits(self, family: Family) -> dict[str, int]:
        """Bits by the linear's full name."""
        return {
            f"{family.blocks}.{unit.block}.{name}": bits
            for unit, bits in zip(self.units, self.chosen.widths, strict=True)
            for name in unit.names
        }

    def rules(self, family: Family) -> dict[str, dict[str, int]]:
        """`dynamic` of the quantization config: a rule per kind of unit and exceptional width."""
        blocks: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for unit, bits in zip(self.units, self.chosen.widths, strict=True):
            if bits != self.base:
                blocks.setdefault((unit.names, bits), []).append(unit.block)
        rules = {}
        for (names, bits), indices in blocks.items():
            fused = [whole for whole, parts in family.fused if set(parts) <= set(names)]
            which = "|".join(re.escape(name) for name in (*names, *fused))
            where = "|".join(map(str, indices))
            rules[f"+:{re.escape(family.blocks)}\\.(?:{where})\\.(?:{which})$"] = {"bits": bits}
        return rules

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: everything that decided, in full."""
        return {
            "target_bpw": self.chosen.target,
            "bits_per_weight": self.chosen.bits_per_weight,
            "loss": self.chosen.loss,
            "base_bits": self.base,
            "tokens": self.tokens,
            "gradient_tokens": self.gradient_tokens,
            "units": [
                {
                    "block": unit.block,
                    "linears": list(unit.names),
                    "bits": bits,
                    "size": {str(b): unit.size[b] for b in self.choices},
                    "loss": {str(b): unit.loss[b] for b in self.choices},
                }
                for unit, bits in zip(self.units, self.chosen.widths, strict=True)
            ],
            "curve": [
                {
                    "target_bpw": point.target,
                    "bits_per_weight": point.bits_per_weight,
                    "loss": point.loss,
                    "linears": self._linears(point),
                    "uniform_bits": point.uniform,
                }
                for point in self.curve
            ],
        }

    def measured(self) -> dict[str, Any]:
        """What `again` needs: the measurement, not the choice."""
        return {
            "tokens": self.tokens,
            "gradient_tokens": self.gradient_tokens,
            "units": [
                {
                    "block": unit.block,
                    "names": list(unit.names),
                    "weights": unit.weights,
                    "size": [unit.size[b] for b in self.choices],
                    "loss": [unit.loss[b] for b in self.choices],
                }
                for unit in self.units
            ],
        }

    @classmethod
    def again(cls, measured: Mapping[str, Any], spec: QuantSpec) -> Mixed:
        """The same choice from what `measured` gave, after a way through JSON."""
        units = [
            Unit(
                row["block"],
                tuple(row["names"]),
                row["weights"],
                dict(zip(spec.bit_choices, row["size"], strict=True)),
                dict(zip(spec.bit_choices, row["loss"], strict=True)),
            )
            for row in measured["units"]
        ]
        return mix(
            units,
            spec,
            tokens=measured["tokens"],
            gradient_tokens=measured["gradient_tokens"],
        )

    def notice(self, compressed: bool = False) -> str:
        """What reads the result, in words.

        Args:
            compressed: it is in compressed-tensors' format, which names the bits of each linear.
        """
        used = sorted(set(self.chosen.widths))
        if len(used) == 1:
            return f"Every linear has {used[0]} bits: what reads --bits {used[0]} reads it."
        if compressed:
            return "transformers with compressed-tensors, vLLM and qquant.load read this directory."
        text = "Plain transformers and optimum cannot read this directory: they pass over bits per "
        text += "linear. qquant.load and gptqmodel read it."
        if not set(used) <= {4, 8}:
            text += " vLLM's kernels take 4 and 8 bits only: --bit-choices 4,8 makes one for it."
        return text

    def _linears(self, point: Point) -> dict[str, int]:
        """Linears by width."""
        return {
            str(b): sum(
                len(u.names) for u, w in zip(self.units, point.widths, strict=True) if w == b
            )
            for b in self.choices
        }

    def render(self) -> str:
        """The curve as a table, the choice marked."""
        rows = []
        for point in self.curve:
            if point.target is None:
                name = f"uniform {point.uniform}"
            else:
                name = f"{point.target:g}" + (" <- written" if point is self.chosen else "")
            counts = self._linears(point)
            rows.append(
                (
                    name,
                    f"{point.bits_per_weight:.3f}",
                    f"{point.loss:.3g}",
                    *(str(counts[str(b)]) for b in self.choices),
                )
            )
        head = ("target", "bits/weight", "estimated KL", *(f"{b}-bit" for b in self.choices))
        return text_table(head, rows)


def storage_bits(outputs: int, inputs: int, groups: int, bits: int) -> int:
    """Bits on disk of one linear: codes, scales and zero points."""
    return outputs * (inputs * bits + groups * (_SCALE + bits))


def bits_range(shapes: Sequence[tuple[int, int]], spec: QuantSpec) -> tuple[int, dict[int, int]]:
    """(weights, bits on disk by width) of linears of `shapes` [outputs, inputs], all of one width.

    Raises:
        SpecError: `target_bpw` is below the smallest width's or above the largest's.
    """
    weights = sum(n * k for n, k in shapes)
    sizes = {
        b: sum(storage_bits(n, k, k // spec.group_of(k), b) for n, k in shapes)
        for b in spec.bit_choices
    }
    low, high = (sizes[b] / weights for b in (spec.bit_choices[0], spec.bit_choices[-1]))
    target = spec.target_bpw
    if target is not None and not low <= target <= high:
        least, most = spec.bit_choices[0], spec.bit_choices[-1]
        less = "" if least == 2 else " or let it go lower with --bit-choices 2,3,4,8"
        # Rounded inwards, so that what the message says is itself allowed.
        raise SpecError(
            "target_bpw",
            expected=f"{np.ceil(low * 1e3) / 1e3:.3f} ({least} bits everywhere, scales and zero "
            f"points included) to {np.floor(high * 1e3) / 1e3:.3f} ({most} bits)",
            got=target,
            cure=f"Use --bits {most} for that"
            if target > high
            else f"Ask for at least that{less}, or use a larger --group-size",
        )
    return weights, sizes


def choose(units: Sequence[Unit], choices: Sequence[int]) -> Callable[[int], tuple[int, ...]]:
    """The widths of least summed loss, as a function of the budget in bits.

    Args:
        units: at least one.
        choices: widths, rising; each unit has a size and a loss for each.

    Returns:
        From a budget that fits the smallest widths to a width per unit. Of equal losses the smaller
        size is taken.
    """
    least = sum(unit.size[choices[0]] for unit in units)
    extra = [[unit.size[b] - unit.size[choices[0]] for b in choices] for unit in units]
    span = sum(row[-1] for row in extra)
    measure = reduce(gcd, (e for row in extra for e in row)) or 1
    measure = max(measure, -(-span // _CELLS))
    cells = span // measure + 1
    # Least loss of the units so far within each budget, and the pick that gives it.
    best = np.zeros(cells)
    picks = np.zeros((len(units), cells), dtype=np.uint8)
    costs = [[-(-e // measure) for e in row] for row in extra]
    for i, unit in enumerate(units):
        now = np.full(cells, np.inf)
        for j, bits in enumerate(choices):
            cost = costs[i][j]
            if cost >= cells:
                continue
            loss = np.full(cells, np.inf)
            loss[cost:] = best[: cells - cost] + unit.loss[bits]
            better = loss < now
            now[better] = loss[better]
            picks[i, better] = j
        best = now

    def widths(budget: int) -> tuple[int, ...]:
        if budget < least:
            raise ValueError(f"a budget of {budget} bits, below the least of {least}")
        cell = min((budget - least) // measure, cells - 1)
        chosen = [0] * len(units)
        for i in reversed(range(len(units))):
            chosen[i] = int(picks[i, cell])
            cell -= costs[i][chosen[i]]
        spent = least + sum(row[j] for row, j in zip(extra, chosen, strict=True))
        return tuple(choices[j] for j in _fill(units, choices, extra, chosen, budget - spent))

    return widths


def _fill(
    units: Sequence[Unit],
    choices: Sequence[int],
    extra: Sequence[Sequence[int]],
    chosen: list[int],
    left: int,
) -> list[int]:
    """Spends what rounding of sizes has left over, each time where it gains most."""
    while True:
        gains = [
            (unit.loss[choices[chosen[i]]] - unit.loss[choices[j]], -i, -j)
            for i, unit in enumerate(units)
            for j in range(len(choices))
            if extra[i][j] - extra[i][chosen[i]] <= left
        ]
        gain, i, j = max(gains)
        if gain <= 0:
            return chosen
        left -= extra[-i][-j] - extra[-i][chosen[-i]]
        chosen[-i] = -j


def mix(
    units: Sequence[Unit], spec: QuantSpec, *, tokens: int = 0, gradient_tokens: int = 0
) -> Mixed:
    """Chooses the widths for `spec.target_bpw` and computes the curve around them.

    Args:
        units: of the whole model, in order.
        tokens, gradient_tokens: that the losses were measured on, for the record.

    Raises:
        SpecError: there is no target, or it is out of reach.
    """
    if spec.target_bpw is None:
        raise SpecError("target_bpw", expected="bits per weight", got=None, cure="Use 4.5.")
    choices = spec.bit_choices
    weights = sum(unit.weights for unit in units)
    pick = choose(units, choices)

    def point(target: float | None, widths: tuple[int, ...]) -> Point:
        pairs = list(zip(units, widths, strict=True))
        size = sum(unit.size[b] for unit, b in pairs)
        return Point(target, size / weights, sum(unit.loss[b] for unit, b in pairs), widths)

    uniform = [point(None, (b,) * len(units)) for b in choices]
    low, high = uniform[0].bits_per_weight, uniform[-1].bits_per_weight
    if not low <= spec.target_bpw <= high:
        raise SpecError("target_bpw", expected=f"{low} to {high}", got=spec.target_bpw)
    chosen = point(spec.target_bpw, pick(budget_bits(spec.target_bpw, weights)))
    grid = [i * _STEP for i in range(1, int(high / _STEP) + 1)]
    curve = [
        point(target, pick(budget_bits(target, weights)))
        for target in grid
        if low <= target <= high and target != spec.target_bpw
    ]
    curve = list({p.widths: p for p in reversed([chosen, *curve])}.values())  # each choice once
    ordered = sorted([*curve, *uniform], key=lambda p: -p.bits_per_weight)
    return Mixed(tuple(units), chosen, tuple(ordered), tuple(choices), tokens, gradient_tokens)


def budget_bits(target: float, weights: int) -> int:
    """The bits that `target` per weight allows, in whole bits.

    A target printed from a size (4.15625 for uniform 4 bits) gives that size again, whatever the
    rounding of the product.
    """
    exact = target * weights
    near = round(exact)
    return near if abs(exact - near) <= 1e-15 * 4 * exact else int(exact)
