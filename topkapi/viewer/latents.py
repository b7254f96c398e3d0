"""The numbers of one latent: what the page of a latent shows above its examples.

Intervals are 95 %. Both take tokens as independent of each other, which tokens of one text are not quite:

    density     Poisson, exact: between the means of which a count as small, or as large, has a chance of 2.5 %
    importance  normal: importance +- 1.96 sqrt((E[a^4] - E[a^2]^2) / n_tokens), over all tokens; none below 10 firings
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import stats

from topkapi.data.language_model import LanguageModel
from topkapi.statistics.intervals import CONFIDENCE
from topkapi.study import Study
from topkapi.study.latent import Latent
from topkapi.viewer.modes import dip, find_modes
from topkapi.viewer.texts import Texts

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 50
BESIDE = 10  # latents of each kind of neighbour, and tokens voted for and against
VOTES_CAVEAT = (
    "What the decoder row would add to the logits if it went straight to the unembedding. Layers after the site and "
    "the final norm are passed over: the earlier the site, the less this says. An ablation measures."
)
FEWEST_FOR_INTERVAL = 10  # firings behind an interval of importance
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def describe(study: Study, some: Sequence[int]) -> list[dict[str, Any]]:
    """Everything that the study and the autoencoder say of some latents but their examples.

    One pass over the autoencoder finds the neighbours of all. Raises TopkapiError where there is no such latent.
    """
    each = [study.latent(i) for i in some]
    nearest = {by: study.nearest_of(some, BESIDE, by) for by in ("decoder", "encoder")}
    return [
        _numbers(latent)
        | {"nearest": {by: [one._asdict() for one in found[at]] for by, found in nearest.items()}}
        | {"coactive": _coactive(study, latent), "alignment": alignment(study, latent.i)}
        for at, latent in enumerate(each)
    ]


def _numbers(latent: Latent) -> dict[str, Any]:
    """What the study says of a latent's firings."""
    study, values = latent.study, latent.values.astype(np.float64)
    quantiles, histogram = latent.quantiles(QUANTILES), latent.histogram(BINS)
    tested = dip(latent.values)
    return {
        "i": latent.i,
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
    }


def votes(study: Study, some: Sequence[int], lm: LanguageModel, texts: Texts) -> list[dict[str, Any]]:
    """The tokens that some latents vote for and against; z is a logit over the standard deviation of the latent's
    logits over the vocabulary."""
    found = []
    for of in study.votes_of(some, lm, BESIDE):
        sides = {
            side: [
                vote._asdict()
                | {"text": texts.alone(vote.token), "z": vote.logit / of.deviation if of.deviation else 0.0}
                for vote in each
            ]
            for side, each in (("up", of.up), ("down", of.down))
        }
        found.append({**sides, "caveat": VOTES_CAVEAT})
    return found


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


def _coactive(study: Study, latent: Latent) -> list[dict[str, Any]] | None:
    """Latents that fire on the same tokens, with |both| / |either|; None where a reservoir keeps no code of tokens."""
    if study.reservoir:
        return None
    return [
        one._asdict() | {"jaccard": one.n_both / (latent.n_fired + int(study.n_fired[one.latent]) - one.n_both)}
        for one in latent.coactive(BESIDE)
    ]
