"""Which latents two dictionaries share, of two seeds say, by the cosines of their decoder rows.

Paulo and Belrose 2025 found 53 % of 32 768 latents (Pythia 160M) and 30 % of 131 072 (Llama 3 8B) shared by two seeds,
counting pairs of a one-to-one assignment with a cosine of at least 0.7 in decoder and encoder. Here each latent is free
to choose, by its decoder row alone, so `rate_a` and `rate_b` can only be larger; `mutual_rate` is the share of pairs
that choose each other.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError

CHUNK = 4096  # rows of each decoder at a time: 64 MiB of cosines


@dataclass(frozen=True)
class Matching:
    """Each latent's nearest latent of the other dictionary."""

    cosine_a: Float[Tensor, " n_latents_a"]
    """Cosine of each latent of a with its nearest of b."""
    nearest_a: Int[Tensor, " n_latents_a"]
    """Index of that latent of b; among equals the lowest."""
    cosine_b: Float[Tensor, " n_latents_b"]
    nearest_b: Int[Tensor, " n_latents_b"]

    def rate_a(self, threshold: float) -> float:
        """Share of latents of a whose nearest of b has at least this cosine."""
        return int((self.cosine_a >= threshold).sum()) / len(self.cosine_a)

    def rate_b(self, threshold: float) -> float:
        """Share of latents of b whose nearest of a has at least this cosine."""
        return int((self.cosine_b >= threshold).sum()) / len(self.cosine_b)

    def mutual_pairs(self, threshold: float) -> Int[Tensor, "n_pairs 2"]:
        """Latents of a and of b that are each other's nearest, at least this near; a latent is in one pair at most."""
        a = torch.arange(len(self.nearest_a), device=self.nearest_a.device)
        chosen = (self.nearest_b[self.nearest_a] == a) & (self.cosine_a >= threshold)
        return torch.stack([a[chosen], self.nearest_a[chosen]], 1)

    def mutual_rate(self, threshold: float) -> float:
        """`mutual_pairs`, as a share of the latents of the smaller dictionary."""
        return len(self.mutual_pairs(threshold)) / min(len(self.cosine_a), len(self.cosine_b))


@torch.no_grad()
def match(
    W_dec_a: Float[Tensor, "n_latents_a d_model"], W_dec_b: Float[Tensor, "n_latents_b d_model"], chunk: int = CHUNK
) -> Matching:
    """The nearest latents between two decoders on one device, by the cosine of their rows, in float32.

        cosine[i, j] = <W_dec_a[i], W_dec_b[j]> / (|W_dec_a[i]| |W_dec_b[j]|),  0 for a row of zeros

    Costs 2 n_latents_a n_latents_b d_model flops; holds chunk^2 cosines at a time, and both decoders in float32.

    Raises:
        TopkapiError: a decoder has no latents.
    """
    if not len(W_dec_a) or not len(W_dec_b):
        raise TopkapiError(f"Both decoders need latents; got {len(W_dec_a)} and {len(W_dec_b)}.")
    a, b = (torch.nn.functional.normalize(weight.float(), dim=1) for weight in (W_dec_a, W_dec_b))
    cosine_a, nearest_a = _nothing_yet(a)
    cosine_b, nearest_b = _nothing_yet(b)
    for i in range(0, len(a), chunk):
        for j in range(0, len(b), chunk):
            cosines = a[i : i + chunk] @ b[j : j + chunk].T
            _improve_(cosine_a[i : i + chunk], nearest_a[i : i + chunk], cosines, j)
            _improve_(cosine_b[j : j + chunk], nearest_b[j : j + chunk], cosines.T, i)
    return Matching(cosine_a, nearest_a, cosine_b, nearest_b)


def merged_densities(
    matching: Matching,
    density_a: Float[Tensor, " n_latents_a"],
    density_b: Float[Tensor, " n_latents_b"],
    threshold: float,
) -> Float[Tensor, " n_pairs"]:
    """The mean of both densities of each of `mutual_pairs`, in their order: how often what is shared fires."""
    a, b = matching.mutual_pairs(threshold).T
    return (density_a[a] + density_b[b]) / 2


def _nothing_yet(rows: Tensor) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    return rows.new_full((len(rows),), -torch.inf), torch.zeros(len(rows), dtype=torch.long, device=rows.device)


def _improve_(
    cosine: Float[Tensor, " n"], nearest: Int[Tensor, " n"], cosines: Float[Tensor, "n m"], first: int
) -> None:
    """Takes over what is nearer among `cosines` with the other decoder's latents from `first` on."""
    best, at = cosines.max(1)
    nearer = best > cosine
    cosine[nearer] = best[nearer]
    nearest[nearer] = at[nearer] + first
