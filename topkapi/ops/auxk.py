"""Loss and gradients of AuxK on the gathered rows of the dead latents, over the primitives.

For m dead latents and the loss c mean error^2:

    P = centred W_enc^T + bias      z = ReLU(TopK_k(P))             error = z W_dec - residual
    G = 2 c / (n d_model) error     dP = (G W_dec^T) where z > 0    dW_dec = z^T G    dW_enc = dP^T centred

That is five products of (tokens, m) and (m, d_model) matrices.

`dense` makes all of them, with k of m entries of z and dP above 0; `sparse` makes P alone and then works on the k
active latents of each token, which is less arithmetic and slower per flop. Both go over the tokens in chunks, so that
what they hold is bounded, and add up weight gradients in float32 (float64 for float64).

Called by `topkapi.auxk`. Source: Gao et al. 2024, appendices A.2 and D.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.ops.autograd import SparseRows
from topkapi.ops.dispatch import implementation

SCRATCH_BYTES = 1024 * 2**20  # held beside inputs and results
SPARSE_ENTRY_BYTES = 64  # a code's value, index, gradient and what sorting it takes


@dataclass(frozen=True)
class DeadWeights:
    """The rows of the dead latents, and how many of them a token may use."""

    W_enc: Float[Tensor, "m d_model"]
    W_dec: Float[Tensor, "m d_model"]
    bias: Float[Tensor, " m"]
    k: int


@dataclass
class AuxKSums:
    """Sums over the tokens seen so far."""

    squared_error: Float[Tensor, ""]
    W_enc: Float[Tensor, "m d_model"]
    W_dec: Float[Tensor, "m d_model"]
    latent_bias: Float[Tensor, " m"]

    def add_(self, other: "AuxKSums") -> "AuxKSums":
        """Add further tokens."""
        self.squared_error += other.squared_error
        self.W_enc += other.W_enc
        self.W_dec += other.W_dec
        self.latent_bias += other.latent_bias
        return self


@torch.no_grad()
def auxk_gradients(
    weights: DeadWeights,
    centred: Float[Tensor, "n d_model"],
    grad_recon: Float[Tensor, "n d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
    *,
    dense: bool,
) -> AuxKSums:
    """Squared error and gradients of the dead latents' reconstruction of the residual -inverse_scale grad_recon.

    Gradients are those of factor / 2 times the squared error; n is at least 1. Deterministic.
    """
    n, m = len(centred), len(weights.W_enc)
    row_bytes = 2 * m * centred.element_size() if dense else weights.k * SPARSE_ENTRY_BYTES
    scratch = centred.new_empty(2, _chunk_rows(n, row_bytes), m) if dense else None
    sums = None
    for rows in chunks(n, row_bytes):
        if scratch is not None:
            part = _dense(weights, centred[rows], grad_recon[rows], inverse_scale, factor, scratch)
        else:
            part = _sparse(weights, centred[rows], grad_recon[rows], inverse_scale, factor)
        sums = part if sums is None else sums.add_(part)
    return sums


def _chunk_rows(n: int, row_bytes: int) -> int:
    """Rows of the longest chunk: chunks are as even as they can be."""
    n_chunks = -(-n * row_bytes // SCRATCH_BYTES)
    return -(-n // min(max(n_chunks, 1), n))


def chunks(n: int, row_bytes: int) -> Iterator[slice]:
    """Parts of n tokens that take `row_bytes` each, of at most SCRATCH_BYTES."""
    rows = _chunk_rows(n, row_bytes)
    return (slice(start, start + rows) for start in range(0, n, rows))


def _dense(
    weights: DeadWeights,
    centred: Float[Tensor, "c d_model"],
    grad_recon: Float[Tensor, "c d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
    scratch: Float[Tensor, "2 rows m"],
) -> AuxKSums:
    primitives = implementation(centred)
    code, grad_pre_acts = scratch[:, : len(centred)]
    torch.mm(centred, weights.W_enc.T, out=code)
    selected = primitives.select_topk_(code, weights.bias, weights.k)
    grad = code @ weights.W_dec
    squared_error = primitives.residual_gradient_(grad, grad_recon, inverse_scale, factor)
    torch.mm(grad, weights.W_dec.T, out=grad_pre_acts)
    latent_bias = primitives.mask_selected_(grad_pre_acts, selected)
    return AuxKSums(
        squared_error=squared_error.sum(),
        W_enc=_transposed_product(grad_pre_acts, centred),
        W_dec=_transposed_product(code, grad),
        latent_bias=latent_bias,
    )


def _sparse(
    weights: DeadWeights,
    centred: Float[Tensor, "c d_model"],
    grad_recon: Float[Tensor, "c d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
) -> AuxKSums:
    primitives, no_pre_bias = implementation(centred), torch.zeros_like(centred[0])
    values, indices = primitives.encode_topk(centred, weights.W_enc, weights.bias, no_pre_bias, weights.k)
    grad = primitives.dense_sparse_matmul(values, indices, weights.W_dec)
    squared_error = primitives.residual_gradient_(grad, grad_recon, inverse_scale, factor)
    return sums_of_code(weights, centred, values, indices, grad, squared_error)


def sums_of_code(
    weights: DeadWeights,
    centred: Float[Tensor, "c d_model"],
    values: Float[Tensor, "c k"],
    indices: Int[Tensor, "c k"],
    grad: Float[Tensor, "c d_model"],
    squared_error: Float[Tensor, " part"],
) -> AuxKSums:
    """Gradients of a sparse code of the dead latents, from `grad`, that of its reconstruction."""
    primitives, m = implementation(centred), len(weights.W_enc)
    grad_values = primitives.matmul_at_sparse_indices(grad, weights.W_dec, indices).mul_(values > 0)
    order = primitives.order_by_latent(indices, m)
    return AuxKSums(
        squared_error=squared_error.sum(),
        W_enc=SparseRows(grad_values, order, centred).dense(),
        W_dec=SparseRows(values, order, grad).dense(),
        latent_bias=primitives.latent_sums(grad_values, order, m),
    )


def _transposed_product(a: Float[Tensor, "c m"], b: Float[Tensor, "c d_model"]) -> Float[Tensor, "m d_model"]:
    """a^T b, not rounded below float32."""
    if a.dtype in (torch.float32, torch.float64):
        return a.T @ b
    if a.is_cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T.float() @ b.float()  # CPUs have no product with another dtype out
