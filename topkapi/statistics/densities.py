"""Distributions of densities and importances over latents, in logarithms, and how dense a solution is.

A latent's density is the fraction of tokens on which it fires; its importance is E[a^2], the mean of its squared
activation over all tokens, about what the MSE would gain if it were left out. Both spread over decades, so fits are
of natural logarithms: log densities are close to Gaussian, without a second mode, log importances closer to Laplace
(Gao et al. 2024, appendix E.4). A latent that never fired has no logarithm: `n_zero` counts it in every result, and
no fit knows of it. Rare latents are blurred besides: n firings give a density to within a factor of about
1 +- 1/sqrt(n).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from topkapi.errors import TopkapiError
from topkapi.statistics.intervals import CONFIDENCE, Interval, checked_sample

Family = Literal["gaussian", "laplace"]

FEWEST = 8  # positive values of a fit: the interval of a median takes six
SAME = 0.01  # of L0: how far the sum of densities may be from it, for rounding and for another sample of tokens
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


@dataclass(frozen=True)
class LogFit:
    """Maximum likelihood fit of ln(values) for the values above zero."""

    family: Family
    location: float
    """Mean (gaussian) or median (laplace) of ln(value)."""
    location_interval: Interval
    scale: float
    """Standard deviation (gaussian), or mean distance from the median (laplace), of ln(value): e-foldings."""
    scale_interval: Interval
    log_likelihood: float
    """Of the logarithms, in nats, summed over the values above zero."""
    n: int
    """Values above zero."""
    n_zero: int
    """Values of zero, which are not part of the fit."""

    def log_density(self, log_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """ln of the probability density of ln(value), per e-folding; times ln 10 the density is per decade.

        gaussian: -(y - location)^2 / (2 scale^2) - ln(scale sqrt(2 pi))
        laplace:  -|y - location| / scale - ln(2 scale)
        """
        away = (log_values - self.location) / self.scale
        if self.family == "gaussian":
            return -(away**2) / 2 - math.log(self.scale * math.sqrt(2 * math.pi))
        return -np.abs(away) - math.log(2 * self.scale)


@dataclass(frozen=True)
class Comparison:
    """A Gaussian and a Laplace fit to the same logarithms, and which of them is more likely."""

    gaussian: LogFit
    laplace: LogFit
    log_likelihood_ratio: float
    """Log-likelihood of the Gaussian less that of the Laplace, in nats, summed over latents."""
    interval: Interval
    p_value: float
    """Of the ratio, two-sided, where both are equally far from the truth (Vuong 1989)."""

    @property
    def preferred(self) -> Family | Literal["neither"]:
        """The more likely family, or neither where the interval holds zero."""
        if 0 in self.interval:
            return "neither"
        return "gaussian" if self.log_likelihood_ratio > 0 else "laplace"


@dataclass(frozen=True)
class Counts:
    """Latents by how often they fire."""

    n_latents: int
    n_dead: int
    """Density zero: dead, where the densities are over at least `dead_after` tokens."""
    n_dense: int
    """Density at or above the bound that was asked for."""


def fit_gaussian(values: Float[np.ndarray, " n_latents"]) -> LogFit:
    """The Gaussian of ln(values): mean and standard deviation (that of maximum likelihood, over n).

    Intervals: the mean's is Student's; that of the standard deviation follows from the fourth moment, on a log
    scale, so it holds for large n whether or not the logarithms are Gaussian.

    Raises:
        TopkapiError: a value is negative or not finite, or fewer than 8 are positive, or all are equal.
    """
    logs, n_zero = _logarithms(values)
    n, mean, scale = len(logs), float(logs.mean()), float(logs.std())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * scale / math.sqrt(n - 1)
    spread = math.sqrt(max(0.0, float((((logs - mean) / scale) ** 4).mean()) - 1)) / 2  # of ln(scale), times sqrt(n)
    return _with_likelihood("gaussian", logs, n_zero, mean, Interval(mean - half, mean + half), scale, spread)


def fit_laplace(values: Float[np.ndarray, " n_latents"]) -> LogFit:
    """The Laplace distribution of ln(values): median, and mean distance from the median.

    Intervals: the median's lies between two order statistics, whatever the distribution; that of the scale follows
    from the variance of the distances, on a log scale, so it holds for large n.

    Raises:
        TopkapiError: as in `fit_gaussian`.
    """
    logs, n_zero = _logarithms(values)
    n, median = len(logs), float(np.median(logs))
    rank = int(stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
    ordered = np.sort(logs)
    interval = Interval(float(ordered[rank - 1]), float(ordered[n - rank]))
    distances = np.abs(logs - median)
    scale = float(distances.mean())
    return _with_likelihood("laplace", logs, n_zero, median, interval, scale, float(distances.std()) / scale)


def compare(values: Float[np.ndarray, " n_latents"]) -> Comparison:
    """Whether ln(values) are rather Gaussian or Laplace, by how much, and how sure that is.

        ratio = sum_i r_i,  r_i = ln p_gaussian(y_i) - ln p_laplace(y_i),  interval = ratio +- z sqrt(n) std(r)

    Neither family contains the other and both have two parameters, so the ratio over sqrt(n) std(r) is a standard
    normal where both are equally wrong. Latents count as independent of each other.

    Source: Vuong 1989, section 5.

    Raises:
        TopkapiError: as in `fit_gaussian`.
    """
    gaussian, laplace = fit_gaussian(values), fit_laplace(values)
    logs, _ = _logarithms(values)
    ratios = gaussian.log_density(logs) - laplace.log_density(logs)
    ratio, spread = float(ratios.sum()), math.sqrt(len(logs)) * float(ratios.std())
    p_value = 2 * float(stats.norm.sf(abs(ratio) / spread)) if spread else 0.0  # two distinct values, equally often
    return Comparison(gaussian, laplace, ratio, Interval(ratio - Z * spread, ratio + Z * spread), p_value)


def cumulative_share(values: Float[np.ndarray, " n_latents"]) -> Float[np.ndarray, " n_latents"]:
    """Entry i: the share of the sum that the i + 1 largest values hold; rises to 1. Zeros make it end flat.

    Of importances it says how few latents explain most of what is explained.

    Raises:
        TopkapiError: a value is negative or not finite, or all are zero.
    """
    values = _not_negative(values, 1)
    if not values.any():
        raise TopkapiError(f"All {len(values)} values are zero: there is nothing to share out.")
    sums = np.cumsum(np.sort(values)[::-1])
    return sums / sums[-1]


def count_latents(density: Float[np.ndarray, " n_latents"], dense_from: float) -> Counts:
    """How many latents never fired, and how many have at least the density `dense_from`.

    Raises:
        TopkapiError: a density lies outside [0, 1], or `dense_from` outside (0, 1].
    """
    if not 0 < dense_from <= 1:
        raise TopkapiError(f"dense_from must be a density in (0, 1]; got {dense_from}.")
    density = _densities(density)
    n_dead, n_dense = np.count_nonzero(density == 0), np.count_nonzero(density >= dense_from)
    return Counts(len(density), int(n_dead), int(n_dense))


def dense_measure(density: Float[np.ndarray, " n_latents"], d_model: int, l0: float | int) -> float:
    """The mean density of the d_model densest latents, over L0: between 1 / n_latents and 1 / d_model.

        measure = mean of the d_model largest densities / l0

    It is 1 / d_model where d_model latents do all the firing, as principal components would, and 1 / n_latents where
    all fire equally often. Densities add up to L0, so both must be of the same tokens.

    Source: Gao et al. 2024, appendix E.5.

    Raises:
        TopkapiError: a density lies outside [0, 1]; fewer latents than d_model; l0 is not the sum of densities to 1 %.
    """
    density = _densities(density)
    if not 1 <= d_model <= len(density):
        raise TopkapiError(f"d_model must be between 1 and the number of latents, {len(density)}; got {d_model}.")
    total = float(density.sum())
    if total == 0 or abs(total - l0) > SAME * total:
        raise TopkapiError(f"l0 is {l0}, but densities add up to {total:.4g}: measure both on the same tokens.")
    densest = np.partition(density, len(density) - d_model)[-d_model:]
    return float(densest.mean()) / l0


def dense_mass(density: Float[np.ndarray, " n_latents"], d_model: int, l0: float | int) -> float:
    """The share of all firings that are of the d_model densest latents: d_model / n_latents to 1.

        mass = d_model dense_measure

    Raises:
        TopkapiError: as in `dense_measure`.
    """
    return d_model * dense_measure(density, d_model, l0)


def _with_likelihood(
    family: Family,
    logs: np.ndarray,
    n_zero: int,
    location: float,
    location_interval: Interval,
    scale: float,
    spread: float,
) -> LogFit:
    """The fit with its log-likelihood; `spread` is the standard error of ln(scale), times sqrt(n)."""
    factor = math.exp(Z * spread / math.sqrt(len(logs)))
    interval = Interval(scale / factor, scale * factor)
    silent = LogFit(family, location, location_interval, scale, interval, 0.0, len(logs), n_zero)
    return LogFit(**(vars(silent) | {"log_likelihood": float(silent.log_density(logs).sum())}))


def _logarithms(values: np.ndarray) -> tuple[np.ndarray, int]:
    """ln of the values above zero, and how many are zero."""
    values = _not_negative(values, 1)
    positive = values[values > 0]
    if len(positive) < FEWEST or positive.min() == positive.max():
        raise TopkapiError(
            f"A fit needs at least {FEWEST} positive values that are not all equal; "
            f"{len(positive)} of {len(values)} are positive."
        )
    return np.log(positive), len(values) - len(positive)


def _not_negative(values: np.ndarray, at_least: int) -> np.ndarray:
    values = checked_sample(values, "values", at_least)
    if values.min() < 0:
        raise TopkapiError(f"values must not be negative; the smallest is {values.min()}.")
    return values


def _densities(density: np.ndarray) -> np.ndarray:
    density = _not_negative(density, 1)
    if density.max() > 1:
        raise TopkapiError(f"A density is a fraction of tokens, at most 1; the largest is {density.max()}.")
    return density
