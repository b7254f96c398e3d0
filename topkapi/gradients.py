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

Several processes take the step together: `topkapi.exchange` says what they tell each other. Shards have their latents'
rows of everything here, and what belongs to the whole batch comes out the same on all of them.

Called by `topkapi.train`, once a step.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi import exchange, loss
from topkapi.config import AuxKConfig, LossConfig, ParallelConfig
from topkapi.exchange import Rows
from topkapi.loss import LossTerms
from topkapi.model import Autoencoder, Working
from topkapi.ops import SparseRows
from topkapi.ops.auxk import AuxKSums, DeadWeights, auxk_gradients
from topkapi.ops.dispatch import implementation
from topkapi.ops.normalise import centre
from topkapi.parallel import ALONE, Mesh

# Dead latents per auxk up to which dense products win. cpu: measured on 2 cores (docs/LOG.md).
DENSE_AUXK_BELOW = {"cpu": 8, "cuda": 256}
PADDING = 64  # dead latents a multiple of this on a GPU: rows of 128 bytes in bf16, as fast products want them
NEVER = -1e30  # a bias no pre-activation makes up for
DEFAULT = ParallelConfig()


@dataclass(frozen=True)
class DeadSubset:
    """The latents that AuxK trains in one step. Its length, equal on all shards, is known without asking the device."""

    latents: Int[Tensor, " m"]
    """Ascending, then n_latents as padding."""
    dead: Bool[Tensor, " m"]
    """False for padding, and for latents that have fired since the list was made: they take no part."""

    @classmethod
    def of(cls, dead: Bool[Tensor, " n_latents"], padding: int | None = None, mesh: Mesh = ALONE) -> "DeadSubset":
        """Exactly the latents of a mask, as many on each shard. Waits for the device to count them."""
        multiple = padding or (PADDING if dead.is_cuda else 1)
        count = int(mesh.max_(dead.sum(), "shards"))
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
    lost: Float[Tensor, ""] | None = None
    """Share of the k largest pre-activations that shards did not put forward, on some tokens; None where they must."""


@torch.no_grad()
def topk_step(
    ae: Autoencoder,
    x: Float[Tensor, "n d_model"],
    scale: float,
    dead: DeadSubset,
    config: AuxKConfig,
    working: Working | None = None,
    mesh: Mesh = ALONE,
    parallel: ParallelConfig = DEFAULT,
) -> Step:
    """Loss, gradients and fired latents of a TopK autoencoder on normalised activations `x`.

    `scale` is `loss.mse_scale` of the run's sample; `dead` holds the latents that AuxK trains; `working` the weights
    to compute with, those of `ae` themselves by default. On a mesh `x` is this replica's part of the batch, as long as
    the others'; loss, l0 and gradients are those of the whole batch, the gradients of this shard's latents.
    Deterministic.

    Source: Gao et al. 2024, sections 2.1 to 2.4 and appendix D.2.
    """
    weights, pre_bias, latent_bias = working or Working.of(ae), ae.pre_bias.detach(), ae.latent_bias.detach()
    n_tokens, numel = len(x) * mesh.n_replicas, max(x.numel() * mesh.n_replicas, 1)
    centred = centre(x, pre_bias, weights.W_enc.dtype)
    # reconstruction error is z W_dec - centred, so pre_bias plays no further part
    width = exchange.candidates_of(ae.k, ae.n_latents, mesh.n_shards, parallel)
    values, indices = exchange.select(centred, weights.W_enc, latent_bias, ae.k, width, mesh, weights.screening)
    decoded = exchange.decode(values, indices, weights.W_dec, centred, 2 * scale / numel, mesh)
    squared_error, n_active = _totals(decoded.squared_error.sum(), (values > 0).sum(), mesh)
    mse = squared_error * (scale / numel)

    rows = Rows(centred, decoded.grad_recon, values, decoded.grad_values, indices)
    if _replicas_send_rows(rows, ae.n_latents, mesh, parallel):
        gradients, grad_recon_sum, fired = _gradients_of_all_rows(rows, weights, mesh)
    else:
        gradients, grad_recon_sum, fired = _sum_of_gradients(rows, weights, mesh)
    auxk = torch.zeros_like(mse)
    if min(config.auxk, len(dead), len(x)) > 0 and config.coefficient > 0:
        residual = _Residual(decoded.grad_recon, n_tokens, numel / (2 * scale), grad_recon_sum, squared_error)
        auxk = _add_auxk_(gradients, weights, latent_bias, centred, residual, dead, config, mesh)
    lost = None
    if mesh.n_shards > 1 and parallel.selection == "capacity":
        lost = exchange.share_lost(centred, weights.W_enc, latent_bias, ae.k, width, ae.n_latents, mesh)
    return Step(LossTerms(mse, auxk, torch.zeros_like(mse)), gradients, fired, n_active / max(n_tokens, 1), lost)


