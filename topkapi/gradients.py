"""One training step's forward pass and gradients.

For TopK they are written by hand over the primitives of `topkapi.ops`, the same lines on every device: nothing of the
size (tokens, n_latents) is kept, the weight gradients stay sparse until the optimiser asks for rows, and on a GPU the
host waits for nothing. The ReLU baselines are dense by nature and use autograd.

TopK, for a batch of n tokens, in the dtype of the working weights:

1. centred = x - pre_bias;  values, indices = encode_topk(centred)
2. one pass over the decoder rows of each token: error = recon - x, G = dL/drecon = 2 mse_scale / (n d_model) error,
   and dvalues = G W_dec^T at the active latents
3. one sort of the (token, latent) pairs, shared by the weight gradients of decoder and encoder, the gradient of
   latent_bias and the record of which latents fired
4. AuxK: the dead latents' rows are gathered and treated as a small autoencoder of the residual

Called by `topkapi.train`, once a step.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi import loss
from topkapi.config import AuxKConfig, LossConfig
from topkapi.loss import LossTerms
from topkapi.model import Autoencoder, Working
from topkapi.ops import SparseRows
from topkapi.ops.auxk import AuxKSums, DeadWeights, auxk_gradients
from topkapi.ops.dispatch import implementation
from topkapi.ops.normalise import centre

# Dead latents per auxk up to which dense products win. cpu: measured on 2 cores (docs/LOG.md).
DENSE_AUXK_BELOW = {"cpu": 8, "cuda": 256}
PADDING = 64  # dead latents a multiple of this on a GPU: rows of 128 bytes in bf16, as fast products want them
NEVER = -1e30  # a bias no pre-activation makes up for


@dataclass(frozen=True)
class DeadSubset:
    """The latents that AuxK trains in one step. Its length is known without asking the device."""

    latents: Int[Tensor, " m"]
    """Ascending, then n_latents as padding."""
    dead: Bool[Tensor, " m"]
    """False for padding, and for latents that have fired since the list was made: they take no part."""

    @classmethod
    def of(cls, dead: Bool[Tensor, " n_latents"], padding: int | None = None) -> "DeadSubset":
        """Exactly the latents of a mask. Waits for the device to count them."""
        multiple = padding or (PADDING if dead.is_cuda else 1)
        count = int(dead.sum())
        size = -(-count // multiple) * multiple
        latents = torch.nonzero_static(dead, size=size, fill_value=len(dead)).flatten()
        return cls(latents, latents < len(dead))

    def __len__(self) -> int:
        return len(self.latents)


@dataclass
class WeightGradient:
    """The gradient of W_enc or W_dec as a sum of parts, handed out a block of rows at a time."""

    n_latents: int
    sparse: SparseRows | None = None
    dense: Float[Tensor, "n_latents d_model"] | None = None
    subset: Int[Tensor, " m"] | None = None
    """Ascending latents that `subset_rows` belong to (the dead ones), then n_latents for rows of nobody."""
    subset_rows: Float[Tensor, "m d_model"] | None = None
    position: Int[Tensor, " n_latents"] | None = None
    """The inverse of `subset`: a latent's row of `subset_rows`, -1 for none; int32."""

    def block(self, start: int, stop: int) -> Float[Tensor, "stop_minus_start d_model"]:
        """Rows start..stop, as a tensor that the caller may overwrite."""
        rows = self.dense[start:stop].clone() if self.sparse is None else self.sparse.block(start, stop)
        if self.subset is not None:
            first, last = torch.searchsorted(self.subset, self.subset.new_tensor([start, stop])).tolist()
            rows.index_add_(0, self.subset[first:last] - start, self.subset_rows[first:last])
        return rows

    def all(self) -> Float[Tensor, "n_latents d_model"]:
        """The whole gradient."""
        return self.block(0, self.n_latents)


