"""Compute equivalents on curves with known inverses.

Mutations seen caught: interpolation in compute instead of its logarithm; the share upside down; a loss outside the
curve given the nearest point's compute.
"""

import math

import pytest

from topkapi.errors import TopkapiError
from topkapi.evaluate.compute_equivalent import compute_equivalent

LOG_LINE = [(10.0**i, 4 - 0.5 * i) for i in range(5)]  # a tenfold of compute for half a nat


@pytest.mark.parametrize("ce_clean", [2.0, 2.3, 3.0])
@pytest.mark.parametrize("delta", [0, 0.1, 0.25, 1.0])
def test_on_a_straight_line_the_share_is_exact_between_points_too(delta, ce_clean):
    assert compute_equivalent(LOG_LINE, ce_clean + delta, ce_clean) == pytest.approx(10 ** (-2 * delta), rel=1e-12)


def test_points_of_the_curve_give_their_own_compute_in_any_order_and_unit():
    curve = [(3.0, 2.5), (1.0, 3.7), (100.0, 2.0)]
    assert compute_equivalent(curve, 3.7, 2.5) == pytest.approx(1 / 3)
    assert compute_equivalent([(1e20 * c, loss) for c, loss in curve], 3.7, 2.0) == pytest.approx(0.01)


def test_a_power_law_is_followed_to_a_percent_by_points_a_doubling_apart():
    """CE = 1.7 + 8 C^-0.15, whose inverse is known."""
    curve = [(2.0**i, 1.7 + 8 * 2 ** (-0.15 * i)) for i in range(10, 30)]
    for compute in (3e3, 1e5, 7e6):
        loss = 1.7 + 8 * compute**-0.15
        assert compute_equivalent(curve, loss, curve[-1][1]) == pytest.approx(compute / 2**29, rel=0.01)


def test_splicing_that_helps_is_worth_more_than_the_whole():
    assert compute_equivalent(LOG_LINE, 2.0, 2.5) == pytest.approx(10)


@pytest.mark.parametrize(
    ("curve", "spliced", "clean", "message"),
    [
        (LOG_LINE, 4.1, 2.0, "ce_spliced = 4.1 lies outside"),
        (LOG_LINE, 3.0, 1.9, "ce_clean = 1.9 lies outside"),
        (LOG_LINE, math.nan, 2.0, "ce_spliced = nan lies outside"),
        (LOG_LINE[:1], 4.0, 4.0, "got 1"),
        ([(0.0, 4.0), (1.0, 3.0)], 3.5, 3.0, r"got \(0.0, 4.0\)"),
        ([(1.0, math.inf), (2.0, 3.0)], 3.5, 3.0, r"got \(1.0, inf\)"),
        ([(1.0, 4.0), (2.0, 3.0), (3.0, 3.2)], 3.5, 3.1, "from 3 at 2 to 3.2 at 3"),
        ([(1.0, 4.0), (1.0, 3.0)], 3.5, 3.1, "must fall"),
    ],
)
def test_what_has_no_answer_is_an_error_of_one_line(curve, spliced, clean, message):
    with pytest.raises(TopkapiError, match=message) as error:
        compute_equivalent(curve, spliced, clean)
    assert "\n" not in str(error.value)
