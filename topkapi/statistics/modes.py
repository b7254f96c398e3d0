"""Whether a sample has one mode, and how many: Hartigans' dip test, and counted peaks of a density estimate.

The dip of a sample is the least distance, in the supremum of distribution functions, to any unimodal distribution:
one whose distribution function is convex up to a mode, and concave from there on (it may jump at the mode).

1. G, the greatest convex minorant of the empirical distribution function between two points (at first the ends), and
   L, its least concave majorant
2. where L - G is largest, at a corner of one of them, begins or ends a modal interval; the other end is the
   neighbouring corner of the other
3. outside it, left of it for G and right of it for L, the sample is as far from them as it must be from a unimodal
   distribution; the dip is half of the largest such distance
4. on from 1 in the modal interval, until L - G is no larger than that distance or the interval no longer shrinks

It is done for many samples at a time: they lie behind one another in flat arrays.

Source: Hartigan and Hartigan 1985. Activations of latents often have several modes, more so in early layers (Gao et
al. 2024, appendix E.3); log densities were not seen to (E.4).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

from topkapi.statistics.intervals import checked_sample

LARGEST_SIMULATED = 1000  # sqrt(n) dip: 95 % quantile 0.458 for n = 20, 0.505 for 200, 0.538 for 1000
THINNING = 0.1  # a pass over the corners that removes less is followed by one that is exact
GRID = 512
LARGEST_GRID = 2**20  # of samples with outliers very far away
CELLS_A_BANDWIDTH = 8
GRID_MARGIN = 4.0  # bandwidths beyond the sample


@dataclass(frozen=True)
class DipTest:
    """A sample's dip, and how often a sample of the uniform distribution has one as large."""

    dip: float
    p_value: float


@dataclass(frozen=True)
class Modes:
    """The modes of a sample, from left to right, and the density estimate that shows them."""

    positions: Float[np.ndarray, " n_modes"]
    heights: Float[np.ndarray, " n_modes"]
    bandwidth: float
    """Standard deviation of the Gaussian kernel, in the unit of the sample."""
    grid: Float[np.ndarray, " n_grid"]
    density: Float[np.ndarray, " n_grid"]

    def __len__(self) -> int:
        return len(self.positions)


def dip_test(sample: Float[np.ndarray, " n"], n_simulated: int = 1000, seed: int = 0) -> DipTest:
    """The dip of a sample and its p-value against the uniform, the unimodal distribution with the largest dips.

        p = (1 + simulated dips at least as large) / (1 + n_simulated)

    Simulated samples have the sample's size up to 1000; beyond that sqrt(n) dip is compared. They are made once for a
    size and seed. The test is for continuous quantities: many equal values count as modes.

    Raises:
        TopkapiError: fewer than 4 values, or one is not finite.
    """
    sample = checked_sample(sample, "The sample", 4)
    found = dip(sample)
    n = min(len(sample), LARGEST_SIMULATED)
    simulated = _uniform_dips(n, n_simulated, seed)
    exceeding = np.count_nonzero(np.sqrt(n) * simulated >= np.sqrt(len(sample)) * found)
    return DipTest(found, (1 + int(exceeding)) / (1 + n_simulated))


def dip(sample: Float[np.ndarray, " n"]) -> float:
    """The dip of a sample: from 1 / (2 n), for equal distances say, to 1 / 4, half at each of two points. Exact.

    Raises:
        TopkapiError: no values, or one is not finite.
    """
    return float(_dips(np.sort(checked_sample(sample, "The sample", 1))[None])[0])


def count_modes(sample: Float[np.ndarray, " n"], prominence: float = 0.01, deviations: float | int = 3) -> Modes:
    """The peaks of a kernel density estimate that stand out, from the highest valley around them, in two ways.

    By at least `prominence` times the highest peak, and by `deviations` standard deviations of the estimate there:

        bandwidth = 0.9 min(standard deviation, interquartile range / 1.34) n^(-1/5)
        deviation(height) = sqrt(height / (2 sqrt(pi) n bandwidth))

    The kernel is Gaussian. The bandwidth is Silverman's (1986, eq. 3.31), right for one mode and wide for several, so
    modes closer than about three bandwidths are counted as one.

    Raises:
        TopkapiError: fewer than 4 values, or one is not finite.
    """
    sample = checked_sample(sample, "The sample", 4)
    n = len(sample)
    quartiles = np.quantile(sample, [0.25, 0.75])
    spreads = [float(sample.std(ddof=1)), float(quartiles[1] - quartiles[0]) / 1.34]
    spread = min((one for one in spreads if one > 0), default=0.0)
    if spread == 0:
        return Modes(sample[:1], np.array([np.inf]), 0.0, sample[:1], np.array([np.inf]))
    bandwidth = 0.9 * spread * n**-0.2
    low, high = sample.min() - GRID_MARGIN * bandwidth, sample.max() + GRID_MARGIN * bandwidth
    cells = int(np.clip(CELLS_A_BANDWIDTH * (high - low) / bandwidth, GRID, LARGEST_GRID))
    counts, edges = np.histogram(sample, cells, (low, high))
    width = float(edges[1] - edges[0])
    density = gaussian_filter1d(counts / (n * width), bandwidth / width, mode="constant", truncate=GRID_MARGIN)
    peaks, found = find_peaks(density, prominence=prominence * density.max())
    deviation = np.sqrt(density[peaks] / (2 * np.sqrt(np.pi) * n * bandwidth))
    peaks = peaks[found["prominences"] >= deviations * deviation]
    if not len(peaks):
        peaks = density.argmax(keepdims=True)
    grid = (edges[:-1] + edges[1:]) / 2
    return Modes(grid[peaks], density[peaks], bandwidth, grid, density)


