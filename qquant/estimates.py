"""A figure and how far it can be trusted: means of samples, their standard errors, intervals.

Samples are taken to be independent: rows of text, questions of a benchmark. A pair of models is
compared by the differences on the same samples, whose spread is far smaller than that of either
alone: a loss of 0.3 points can then be told from noise. The interval is Student's, so that it is as
wide as few samples make it (four rows: 3.18 standard errors, not 1.96). Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LARGEST = 1e100  # beyond that a sum or a square of figures might not be finite


class Estimate(NamedTuple):
    """A mean with its standard error (NaN where a single sample leaves it unknown, or one is not
    finite)."""

    value: float
    stderr: float


def mean(values: Sequence[float]) -> Estimate:
    """The mean of samples, and the standard error of that mean: s/√n with n - 1 in s."""
    if not all(map(math.isfinite, values)):  # statistics.stdev raises
        return Estimate(sum(values) / len(values), math.nan)
    value = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(value, math.nan)
    return Estimate(value, statistics.stdev(values) / math.sqrt(len(values)))


def exp(estimate: Estimate) -> Estimate:
    """e to the power of it, the standard error by the delta method; infinite beyond floats."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value, value * estimate.stderr)


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """`other` less `one`, sample by sample."""
    return [b - a for a, b in zip(one, other, strict=True)]


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the mean of what was sampled from, with probability `level`.

    NaN, twice, for a single sample.
    """
    value, error = mean(values)
    if math.isnan(error):
        return math.nan, math.nan
    reach = t_quantile(0.5 + level / 2, len(values) - 1) * error
    return value - reach, value + reach


def t_quantile(p: float, df: int) -> float:
    """Where Student's distribution with `df` degrees of freedom has `p` below it, 0.5 <= p < 1.

    By bisection of the cumulative distribution, whose closed form for whole `df` is in Abramowitz
    and Stegun, 26.7.3 and 26.7.4; from 1000 on, the normal distribution's, which then differs by
    less than 0.2 %.
    """
    if df >= 1000:
        return statistics.NormalDist().inv_cdf(p)
    low, high = 0.0, 1.0
    while _within(high, df) < 2 * p - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def known(values: Sequence[float]) -> list[float | None]:
    """As JSON has them: None for what is not finite, or beyond `LARGEST`."""
    return [value if -LARGEST <= value <= LARGEST else None for value in values]


def _within(t: float, df: int) -> float:
    """The probability of a value between -t and t."""
    theta = math.atan(t / math.sqrt(df))
    cos, sin = math.cos(theta), math.sin(theta)
    odd = df % 2
    term = total = (cos if odd else 1.0) if df > 1 else 0.0
    for i in range(3 if odd else 2, df - 1, 2):
        term *= cos * cos * (i - 1) / i
        total += term
    return 2 / math.pi * (theta + sin * total) if odd else sin * total
