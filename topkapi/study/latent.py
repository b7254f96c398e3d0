"""What a study says of one latent: numbers of its firings, and the text around them.

Everything is found when asked for, from the entries of the latent; with a reservoir quantiles, histograms, positions
and examples are of a uniform sample of its firings, and `is_sample` says so.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt32

from topkapi.study.layout import damaged, path_of

if TYPE_CHECKING:
    from topkapi.study.reader import Study

BEFORE, AFTER = 24, 12  # tokens of text on each side of a firing
ROWS_AT_ONCE = 2**18  # whose codes are looked through for latents beside


class Example(NamedTuple):
    """One firing and the text around it, of its own context and document."""

    value: float
    row: int
    """The token's number among those encoded."""
    document: int
    """Number of the document in its split."""
    position: int
    """Of the token in its context, from 0."""
    at: int
    """Which of `tokens` fires."""
    tokens: list[int]
    values: list[float | None]
    """The latent's value at each of `tokens`; None where a token was not encoded. With a reservoir None for all but
    kept firings, as nothing is known of the others."""


class Histogram(NamedTuple):
    """How many firings have values in each bin, edges[i] <= value < edges[i + 1], the last edge included."""

    counts: Int64[np.ndarray, " bins"]
    edges: Float64[np.ndarray, " bins_plus_1"]


class Coactive(NamedTuple):
    """Another latent that fires on the same tokens."""

    latent: int
    n_both: int
    """Tokens on which both fire."""
    given_this: float
    """P(other fires | this one does)."""
    given_other: float
    """P(this one fires | other does)."""


