"""Reconstruction error of a sparse code and its gradients, reading each of a token's k decoder rows once.

The columns are independent but for two sums. So a program takes one token and BLOCK columns at a time:

    rows       = W_dec[indices, columns]                  (KP, BLOCK), held in registers
    error      = values rows - target                     gradient and squared error follow
    dots      += rows (scale error)                       a partial dot a group of neighbouring columns

and sums the partial dots after its last block. Each block of rows is used twice and loaded once, whatever d_model is;
k only changes the number of warps that share it. The next blocks are fetched into shared memory meanwhile, where they
fit: up to k = 256 in bf16 and 128 in float32 on an H200.

Memory traffic at 65 536 tokens, k = 32, d_model = 768: 3.2 GB of bf16 rows, less what the level-2 cache serves, and
0.2 GB of target and gradient. Entries whose value is 0 are not read.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.ops import reference
from topkapi.ops.kernels.matmul_at_sparse_indices import lane_columns
from topkapi.ops.kernels.weight_gradients import sum_dtype
from topkapi.ops.reference import DecodeStep

LAUNCH = {"held": 128, "columns": 128, "stages": 3}  # elements of the rows that a lane holds; most columns at a time
FEWEST_COLUMNS = 64  # beside few rows a narrower tile leaves lanes of a warp without an element of their own
MOST_WARPS = 16
MOST_ACTIVE = 4096


@torch.no_grad()
def decode_step(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    target: Float[Tensor, "n d_model"],
    scale: float,
    **launch: int,
) -> DecodeStep:
    """See `topkapi.ops.reference.decode_step`. `launch` replaces entries of LAUNCH.

    Raises:
        TopkapiError: k is above 4096.
    """
    (n, k), d_model = indices.shape, W_dec.shape[1]
    if k > MOST_ACTIVE:
        raise TopkapiError(f"training on a GPU takes k up to {MOST_ACTIVE}; got k={k}.")
    if W_dec.dtype == torch.float64:  # a kernel's float arguments, like `scale`, are float32
        return reference.decode_step(values, indices, W_dec, target, scale)
    given = LAUNCH | launch
    k_padded = max(triton.next_power_of_2(k), 2)
    group = math.gcd(lane_columns(W_dec), d_model)  # columns that a lane loads at once: fewer where rows are unaligned
    held = given["held"] if group == lane_columns(W_dec) else given["held"] // 2  # more partial dots take registers
    columns = min(given["columns"], max(triton.next_power_of_2(d_model), FEWEST_COLUMNS))
    block = max(min(columns, MOST_WARPS * 32 * held // k_padded), 16)
    num_warps = min(max(k_padded * block // (32 * held), 1), MOST_WARPS)
    stages = _fitting_stages(given["stages"], k_padded * block * W_dec.element_size(), W_dec.device)
    squared_error = torch.empty(n, dtype=sum_dtype(W_dec), device=W_dec.device)
    grad_values = torch.empty(n, k, dtype=sum_dtype(W_dec), device=W_dec.device)
    grad = torch.empty_like(target, memory_format=torch.contiguous_format)
    if n and d_model:
        _decode_step[(n,)](
            values.contiguous(), indices.contiguous(), W_dec.contiguous(), target.contiguous(),
            squared_error, grad, grad_values, float(scale),
            D=d_model, K=k, KP=k_padded, BLOCK=block, GROUP=group, STAGES=stages,
            num_warps=num_warps,
        )  # fmt: skip
    return DecodeStep(squared_error, grad, grad_values)


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program can have."""
    if device.type != "cuda":
        return 2**31
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _fitting_stages(stages: int, n_bytes: int, device: torch.device) -> int:
    """`stages`, or 1 where what is fetched ahead, `n_bytes` at a time, would not fit into shared memory."""
    reductions = 2**13  # what else a kernel keeps there, at most
    return stages if (stages - 1) * n_bytes + reductions <= _shared_bytes(device) else 1


@triton.jit
def _widened_again(rows, dtype: tl.constexpr):
    """`rows.to(dtype)`, said differently for bf16: two uses of one result would keep all of it in registers."""
    if rows.dtype == tl.bfloat16:
        return (rows.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - the branch not taken must not be compiled
        return rows.to(dtype)


@triton.jit
def _decode_step(
    values_ptr, indices_ptr, weight_ptr, target_ptr, squared_ptr, grad_ptr, grad_values_ptr, scale,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, KP)
    dtype: tl.constexpr = squared_ptr.dtype.element_ty
    value = tl.load(values_ptr + token * K + j, mask=j < K, other=0.0).to(dtype)
    latent = tl.load(indices_ptr + token * K + j, mask=j < K, other=0).to(tl.int64)
    base = weight_ptr + latent * D
    active = value != 0
    squares = tl.zeros((BLOCK,), dtype)
    dots = tl.zeros((KP, BLOCK // GROUP), dtype)
    for c0 in tl.range(0, D, BLOCK, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK)
        in_d = c < D
        target = tl.load(target_ptr + token * D + c, mask=in_d, other=0.0).to(dtype)
        rows = tl.load(base[:, None] + c[None, :], mask=active[:, None] & in_d[None, :], other=0.0)  # (KP, BLOCK)
        error = tl.sum(rows.to(dtype) * value[:, None], 0) - target
        squares += error * error
        grad = error * scale
        tl.store(grad_ptr + token * D + c, grad.to(grad_ptr.dtype.element_ty), mask=in_d)
        products = _widened_again(rows, dtype) * grad[None, :]
        dots += tl.sum(tl.reshape(products, (KP, BLOCK // GROUP, GROUP)), 2)
    tl.store(squared_ptr + token, tl.sum(squares, 0))
    # Every lane of a row has its sum, and the first stores it: a tensor of KP would be brought into other lanes through
    # shared memory, where lanes with the same sum write to one place at once. The hint keeps the sums where they are.
    g = tl.arange(0, BLOCK // GROUP)[None, :]
    at = tl.max_contiguous(grad_values_ptr + token * K + j[:, None] + g, (1, 2))
    grad_values = tl.where((value > 0)[:, None], tl.sum(dots, 1)[:, None], tl.zeros_like(dots))  # (KP, BLOCK / GROUP)
    tl.store(at, grad_values, mask=(j < K)[:, None] & (g == 0))
