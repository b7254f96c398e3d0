"""One training step's forward pass and gradients.

For TopK they are written by hand: nothing of the size (tokens, n_latents) is kept, and the weight gradients stay
sparse until the optimiser asks for rows. The ReLU baselines are dense by nature and use autograd.

TopK, for a batch of n tokens:

1. values, indices = encode_topk(x);  recon = decode(values, indices)
2. G = dL/drecon = 2 mse_scale / (n d_model) (recon - x);  dvalues = matmul_at_sparse_indices(G, W_dec, indices)
3. one sort of the (token, latent) pairs, shared by the weight gradients of decoder and encoder
4. AuxK: the dead latents' rows are gathered and treated as a small autoencoder of the residual

Called by `topkapi.train`, once a step.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi import loss, ops
from topkapi.config import AuxKConfig, LossConfig
from topkapi.loss import LossTerms
from topkapi.model import Autoencoder
from topkapi.ops import SparseRows, reference

DENSE_AUXK_BELOW = 8  # dead latents per auxk up to which dense products win, on 2 cores (docs/LOG.md)


@dataclass
class WeightGradient:
    """The gradient of W_enc or W_dec as a sum of parts, handed out a block of rows at a time."""

    n_latents: int
    sparse: SparseRows | None = None
    dense: Float[Tensor, "n_latents d_model"] | None = None
    subset: Int[Tensor, " m"] | None = None
    """Ascending latents that `subset_rows` belong to (the dead ones)."""
    subset_rows: Float[Tensor, "m d_model"] | None = None

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
    dead: Bool[Tensor, " n_latents"],
    config: AuxKConfig,
) -> Step:
    """Loss, gradients and fired latents of a TopK autoencoder on normalised activations `x`.

    `scale` is `loss.mse_scale` of the run's sample; `dead` marks the latents that AuxK trains.

    Source: Gao et al. 2024, sections 2.1 to 2.4 and appendix D.2.
    """
    W_enc, W_dec, pre_bias = ae.W_enc.detach(), ae.W_dec.detach(), ae.pre_bias.detach()
    values, indices = reference.encode_topk(x, W_enc, ae.latent_bias.detach(), pre_bias, ae.k)
    error = reference.dense_sparse_matmul(values, indices, W_dec).add_(pre_bias).sub_(x)
    mse = scale * error.pow(2).mean()
    grad_recon = error * (2 * scale / max(error.numel(), 1))

    grad_values = reference.matmul_at_sparse_indices(grad_recon, W_dec, indices)
    order = ops.order_by_latent(indices, ae.n_latents)
    encoder = ops.encoder_gradients(grad_values, values, indices, order, x, W_enc, pre_bias)
    gradients = Gradients(
        W_enc=WeightGradient(ae.n_latents, sparse=encoder.W_enc),
        W_dec=WeightGradient(ae.n_latents, sparse=SparseRows(values, order, grad_recon)),
        latent_bias=encoder.latent_bias,
        pre_bias=grad_recon.sum(0) + encoder.pre_bias,
    )
    auxk = _add_auxk_(gradients, ae, x, residual=error.neg_(), dead=dead, config=config)

    fired = torch.zeros(ae.n_latents, dtype=torch.bool, device=x.device)
    fired[indices[values > 0]] = True
    l0 = (values > 0).sum() / max(len(x), 1)
    return Step(LossTerms(mse, auxk, torch.zeros_like(mse)), gradients, fired, l0)


def _add_auxk_(
    gradients: Gradients,
    ae: Autoencoder,
    x: Float[Tensor, "n d_model"],
    residual: Float[Tensor, "n d_model"],
    dead: Bool[Tensor, " n_latents"],
    config: AuxKConfig,
) -> Float[Tensor, ""]:
    """Add AuxK's gradients to `gradients` and return its loss term.

    The dead latents encode x as the main model does (pre_bias a constant here) and decode the residual without
    bias, so pre_bias gets no gradient. With fewer dead latents than auxk all of them are used. A term that is not
    finite, or a residual without variance, contributes exactly 0 and leaves the gradients untouched.

    Source: Gao et al. 2024, appendix A.2.
    """
    zero = x.new_zeros(())
    subset = dead.nonzero().flatten()
    k = min(config.auxk, len(subset))
    if k == 0 or len(x) == 0 or config.coefficient == 0:
        return zero
    W_enc, W_dec = ae.W_enc.detach()[subset], ae.W_dec.detach()[subset]
    values, indices = reference.encode_topk(x, W_enc, ae.latent_bias.detach()[subset], ae.pre_bias.detach(), k)
    code = _Code(values, indices, dense_width=len(subset) if len(subset) <= DENSE_AUXK_BELOW * k else 0)
    auxk_recon = code.decode(W_dec)
    variance = (residual - residual.mean(0)).pow(2).mean()
    term = loss.auxk(residual, auxk_recon, config.coefficient)
    if not (torch.isfinite(term) and variance > 0):
        return zero
    grad_recon = (auxk_recon - residual) * (2 * config.coefficient / (x.numel() * variance))
    grad_pre_acts = code.grad_values(grad_recon, W_dec) * (values > 0)
    gradients.W_dec.subset = gradients.W_enc.subset = subset
    gradients.W_dec.subset_rows = code.transposed(values, grad_recon, len(subset))
    gradients.W_enc.subset_rows = code.transposed(grad_pre_acts, x - ae.pre_bias.detach(), len(subset))
    gradients.latent_bias.index_add_(0, subset, ops.latent_sums(grad_pre_acts, indices, len(subset)))
    return term


@dataclass(frozen=True)
class _Code:
    """A sparse code of the dead latents, multiplied densely when there are few of them and sparsely otherwise."""

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    dense_width: int
    """Number of dead latents, or 0 for the sparse way."""

    def _scatter(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        return values.new_zeros(len(values), self.dense_width).scatter_(1, self.indices, values)

    def decode(self, weight: Float[Tensor, "m d_model"]) -> Float[Tensor, "n d_model"]:
        if self.dense_width:
            return self._scatter(self.values) @ weight
        return reference.dense_sparse_matmul(self.values, self.indices, weight)

    def grad_values(self, grad: Float[Tensor, "n d_model"], weight: Float[Tensor, "m d_model"]) -> Float[Tensor, "n k"]:
        if self.dense_width:
            return (grad @ weight.T).gather(1, self.indices)
        return reference.matmul_at_sparse_indices(grad, weight, self.indices)

    def transposed(
        self, values: Float[Tensor, "n k"], rows: Float[Tensor, "n d_model"], n_latents: int
    ) -> Float[Tensor, "m d_model"]:
        if self.dense_width:
            return self._scatter(values).T @ rows
        return SparseRows(values, ops.order_by_latent(self.indices, n_latents), rows).dense()


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
