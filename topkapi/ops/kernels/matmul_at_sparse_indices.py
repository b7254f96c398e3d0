"""Dot products of a dense row with the weight rows that a sparse code selects.

A program makes ROWS of one token's dots. It goes through the columns BLOCK at a time, keeps a partial dot a group of
neighbouring columns, and sums over the groups at the end: one exchange between lanes a token instead of one a block.
It reads 2 n k d_model bytes of bf16 weight rows, from the level-2 cache where they are there already. Entries of nobody
are not read.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.ops.kernels.weight_gradients import sum_dtype

LAUNCH = {"rows": 32, "columns": 128, "num_warps": 2}


@torch.no_grad()
def matmul_at_sparse_indices(
    a: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "n_latents d_model"],
    indices: Int[Tensor, "n k"],
    **launch: int,
) -> Float[Tensor, "n k"]:
    """See `topkapi.ops.reference.matmul_at_sparse_indices`. `launch` replaces LAUNCH."""
    (n, k), d_model = indices.shape, weight.shape[1]
    given = LAUNCH | launch
    out = torch.empty(n, k, dtype=sum_dtype(weight), device=weight.device)
    if out.numel():
        rows = min(given["rows"], max(triton.next_power_of_2(k), 2))
        block = min(given["columns"], max(triton.next_power_of_2(d_model), 16))
        _at_indices[(n * triton.cdiv(k, rows),)](
            a.contiguous(), weight.contiguous(), indices.contiguous(), out, len(weight), D=d_model, K=k, ROWS=rows,
            BLOCK=block, GROUP=lane_columns(weight), num_warps=given["num_warps"],
        )  # fmt: skip
    return out


def lane_columns(weight: Tensor) -> int:
    """Neighbouring columns that one lane loads at once, 16 bytes."""
    return 16 // weight.element_size()


@triton.jit
def _at_indices(
    a_ptr, weight_ptr, indices_ptr, out_ptr, n_latents,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (K + ROWS - 1) // ROWS
    token = (tl.program_id(0) // blocks).to(tl.int64)  # one grid axis: the others end at 65 535
    j = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    in_k = j < K
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    latent = tl.load(indices_ptr + token * K + j, mask=in_k, other=n_latents)
    exists = latent < n_latents
    base = weight_ptr + latent.to(tl.int64) * D
    dots = tl.zeros((ROWS, BLOCK // GROUP), dtype)
    for c0 in range(0, D, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        in_d = c < D
        x = tl.load(a_ptr + token * D + c, mask=in_d, other=0.0).to(dtype)
        rows = tl.load(base[:, None] + c[None, :], mask=exists[:, None] & in_d[None, :], other=0.0)  # (ROWS, BLOCK)
        dots += tl.sum(tl.reshape(rows.to(dtype) * x[None, :], (ROWS, BLOCK // GROUP, GROUP)), 2)
    tl.store(out_ptr + token * K + j, tl.sum(dots, 1), mask=in_k)
