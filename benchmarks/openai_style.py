"""The straightforward kernels for a TopK autoencoder's sparse products, as a baseline for Topkapi's.

The scheme is the one of OpenAI's published training code (Gao et al. 2024, appendix D), written anew:

- sparse code times weight: one program a token, which adds its k rows one after the other
- dot products at the code's indices: one program a token, which takes its k rows one after the other
- transposed code times rows: pairs sorted by latent, a fixed number of pairs a program, which adds rows while the
  latent stays the same and adds the sum to the output with float32 atomics when it changes. Sums that several programs
  share come in any order, so that the result differs from run to run.

Called by benchmarks/sparse_uses.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 128  # of one program in the transposed product


def dense_sparse_matmul(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """(n, d_model) in the weight's dtype: out[i] = sum_j values[i, j] weight[indices[i, j]]."""
    (n, k), d_model = indices.shape, weight.shape[1]
    out = torch.empty(n, d_model, dtype=weight.dtype, device=weight.device)
    _gather_add[(n,)](values, indices, weight, out, k, d_model, BD=triton.next_power_of_2(d_model))
    return out


def matmul_at_sparse_indices(a: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """(n, k) float32: out[i, j] = <a[i], weight[indices[i, j]]>."""
    (n, k), d_model = indices.shape, weight.shape[1]
    out = torch.empty(n, k, dtype=torch.float32, device=weight.device)
    _gather_dot[(n,)](a, indices, weight, out, k, d_model, BD=triton.next_power_of_2(d_model))
    return out


def sorted_pairs(indices: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, pairs): the code's latents in ascending order, and where each stands in the flattened code."""
    return indices.flatten().sort()


def transposed_dense_sparse_matmul(
    values: Tensor, latents: Tensor, pairs: Tensor, rows: Tensor, n_latents: int
) -> Tensor:
    """(n_latents, d_model) float32: out[l] = sum over the pairs p of latent l of values[p] rows[token of p]."""
    k, d_model, n_pairs = values.shape[1], rows.shape[1], len(pairs)
    out = torch.zeros(n_latents, d_model, dtype=torch.float32, device=rows.device)
    grid = (triton.cdiv(n_pairs, PAIRS),)
    BD = triton.next_power_of_2(d_model)
    _sorted_add[grid](values, latents, pairs, rows, out, n_pairs, k, d_model, PAIRS=PAIRS, BD=BD)
    return out


def pre_bias_gradient(grad_values: Tensor, indices: Tensor, W_enc: Tensor) -> Tensor:
    """(d_model,) float32: gradients summed over the batch, with atomics, then one product with the encoder."""
    sums = torch.zeros(len(W_enc), dtype=torch.float32, device=W_enc.device)
    sums.index_add_(0, indices.flatten(), grad_values.flatten())
    return -(sums.to(W_enc.dtype) @ W_enc).float()


@triton.jit
def _gather_add(value_ptr, index_ptr, weight_ptr, out_ptr, k, d_model, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for j in range(k):
        latent = tl.load(index_ptr + token * k + j)
        row = tl.load(weight_ptr + latent * d_model + d, mask=d < d_model, other=0.0)
        total += tl.load(value_ptr + token * k + j) * row.to(tl.float32)
    tl.store(out_ptr + token * d_model + d, total, mask=d < d_model)


@triton.jit
def _gather_dot(a_ptr, index_ptr, weight_ptr, out_ptr, k, d_model, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    a = tl.load(a_ptr + token * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
    for j in range(k):
        latent = tl.load(index_ptr + token * k + j)
        row = tl.load(weight_ptr + latent * d_model + d, mask=d < d_model, other=0.0)
        tl.store(out_ptr + token * k + j, tl.sum(a * row.to(tl.float32)))


@triton.jit
def _sorted_add(
    value_ptr, latent_ptr, pair_ptr, row_ptr, out_ptr, n_pairs, k, d_model, PAIRS: tl.constexpr, BD: tl.constexpr
):
    first = tl.program_id(0) * PAIRS
    d = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    current = tl.load(latent_ptr + first)
    for i in range(first, min(first + PAIRS, n_pairs)):
        latent = tl.load(latent_ptr + i)
        pair = tl.load(pair_ptr + i)
        if latent != current:
            tl.atomic_add(out_ptr + current * d_model + d, total, mask=d < d_model, sem="relaxed")
            total = tl.zeros((BD,), tl.float32)
            current = latent
        row = tl.load(row_ptr + pair // k * d_model + d, mask=d < d_model, other=0.0)
        total += tl.load(value_ptr + pair) * row.to(tl.float32)
    tl.atomic_add(out_ptr + current * d_model + d, total, mask=d < d_model, sem="relaxed")
