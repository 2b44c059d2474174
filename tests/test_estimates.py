"""Standard errors and intervals against what tables and definitions say."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from qquant import estimates

# Student's t at 97.5 %, as printed in any table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_are_those_of_the_tables(df: int) -> None:
    assert estimates.t_quantile(0.975, df) == pytest.approx(TABLE[df], abs=6e-4)


def test_quantiles_end_in_the_normal_distributions() -> None:
    assert estimates.t_quantile(0.975, 999) == pytest.approx(1.9623, abs=1e-4)
    assert estimates.t_quantile(0.975, 10**6) == pytest.approx(1.95996, abs=1e-5)
    assert estimates.t_quantile(0.5, 7) == pytest.approx(0, abs=1e-9)


def test_means_are_their_definitions() -> None:
    values = [3.0, 5.0, 10.0, 2.0]
    value, error = estimates.mean(values)
    assert value == 5
    assert error == pytest.approx(math.sqrt((4 + 0 + 25 + 9) / 3 / 4))
    low, high = estimates.interval(values)
    assert (high - low) / 2 == pytest.approx(3.182 * error, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(value)
    grown = estimates.exp(estimates.Estimate(2.0, 0.1))
    assert grown == pytest.approx((math.e**2, 0.1 * math.e**2))
    assert estimates.exp(estimates.Estimate(800.0, 0.1)).value == math.inf


def test_one_sample_tells_no_spread() -> None:
    assert estimates.mean([4.0])[0] == 4 and math.isnan(estimates.mean([4.0])[1])
    assert all(math.isnan(end) for end in estimates.interval([4.0]))
    for odd in (math.nan, math.inf):
        value, error = estimates.mean([4.0, odd])
        assert not math.isfinite(value) and math.isnan(error)
        assert all(math.isnan(end) for end in estimates.interval([4.0, odd]))
    assert estimates.known([1.0, math.nan, math.inf]) == [1.0, None, None]


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = estimates.interval([draw.gauss(1, 2) for _ in range(5)])
        held += low <= 1 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_paired_difference_is_sharper_than_two_means() -> None:
    draw = random.Random(1)
    one = [draw.gauss(0, 1) for _ in range(200)]
    other = [x + 0.05 + draw.gauss(0, 0.01) for x in one]
    low, high = estimates.interval(estimates.differences(one, other))
    assert 0.04 < low < 0.05 < high < 0.06
    spread = math.hypot(estimates.mean(one).stderr, estimates.mean(other).stderr)
    assert spread > 20 * (high - low)
    assert estimates.mean(estimates.differences(one, one)) == (0, 0)
    assert estimates.mean(one).value == pytest.approx(statistics.mean(one))
