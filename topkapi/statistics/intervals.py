"""Confidence intervals, and what every function of this room checks of its samples."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from topkapi.errors import TopkapiError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Where a quantity lies with probability `CONFIDENCE`."""

    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        return self.low <= value <= self.high


def percentile_interval(draws: Float[np.ndarray, " n_bootstrap"]) -> Interval:
    """The interval between the (1 - CONFIDENCE) / 2 quantiles of bootstrap draws, from below and from above."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


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
