"""The dictionary as a whole: distributions over latents, how training went, what was measured."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from topkapi.errors import TopkapiError
from topkapi.results import read_metrics
from topkapi.statistics.densities import LogFit, compare, count_latents, cumulative_share, dense_mass, dense_measure
from topkapi.study import Study
from topkapi.viewer.answers import finite
from topkapi.viewer.runs import evaluation

BINS = 60
POINTS = 400  # of a curve, at most
ROWS_AT_ONCE = 2**14  # of W_enc and W_dec
LN10 = math.log(10)


def of_study(study: Study) -> dict[str, Any]:
    """What the page of the whole dictionary shows of a study, which does not change."""
    return {
        "density": distribution(study.density),
        "importance": distribution(study.importance),
        "cumulative": _cumulative(study.importance),
        "dense": _dense(study),
        "alignment": _alignment(study),
    }


def of_run(run: Path) -> dict[str, Any]:
    """What it shows of files that grow and come while the run is looked at."""
    measured = evaluation(run)
    return {
        "training": training(run),
        "evaluation": measured.metrics,
        "evaluation_problem": measured.problem,
    }


def distribution(values: Float64[np.ndarray, " n_latents"]) -> dict[str, Any]:
    """A histogram of log10 of the values above zero, and the Gaussian and the Laplace distribution fitted to them.

    Fits are None, and `why` says why, where there is too little to fit.
    """
    logs = np.log10(values[values > 0])
    n_dead = len(values) - len(logs)
    if not len(logs):
        return {"edges": [], "counts": [], "fits": None, "why": "no latent fired", "n_dead": n_dead, "better": None}
    counts, edges = np.histogram(logs, BINS)
    found: dict[str, Any] = {"edges": edges, "counts": counts, "n_dead": n_dead}
    try:
        fits = compare(values)
    except TopkapiError as error:
        return found | {"fits": None, "why": str(error), "better": None}
    return found | {
        "fits": {fit.family: _fit(fit, edges) for fit in (fits.gaussian, fits.laplace)},
        "log_likelihood_ratio": fits.log_likelihood_ratio,
        "log_likelihood_ratio_interval": list(fits.interval),
        "p": fits.p_value,
        "better": fits.preferred,
    }


def _fit(fit: LogFit, edges: Float64[np.ndarray, " edges"]) -> dict[str, Any]:
    """A fit in units of log10, and `curve`: the count that it expects in a bin around each edge."""
    density = np.exp(fit.log_density(edges * LN10)) * LN10  # a decade
    return {
        "location": fit.location / LN10,
        "location_interval": [bound / LN10 for bound in fit.location_interval],
        "scale": fit.scale / LN10,
        "scale_interval": [bound / LN10 for bound in fit.scale_interval],
        "log_likelihood": fit.log_likelihood,
        "n": fit.n,
        "curve": density * fit.n * float(edges[1] - edges[0]),
    }


def _cumulative(importance: Float64[np.ndarray, " n_latents"]) -> dict[str, Any]:
    """How much of all importance the most important latents have together; from 0 of both on."""
    if not importance.any():
        return {"share_of_latents": [], "share_of_importance": []}
    n = len(importance)
    at = np.unique(np.geomspace(1, n, POINTS).astype(int)) - 1
    shares = cumulative_share(importance)[at]
    return {"share_of_latents": [0, *((at + 1) / n).tolist()], "share_of_importance": [0, *shares.tolist()]}


def _dense(study: Study) -> dict[str, Any]:
    """The dense measure and mass of the d_model densest latents, and the values that they lie between."""
    density, n = study.density, study.n_latents
    d_model = min(study.header["about"]["d_model"], n)
    found = {"d_model": d_model, "bounds": [1 / n, 1 / d_model], "measure": None, "mass": None}
    found["n_dense"] = {str(bound): count_latents(density, bound).n_dense for bound in (0.1, 0.5)}
    if l0 := float(density.sum()):
        found |= {"measure": dense_measure(density, d_model, l0), "mass": dense_mass(density, d_model, l0)}
    return found


@torch.no_grad()
def _alignment(study: Study) -> dict[str, Any]:
    """How many latents have which cosine of encoder and decoder row."""
    ae = study.autoencoder
    parts = zip(ae.W_enc.split(ROWS_AT_ONCE), ae.W_dec.split(ROWS_AT_ONCE), strict=True)
    cosines = torch.cat([torch.nn.functional.cosine_similarity(encoder, decoder) for encoder, decoder in parts])
    counts, edges = np.histogram(cosines.cpu().numpy(), BINS, (-1, 1))
    return {"edges": edges, "counts": counts}


def training(run: Path) -> dict[str, Any]:
    """The series of metrics.jsonl, evenly thinned to some hundred points; lines that are damaged are passed over."""
    try:
        lines = read_metrics(run, skip_damaged=True)
    except OSError:
        lines = []
    rows = [line for line in lines if finite(line["tokens"]) is not None]
    rows = rows[:: max(1, -(-len(rows) // POINTS))]
    names = {name: None for row in rows for name in row if name not in ("tokens", "step")}  # in the order written
    series = {name: [finite(row.get(name)) for row in rows] for name in names}
    return {"tokens": [row["tokens"] for row in rows], "series": series}
