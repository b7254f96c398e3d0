"""Bootstrap intervals of means.

Mutations seen caught: undefined values counted as 0; quantiles 5 % and 95 %; resampling without replacement;
weights of other values taken.
"""

import math

import numpy as np
import pytest

from topkapi.statistics.intervals import Estimate, bootstrap_mean, estimate


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    """Of 80 samples of 100 exponential values; at least 3 sigma below the 0.94 that 100 skewed values reach."""
    rng = np.random.default_rng(0)
    found = [bootstrap_mean(rng.exponential(size=100).tolist(), seed) for seed in range(80)]
    assert 0.86 <= np.mean([e.low <= 1 <= e.high for e in found]) < 1


def test_the_interval_is_that_of_the_normal_approximation_for_many_values():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    found = bootstrap_mean(values.tolist())
    error = values.std() / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)


def test_the_seed_decides():
    values = [float(i**2) for i in range(30)]
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    assert bootstrap_mean(values, 3).low != bootstrap_mean(values, 4).low


def test_a_weight_of_three_counts_three_times_in_the_mean_but_not_as_three_values():
    values, weights = [math.nan, 1.0, 5.0], [7.0, 3.0, 1.0]
    assert bootstrap_mean(values, weights=weights).value == 2
    many = np.random.default_rng(2).normal(size=500).tolist()
    assert bootstrap_mean(many, weights=[4.0] * 500)[:4] == pytest.approx(bootstrap_mean(many)[:4])


def test_undefined_values_are_left_out_and_counted():
    found = bootstrap_mean([None, 1.0, math.nan, 3.0])
    assert (found.value, found.n, found.reason) == (2, 2, "")


def test_what_is_undefined_is_none_with_a_reason():
    assert bootstrap_mean([None, None]) == (None, None, None, 0, "none of the 2 values is defined")
    assert bootstrap_mean([]) == (None, None, None, 0, "none of the 0 values is defined")
    assert bootstrap_mean([0.5]) == (0.5, None, None, 1, "a single value has no interval")


def test_replicates_that_are_not_finite_are_left_out():
    replicates = np.array([2.0, math.nan, *np.linspace(0, 100, 101)])
    assert estimate(replicates, 9)[:4] == pytest.approx((2, 2.5, 97.5, 9))
    assert estimate(np.full(9, -math.inf), 9) == Estimate(None, None, None, 9, "not finite")
    assert estimate(replicates, 1) == Estimate(2, None, None, 1, "a single value has no interval")
