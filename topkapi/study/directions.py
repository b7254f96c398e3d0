"""What a latent's directions say by themselves: latents beside it, and tokens that its decoder row votes for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError

ROWS_AT_ONCE = 2**16  # of W_dec or of the unembedding in float32


class Neighbour(NamedTuple):
    """Another latent and the cosine with its direction."""

    latent: int
    cosine: float


class Vote(NamedTuple):
    """A token and what the latent adds to its logit, less the mean over the vocabulary."""

    token: int
    logit: float


class Votes(NamedTuple):
    """The tokens voted for most, falling, and against most, rising."""

    up: list[Vote]
    down: list[Vote]
    deviation: float
    """Standard deviation of the latent's logits over the vocabulary."""


def lengths(weight: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, " n_latents"]:
    """The norm of each row, in float32, at least the smallest normal number."""
    found = torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in weight.split(ROWS_AT_ONCE)])
    return found.clamp_min(torch.finfo(torch.float32).tiny)


def nearest(
    weight: Float[Tensor, "n_latents d_model"],
    norms: Float[Tensor, " n_latents"],
    latents: Sequence[int],
    n: int,
) -> list[list[Neighbour]]:
    """For each of some latents the n others of the largest cosine with it, falling; ties by number.

        cosine(i, j) = <w_i, w_j> / (|w_i| |w_j|), 0 where a row is 0

    `norms` are `lengths(weight)`. Cost: one pass over `weight`. Memory: n_latents floats for each of `latents`.
    """
    chosen = list(latents)
    cosines, scale = _products(weight[chosen].float(), weight), norms.cpu().numpy()
    cosines /= scale
    cosines /= scale[chosen, None]
    cosines[np.arange(len(chosen)), chosen] = -np.inf
    n = min(n, len(weight) - 1)
    return [[Neighbour(*pair) for pair in zip(*_largest(row, n), strict=True)] for row in cosines]


def votes(directions: Float[Tensor, "m d_model"], lm: LanguageModel, n: int) -> list[Votes]:
    """What each decoder row would add to the logits if it went straight from the site to the unembedding.

        logit[token] = <W_unembedding[token], direction>  - mean over the vocabulary, which no probability depends on

    To be read with care. Layers after the site, which read the direction and may turn it, are passed over; so is the
    final norm, its gain and its centring: a gain that differs between coordinates can change the order. The row has
    the scale of normalised activations: times a value and the token's norm at the site it is a change of activation.
    The earlier the site, the less votes say. Measure what matters by ablation.

    Raises:
        TopkapiError: the language model has no unembedding, or of another width.
    """
    unembedding = lm.model.get_output_embeddings()
    weight = None if unembedding is None else unembedding.weight
    if weight is None or weight.shape[1] != directions.shape[1]:
        raise TopkapiError(f"{lm.name} has no output matrix of width {directions.shape[1]} to vote with.")
    logits = _products(directions.to(weight.device).float(), weight.detach())
    logits -= logits.mean(1, keepdims=True, dtype=np.float64)
    found = []
    for row in logits:
        up, down = _largest(row, n), _largest(-row, n)
        against = zip(down[0], (-logit for logit in down[1]), strict=True)
        spread = float(row.std(dtype=np.float64))
        found.append(Votes([Vote(*pair) for pair in zip(*up, strict=True)], [Vote(*pair) for pair in against], spread))
    return found


def _products(a: Float[Tensor, "m d_model"], weight: Float[Tensor, "n d_model"]) -> Float32[np.ndarray, "m n"]:
    """a weight^T, some rows of `weight` in float32 at a time.

    What is done with it is left to numpy: it is little, and threads of torch would wait for each other at every step
    where other programs use the cores.
    """
    found = np.empty((len(a), len(weight)), np.float32)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[start : start + ROWS_AT_ONCE].float()
        found[:, start : start + len(rows)] = (a @ rows.T).cpu().numpy()
    return found


def _largest(values: Float32[np.ndarray, " m"], n: int) -> tuple[list[int], list[float]]:
    """Where the n largest values are, and they, falling; ties by place."""
    if n == 0:
        return [], []
    at = np.flatnonzero(values >= np.partition(values, len(values) - n)[-n])  # more than n where some are equal
    order = at[np.argsort(-values[at], kind="stable")][:n]
    return order.tolist(), values[order].tolist()