class Latent:
    """One latent of a study. Where it never fired, what would be of its firings is None or empty, not 0."""

    def __init__(self, study: "Study", i: int) -> None:
        self.study, self.i = study, i
        start, end = study.arrays["latent_offsets"][i : i + 2]
        self.rows: UInt32[np.ndarray, " firings"] = study.arrays["latent_rows"][start:end]
        """Numbers of the encoded tokens on which it fires, ascending."""
        self.values: Float32[np.ndarray, " firings"] = study.arrays["latent_values"][start:end]
        """Its value at each of them, above 0."""
        self.chosen: Int64[np.ndarray, " chosen"] = np.arange(len(self.rows))
        """Numbers, ascending, of the firings that examples are taken from: all of them, see `between`."""
        self._require_counted()

    def _require_counted(self) -> None:
        """Raise TopkapiError where its entries are not those that its count and maximum are of: what is mapped is not
        read when a study is opened."""
        largest, maximum = self.values.max(initial=0.0), self.study.arrays["maxima"][self.i]
        same = len(self.values) == self.n_fired and largest == maximum
        if not (same or (self.study.reservoir and self.is_sample and largest <= maximum)):
            self._damaged("latent_values", "latent_offsets")
        if self.rows.max(initial=0) >= self.study.n_tokens:
            self._damaged("latent_rows", "latent_offsets")

    def _damaged(self, name: str, other: str) -> NoReturn:
        state = f"damaged, or {other}.bin is: what is there of latent {self.i} is not what was counted"
        raise damaged(path_of(self.study.folder, name), state)

    def between(self, low: float, high: float) -> "Latent":
        """The same latent, with examples taken from firings of low <= value < high alone."""
        other = Latent(self.study, self.i)
        other.chosen = np.flatnonzero((self.values >= np.float64(low)) & (self.values < np.float64(high)))
        return other

    @property
    def n_fired(self) -> int:
        """Tokens on which it fires."""
        return int(self.study.n_fired[self.i])

    @property
    def is_sample(self) -> bool:
        """Whether `rows` and `values` are a uniform sample of the firings and not all of them."""
        return len(self.rows) < self.n_fired

    @property
    def density(self) -> float:
        """Fraction of encoded tokens on which it fires."""
        return self.n_fired / self.study.n_tokens

    @property
    def importance(self) -> float:
        """Mean squared value over all encoded tokens."""
        return float(self.study.arrays["sum_squares"][self.i]) / self.study.n_tokens

    @property
    def mean(self) -> float | None:
        """Mean value of its firings; None if it never fired."""
        return float(self.study.arrays["sums"][self.i]) / self.n_fired if self.n_fired else None

    @property
    def maximum(self) -> float | None:
        """Its largest value, of all firings; None if it never fired."""
        return float(self.study.arrays["maxima"][self.i]) if self.n_fired else None

    def quantiles(self, at: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float] | None:
        """Quantiles of its firings' values, linear between neighbours; None if it never fired."""
        return np.quantile(self.values.astype(np.float64), at).tolist() if len(self.values) else None

    def histogram(self, bins: int = 50) -> Histogram | None:
        """Its firings' values in equal bins from 0 to its maximum; None if it never fired."""
        if self.maximum is None:
            return None
        return Histogram(*np.histogram(self.values.astype(np.float64), bins, (0.0, self.maximum)))

    def positions(self) -> Int64[np.ndarray, " context"] | None:
        """Its firings at each position of a context, beside `Study.context_positions`; None if it never fired."""
        if not len(self.rows):
            return None
        where = self.study.arrays["positions"][self.rows] % self.study.context
        return np.bincount(where, minlength=self.study.context)

    @cached_property
    def _falling(self) -> Int64[np.ndarray, " chosen"]:
        """The chosen firings in the order of falling values; ties by row."""
        return self.chosen[np.argsort(-self.values[self.chosen], kind="stable")]

    def top(self, n: int = 10) -> list[Example]:
        """Its strongest firings, falling, at most one a context, and none whose shown tokens were shown before.

        With a reservoir the strongest of the sample.
        """
        found, contexts, shown, positions = [], set(), set(), self.study.arrays["positions"]
        for entry in self._falling.tolist():
            if len(found) == n:
                break
            if (context := int(positions[self.rows[entry]]) // self.study.context) in contexts:
                continue
            example = self.example(entry)
            if (text := (example.at, *example.tokens)) not in shown:
                found.append(example)
                contexts.add(context)
                shown.add(text)
        return found

    def random(self, n: int = 10, seed: int = 0) -> list[Example]:
        """Firings drawn uniformly without replacement, in the order drawn; the same for the same seed."""
        return [self.example(entry) for entry in self._draw(self.chosen, n, seed)]

    def by_quantile(self, groups: int = 5, n: int = 5, seed: int = 0) -> list[list[Example]]:
        """Firings drawn as `random` does from each of `groups` equal shares of them, the strongest share first.

        Shares differ by one firing at most; some are empty where it fired on fewer tokens than there are groups.
        """
        shares = np.array_split(self._falling, groups)
        return [[self.example(e) for e in self._draw(share, n, [seed, i])] for i, share in enumerate(shares)]

    def near_misses(self, n: int = 10) -> list[Example]:
        """Its weakest firings, rising: the smallest values above 0.

        They stand for tokens on which it almost fires, which a TopK code does not show: what is not among the k
        largest of its token, or below 0, is not kept.
        """
        order = np.argsort(self.values[self.chosen], kind="stable")[:n]
        return [self.example(entry) for entry in self.chosen[order].tolist()]

    def coactive(self, n: int = 10) -> list[Coactive]:
        """The n latents that fire most often on the tokens on which it does, falling; ties by number.

        Raises:
            TopkapiError: the study keeps a reservoir, or is damaged: on those tokens it is not active itself.
        """
        study = self.study
        study.require_complete("co-activation")
        both = np.zeros(study.n_latents, np.int64)
        for start in range(0, len(self.rows), ROWS_AT_ONCE):
            offsets, indices = study.arrays["row_offsets"], study.arrays["indices"]
            rows = self.rows[start : start + ROWS_AT_ONCE].astype(np.int64)
            begin = offsets[rows]
            length = offsets[rows + 1] - begin
            if min(begin.min(), length.min()) < 0 or (begin + length).max() > len(indices):
                self._damaged("row_offsets", "latent_rows")
            ends = np.cumsum(length)
            entries = np.arange(ends[-1]) + np.repeat(begin - ends + length, length)
            found = indices[entries]
            if found.max() >= study.n_latents:  # counting would take memory for as many
                self._damaged("indices", "latent_rows")
            both += np.bincount(found, minlength=study.n_latents)
        if both[self.i] != len(self.rows):
            self._damaged("indices", "latent_rows")
        both[self.i] = 0
        order = np.argsort(-both, kind="stable")[:n]
        counts = [(int(j), int(both[j])) for j in order if both[j]]
        return [Coactive(j, c, c / self.n_fired, c / int(study.n_fired[j])) for j, c in counts]

    def example(self, entry: int) -> Example:
        """Firing number `entry` of `rows` with the text around it: BEFORE tokens before and AFTER after it, as far as
        its context and its document reach."""
        arrays, row = self.study.arrays, int(self.rows[entry])
        number, position, source, document = self.study.place(row)
        begin = number * self.study.context  # of its context, in the study's text
        at = begin + position
        documents = arrays["document_offsets"]
        first = max(begin, at - BEFORE, at - (source - int(documents[document])))
        end = min(begin + self.study.context, at + AFTER + 1, at + int(documents[document + 1]) - source)
        return Example(
            value=float(self.values[entry]),
            row=row,
            document=document,
            position=position,
            at=at - first,
            tokens=arrays["tokens"][first:end].tolist(),
            values=self._values_at(first, end),
        )

    def _values_at(self, first: int, end: int) -> list[float | None]:
        """Its values at places first to end of the study's text."""
        places = self.study.arrays["positions"]
        rows = np.arange(*(int(i) for i in np.searchsorted(places, np.array([first, end], places.dtype))))
        known = {} if self.is_sample else dict.fromkeys(places[rows].tolist(), 0.0)
        entries = np.arange(*np.searchsorted(self.rows, np.array([rows[0], rows[-1] + 1], self.rows.dtype)))
        known |= dict(zip(places[self.rows[entries]].tolist(), self.values[entries].tolist(), strict=True))
        return [known.get(place) for place in range(first, end)]

    def _draw(self, among: Int64[np.ndarray, " firings"], n: int, seed: int | list[int]) -> list[int]:
        generator = np.random.default_rng([*np.atleast_1d(seed).tolist(), self.i])
        return generator.choice(among, min(n, len(among)), replace=False).tolist() if len(among) else []
