"""Compute equivalents on curves with known inverses.

Mutations seen caught: interpolation in compute instead of its logarithm; the share upside down; a loss outside the
curve given the nearest point's compute.
"""

import math

import pytest

from topkapi.errors import TopkapiError
from topkapi.evaluate.compute_equivalent import compute_equivalent, read_curve, resampled

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


def test_the_interval_is_of_shares_of_losses_drawn_together():
    clean = [2.5, *(2.5 + i / 1000 for i in range(101))]
    spliced = [3.0, *(loss + 0.5 + 0.1 * i / 100 for i, loss in enumerate(clean[1:]))]
    found = resampled(LOG_LINE, spliced, clean, 7)
    wanted = [10 ** (-2 * delta) for delta in (0.5, 0.5975, 0.5025)]
    assert found[:4] == pytest.approx((*wanted, 7), rel=1e-3)
    outside = resampled(LOG_LINE, [3.0, *[9.0] * 10, *spliced[11:]], clean, 7)
    assert (outside.low, outside.high) == (None, None)
    assert "outside the reference curve" in outside.reason


@pytest.mark.parametrize(
    "text", ["1e3,3\n1e4,2\n", "flops,loss\n1000 3  # small\n\n10000\t2\n", "# flops loss\n1000, 3\n1e4, 2"]
)
def test_a_curve_is_read_from_lines_of_two_numbers(tmp_path, text):
    (tmp_path / "curve").write_text(text)
    assert read_curve(tmp_path / "curve") == [(1000, 3), (10000, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1e3,3\n1e4,2,1\n", "line 2: wanted two numbers"),
        ("1e3,3\nsmall,2\n", "line 2: wanted two numbers"),
        ("1e3,3\n", "needs two points"),
        ("", "needs two points"),
        ("1,3\n2,4\n", "must fall as compute grows"),
    ],
)
def test_a_file_that_is_no_curve_is_an_error_of_one_line(tmp_path, text, message):
    (tmp_path / "curve").write_text(text)
    with pytest.raises(TopkapiError, match=message):
        read_curve(tmp_path / "curve")
    with pytest.raises(TopkapiError, match="cannot be read"):
        read_curve(tmp_path / "none")
