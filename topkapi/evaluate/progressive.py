"""Progressive recovery: how the reconstruction improves as more latents of each token take part.

Two rules choose them, both with the trained weights as they are:

1. `progressive_recovery`: TopK(k'), the k' largest pre-activations above 0, for k' up to and beyond training's k.
2. `jump_relu_recovery`: JumpReLU, all pre-activations above one threshold; `calibrate_thresholds` finds those that
   give a wanted mean number of latents on other tokens.

A TopK autoencoder recovers more and more up to its own k, and hardly more, or less, beyond it.

Source: Gao et al. 2024, section 5.3.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from topkapi import ops
from topkapi.errors import TopkapiError
from topkapi.evaluate.sampling import TokenSums, chunks
from topkapi.model import Autoencoder, relu_latents
from topkapi.statistics.intervals import Estimate

ROWS_ELEMENTS = 2**24  # float64 of residuals or of errors at once: 128 MiB


@dataclass(frozen=True)
class Recovery:
    """A curve of normalized MSE: entry i belongs to settings[i]."""

    settings: tuple[float | int, ...]
    """k' (TopK) or the threshold (JumpReLU)."""
    l0: tuple[float, ...] | None
    """Mean number of latents above 0 that take part, per token: the axis on which both rules compare."""
    normalized_mse: tuple[Estimate, ...] | None
    n_tokens: int
    reason: str
    """Why the curve is None; empty if it is not."""


@torch.no_grad()
def progressive_recovery(
    ae: Autoencoder,
    x: Tensor | Iterable[Tensor],
    k_max: int,
    seed: int = 0,
    contexts: Int[Tensor, " tokens"] | None = None,
) -> Recovery:
    """Normalized MSE with the k' largest latents of each token, for k' = 1 .. k_max, in one pass.

    `x` is (n, d_model) of normalised activations or an iterable of such blocks; `seed` that of the bootstrap, which
    draws contexts where `contexts` says which one each token is of, and otherwise tokens. Cost:
    encoding with k_max latents, and 2 n k_max d_model flops.

    Raises:
        TopkapiError: k_max is below 1 or above n_latents, or x has another shape.
    """
    if not 1 <= k_max <= ae.n_latents:
        raise TopkapiError(f"k_max must be between 1 and n_latents={ae.n_latents}; got {k_max}.")
    curve = _Curve(ae, tuple(range(1, k_max + 1)), seed, contexts)
    for chunk in chunks(ae, x):
        values, indices = ops.encode_topk(chunk, ae.W_enc, ae.latent_bias, ae.pre_bias, k_max)
        n_taken = torch.arange(1, k_max + 1, device=chunk.device).expand(len(chunk), -1)
        curve.add(chunk, values, indices, n_taken)
    return curve.result()


@torch.no_grad()
def calibrate_thresholds(
    ae: Autoencoder, x: Float[Tensor, "n d_model"], target_l0: Sequence[float | int]
) -> tuple[float, ...]:
    """For each target the threshold above which x has that many pre-activations per token, on the mean.

    Exact: halfway between the pre-activations of ranks round(target n) and one more among all n n_latents. Only equal
    pre-activations there leave L0 below the target. Memory: one float for each of the max(target) n largest, and a
    chunk of pre-activations.

    Raises:
        TopkapiError: no token, a target at which no or all pre-activations above 0 of the sample do not suffice, or x
            has another shape.
    """
    ranks = [round(target * len(x)) for target in target_l0]
    if not ranks or min(ranks) < 1:
        raise TopkapiError(f"Each target L0 must be at least one latent on the {len(x)} tokens; got {list(target_l0)}.")
    kept = x.new_zeros(0, dtype=ae.W_dec.dtype, device=ae.W_dec.device)
    for chunk in chunks(ae, x):
        latents = relu_latents(chunk - ae.pre_bias, ae.W_enc, ae.latent_bias).flatten()
        floor = kept[-1] if len(kept) > max(ranks) else 0
        kept = torch.cat([kept, latents[latents > floor]]).sort(descending=True).values[: max(ranks) + 1]
    if len(kept) < max(ranks):
        raise TopkapiError(
            f"A mean L0 of {max(target_l0):g} is out of reach: only {len(kept) / len(x):.4g} pre-activations per token "
            "are above 0. Give smaller targets."
        )
    kept = torch.cat([kept, kept.new_zeros(1)]).double().tolist()
    return tuple((kept[rank - 1] + kept[rank]) / 2 for rank in ranks)


