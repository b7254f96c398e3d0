"""Edits of other latents, for comparison: the same ones, of latents that are as active."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from topkapi.errors import TopkapiError
from topkapi.explore.edits import Edit
from topkapi.study import Study

NEAREST = 4  # latents to draw from, for each control


def matched_controls(study: Study, edits: Sequence[Edit], n_controls: int, seed: int = 0) -> list[list[Edit]]:
    """n_controls copies of `edits`, each of other latents, which are drawn from those nearest in activity.

    Nearest in log density and log maximum, each over its standard deviation among the latents that fired. Values stay
    what they are: as decoder rows have unit norm, every control pushes activations as far.

    Raises:
        TopkapiError: an edited latent never fired in the study, or too few others did; n_controls or seed is below 0.
    """
    if min(n_controls, seed) < 0:
        raise TopkapiError(f"controls and seed must be 0 or more; got {n_controls} controls and seed {seed}.")
    fired = np.flatnonzero(study.n_fired > 0)
    edited = sorted({edit.latent for edit in edits})
    if silent := sorted(set(edited) - set(fired.tolist())):
        raise TopkapiError(
            f"latent {silent[0]} never fired in the {study.n_tokens:,} tokens of {study.folder}: which latents are as "
            "active as it is cannot be said. Study more tokens."
        )
    others = np.setdiff1d(fired, edited)
    if len(others) < n_controls * len(edited):
        raise TopkapiError(
            f"{n_controls} controls of {len(edited)} latents each need {n_controls * len(edited)} other latents that "
            f"fired in the study; there are {len(others)}. Ask for fewer, or study more tokens."
        )
    activity = np.log(np.stack([study.n_fired[fired], study.arrays["maxima"][fired]], 1).astype(np.float64))
    activity /= np.maximum(activity.std(0), 1e-9)
    of = dict(zip(fired.tolist(), activity, strict=True))
    rng = np.random.default_rng([seed, *edited])
    chosen: dict[int, list[int]] = {}
    free = others.tolist()
    for latent in edited:
        free.sort(key=lambda other: (float(np.linalg.norm(of[other] - of[latent])), other))
        near = free[: NEAREST * n_controls]
        chosen[latent] = [near[i] for i in rng.choice(len(near), n_controls, replace=False)]
        free = [other for other in free if other not in set(chosen[latent])]
    return [[replace(edit, latent=chosen[edit.latent][i]) for edit in edits] for i in range(n_controls)]
