"""What an autoencoder is trained on: normalized MSE, AuxK and the L1 penalties, each defined once.

`topkapi.step` differentiates these by hand for TopK; the definitions here are what its tests differentiate.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """The terms of one step's loss, already weighted: their sum is what is minimised. All 0-dimensional."""

    normalized_mse: Float[Tensor, ""]
    """Squared error times `mse_scale`: the batch's normalized MSE against the fixed baseline of the sample."""
    auxk: Float[Tensor, ""]
    """AuxK with its coefficient; 0 where no latent is dead or the term is not finite."""
    l1: Float[Tensor, ""]
    """Sparsity penalty with its coefficient; 0 for TopK."""

    def total(self) -> Float[Tensor, ""]:
        """The loss."""
        return self.normalized_mse + self.auxk + self.l1

    def detached(self) -> dict[str, float]:
        """The terms as numbers, under their names, for the log; one transfer from the device."""
        names = [f.name for f in fields(self)]
        return dict(zip(names, torch.stack([getattr(self, name).detach() for name in names]).tolist(), strict=True))


def mse_scale(sample: Float[Tensor, "n d_model"]) -> float:
    """The constant that turns mean squared error into normalized MSE, measured once on a sample.

        1 / mean over tokens and coordinates of (x - mean of the sample)^2

    Source: Gao et al. 2024, section 2.1; measured once, so that the loss does not change scale between batches.
    """
    variance = (sample - sample.mean(0)).double().pow(2).mean()
    return float(1 / variance.clamp_min(torch.finfo(torch.float32).tiny))


def mse(x: Float[Tensor, "n d_model"], recon: Float[Tensor, "n d_model"], scale: float) -> Float[Tensor, ""]:
    """Mean squared error over tokens and coordinates, times `mse_scale`."""
    return scale * (recon - x).pow(2).mean()


def normalized_mse(
    x: Float[Tensor, "n d_model"], recon: Float[Tensor, "n d_model"], mean: Float[Tensor, " d_model"]
) -> Float[Tensor, ""]:
    """Squared error of `recon` over that of always predicting `mean`: 0 perfect, 1 the mean.

        sum |x - recon|^2 / sum |x - mean|^2

    Elsewhere called fraction of variance unexplained, 1 - explained variance.

    Source: Gao et al. 2024, section 2.1.
    """
    return (x - recon).pow(2).sum() / (x - mean).pow(2).sum()


def auxk(
    residual: Float[Tensor, "n d_model"], auxk_recon: Float[Tensor, "n d_model"], coefficient: float
) -> Float[Tensor, ""]:
    """AuxK: how badly the dead latents' reconstruction misses the main model's residual.

        coefficient mean |residual - auxk_recon|^2 / mean |residual - batch mean of residual|^2

    `residual` is x - recon, treated as a constant; `auxk_recon` is decoded without pre_bias. Normalised by the
    residual's variance over the batch, because its scale changes as training goes.

    Source: Gao et al. 2024, appendix A.2.
    """
    residual = residual.detach()
    variance = (residual - residual.mean(0)).pow(2).mean()
    return coefficient * (residual - auxk_recon).pow(2).mean() / variance


def l1(
    latents: Float[Tensor, "n n_latents"],
    coefficient: float,
    decoder_norms: Float[Tensor, " n_latents"] | None = None,
) -> Float[Tensor, ""]:
    """The sum of a token's latents, averaged over tokens, times `coefficient`.

        coefficient mean over tokens of sum_l latents[l] (decoder_norms[l])

    Without norms the penalty alone can be lowered for nothing, by shrinking the latents and growing the decoder's
    rows, so the rows must be held at unit norm. Weighted by the rows' norms it is the same for any such rescaling.

    Source: Bricken et al. 2023 (plain); Conerly et al., April 2024 (weighted).
    """
    weighted = latents if decoder_norms is None else latents * decoder_norms
    return coefficient * weighted.sum(1).mean()