@torch.no_grad()
def jump_relu_recovery(
    ae: Autoencoder,
    x: Tensor | Iterable[Tensor],
    thresholds: Sequence[float | int],
    seed: int = 0,
    contexts: Int[Tensor, " tokens"] | None = None,
) -> Recovery:
    """Normalized MSE and L0 with all pre-activations above a threshold, for each of several, in one pass.

        z = pre_acts  where pre_acts > threshold, else 0

    `x` is (n, d_model) of normalised activations, others than those of `calibrate_thresholds`, or an iterable of such
    blocks; `contexts` as in `progressive_recovery`. Cost: all pre-activations, and 2 n m d_model flops, m the largest
    number of latents of a token.

    Raises:
        TopkapiError: no threshold, one below 0, or x has another shape.
    """
    if not len(thresholds) or not min(thresholds) >= 0:
        raise TopkapiError(f"Thresholds must be at least one, and none below 0; got {list(thresholds)}.")
    curve = _Curve(ae, tuple(thresholds), seed, contexts)
    for chunk in chunks(ae, x):
        latents = relu_latents(chunk - ae.pre_bias, ae.W_enc, ae.latent_bias)
        n_taken = torch.stack([(latents > threshold).sum(1) for threshold in thresholds], 1)
        values, indices = latents.topk(int(n_taken.max()))
        curve.add(chunk, values, indices, n_taken)
    return curve.result()


class _Curve:
    """Sums over tokens of the squared error and of the number of latents at each setting."""

    def __init__(
        self, ae: Autoencoder, settings: tuple[float | int, ...], seed: int, contexts: Int[Tensor, " tokens"] | None
    ) -> None:
        self.ae, self.settings = ae, settings
        self.sums = TokenSums(ae, 2 * len(settings), seed, contexts)

    def add(
        self,
        x: Float[Tensor, "n d_model"],
        values: Float[Tensor, "n k"],
        indices: Int[Tensor, "n k"],
        n_taken: Int[Tensor, "n settings"],
    ) -> None:
        """Count n tokens: at setting s token i takes its n_taken[i, s] largest latents."""
        values, order = values.sort(1, descending=True)  # a GPU gives them in no order
        indices = indices.gather(1, order)
        rows = max(1, ROWS_ELEMENTS // max(self.ae.d_model, values.shape[1] + 1))
        for part in zip(*(tensor.split(rows) for tensor in (x, values, indices, n_taken)), strict=True):
            errors = squared_errors(self.ae, *part[:3]).gather(1, part[3])
            n_active = torch.minimum(part[3], (part[1] > 0).sum(1, keepdim=True)).double()
            self.sums.add(part[0], torch.cat([errors, n_active], 1))

    def result(self) -> Recovery:
        errors, n_active = self.sums.columns.chunk(2, 1)
        l0 = (n_active[0] / self.sums.count[0]).tolist()
        curve = tuple(self.sums.estimate(column / self.sums.spread) for column in errors.T)
        reason = ""
        if not self.sums.n_tokens:
            reason = "no token was given"
        elif not n_active[0].any():
            reason = "no latent takes part on any of the tokens"
        elif any(point.value is None for point in curve):
            reason = "all tokens are the same, or the reconstruction is not finite"
        return Recovery(
            self.settings, None if reason else tuple(l0), None if reason else curve, self.sums.n_tokens, reason
        )


def squared_errors(
    ae: Autoencoder, x: Float[Tensor, "n d_model"], values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
) -> Float64[Tensor, "n k+1"]:
    """|x - recon|^2 with the first j columns of the code, for j = 0 .. k: each adds one row to the one before.

    Accumulates in float64.
    """
    residual = x.double() - ae.pre_bias.double()
    errors = [residual.square().sum(1)]
    for value, index in zip(values.T, indices.T, strict=True):
        residual -= value.double()[:, None] * ae.W_dec[index].double()
        errors.append(residual.square().sum(1))
    return torch.stack(errors, 1)
