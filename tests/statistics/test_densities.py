"""Fits of densities and importances on samples whose distribution is known, and the bounds of the dense measure.

Seen to fail when: the scale of a Laplace fit is the standard deviation; zeros are dropped without being counted; the
mean of all latents stands for that of the densest.
"""

import math

import numpy as np
import pytest
from scipy import stats

from topkapi.errors import TopkapiError
from topkapi.statistics.densities import (
    compare,
    count_latents,
    cumulative_share,
    dense_mass,
    dense_measure,
    fit_gaussian,
    fit_laplace,
)


def log_gaussian(n, seed, location=-9.0, scale=1.5):
    return np.exp(np.random.default_rng(seed).normal(location, scale, n))


def log_laplace(n, seed, location=-9.0, scale=1.5):
    return np.exp(np.random.default_rng(seed).laplace(location, scale, n))


def test_fits_are_those_of_maximum_likelihood():
    values = log_gaussian(501, 0)
    logs = np.log(values)
    for fit, family in ((fit_gaussian(values), stats.norm), (fit_laplace(values), stats.laplace)):
        location, scale = family.fit(logs)
        assert fit.location == pytest.approx(location)
        assert fit.scale == pytest.approx(scale)
        assert fit.log_likelihood == pytest.approx(family.logpdf(logs, location, scale).sum())
        assert fit.log_density(logs) == pytest.approx(family.logpdf(logs, location, scale))


@pytest.mark.parametrize("fit", [fit_gaussian, fit_laplace])
@pytest.mark.parametrize("sample", [log_gaussian, log_laplace])
def test_intervals_hold_the_truth_whatever_the_distribution(fit, sample):
    """Nominally 95 %: of 300 samples at least 91 %, which 95 % misses once in 500 times."""
    whole = fit(sample(400_000, 99))
    fits = [fit(sample(400, seed)) for seed in range(300)]
    assert np.mean([whole.location in one.location_interval for one in fits]) > 0.91
    assert np.mean([whole.scale in one.scale_interval for one in fits]) > 0.91


def test_gaussian_and_laplace_are_told_apart():
    for n in (1000, 30_000):
        for seed in range(5):
            assert compare(log_gaussian(n, seed)).preferred == "gaussian"
            assert compare(log_laplace(n, seed)).preferred == "laplace"


def test_the_ratio_and_its_interval_are_those_expected():
    """A value's ln p_gaussian - ln p_laplace is ln(2 b / (s sqrt(2 pi))) + 1/2 on average.

    With b = s sqrt(2 / pi), of Gaussian values, 0.0484; with s = b sqrt(2), of Laplace values, -0.0724.
    """
    found = [compare(log_gaussian(2000, seed)) for seed in range(200)]
    expected = 2000 * (math.log(2 / math.pi) + 0.5)
    assert expected == pytest.approx(2000 * 0.04842, rel=1e-3)
    assert np.mean([one.log_likelihood_ratio for one in found]) == pytest.approx(expected, rel=0.05)
    assert np.mean([expected in one.interval for one in found]) > 0.9
    found = compare(log_laplace(100_000, 0))
    assert found.log_likelihood_ratio == pytest.approx(1e5 * (math.log(1 / math.sqrt(math.pi)) + 0.5), rel=0.1)
    assert found.p_value < 1e-6


def test_few_values_prefer_neither():
    preferred = [compare(log_gaussian(10, seed)).preferred for seed in range(50)]
    assert preferred.count("neither") > 30


def test_two_distinct_values_have_fits():
    found = compare(np.array([1.0, 2.0] * 5))
    assert found.interval.low == pytest.approx(found.interval.high)


def test_zeros_are_counted_and_change_nothing_else():
    values = log_gaussian(100, 0)
    with_zeros = np.concatenate([np.zeros(7), values])
    for fit in (fit_gaussian, fit_laplace):
        alone, beside = fit(values), fit(with_zeros)
        assert (alone.n, alone.n_zero) == (100, 0)
        assert (beside.n, beside.n_zero) == (100, 7)
        assert beside.log_likelihood == alone.log_likelihood
    assert compare(with_zeros).gaussian.n_zero == 7


def test_cumulative_share():
    found = cumulative_share(np.array([1.0, 0.0, 6.0, 3.0]))
    assert found == pytest.approx([0.6, 0.9, 1.0, 1.0])


def test_counts_of_dead_and_dense():
    density = np.array([0.0, 0.0, 1e-5, 0.1, 0.5])
    assert vars(count_latents(density, dense_from=0.1)) == {"n_latents": 5, "n_dead": 2, "n_dense": 2}


def test_the_dense_measure_lies_between_its_bounds_and_reaches_them():
    n_latents, d_model = 2048, 64
    principal = np.concatenate([np.full(d_model, 0.5), np.zeros(n_latents - d_model)])
    assert dense_measure(principal, d_model, l0=32) == pytest.approx(1 / d_model)
    assert dense_mass(principal, d_model, l0=32) == pytest.approx(1)
    uniform = np.full(n_latents, 32 / n_latents)
    assert dense_measure(uniform, d_model, l0=32) == pytest.approx(1 / n_latents)
    assert dense_mass(uniform, d_model, l0=32) == pytest.approx(d_model / n_latents)
    for seed in range(20):
        density = np.minimum(log_gaussian(n_latents, seed, -6.0, 2.0), 1.0)
        measure = dense_measure(density, d_model, l0=float(density.sum()))
        assert 1 / n_latents < measure < 1 / d_model
        assert measure == pytest.approx(np.sort(density)[-d_model:].mean() / density.sum())


def test_the_largest_measure_at_the_width_of_gpt2():
    assert dense_measure(np.full(768, 0.5), 768, l0=384) == pytest.approx(1.30e-3, abs=5e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit_gaussian(np.array([-1.0] + [1.0] * 9)), "negative"),
        (lambda: fit_gaussian(np.array([np.nan] + [1.0] * 9)), "finite"),
        (lambda: fit_laplace(np.array([0.0] * 9 + [1.0])), "1 of 10 are positive"),
        (lambda: fit_laplace(np.ones(9)), "not all equal"),
        (lambda: compare(np.array([])), "one-dimensional"),
        (lambda: cumulative_share(np.zeros(3)), "all 3 values are zero"),
        (lambda: count_latents(np.array([2.0]), 0.1), "at most 1"),
        (lambda: count_latents(np.array([0.5]), 0.0), "dense_from"),
        (lambda: dense_measure(np.full(10, 0.1), 11, 1), "d_model"),
        (lambda: dense_measure(np.full(10, 0.1), 5, 2), "same tokens"),
        (lambda: dense_measure(np.zeros(10), 5, 0), "same tokens"),
    ],
)
def test_what_cannot_be_used_is_named(call, said):
    with pytest.raises(TopkapiError, match=f"(?i){said}"):
        call()
