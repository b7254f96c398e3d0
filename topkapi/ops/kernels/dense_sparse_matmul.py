"""The sparse code times a dense weight: a token's k rows, gathered, weighted and summed.

A program makes BLOCK columns of one token's output from k rows, ROWS at a time. It reads 2 n k d_model bytes of bf16
weight rows, from the level-2 cache where they are there already, and writes the output once. Entries whose value is 0
are not read.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

LAUNCH = {"rows": 16, "columns": 256, "num_warps": 1}


@torch.no_grad()
def dense_sparse_matmul(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    weight: Float[Tensor, "n_latents d_model"],
    dtype: torch.dtype | None = None,
    **launch: int,
) -> Float[Tensor, "n d_model"]:
    """See `topkapi.ops.reference.dense_sparse_matmul`. `launch` replaces LAUNCH."""
    (n, k), d_model = indices.shape, weight.shape[1]
    given = LAUNCH | launch
    out = torch.empty(n, d_model, dtype=dtype or weight.dtype, device=weight.device)
    if out.numel():
        block = min(given["columns"], max(triton.next_power_of_2(d_model), 16))
        _dense_sparse[(n * triton.cdiv(d_model, block),)](
            values.contiguous(), indices.contiguous(), weight.contiguous(), out, D=d_model, K=k, BLOCK=block,
            ROWS=min(given["rows"], max(triton.next_power_of_2(k), 2)),
            num_warps=given["num_warps"],
        )  # fmt: skip
    return out


@triton.jit
def _dense_sparse(
    values_ptr, indices_ptr, weight_ptr, out_ptr,
    D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)  # one grid axis: the others end at 65 535
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_d = c < D
    dtype: tl.constexpr = tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK,), dtype)
    for j0 in range(0, K, ROWS):
        j = j0 + tl.arange(0, ROWS)
        value = tl.load(values_ptr + token * K + j, mask=j < K, other=0.0).to(dtype)
        latent = tl.load(indices_ptr + token * K + j, mask=j < K, other=0).to(tl.int64)
        mask = (value != 0)[:, None] & in_d[None, :]
        rows = tl.load(weight_ptr + latent[:, None] * D + c[None, :], mask=mask, other=0.0)  # (ROWS, BLOCK)
        acc += tl.sum(rows.to(dtype) * value[:, None], 0)
    tl.store(out_ptr + token * D + c, acc.to(out_ptr.dtype.element_ty), mask=in_d)
