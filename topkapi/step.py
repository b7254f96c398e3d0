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

Several processes take the step together: `topkapi.exchange` says what shards tell each other. What belongs to the whole
batch comes out the same on all of them, and gradients are those of the latents that the process owns. Replicas have two
ways to see to that:

rows    everything that weight gradients are made of is gathered, and the owner reduces it for its latents. Codes and
        activations travel while the batch is decoded, gradients while the codes are sorted.
sums    each replica adds up the gradients of its own tokens, dense, and the owner gets the sum of its rows. W_enc's
        travel while W_dec's are reduced. Batches that are gone through in micro-batches are added up in this way too.

Called by `topkapi.train`, once a step.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi import exchange, loss
from topkapi.auxk import AuxK
from topkapi.config import AuxKConfig, LossConfig, ParallelConfig
from topkapi.gradients import DeadSubset, Gradients, WeightGradient
from topkapi.loss import LossTerms
from topkapi.model import OF_LATENTS, Autoencoder, Working, relu_latents
from topkapi.ops import DecodeStep, SparseRows
from topkapi.ops.dispatch import implementation
from topkapi.ops.normalise import centre
from topkapi.parallel import ALONE, Mesh

MEASURED_TOKENS = 256  # of each replica, on which the share that is lost is counted
ADDED_ROWS = 2**16  # rows of a micro-batch's gradient that exist beside the sum
DEFAULT = ParallelConfig()


@dataclass
class Step:
    """What a step found: its loss, gradients, and which latents fired."""

    terms: LossTerms
    gradients: Gradients
    fired: Bool[Tensor, " n_latents"]
    l0: Float[Tensor, ""] = field(default_factory=lambda: torch.zeros(()))
    """Mean number of latents with a value > 0 per token."""
    lost: Float[Tensor, ""] | None = None
    """Share of the k largest pre-activations that shards did not put forward, on the first MEASURED_TOKENS of each
    replica; None where it was not asked for, or they must put forward all."""


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
    count_lost: bool = False,
) -> Step:
    """Loss, gradients and fired latents of a TopK autoencoder on normalised activations `x`.

    `scale` is `loss.mse_scale` of the run's sample; `dead` holds the latents that AuxK trains; `working` the weights
    to compute with, those of `ae` themselves by default. On a mesh `x` is this replica's part of the batch, as long as
    the others'; loss and l0 are those of the whole batch, `fired` of this shard's latents, gradients of those that the
    process owns. `count_lost`, the same on all processes, asks for `Step.lost`, a second selection of some tokens.
    Deterministic.

    Source: Gao et al. 2024, sections 2.1 to 2.4 and appendix D.2.
    """
    weights, n_tokens = working or Working(ae, mesh=mesh), len(x) * mesh.n_replicas
    numel = max(x.numel() * mesh.n_replicas, 1)
    batch = _Batch(ae.k, ae.n_latents, ae.pre_bias.detach(), weights, scale, numel, mesh, parallel)
    auxk = None
    if min(config.auxk, len(dead), len(x)) > 0 and config.coefficient > 0:
        auxk = AuxK(dead, config, weights, scale, numel, mesh, parallel)
    whole = max(len(x), 1)
    micro_batches = x.split(min(parallel.micro_batch_tokens or whole, whole))
    if len(micro_batches) == 1 and batch.replicas_send_rows(x):
        found = _by_rows(batch, x, auxk)
    else:
        found = _by_sums(batch, micro_batches, auxk)
    squared_error, n_active = _totals(found.squared_error, found.n_active, mesh)
    mse = squared_error * (scale / numel)
    auxk_term = torch.zeros_like(mse)
    if auxk is not None:
        auxk_term = auxk.add_to_(found.gradients, squared_error, found.grad_recon_sum)
    count_lost = count_lost and mesh.n_shards > 1 and parallel.selection == "capacity"
    lost = batch.share_lost(x[:MEASURED_TOKENS]) if count_lost else None
    terms = LossTerms(mse, auxk_term, torch.zeros_like(mse))
    return Step(terms, found.gradients, found.fired, n_active / max(n_tokens, 1), lost)