@dataclass
class Gradients:
    """Gradients of a step's loss with respect to the four parameters."""

    W_enc: WeightGradient
    W_dec: WeightGradient
    latent_bias: Float[Tensor, " n_latents"]
    pre_bias: Float[Tensor, " d_model"]


@dataclass
class Step:
    """What a step found: its loss, gradients, and which latents fired."""

    terms: LossTerms
    gradients: Gradients
    fired: Bool[Tensor, " n_latents"]
    l0: Float[Tensor, ""] = field(default_factory=lambda: torch.zeros(()))
    """Mean number of latents with a value > 0 per token."""


@torch.no_grad()
def topk_step(
    ae: Autoencoder,
    x: Float[Tensor, "n d_model"],
    scale: float,
    dead: DeadSubset,
    config: AuxKConfig,
    working: Working | None = None,
) -> Step:
    """Loss, gradients and fired latents of a TopK autoencoder on normalised activations `x`.

    `scale` is `loss.mse_scale` of the run's sample; `dead` holds the latents that AuxK trains; `working` the weights
    to compute with, those of `ae` themselves by default. Deterministic.

    Source: Gao et al. 2024, sections 2.1 to 2.4 and appendix D.2.
    """
    weights, pre_bias, latent_bias = working or Working.of(ae), ae.pre_bias.detach(), ae.latent_bias.detach()
    primitives, n_latents, numel = implementation(x), ae.n_latents, max(x.numel(), 1)
    centred = centre(x, pre_bias, weights.W_enc.dtype)
    # reconstruction error is z W_dec - centred, so pre_bias plays no further part
    values, indices = primitives.encode_topk(centred, weights.W_enc, latent_bias, None, ae.k, weights.screening)
    decoded = primitives.decode_step(values, indices, weights.W_dec, centred, 2 * scale / numel)
    mse = decoded.squared_error.sum() * (scale / numel)

    order = primitives.order_by_latent(indices, n_latents)
    grad_latent_bias, row_sum = primitives.bias_gradients(decoded.grad_values, order, weights.W_enc)
    grad_recon_sum = decoded.grad_recon.sum(0, dtype=mse.dtype)
    gradients = Gradients(
        W_enc=WeightGradient(n_latents, sparse=SparseRows(decoded.grad_values, order, centred)),
        W_dec=WeightGradient(n_latents, sparse=SparseRows(values, order, decoded.grad_recon)),
        latent_bias=grad_latent_bias,
        pre_bias=grad_recon_sum - row_sum,
    )
    auxk = torch.zeros_like(mse)
    if min(config.auxk, len(dead), len(x)) > 0 and config.coefficient > 0:
        residual = _Residual(decoded.grad_recon, numel / (2 * scale), grad_recon_sum, decoded.squared_error.sum())
        auxk = _add_auxk_(gradients, weights, latent_bias, centred, residual, dead, config)
    fired = primitives.fired(values, order)
    return Step(LossTerms(mse, auxk, torch.zeros_like(mse)), gradients, fired, (values > 0).sum() / max(len(x), 1))


@dataclass(frozen=True)
class _Residual:
    """x - recon of a batch, which is kept as the gradient that it is proportional to."""

    grad_recon: Float[Tensor, "n d_model"]
    inverse_scale: float
    """residual = -inverse_scale grad_recon"""
    grad_recon_sum: Float[Tensor, " d_model"]
    """Over tokens."""
    squared_error: Float[Tensor, ""]
    """Sum of the residual's squares."""

    def variance(self) -> Float[Tensor, ""]:
        """Over the batch, averaged over coordinates; 0 where nothing but rounding is left of it."""
        square = self.squared_error / self.grad_recon.numel()
        mean = self.grad_recon_sum * (self.inverse_scale / len(self.grad_recon))
        variance = square - mean.pow(2).mean()
        rounding = max(torch.finfo(self.grad_recon.dtype).eps, 16 * torch.finfo(square.dtype).eps)
        return torch.where(variance > rounding * square, variance, 0)


