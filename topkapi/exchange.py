"""What the processes that train one autoencoder tell each other during a step.

Shards find the k largest pre-activations of a token together and sum their parts of its reconstruction. What replicas
exchange is in `topkapi.step`, beside what it travels along with. With one shard every function is the local
computation alone.

Selection. Each shard puts its largest pre-activations forward, `candidates` a token, and gathers the values of all:
as a shard's candidates come with equal values in the order of latents, and shards own ascending ranges, which of equal
ones are kept needs no indices. Candidates that are beaten become nobody's (`topkapi.ops.reference.keep_largest`) and
cost nothing after that. In exact mode a shard puts k forward, and nothing can be lost.

Reconstruction. Each shard decodes its latents; the parts are summed so that a shard gets the whole sum for its part of
the tokens (reduce-scatter), from which it computes error and gradient; the gradients are then gathered. That is the
traffic of one all-reduce with the gradient for free. On a GPU it goes in pieces: while one travels, the next is
computed.

Called by `topkapi.step`. Source: Gao et al. 2024, appendix D.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from topkapi.config import ParallelConfig
from topkapi.ops import DecodeStep, implementation
from topkapi.ops.auxk import SPARSE_ENTRY_BYTES, AuxKSums, DeadWeights, chunks, sums_of_code
from topkapi.parallel import Mesh

LOST = 1e-3  # share of the k largest that candidates chosen from a capacity may lose, if latents are spread at random
PIECES = {"cpu": 1, "cuda": 4}  # parts of a batch of which one travels while the next is computed
LONGEST_RING = 8  # shards beyond which pieces' hops would cost more than overlap gains (by the plan's model)
FEWEST = 2048  # tokens of a part: collectives of fewer are all latency


@lru_cache  # asked for in every step
def candidates(k: int, n_shards: int, capacity: float) -> int:
    """Candidates a token that each shard puts forward: its share k / n_shards times `capacity`, but never so few that
    more than LOST of the k largest would be lost, nor fewer than 2 (or k).
    """
    if n_shards == 1:
        return k
    enough = next(c for c, lost in enumerate(truncation_losses(k, n_shards)) if lost < LOST)
    return min(max(math.floor(capacity * k / n_shards), enough, 2), k)


@lru_cache
def truncation_losses(k: int, n_shards: int) -> tuple[float, ...]:
    """Share of the k largest latents that is lost if each shard puts c of them forward at most, for c = 0 to k.

        n_shards E[max(X - c, 0)] / k,    X ~ Binomial(k, 1 / n_shards)

    That is where latents are spread over shards at random. The truncation: Gao et al. 2024, appendix D.2.
    """
    if n_shards == 1:
        return tuple(1 - c / k for c in range(k + 1))
    p, more, losses = 1 / n_shards, 0.0, [0.0]  # more: the chance that X > c
    for hits in range(k, 0, -1):
        more += math.exp(
            math.lgamma(k + 1)
            - math.lgamma(hits + 1)
            - math.lgamma(k - hits + 1)
            + hits * math.log(p)
            + (k - hits) * math.log1p(-p)
        )
        losses.append(losses[-1] + n_shards / k * more)
    return tuple(reversed(losses))


def candidates_of(k: int, n_latents: int, n_shards: int, config: ParallelConfig) -> int:
    """Candidates a token that each shard of a dictionary puts forward, at most as many as the largest has latents."""
    largest = min(k, -(-n_latents // n_shards))
    if n_shards == 1 or config.selection == "exact":
        return largest
    return min(config.candidates or candidates(k, n_shards, config.capacity), largest)


def auxk_candidates_of(k: int, n_dead: int, n_shards: int, config: ParallelConfig) -> int:
    """Dead latents a token that each shard, of which none has more than `n_dead`, puts forward for the k of AuxK."""
    if n_shards == 1 or config.selection == "exact":
        return min(k, n_dead)
    return min(candidates(k, n_shards, config.capacity), n_dead)


def cheaper_exchange(
    n_replicas: int, n_tokens: int, n_latents: int, d_model: int, n_candidates: int, bytes_of_a_number: int
) -> Literal["sparse", "dense"]:
    """The way of summing gradients over replicas that sends fewer bytes.

        dense   (R - 1) / R  2 n_latents d_model 4                                      reduce-scatter of float32
        sparse  (R - 1) n_tokens (2 d_model bytes_of_a_number + 12 n_candidates)        all-gather

    for `n_tokens` a replica, activations of `bytes_of_a_number`, and `n_latents` a shard.
    """
    dense = 8 / n_replicas * n_latents * d_model
    sparse = n_tokens * (2 * d_model * bytes_of_a_number + 12 * n_candidates)
    return "sparse" if sparse <= dense else "dense"


def select(
    centred: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    latent_bias: Float[Tensor, " n_latents"],
    k: int,
    n_candidates: int,
    mesh: Mesh,
    screening: str = "bf16",
) -> tuple[Float[Tensor, "n c"], Int[Tensor, "n c"]]:
    """Values and indices, in this shard, of those of its candidates that are among the k largest of all shards'.

    The others have value 0 and index n_latents.
    """
    primitives, n_latents = implementation(centred), len(W_enc)
    width = min(n_candidates, n_latents)
    values, indices = primitives.encode_topk(centred, W_enc, latent_bias, None, width, screening)
    if mesh.n_shards == 1:
        return values, indices
    if width < n_candidates:  # the last shard may have fewer latents than the others
        values = pad(values, (0, n_candidates - width))
        indices = pad(indices, (0, n_candidates - width), value=n_latents)
    gathered = mesh.gather(values, "shards")
    return primitives.keep_largest(values, indices, gathered, mesh.shard, k, n_latents)


def share_lost(
    centred: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    latent_bias: Float[Tensor, " n_latents"],
    k: int,
    n_candidates: int,
    n_latents: int,
    mesh: Mesh,
) -> Float[Tensor, ""]:
    """The share of the k largest pre-activations above 0 that `n_candidates` a shard leave out, of n_latents in all.

    Counted on some tokens of each replica, for which the exact selection is made: what a shard has of a token's k
    largest beyond its candidates is lost.
    """
    exact = min(k, -(-n_latents // mesh.n_shards))
    values, _ = select(centred, W_enc, latent_bias, k, exact, mesh)
    wanted = (values > 0).sum(1)
    lost = (wanted - n_candidates).clamp_min(0)
    lost, wanted = mesh.ordered_sum(torch.stack([lost.sum(), wanted.sum()]), "all")
    return lost / wanted.clamp_min(1)


def decode(
    values: Float[Tensor, "n c"],
    indices: Int[Tensor, "n c"],
    W_dec: Float[Tensor, "n_latents d_model"],
    centred: Float[Tensor, "n d_model"],
    scale: float,
    mesh: Mesh,
) -> DecodeStep:
    """`decode_step` of a code that is divided among shards. `squared_error` is that of this shard's part of the tokens.

    See `topkapi.ops.reference.decode_step`; several shards use the gradient rounded to the dtype of `centred`.
    """
    primitives, n = implementation(centred), len(centred)
    if mesh.n_shards == 1:
        return primitives.decode_step(values, indices, W_dec, centred, scale)
    pieces = list(pieces_of(n, mesh.n_shards, PIECES[centred.device.type]))
    grad_recon = torch.empty_like(centred)
    summed, gathered, squares, grad_values = {}, {}, [], []
    for turn in range(len(pieces) + 2):  # a piece is decoded, one before differentiated, one before that finished
        if turn < len(pieces):
            rows = pieces[turn]
            summed[turn] = _start_recon(values[rows], indices[rows], W_dec, mesh)
        if turn - 1 in summed:
            recon = summed.pop(turn - 1)()
            own = _own(centred[pieces[turn - 1]], recon, mesh)
            if len(own) < len(recon):  # the rest is padding, and 0
                own = pad(own, (0, 0, 0, len(recon) - len(own)))
            squared_error, grad = primitives.recon_gradient(recon, own, scale)
            squares.append(squared_error)
            gathered[turn - 1] = mesh.start_gather(grad, "shards")
        if turn - 2 in gathered:
            rows = pieces[turn - 2]
            grad_recon[rows] = gathered.pop(turn - 2)()[: rows.stop - rows.start]
            grad_values.append(primitives.matmul_at_sparse_indices(grad_recon[rows], W_dec, indices[rows]))
    return DecodeStep(torch.cat(squares), grad_recon, torch.cat(grad_values).mul_(values > 0))


def pieces_of(n: int, n_shards: int, n_pieces: int) -> Iterator[slice]:
    """Parts of n tokens, of which all but the last are multiples of the shards; one empty part of none."""
    n_pieces = n_pieces if n_shards <= LONGEST_RING else 1
    size = max(-(-n // (n_pieces * n_shards)), -(-FEWEST // n_shards)) * n_shards
    return (slice(start, min(start + size, n)) for start in range(0, max(n, 1), size))


def _start_recon(
    values: Tensor, indices: Tensor, W_dec: Tensor, mesh: Mesh
) -> Callable[[], Float[Tensor, "part d_model"]]:
    """Start to sum over shards what they decode; it comes for this shard's part of the tokens, the last being padding
    of zeros."""
    sums = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    recon = implementation(W_dec).dense_sparse_matmul(values, indices, W_dec, sums)
    missing = -len(recon) % mesh.n_shards
    return mesh.start_scatter_sum(pad(recon, (0, 0, 0, missing)) if missing else recon, "shards")


def _own(rows: Tensor, part: Tensor, mesh: Mesh) -> Tensor:
    """The rows that belong to this shard's part of the tokens, without padding."""
    return rows[mesh.shard * len(part) : (mesh.shard + 1) * len(part)]


