"""What a latent's directions say by themselves: latents beside it, and tokens that its decoder row votes for."""

from typing import NamedTuple

import torch
from jaxtyping import Float
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


def nearest(weight: Float[Tensor, "n_latents d_model"], i: int, n: int) -> list[Neighbour]:
    """The n other latents of the largest cosine with latent i, falling; ties by number.

        cosine(i, j) = <w_i, w_j> / (|w_i| |w_j|), 0 where a row is 0

    Cost: one pass over `weight`.
    """
    own = weight[i].float()
    parts = [
        torch.nn.functional.cosine_similarity(rows.float(), own[None], dim=1) for rows in weight.split(ROWS_AT_ONCE)
    ]
    cosines = torch.cat(parts)
    cosines[i] = -torch.inf
    values, order = cosines.sort(descending=True, stable=True)
    n = min(n, len(cosines) - 1)
    return [Neighbour(*pair) for pair in zip(order[:n].tolist(), values[:n].tolist(), strict=True)]


def votes(direction: Float[Tensor, " d_model"], lm: LanguageModel, n: int) -> Votes:
    """What a decoder row would add to the logits if it went straight from the site to the unembedding.

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
    if weight is None or weight.shape[1] != len(direction):
        raise TopkapiError(f"{lm.name} has no output matrix of width {len(direction)} to vote with.")
    direction = direction.to(weight.device).float()
    logits = torch.cat([rows.float() @ direction for rows in weight.detach().split(ROWS_AT_ONCE)]).cpu()
    logits -= logits.mean()
    falling, order = logits.sort(descending=True, stable=True)
    rising, reverse = logits.sort(stable=True)
    return Votes(
        [Vote(*pair) for pair in zip(order[:n].tolist(), falling[:n].tolist(), strict=True)],
        [Vote(*pair) for pair in zip(reverse[:n].tolist(), rising[:n].tolist(), strict=True)],
        float(logits.std(correction=0)),
    )
