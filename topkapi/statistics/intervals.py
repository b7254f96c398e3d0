"""Estimates with confidence intervals, and what every function of this room checks of its samples."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from topkapi.errors import TopkapiError

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # 1.96: of standard normal numbers that share is within -Z to Z
RESAMPLES = 2_000  # an end of the interval then varies by 1.5 % of its width (standard deviation) between seeds


class Interval(NamedTuple):
    """Where a quantity lies with probability `CONFIDENCE`."""

    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        return self.low <= value <= self.high


class Estimate(NamedTuple):
    """A value, and the interval it lies in with probability `CONFIDENCE`."""

    value: float | None
    """None where undefined."""
    low: float | None
    """None, as is `high`, where there is no interval."""
    high: float | None
    n: int
    """Independent values that it comes from: contexts, latents, texts ..."""
    reason: str = ""
    """Why something is None."""


def percentile_interval(draws: Float[np.ndarray, " n_bootstrap"]) -> Interval:
    """The interval between the (1 - CONFIDENCE) / 2 quantiles of bootstrap draws, from below and from above."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def estimate(replicates: Float[np.ndarray, " replicates"], n: int) -> Estimate:
    """The first number, a measure of n independent values, with the interval of the others, its bootstrap draws.

    Draws that are not finite, of samples in which the measure is undefined, are left out.
    """
    value, draws = float(replicates[0]), replicates[1:]
    if not math.isfinite(value):
        return Estimate(None, None, None, n, "not finite" if n else "there are no values")
    if n < 2:
        return Estimate(value, None, None, n, "a single value has no interval")
    return Estimate(value, *percentile_interval(draws[np.isfinite(draws)]), n)


def bootstrap_mean(values: Sequence[float | None], seed: int = 0, weights: Sequence[float] | None = None) -> Estimate:
    """Mean of the defined values, and the interval of the means of resampled ones; n counts the defined ones.

    Weighted where weights are given: sum w v / sum w, of the resampled pairs. None and NaN are undefined values. The
    values must be independent of each other: latents, or sampled tokens, not many values of one token. Percentile
    bootstrap, which is too narrow for fewer than some twenty values. Cost: 2 000 means of n values.

    Source: Efron 1979.
    """
    v = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    w = np.ones(len(v)) if weights is None else np.asarray(weights, dtype=np.float64)
    defined = ~np.isnan(v)
    v, w = v[defined], w[defined]
    if not len(v):
        return Estimate(None, None, None, 0, f"none of the {len(values)} values is defined")
    rng = np.random.default_rng(seed)
    samples = [slice(None), *(rng.integers(len(v), size=len(v)) for _ in range(RESAMPLES))]
    return estimate(np.array([np.average(v[sample], weights=w[sample]) for sample in samples]), len(v))


def checked_sample(values: np.ndarray, what: str, at_least: int) -> Float[np.ndarray, " n"]:
    """`values` in float64.

    Raises:
        TopkapiError: they are not one-dimensional, not finite, or fewer than `at_least`.
    """
    if values.ndim != 1 or len(values) < at_least:
        raise TopkapiError(f"{what} must be one-dimensional, with at least {at_least} numbers; got {values.shape}.")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise TopkapiError(f"{what} must be finite; {np.count_nonzero(~np.isfinite(values))} of {len(values)} are not.")
    return values
