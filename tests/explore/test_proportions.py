"""Intervals against published and recomputed values, and their coverage.

Mutations seen caught: a normal interval in place of Wilson's; the ends of b swapped in a difference; all samples of all
controls taken as independent.
"""

import numpy as np
import pytest

from topkapi.explore.proportions import clustered_rate, difference, rate


def test_rates_have_wilsons_interval():
    from scipy.stats import binomtest

    for n, of in [(0, 10), (3, 10), (10, 10), (81, 263), (15, 148), (1, 29)]:
        low, high = binomtest(n, of).proportion_ci(method="wilson")
        assert rate(n, of)[2:] == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),  # Newcombe 1998, table II, method 10
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_differences_have_newcombes_interval(a, b, wanted):
    found = difference(rate(*a), rate(*b))
    assert found.value == pytest.approx(a[0] / a[1] - b[0] / b[1])
    assert found[1:] == pytest.approx(wanted, abs=6e-5)
    assert found.excludes_zero == (wanted[0] > 0)


def test_groups_that_agree_are_one_sample_and_those_that_differ_are_fewer():
    assert clustered_rate([5, 5, 5, 5], 20)[2:] == pytest.approx(rate(20, 80)[2:])
    assert clustered_rate([0, 0, 0], 20) == pytest.approx(rate(0, 60))
    low, high = clustered_rate([0, 0, 20, 0], 20)[2:]
    assert high - low > 2.5 * (rate(20, 80).high - rate(20, 80).low)


def test_the_interval_of_groups_covers_their_common_mean():
    rng = np.random.default_rng(0)
    covered, naive = 0, 0
    for _ in range(600):
        shares = rng.beta(2, 6, size=8)  # every control has a rate of its own, 0.25 on average
        counts = rng.binomial(30, shares).tolist()
        found, plain = clustered_rate(counts, 30), rate(sum(counts), 240)
        covered += found.low <= 0.25 <= found.high
        naive += plain.low <= 0.25 <= plain.high
    assert covered / 600 >= 0.93
    assert naive / 600 < 0.8


def test_equal_rates_seldom_exclude_zero():
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(600):
        controls = clustered_rate(rng.binomial(20, 0.1, size=10).tolist(), 20)
        wrong += difference(rate(int(rng.binomial(20, 0.1)), 20), controls).excludes_zero
    assert wrong / 600 <= 0.06
