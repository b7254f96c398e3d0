"""Shares of samples, and differences of shares, with 95 % intervals that hold for few samples and for none counted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from topkapi.statistics.intervals import Z


class Rate(NamedTuple):
    """n of `of` samples, and where the rate that they are drawn from lies with 95 % confidence."""

    n: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share counted."""
        return self.n / self.of


class Difference(NamedTuple):
    """One rate less another, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval says that the rates differ."""
        return self.low > 0 or self.high < 0


def rate(n: int, of: int) -> Rate:
    """A rate with Wilson's interval.

    Source: Wilson 1927.
    """
    return Rate(n, of, *_wilson(n / of, float(of)))


def clustered_rate(counts: Sequence[int], of: int) -> Rate:
    """The rate of several groups of `of` samples each, where groups may have rates of their own.

        deff = variance of the groups' rates / (p (1 - p) / of)
        n    = (number of samples) / deff (Z / t)^2               in Wilson's interval

    with t the quantile of Student's distribution for the number of groups less one, Z that of the normal one. Where the
    groups differ no more than samples would, deff <= 1, it is Wilson's interval of all samples.

    Source: Korn and Graubard 1998, with Wilson's interval in place of Clopper and Pearson's.
    """
    groups, total = len(counts), sum(counts)
    n = groups * of
    p, shares = total / n, np.array(counts) / of
    effective = float(n)
    if 0 < p < 1:
        deff = float(shares.var(ddof=1)) / (p * (1 - p) / of)
        if deff > 1:
            effective = n / deff * (Z / float(stats.t.ppf(0.975, groups - 1))) ** 2
    return Rate(total, n, *_wilson(p, effective))


def difference(a: Rate, b: Rate) -> Difference:
    """a less b, with the interval that follows from those of two independent rates.

        low  = d - sqrt((a - a.low)^2 + (b.high - b)^2)
        high = d + sqrt((a.high - a)^2 + (b - b.low)^2)

    Source: Newcombe 1998, method 10.
    """
    d = a.value - b.value
    low = d - math.hypot(a.value - a.low, b.high - b.value)
    high = d + math.hypot(a.high - a.value, b.value - b.low)
    return Difference(d, low, high)


def _wilson(p: float, n: float) -> tuple[float, float]:
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