@dataclass(frozen=True)
class _Batch:
    """What the micro-batches of a step share."""

    k: int
    n_latents: int
    pre_bias: Float[Tensor, " d_model"]
    weights: Working
    scale: float
    numel: int
    """Numbers in the activations of all replicas."""
    mesh: Mesh
    parallel: ParallelConfig

    @property
    def width(self) -> int:
        """Candidates a token that each shard puts forward."""
        return exchange.candidates_of(self.k, self.n_latents, self.mesh.n_shards, self.parallel)

    def centred(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """x - pre_bias. The reconstruction's error is z W_dec minus this, so pre_bias plays no further part."""
        return centre(x, self.pre_bias, self.weights.W_enc.dtype)

    def encode(self, centred: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "n c"], Int[Tensor, "n c"]]:
        """Values and indices of this shard's active latents."""
        weights = self.weights
        weights.finish("W_enc", "latent_bias")
        given = (weights.W_enc, weights.latent_bias, self.k, self.width, self.mesh, weights.screening)
        return exchange.select(centred, *given)

    def decode(self, centred: Float[Tensor, "n d_model"], values: Tensor, indices: Tensor) -> DecodeStep:
        """Squared error of this shard's part of the tokens, and gradients."""
        self.weights.finish("W_dec")
        return exchange.decode(values, indices, self.weights.W_dec, centred, 2 * self.scale / self.numel, self.mesh)

    def replicas_send_rows(self, x: Float[Tensor, "n d_model"]) -> bool:
        """Whether they do so rather than adding up gradients; a replica alone does too. The same for all processes."""
        if self.mesh.n_replicas == 1 or self.parallel.exchange != "auto":
            return self.mesh.n_replicas == 1 or self.parallel.exchange == "sparse"
        (n_tokens, d_model), largest = x.shape, -(-self.n_latents // self.mesh.n_shards)
        sizes = (n_tokens, largest, d_model, self.width, self.weights.W_enc.element_size())
        return exchange.cheaper_exchange(self.mesh.n_replicas, *sizes) == "sparse"

    def share_lost(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, ""]:
        """See `topkapi.exchange.share_lost`."""
        weights = self.weights
        given = (weights.W_enc, weights.latent_bias, self.k, self.width, self.n_latents, self.mesh)
        return exchange.share_lost(self.centred(x), *given)


@dataclass(frozen=True)
class _Found:
    """What a batch comes to. Errors and counts are of this process's tokens, the rest is of the whole batch."""

    gradients: Gradients
    fired: Bool[Tensor, " n_latents"]
    grad_recon_sum: Float[Tensor, " d_model"]
    """Of the gradient at the reconstruction, over tokens."""
    squared_error: Float[Tensor, ""]
    n_active: Int[Tensor, ""]


def _by_rows(batch: _Batch, x: Float[Tensor, "n d_model"], auxk: AuxK | None) -> _Found:
    """The owner of a latent reduces its gradients over the tokens of all replicas."""
    mesh, weights, primitives = batch.mesh, batch.weights, implementation(x)
    own, n_latents = weights.own, len(weights.W_enc)
    centred = batch.centred(x)
    values, indices = batch.encode(centred)
    narrow = indices if mesh.n_replicas == 1 else indices.to(torch.int32)
    codes = [mesh.start_gather(part, "replicas") for part in (narrow, values, centred)]
    decoded = batch.decode(centred, values, indices)
    grads = [mesh.start_gather(part, "replicas") for part in (decoded.grad_values, decoded.grad_recon)]
    all_indices, all_values, all_centred = [finish() for finish in codes]
    order = primitives.order_by_latent(_of_owner(all_indices, own, n_latents), own.stop - own.start)
    fired = primitives.fired(all_values, order).view(torch.uint8)
    all_grad_values, all_grad_recon = [finish() for finish in grads]
    latent_bias, row_sum = primitives.bias_gradients(all_grad_values, order, weights.W_enc[own])
    grad_recon_sum = all_grad_recon.sum(0, dtype=row_sum.dtype)
    gradients = Gradients(
        W_enc=WeightGradient(own.stop - own.start, sparse=SparseRows(all_grad_values, order, all_centred)),
        W_dec=WeightGradient(own.stop - own.start, sparse=SparseRows(all_values, order, all_grad_recon)),
        latent_bias=latent_bias,
        pre_bias=grad_recon_sum - mesh.ordered_sum(row_sum, "all"),
    )
    if auxk is not None:
        auxk.add_(centred, decoded.grad_recon)
    fired = mesh.gather_rows(fired, n_latents).view(torch.bool)
    return _Found(gradients, fired, grad_recon_sum, decoded.squared_error.sum(), (values > 0).sum())


def _of_owner(indices: Int[Tensor, "n c"], own: slice, n_latents: int) -> Int[Tensor, "n c"]:
    """Indices among the rows `own` of n_latents; those of other owners become nobody's."""
    n_own = own.stop - own.start
    if n_own == n_latents:
        return indices
    local = indices - own.start
    return torch.where((local >= 0) & (local < n_own), local, n_own)


def _by_sums(batch: _Batch, micro_batches: tuple[Float[Tensor, "m d_model"], ...], auxk: AuxK | None) -> _Found:
    """Dense gradients are added up over micro-batches, then over replicas, which get the rows that they own."""
    mesh, weights, primitives = batch.mesh, batch.weights, implementation(batch.weights.W_enc)
    own, n_latents = weights.own, len(weights.W_enc)
    n_rows = mesh.n_replicas * mesh.largest_part(n_latents)
    W_enc = W_dec = sums = None
    for number, x in enumerate(micro_batches, 1):
        centred = batch.centred(x)
        values, indices = batch.encode(centred)
        decoded = batch.decode(centred, values, indices)
        order = primitives.order_by_latent(indices, n_latents)
        W_enc = _plus(W_enc, SparseRows(decoded.grad_values, order, centred), n_rows)
        if number == len(micro_batches):
            finish_W_enc = mesh.start_scatter_sum(W_enc, "replicas")
        W_dec = _plus(W_dec, SparseRows(values, order, decoded.grad_recon), n_rows)
        latent_bias, row_sum = primitives.bias_gradients(decoded.grad_values, order, weights.W_enc)
        grad_recon_sum = decoded.grad_recon.sum(0, dtype=row_sum.dtype)
        fired = primitives.fired(values, order).int()
        more = (latent_bias, row_sum, grad_recon_sum, fired, decoded.squared_error.sum(), (values > 0).sum())
        sums = more if sums is None else tuple(a + b for a, b in zip(sums, more, strict=True))
        if auxk is not None:
            auxk.add_(centred, decoded.grad_recon)
    finish_W_dec = mesh.start_scatter_sum(W_dec, "replicas")
    latent_bias, row_sum, grad_recon_sum, fired, squared_error, n_active = sums
    n_own, grad_recon_sum = own.stop - own.start, mesh.ordered_sum(grad_recon_sum, "replicas")
    latent_bias = mesh.sum_(latent_bias, "replicas")[own]
    pre_bias = grad_recon_sum - mesh.ordered_sum(row_sum, "all")
    fired = mesh.sum_(fired, "replicas") > 0
    gradients = Gradients(
        W_enc=WeightGradient(n_own, dense=finish_W_enc()[:n_own]),
        W_dec=WeightGradient(n_own, dense=finish_W_dec()[:n_own]),
        latent_bias=latent_bias,
        pre_bias=pre_bias,
    )
    return _Found(gradients, fired, grad_recon_sum, squared_error, n_active)


def _plus(total: Tensor | None, gradient: SparseRows, n_rows: int) -> Float[Tensor, "n_rows d_model"]:
    """`total`, zeros to begin with, with a gradient added, and as many rows."""
    n_latents = len(gradient.order.offsets) - 1
    if total is None and n_latents == n_rows:
        return gradient.dense()
    for start in range(0, n_latents, ADDED_ROWS):  # with padding too: to pad the whole would need it twice
        stop = min(start + ADDED_ROWS, n_latents)
        rows = gradient.block(start, stop)
        total = rows.new_zeros(n_rows, rows.shape[1]) if total is None else total
        total[start:stop] += rows
    return total


def _totals(squared_error: Tensor, n_active: Tensor, mesh: Mesh) -> tuple[Float[Tensor, ""], Tensor]:
    """Both over all processes, the first in its dtype."""
    if mesh.n_ranks == 1:
        return squared_error, n_active
    sums = mesh.ordered_sum(torch.stack([squared_error.double(), n_active.double()]), "all")
    return sums[0].to(squared_error.dtype), sums[1].to(n_active.dtype)


def relu_step(
    ae: Autoencoder,
    x: Float[Tensor, "n d_model"],
    scale: float,
    config: LossConfig,
    working: Working | None = None,
    mesh: Mesh = ALONE,
) -> Step:
    """Loss, gradients and fired latents of a ReLU + L1 baseline on normalised activations `x`.

    Dense: memory is a few times tokens x n_latents. On a mesh of replicas (it has no shards) `x` is this one's part of
    the batch, as long as the others', and what comes back is of the whole batch, as from `topk_step`.

    Source: Bricken et al. 2023; Conerly et al., April 2024 (`l1_decoder_norm`).
    """
    weights = working or Working(ae, mesh=mesh)
    weights.finish(*OF_LATENTS)
    parameters = [getattr(weights, name).detach().requires_grad_() for name in OF_LATENTS]
    parameters.append(ae.pre_bias.detach().requires_grad_())
    with torch.enable_grad():
        W_enc, W_dec, latent_bias, pre_bias = parameters
        latents = relu_latents(x - pre_bias, W_enc, latent_bias)
        recon = latents @ W_dec + pre_bias
        norms = W_dec.norm(dim=1) if config.sparsity == "l1_decoder_norm" else None
        mse, l1 = loss.mse(x, recon, scale), loss.l1(latents, config.l1_coefficient, norms)
        W_enc, W_dec, latent_bias, pre_bias = torch.autograd.grad(mse + l1, parameters)
    active = latents.detach() > 0
    fired, n_active, mse, l1 = active.any(0), active.sum(), mse.detach(), l1.detach()
    if mesh.n_replicas > 1:
        for gradient in (W_enc, W_dec, latent_bias, pre_bias):
            mesh.sum_(gradient, "replicas").div_(mesh.n_replicas)
        fired = mesh.max_(fired.to(torch.uint8), "replicas") > 0
        mse, l1 = mesh.ordered_sum(torch.stack([mse, l1]), "replicas") / mesh.n_replicas
        n_active = mesh.sum_(n_active, "replicas")
    own = weights.own
    gradients = Gradients(
        W_enc=WeightGradient(own.stop - own.start, dense=W_enc[own]),
        W_dec=WeightGradient(own.stop - own.start, dense=W_dec[own]),
        latent_bias=latent_bias[own],
        pre_bias=pre_bias,
    )
    l0 = n_active / max(len(x) * mesh.n_replicas, 1)
    return Step(LossTerms(mse, torch.zeros_like(mse), l1), gradients, fired, l0)