def _totals(squared_error: Tensor, n_active: Tensor, mesh: Mesh) -> tuple[Float[Tensor, ""], Tensor]:
    """Both over all processes, the first in its dtype."""
    if mesh.n_ranks == 1:
        return squared_error, n_active
    sums = mesh.ordered_sum(torch.stack([squared_error.double(), n_active.double()]), "all")
    return sums[0].to(squared_error.dtype), sums[1].to(n_active.dtype)


def _replicas_send_rows(rows: Rows, n_latents: int, mesh: Mesh, parallel: ParallelConfig) -> bool:
    """Whether the exchange is the sparse one, which a process alone takes as well. The same for all processes."""
    if mesh.n_replicas == 1 or parallel.exchange != "auto":
        return mesh.n_replicas == 1 or parallel.exchange == "sparse"
    (n, d_model), width = rows.centred.shape, rows.values.shape[1]
    sizes = (mesh.n_replicas, n, -(-n_latents // mesh.n_shards), d_model, width, rows.centred.element_size())
    return exchange.cheaper_exchange(*sizes) == "sparse"


def _gradients_of_all_rows(
    rows: Rows, weights: Working, mesh: Mesh
) -> tuple[Gradients, Float[Tensor, " d_model"], Bool[Tensor, " n_latents"]]:
    """Gradients, the sum of grad_recon over tokens and which latents fired, from the rows of all replicas."""
    rows = exchange.of_all_replicas(rows, mesh)
    primitives, n_latents = implementation(rows.centred), len(weights.W_enc)
    order = primitives.order_by_latent(rows.indices, n_latents)
    grad_latent_bias, row_sum = primitives.bias_gradients(rows.grad_values, order, weights.W_enc)
    grad_recon_sum = rows.grad_recon.sum(0, dtype=row_sum.dtype)
    gradients = Gradients(
        W_enc=WeightGradient(n_latents, sparse=SparseRows(rows.grad_values, order, rows.centred)),
        W_dec=WeightGradient(n_latents, sparse=SparseRows(rows.values, order, rows.grad_recon)),
        latent_bias=grad_latent_bias,
        pre_bias=grad_recon_sum - mesh.ordered_sum(row_sum, "shards"),
    )
    return gradients, grad_recon_sum, primitives.fired(rows.values, order)


def _sum_of_gradients(
    rows: Rows, weights: Working, mesh: Mesh
) -> tuple[Gradients, Float[Tensor, " d_model"], Bool[Tensor, " n_latents"]]:
    """The same, from the gradients of each replica's own rows. The encoder's travel while the decoder's are reduced."""
    primitives, n_latents = implementation(rows.centred), len(weights.W_enc)
    order = primitives.order_by_latent(rows.indices, n_latents)
    W_enc = SparseRows(rows.grad_values, order, rows.centred).dense()
    finish_W_enc = mesh.start_sum_(W_enc, "replicas")
    W_dec = SparseRows(rows.values, order, rows.grad_recon).dense()
    finish_W_dec = mesh.start_sum_(W_dec, "replicas")
    grad_latent_bias, row_sum = primitives.bias_gradients(rows.grad_values, order, weights.W_enc)
    grad_recon_sum = mesh.ordered_sum(rows.grad_recon.sum(0, dtype=row_sum.dtype), "replicas")
    row_sum = mesh.ordered_sum(row_sum, "all")
    mesh.sum_(grad_latent_bias, "replicas")
    fired = mesh.max_(primitives.fired(rows.values, order).to(torch.uint8), "replicas")
    finish_W_enc(), finish_W_dec()
    gradients = Gradients(
        W_enc=WeightGradient(n_latents, dense=W_enc),
        W_dec=WeightGradient(n_latents, dense=W_dec),
        latent_bias=grad_latent_bias,
        pre_bias=grad_recon_sum - row_sum,
    )
    return gradients, grad_recon_sum, fired > 0


@dataclass(frozen=True)
class _Residual:
    """x - recon of a batch, which is kept as the gradient that it is proportional to."""

    grad_recon: Float[Tensor, "n d_model"]
    """Of this replica's tokens; the rest is of all."""
    n_tokens: int
    inverse_scale: float
    """residual = -inverse_scale grad_recon"""
    grad_recon_sum: Float[Tensor, " d_model"]
    """Over tokens."""
    squared_error: Float[Tensor, ""]
    """Sum of the residual's squares."""

    @property
    def numel(self) -> int:
        """Numbers in the residual."""
        return self.n_tokens * self.grad_recon.shape[1]

    def variance(self) -> Float[Tensor, ""]:
        """Over the batch, averaged over coordinates; 0 where nothing but rounding is left of it."""
        square = self.squared_error / self.numel
        mean = self.grad_recon_sum * (self.inverse_scale / self.n_tokens)
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
    mesh: Mesh,
) -> Float[Tensor, ""]:
    """Add AuxK's gradients to `gradients` and return its loss term.

    The dead latents encode x as the main model does (pre_bias a constant here) and decode the residual without
    bias, so pre_bias gets no gradient. With fewer dead latents than auxk all of them are used. A term that is not
    finite, or a residual without variance, contributes exactly 0 and leaves the gradients untouched.

    Source: Gao et al. 2024, appendix A.2.
    """
    k = min(config.auxk, len(dead) * mesh.n_shards)
    chosen = dead.latents.clamp(max=len(latent_bias) - 1)
    weights = DeadWeights(
        W_enc=working.W_enc[chosen],
        W_dec=working.W_dec[chosen],
        bias=torch.where(dead.dead, latent_bias[chosen], NEVER),
        k=k,
    )
    numel, variance = residual.numel, residual.variance()
    factor = (2 * config.coefficient / numel) / variance
    given = (weights, centred, residual.grad_recon, residual.inverse_scale, factor)
    if mesh.n_shards > 1:
        sums = exchange.auxk_sums(*given, mesh)
    else:
        sums = auxk_gradients(*given, dense=len(dead) <= DENSE_AUXK_BELOW[centred.device.type] * k)
    sums.squared_error = mesh.ordered_sum(sums.squared_error, "all")
    for part in (sums.W_enc, sums.W_dec, sums.latent_bias):
        mesh.sum_(part, "replicas")
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
        rows = torch.where(usable, rows, 0)
        if weight.dense is not None:
            weight.dense.index_add_(0, chosen, rows)
        else:
            weight.subset, weight.position, weight.subset_rows = latents, position[:n_latents], rows
    gradients.latent_bias.index_add_(0, chosen, torch.where(usable, sums.latent_bias, 0))


def relu_step(
    ae: Autoencoder, x: Float[Tensor, "n d_model"], scale: float, config: LossConfig, mesh: Mesh = ALONE
) -> Step:
    """Loss, gradients and fired latents of a ReLU + L1 baseline on normalised activations `x`.

    Dense: memory is a few times tokens x n_latents. On a mesh of replicas (it has no shards) `x` is this one's part of
    the batch, as long as the others', and what comes back is of the whole batch.

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
    fired, n_active, mse, l1 = active.any(0), active.sum(), mse.detach(), l1.detach()
    if mesh.n_replicas > 1:
        for gradient in (W_enc, W_dec, latent_bias, pre_bias):
            mesh.sum_(gradient, "replicas").div_(mesh.n_replicas)
        fired = mesh.max_(fired.to(torch.uint8), "replicas") > 0
        mse, l1 = mesh.ordered_sum(torch.stack([mse, l1]), "replicas") / mesh.n_replicas
        n_active = mesh.sum_(n_active, "replicas")
    gradients = Gradients(
        W_enc=WeightGradient(ae.n_latents, dense=W_enc),
        W_dec=WeightGradient(ae.n_latents, dense=W_dec),
        latent_bias=latent_bias,
        pre_bias=pre_bias,
    )
    l0 = n_active / max(len(x) * mesh.n_replicas, 1)
    return Step(LossTerms(mse, torch.zeros_like(mse), l1), gradients, fired, l0)