def auxk_sums(
    weights: DeadWeights,
    centred: Float[Tensor, "n d_model"],
    grad_recon: Float[Tensor, "n d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
    mesh: Mesh,
    config: ParallelConfig,
) -> AuxKSums:
    """`topkapi.ops.auxk.auxk_gradients` for dead latents that are divided among several shards.

    Every shard has as many rows, some of them padding. `squared_error` is that of this shard's part of the tokens.
    """
    n_candidates = auxk_candidates_of(weights.k, len(weights.W_enc), mesh.n_shards, config)
    row_bytes = n_candidates * (SPARSE_ENTRY_BYTES + 4 * mesh.n_shards) + 8 * centred.shape[1]
    sums = None
    for rows in chunks(len(centred), row_bytes):
        part = _auxk_part(weights, centred[rows], grad_recon[rows], inverse_scale, factor, n_candidates, mesh)
        sums = part if sums is None else sums.add_(part)
    return sums


def _auxk_part(
    weights: DeadWeights,
    centred: Float[Tensor, "n d_model"],
    grad_recon: Float[Tensor, "n d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
    n_candidates: int,
    mesh: Mesh,
) -> AuxKSums:
    values, indices = select(centred, weights.W_enc, weights.bias, weights.k, n_candidates, mesh)
    recon = _start_recon(values, indices, weights.W_dec, mesh)()
    own = _own(grad_recon, recon, mesh)
    squared_error = implementation(centred).residual_gradient_(recon[: len(own)], own, inverse_scale, factor)
    grad = mesh.gather(recon.to(centred.dtype), "shards")[: len(centred)]
    return sums_of_code(weights, centred, values, indices, grad, squared_error)
