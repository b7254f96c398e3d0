"""AuxK: dead latents learn to reconstruct what the others leave over.

    c mean (auxk_recon - residual)^2 / variance of the residual,      residual = x - recon

The dead latents encode x as the main model does (pre_bias a constant here) and decode the residual without bias, so
pre_bias gets no gradient. With fewer dead latents than auxk all of them are used. The variance is that of the whole
batch and known last: sums over tokens leave it out, and are divided by it in the end.

Called by `topkapi.step`. Source: Gao et al. 2024, appendix A.2.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topkapi import exchange
from topkapi.config import AuxKConfig, ParallelConfig
from topkapi.gradients import DeadSubset, Gradients
from topkapi.model import Working
from topkapi.ops.auxk import AuxKSums, DeadWeights, auxk_gradients
from topkapi.parallel import Mesh

# Dead latents per auxk up to which dense products win. cpu: measured on 2 cores (docs/LOG.md).
DENSE_AUXK_BELOW = {"cpu": 8, "cuda": 256}
NEVER = -1e30  # a bias no pre-activation makes up for


class AuxK:
    """The term and its gradients in one step, of which the micro-batches are added one by one."""

    def __init__(
        self,
        dead: DeadSubset,
        config: AuxKConfig,
        weights: Working,
        scale: float,
        numel: int,
        mesh: Mesh,
        parallel: ParallelConfig,
    ) -> None:
        """`scale` and `numel`, the numbers in the whole batch, are those of the main term: error = numel / (2 scale)
        times its gradient."""
        self.dead, self.config, self.working, self.mesh, self.parallel = dead, config, weights, mesh, parallel
        self.numel, self.inverse_scale = numel, numel / (2 * scale)
        self.chosen = dead.latents.clamp(max=len(weights.latent_bias) - 1)
        self.weights: DeadWeights | None = None
        self.sums: AuxKSums | None = None

    def add_(self, centred: Float[Tensor, "n d_model"], grad_recon: Float[Tensor, "n d_model"]) -> None:
        """Take in tokens of this replica: activations, and the main term's gradient at their reconstruction."""
        if self.weights is None:
            self.weights = self._gathered()
        factor = torch.full((), 2 * self.config.coefficient / self.numel, device=centred.device)
        given = (self.weights, centred, grad_recon, self.inverse_scale, factor)
        if self.mesh.n_shards > 1:
            sums = exchange.auxk_sums(*given, self.mesh, self.parallel)
        else:
            is_dense = len(self.dead) <= DENSE_AUXK_BELOW[centred.device.type] * self.weights.k
            sums = auxk_gradients(*given, dense=is_dense)
        self.sums = sums if self.sums is None else self.sums.add_(sums)

    def _gathered(self) -> DeadWeights:
        return DeadWeights(
            W_enc=self.working.W_enc[self.chosen],
            W_dec=self.working.W_dec[self.chosen],
            bias=torch.where(self.dead.dead, self.working.latent_bias[self.chosen], NEVER),
            k=min(self.config.auxk, len(self.dead) * self.mesh.n_shards),
        )

    def add_to_(
        self, gradients: Gradients, squared_error: Float[Tensor, ""], grad_recon_sum: Float[Tensor, " d_model"]
    ) -> Float[Tensor, ""]:
        """Add the gradients to those of the main term, and return the loss term.

        `squared_error` is the sum of the residual's squares over the whole batch, `grad_recon_sum` the sum of the main
        term's gradient over its tokens. A term that is not finite, or a residual without variance, contributes exactly
        0 and leaves the gradients untouched.
        """
        sums, variance = self.sums, self._variance(squared_error, grad_recon_sum)
        sums.squared_error = self.mesh.ordered_sum(sums.squared_error, "all")
        for part in (sums.W_enc, sums.W_dec, sums.latent_bias):
            self.mesh.sum_(part, "replicas")
        term = sums.squared_error / self.numel * self.config.coefficient / variance
        usable = torch.isfinite(term) & (variance > 0)
        self._add_subset_(gradients, usable, 1 / variance)
        return torch.where(usable, term, 0)

    def _variance(
        self, squared_error: Float[Tensor, ""], grad_recon_sum: Float[Tensor, " d_model"]
    ) -> Float[Tensor, ""]:
        """Of the residual over the batch, averaged over coordinates; 0 where nothing but rounding is left of it."""
        square, n_tokens = squared_error / self.numel, self.numel // len(grad_recon_sum)
        mean = grad_recon_sum * (self.inverse_scale / n_tokens)
        variance = square - mean.pow(2).mean()
        rounding = max(torch.finfo(self.working.W_dec.dtype).eps, 16 * torch.finfo(square.dtype).eps)
        return torch.where(variance > rounding * square, variance, 0)

    def _add_subset_(self, gradients: Gradients, usable: Bool[Tensor, ""], inverse: Float[Tensor, ""]) -> None:
        """Add the sums times `inverse`, or zeros where they are not usable, to the rows that this process owns."""
        sums, own = self.sums, self.working.own
        n_own, device = own.stop - own.start, self.chosen.device
        local = self.dead.latents - own.start
        is_own = (local >= 0) & (local < n_own)  # padding has latents beyond
        local = torch.where(is_own, local, n_own)
        position = torch.full((n_own + 1,), -1, dtype=torch.int32, device=device)
        position.scatter_(0, local, torch.arange(len(local), dtype=torch.int32, device=device))
        use = is_own & usable
        for weight, rows in ((gradients.W_enc, sums.W_enc), (gradients.W_dec, sums.W_dec)):
            rows = torch.where(use[:, None], rows * inverse, 0)
            if weight.dense is not None:
                weight.dense.index_add_(0, local.clamp(max=n_own - 1), rows)
            else:
                weight.position, weight.subset_rows = position[:n_own], rows
        bias = torch.where(use, sums.latent_bias * inverse, 0)
        gradients.latent_bias.index_add_(0, local.clamp(max=n_own - 1), bias)
