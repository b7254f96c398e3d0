"""The numbers of one latent: what the page of a latent shows above its examples.

Intervals are 95 %. Both take tokens as independent of each other, which tokens of one text are not quite:

    density     Poisson, exact: between the means of which a count as small, or as large, has a chance of 2.5 %
    importance  normal: importance +- 1.96 sqrt((E[a^4] - E[a^2]^2) / n_tokens), over all tokens; none below 10 firings
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import stats

from topkapi.statistics.intervals import CONFIDENCE
from topkapi.study import Study
from topkapi.study.latent import Latent
from topkapi.viewer.modes import dip, find_modes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 50
BESIDE = 10  # latents of each kind of neighbour
FEWEST_FOR_INTERVAL = 10  # firings behind an interval of importance
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def describe(study: Study, i: int) -> dict[str, Any]:
    """Everything that the study and the autoencoder say of latent i but its examples. Raises TopkapiError: no such."""
    latent = study.latent(i)
    values = latent.values.astype(np.float64)
    quantiles, histogram = latent.quantiles(QUANTILES), latent.histogram(BINS)
    tested = dip(latent.values)
    return {
        "i": i,
        "n_fired": latent.n_fired,
        "n_tokens": study.n_tokens,
        "density": latent.density,
        "density_interval": density_interval(latent.n_fired, study.n_tokens),
        "importance": latent.importance,
        "importance_interval": importance_interval(latent, values),
        "mean": latent.mean,
        "maximum": latent.maximum,
        "quantiles": None if quantiles is None else dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        "skewness": standardised(values, 3),
        "kurtosis": standardised(values, 4),
        "is_sample": latent.is_sample,
        "histogram": None if histogram is None else {"edges": histogram.edges, "counts": histogram.counts},
        "modes": [vars(mode) for mode in find_modes(latent.values)],
        "dip": None if tested is None else tested._asdict(),
        "positions": {"fired": latent.positions(), "encoded": study.context_positions},
        "nearest": {by: _nearest(study, i, by) for by in ("decoder", "encoder")},
        "coactive": _coactive(study, latent),
        "alignment": alignment(study, i),
    }


def density_interval(n_fired: int, n_tokens: int) -> list[float]:
    """The exact interval of a Poisson rate: n_fired firings in n_tokens.

        low = chi2.ppf(0.025, 2 n_fired) / (2 n_tokens),  high = chi2.ppf(0.975, 2 n_fired + 2) / (2 n_tokens)

    Source: Garwood 1936.
    """
    tail = (1 - CONFIDENCE) / 2
    low = float(stats.chi2.ppf(tail, 2 * n_fired)) if n_fired else 0.0
    return [low / 2 / n_tokens, min(1.0, float(stats.chi2.ppf(1 - tail, 2 * n_fired + 2)) / 2 / n_tokens)]


def importance_interval(latent: Latent, values: Float64[np.ndarray, " firings"]) -> list[float] | None:
    """See the module's docstring; E[a^4] is of the sample of firings, where a reservoir keeps no more."""
    if len(values) < FEWEST_FOR_INTERVAL:
        return None
    fourth = float((values**4).mean()) * latent.density
    half = Z * math.sqrt(max(0.0, fourth - latent.importance**2) / latent.study.n_tokens)
    return [max(0.0, latent.importance - half), latent.importance + half]


def standardised(values: Float64[np.ndarray, " firings"], power: int) -> float | None:
    """E[a^power] / E[a^2]^(power / 2) over firings: about zero, not about the mean. None if it never fired."""
    return float((values**power).mean() / (values**2).mean() ** (power / 2)) if len(values) else None


def alignment(study: Study, i: int) -> float:
    """The cosine of latent i's encoder and decoder row; 0 where one is 0."""
    ae = study.autoencoder
    encoder, decoder = ae.W_enc[i].detach().double(), ae.W_dec[i].detach().double()
    length = float(encoder.norm() * decoder.norm())
    return float(encoder @ decoder) / length if length else 0.0


def _nearest(study: Study, i: int, by: str) -> list[dict[str, Any]]:
    return [one._asdict() for one in study.nearest(i, BESIDE, by)]


def _coactive(study: Study, latent: Latent) -> list[dict[str, Any]] | None:
    """Latents that fire on the same tokens, with |both| / |either|; None where a reservoir keeps no code of tokens."""
    if study.reservoir:
        return None
    return [
        one._asdict() | {"jaccard": one.n_both / (latent.n_fired + int(study.n_fired[one.latent]) - one.n_both)}
        for one in latent.coactive(BESIDE)
    ]
