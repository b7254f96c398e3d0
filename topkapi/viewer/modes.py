"""The modes of a latent's firings, as the table and the latent's page count them, in bounded time.

Both look at MOST_FIRINGS firings at most, evenly spaced in the order of the text, so that they agree.
"""

from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from topkapi.statistics.modes import count_modes, dip_test

MOST_FIRINGS = 2**14
FEWEST = 10  # firings that may show more than one mode
MOST_FOR_DIP = 1_000  # firings: the test costs as much for each number of them that it has not met
N_SIMULATED = 99
SIZES = np.unique(np.geomspace(FEWEST, MOST_FOR_DIP, 30).astype(int))  # numbers of firings that the test may meet


@dataclass(frozen=True)
class Mode:
    """A peak of the density of values, and the valleys around it: firings of low <= value < high are its own."""

    low: float
    high: float
    peak: float
    share: float
    """Of the firings looked at."""


class Dip(NamedTuple):
    """Hartigans' dip test of `n` of the firings: how likely one mode would give a dip as large."""

    statistic: float
    p: float
    n: int


def find_modes(values: Float32[np.ndarray, " firings"]) -> list[Mode]:
    """The modes, rising (`topkapi.statistics.modes.count_modes`); one for up to 9 firings, none without any.

    Neighbours meet where the density estimate between their peaks is lowest; together they hold every firing.
    """
    if not len(values):
        return []
    end = float(np.nextafter(values.max(), np.float32(np.inf)))
    some = _evenly(values, MOST_FIRINGS)
    if len(values) < FEWEST:
        return [Mode(0.0, end, float(np.median(some)), 1.0)]
    found = count_modes(some)
    peaks = np.searchsorted(found.grid, found.positions)
    cuts = [found.grid[a + found.density[a:b].argmin()] for a, b in pairwise(peaks)]
    edges = np.array([0.0, *cuts, end])
    shares = np.histogram(some, edges)[0] / len(some)
    rows = zip(pairwise(edges.tolist()), found.positions.tolist(), shares.tolist(), strict=True)
    return [Mode(*ends, peak, share) for ends, peak, share in rows]


def dip(values: Float32[np.ndarray, " firings"]) -> Dip | None:
    """The dip test of as many firings as SIZES has at most; None below 10."""
    if len(values) < FEWEST:
        return None
    n = int(SIZES[np.searchsorted(SIZES, len(values), side="right") - 1])
    found = dip_test(_evenly(values, n), N_SIMULATED)
    return Dip(found.dip, found.p_value, n)


def warm_up(stop: Event) -> None:
    """Simulate what `dip` compares with for every number of firings that it may meet: seconds, which it then lacks."""
    for n in SIZES.tolist():
        if not stop.is_set():
            dip(np.linspace(0.0, 1.0, n, dtype=np.float32))


def _evenly(values: Float32[np.ndarray, " firings"], most: int) -> Float[np.ndarray, " some"]:
    """At most so many of the values, at even distances."""
    at = np.arange(most) * len(values) // most if len(values) > most else slice(None)
    return values[at].astype(np.float64)