def _add_auxk_(
    gradients: Gradients,
    working: Working,
    latent_bias: Float[Tensor, " n_latents"],
    centred: Float[Tensor, "n d_model"],
    residual: _Residual,
    dead: DeadSubset,
    config: AuxKConfig,
) -> Float[Tensor, ""]:
    """Add AuxK's gradients to `gradients` and return its loss term.

    The dead latents encode x as the main model does (pre_bias a constant here) and decode the residual without
    bias, so pre_bias gets no gradient. With fewer dead latents than auxk all of them are used. A term that is not
    finite, or a residual without variance, contributes exactly 0 and leaves the gradients untouched.

    Source: Gao et al. 2024, appendix A.2.
    """
    k = min(config.auxk, len(dead))
    chosen = dead.latents.clamp(max=len(latent_bias) - 1)
    weights = DeadWeights(
        W_enc=working.W_enc[chosen],
        W_dec=working.W_dec[chosen],
        bias=torch.where(dead.dead, latent_bias[chosen], NEVER),
        k=k,
    )
    numel, variance = centred.numel(), residual.variance()
    factor = (2 * config.coefficient / numel) / variance
    dense = len(dead) <= DENSE_AUXK_BELOW[centred.device.type] * k
    sums = auxk_gradients(weights, centred, residual.grad_recon, residual.inverse_scale, factor, dense=dense)
    term = sums.squared_error / numel * config.coefficient / variance
    usable = torch.isfinite(term) & (variance > 0)
    _add_subset_(gradients, dead.latents, chosen, sums, usable)
    return torch.where(usable, term, 0)


def _add_subset_(
    gradients: Gradients,
    latents: Int[Tensor, " m"],
    chosen: Int[Tensor, " m"],
    sums: AuxKSums,
    usable: Bool[Tensor, ""],
) -> None:
    """Add the gradients of some latents, or zeros where they are not usable; padding has zeros already."""
    n_latents, device = len(gradients.latent_bias), latents.device
    position = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=device)
    position.scatter_(0, latents, torch.arange(len(latents), dtype=torch.int32, device=device))
    for weight, rows in ((gradients.W_enc, sums.W_enc), (gradients.W_dec, sums.W_dec)):
        weight.subset, weight.position = latents, position[:n_latents]
        weight.subset_rows = torch.where(usable, rows, 0)
    gradients.latent_bias.index_add_(0, chosen, torch.where(usable, sums.latent_bias, 0))


def relu_step(ae: Autoencoder, x: Float[Tensor, "n d_model"], scale: float, config: LossConfig) -> Step:
    """Loss, gradients and fired latents of a ReLU + L1 baseline on normalised activations `x`.

    Dense: memory is a few times tokens x n_latents.

    Source: Bricken et al. 2023; Conerly et al., April 2024 (`l1_decoder_norm`).
    """
    with torch.enable_grad():
        latents = ae.relu_latents(x)
        recon = latents @ ae.W_dec + ae.pre_bias
        norms = ae.W_dec.norm(dim=1) if config.sparsity == "l1_decoder_norm" else None
        mse, l1 = loss.mse(x, recon, scale), loss.l1(latents, config.l1_coefficient, norms)
        parameters = (ae.W_enc, ae.W_dec, ae.latent_bias, ae.pre_bias)
        W_enc, W_dec, latent_bias, pre_bias = torch.autograd.grad(mse + l1, parameters)
    active = latents.detach() > 0
    gradients = Gradients(
        W_enc=WeightGradient(ae.n_latents, dense=W_enc),
        W_dec=WeightGradient(ae.n_latents, dense=W_dec),
        latent_bias=latent_bias,
        pre_bias=pre_bias,
    )
    terms = LossTerms(mse.detach(), torch.zeros_like(mse), l1.detach())
    return Step(terms, gradients, active.any(0), active.sum() / max(len(x), 1))
