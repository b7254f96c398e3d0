"""The dip against its definition, as a linear programme, and modes of mixtures that have a known number of them.

Seen to fail when: the modal interval of the first round is the last; a p-value ignores the size of a large sample;
peaks need no prominence over the noise.
"""

import numpy as np
import pytest
from scipy.optimize import linprog

from topkapi.errors import TopkapiError
from topkapi.statistics.modes import _dips, count_modes, dip, dip_test


def distance_to_unimodal(sample, mode):
    """The least D such that a distribution unimodal at the point `mode` lies within D of the sample's."""
    x, counts = np.unique(sample, return_counts=True)
    upto = np.cumsum(counts) / len(sample)
    below = np.append(0.0, upto[:-1])
    m = len(x)
    rows, bounds = [], []

    def at(i, side):  # the distribution function just left (0) or right (1) of x[i]; they differ at the mode alone
        row = np.zeros(m + 2)
        row[m if i == mode and side else i] = 1
        return row

    def at_most(row, bound, slack):
        row[-1] -= slack
        rows.append(row)
        bounds.append(bound)

    for i in range(m):
        at_most(-at(i, 1), -upto[i], 1)
        at_most(at(i, 0), below[i], 1)
    at_most(at(mode, 0) - at(mode, 1), 0, 0)
    slopes = [(at(i + 1, 0) - at(i, 1)) / (x[i + 1] - x[i]) for i in range(m - 1)]
    for slope in slopes:
        at_most(-slope, 0, 0)
    for i in range(m - 2):
        if i + 1 != mode:
            sign = 1 if i + 1 < mode else -1
            at_most(sign * (slopes[i] - slopes[i + 1]), 0, 0)
    found = linprog(np.eye(m + 2)[-1], rows, bounds, bounds=[(0, 1)] * (m + 2))
    assert found.success
    return found.fun


def mixture(seed, n, *means, sd=1.0):
    rng = np.random.default_rng(seed)
    return rng.choice(means, n) + rng.normal(0, sd, n)


@pytest.mark.parametrize("seed", range(24))
def test_the_dip_is_the_distance_to_the_nearest_unimodal_distribution(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 13))
    kinds = [rng.random(n), mixture(seed, n, 0.0, 6.0), rng.exponential(size=n), rng.integers(0, 5, n).astype(float)]
    sample = kinds[seed % 4]
    nearest = min(distance_to_unimodal(sample, mode) for mode in range(len(np.unique(sample))))
    assert dip(sample) == pytest.approx(max(nearest, 1 / (2 * n)), abs=1e-9)


def test_known_dips():
    assert dip(np.arange(10.0)) == 1 / 20
    assert dip(np.repeat([0.0, 1.0], 5)) == 1 / 4
    assert dip(np.full(6, 3.0)) == 1 / 12  # all in one point, which may be the mode
    assert dip(np.array([1.0])) == 1 / 2


def test_the_dip_knows_neither_unit_nor_direction():
    sample = mixture(0, 300, 0.0, 4.0)
    assert dip(7 - 3 * sample) == pytest.approx(dip(sample), rel=1e-9)


def test_samples_side_by_side_have_the_dips_they_have_alone():
    samples = np.sort([mixture(seed, 200, 0.0, 0.2 * seed) for seed in range(20)], 1)
    assert _dips(samples).tolist() == [dip(sample) for sample in samples]


def test_p_values_of_the_uniform_are_uniform_and_of_unimodal_samples_no_smaller():
    rng = np.random.default_rng(0)
    uniform = np.array([dip_test(rng.random(100)).p_value for _ in range(200)])
    assert np.mean(uniform < 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(uniform < 0.5) == pytest.approx(0.5, abs=0.1)
    assert np.mean([dip_test(rng.normal(size=100)).p_value < 0.1 for _ in range(100)]) < 0.05
    assert np.mean([dip_test(rng.exponential(size=100)).p_value < 0.1 for _ in range(100)]) < 0.05


def test_two_modes_have_a_small_p_value():
    assert dip_test(mixture(0, 200, 0.0, 5.0)).p_value < 0.01
    large = mixture(0, 20_000, 0.0, 3.0)  # larger than what is simulated
    assert dip_test(large).p_value < 0.01
    assert dip_test(mixture(0, 20_000, 0.0, 0.0)).p_value > 0.5


def test_the_same_seed_gives_the_same_p_value():
    sample = mixture(0, 150, 0.0, 2.4)
    assert dip_test(sample, seed=1) == dip_test(sample, seed=1)
    assert 1 / 1001 <= dip_test(sample).p_value <= 1


@pytest.mark.parametrize("means", [(0.0,), (0.0, 5.0), (0.0, 5.0, 10.0), (-8.0, 0.0, 6.0, 14.0)])
def test_modes_of_mixtures_are_counted_and_found(means):
    for seed in range(5):
        found = count_modes(mixture(seed, 4000, *means))
        assert found.positions == pytest.approx(means, abs=0.4)


def test_a_rare_mode_is_counted_unless_it_is_asked_to_stand_out():
    rng = np.random.default_rng(0)
    sample = np.where(rng.random(4000) < 0.02, 4.0, 1.0) + rng.normal(0, 0.3, 4000)
    assert count_modes(sample).positions == pytest.approx([1, 4], abs=0.2)
    assert len(count_modes(sample, prominence=0.05)) == 1
    assert len(count_modes(sample, deviations=50)) == 1


def test_samples_of_one_mode_seldom_show_two():
    rng = np.random.default_rng(0)
    for draw in (rng.normal, rng.exponential, rng.random, rng.standard_cauchy):
        for n in (50, 2000):
            assert np.mean([len(count_modes(draw(size=n))) > 1 for _ in range(50)]) <= 0.06, (draw, n)


def test_the_density_estimate_is_one():
    found = count_modes(mixture(0, 1000, 0.0, 5.0))
    assert found.density.sum() * (found.grid[1] - found.grid[0]) == pytest.approx(1)
    assert found.density[np.searchsorted(found.grid, found.positions[0])] == pytest.approx(found.heights[0], rel=0.01)


def test_equal_values_have_one_mode():
    assert count_modes(np.full(5, 2.0)).positions.tolist() == [2.0]


@pytest.mark.parametrize("call", [dip_test, count_modes])
def test_what_cannot_be_used_is_named(call):
    with pytest.raises(TopkapiError, match="at least 4"):
        call(np.zeros(3))
    with pytest.raises(TopkapiError, match="finite"):
        call(np.array([1.0, 2.0, np.inf, 3.0]))