@cache
def _uniform_dips(n: int, n_simulated: int, seed: int) -> Float[np.ndarray, " n_simulated"]:
    samples = np.random.default_rng(seed).random((n_simulated, n))
    return _dips(np.sort(samples, 1))


def _dips(samples: Float[np.ndarray, "n_samples n"]) -> Float[np.ndarray, " n_samples"]:
    """The dip of each row; rows are sorted.

    Just below a value the empirical distribution function is `below`, from it on `upto`, both in counts; distances are
    halved and divided by n at the end. Equal values lie above one another, where G is the lowest of `below` and L the
    highest of `upto`.
    """
    n_samples, n = samples.shape
    x, row = samples.ravel(), np.repeat(np.arange(n_samples), n)
    below = np.tile(np.arange(n, dtype=float), n_samples)
    low = n * np.arange(n_samples)
    high = low + n - 1
    distance = np.ones(n_samples)  # no distribution comes nearer to both ends of a step
    active = np.arange(n_samples)
    while len(active):
        points = np.concatenate([np.arange(low[one], high[one] + 1) for one in active])
        found = _modal_intervals(x[points], below[points], row[points])
        goes_on = found.gap > distance[active]
        reached = np.maximum(distance[active], found.outside)
        distance[active] = np.where(goes_on, reached, distance[active])
        new_low, new_high = points[found.low], points[found.high]
        goes_on &= (found.gap > reached) & ((new_low > low[active]) | (new_high < high[active]))
        low[active], high[active] = new_low, new_high
        active = active[goes_on]
    return distance / (2 * n)


@dataclass(frozen=True)
class _ModalIntervals:
    """Steps 1 to 3 of the module's docstring, of each row."""

    gap: Float[np.ndarray, " n_rows"]
    """The largest L - G."""
    low: Int[np.ndarray, " n_rows"]
    high: Int[np.ndarray, " n_rows"]
    outside: Float[np.ndarray, " n_rows"]
    """The largest distance from G left of `low`, and from L right of `high`; 0 where nothing lies there."""


def _modal_intervals(
    x: Float[np.ndarray, " n_points"],
    below: Float[np.ndarray, " n_points"],
    row: Int[np.ndarray, " n_points"],
) -> _ModalIntervals:
    index, upto = np.arange(len(x)), below + 1
    starts = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
    lengths = np.diff(np.append(starts, len(x)))
    edge = np.zeros(len(x), bool)
    edge[starts] = edge[starts + lengths - 1] = True
    corner_g, corner_l = _hull_corners(x, below, edge), _hull_corners(x, -upto, edge)
    g, l = _along(x, below, corner_g), _along(x, upto, corner_l)  # noqa: E741

    gap = np.where(corner_g | corner_l, l - g, -1.0)
    largest = np.maximum.reduceat(gap, starts)
    widest = np.flatnonzero(gap == np.repeat(largest, lengths))
    widest = widest[np.unique(row[widest], return_index=True)[1]]
    low = np.where(corner_g[widest], widest, _previous(corner_g)[widest])
    high = np.where(corner_g[widest], _next(corner_l)[widest], widest)

    left, right = index < np.repeat(low, lengths), index > np.repeat(high, lengths)
    outside = np.maximum(np.where(left, upto - g, 0.0), np.where(right, l - below, 0.0))
    return _ModalIntervals(largest, low, high, np.maximum.reduceat(outside, starts))


def _hull_corners(
    x: Float[np.ndarray, " n_points"], y: Float[np.ndarray, " n_points"], edge: Bool[np.ndarray, " n_points"]
) -> Bool[np.ndarray, " n_points"]:
    """Which points are corners of the greatest convex minorant between edges, the first and last points of the rows.

    A point on or above the line between any two others is no corner, so all that lie so with respect to their
    neighbours go at once; when few do, one pass from left to right with a stack (Andrew 1979) finds the others.
    """
    kept = np.arange(len(x))
    while len(kept) > 2:
        dx, dy = np.diff(x[kept]), np.diff(y[kept])
        goes = (dy[:-1] * dx[1:] >= dy[1:] * dx[:-1]) & ~edge[kept[1:-1]]
        kept = np.delete(kept, np.flatnonzero(goes) + 1)
        if np.count_nonzero(goes) < THINNING * len(kept):
            break
    xs, ys, fixed = x[kept].tolist(), y[kept].tolist(), edge[kept].tolist()
    stack: list[int] = []
    for c in range(len(kept)):
        while len(stack) > 1 and not fixed[b := stack[-1]]:
            a = stack[-2]
            if (ys[b] - ys[a]) * (xs[c] - xs[b]) < (ys[c] - ys[b]) * (xs[b] - xs[a]):
                break
            stack.pop()
        stack.append(c)
    corner = np.zeros(len(x), bool)
    corner[kept[stack]] = True
    return corner


def _along(
    x: Float[np.ndarray, " n_points"], y: Float[np.ndarray, " n_points"], corner: Bool[np.ndarray, " n_points"]
) -> Float[np.ndarray, " n_points"]:
    """The height at each point of the lines from corner to corner."""
    a, b = _previous(corner), _next(corner)
    width = x[b] - x[a]
    return y[a] + (y[b] - y[a]) * np.divide(x - x[a], width, out=np.zeros(len(x)), where=width > 0)


def _previous(corner: Bool[np.ndarray, " n_points"]) -> Int[np.ndarray, " n_points"]:
    """Index of the last corner at or before each point."""
    return np.maximum.accumulate(np.where(corner, np.arange(len(corner)), 0))


def _next(corner: Bool[np.ndarray, " n_points"]) -> Int[np.ndarray, " n_points"]:
    """Index of the first corner at or after each point."""
    last = len(corner) - 1
    return last - _previous(corner[::-1])[::-1]
