"""Which of a shard's candidates are among the k largest of all shards'.

One program a row, whose values stay in registers. Values above 0 are ordered as their bit patterns, so the k-th largest
is found by bisection on patterns, whatever order they come in: 31 counts of a row at most, fewer because it begins
between 0 and the row's maximum and ends as soon as a count is k. Only the shard's own candidates are then written.

Memory traffic: the gathered values once, 4 shards c bytes a row, and 24 c of the shard's own.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.ops import reference

LONGEST_ROW = 16_384  # candidates of all shards: 32 a thread at 512 threads
HELD = 512  # candidates a warp holds


@torch.no_grad()
def keep_largest(
    values: Float[Tensor, "n c"],
    indices: Int[Tensor, "n c"],
    gathered: Float[Tensor, "shards_times_n c"],
    shard: int,
    k: int,
    nobody: int,
) -> tuple[Float[Tensor, "n c"], Int[Tensor, "n c"]]:
    """See `topkapi.ops.reference.keep_largest`. For float32 rows of LONGEST_ROW at most; others go to the reference."""
    n, width = values.shape
    n_all = gathered.numel() // max(n, 1)
    if values.dtype != torch.float32 or n_all > LONGEST_ROW:
        return reference.keep_largest(values, indices, gathered, shard, k, nobody)
    out, latents = torch.empty_like(values), torch.empty_like(indices)
    if values.numel():
        block = max(triton.next_power_of_2(n_all), 16)
        _keep_largest[(n,)](
            values.contiguous(), indices.contiguous(), gathered.contiguous(), out, latents, n, width, n_all, shard, k,
            nobody, OWN=max(triton.next_power_of_2(width), 16), BLOCK=block,
            num_warps=min(max(block // HELD, 1), 16),
        )  # fmt: skip
    return out, latents


@triton.jit
def _keep_largest(
    value_ptr, index_ptr, gathered_ptr, out_value_ptr, out_index_ptr, n, width, n_all, shard, k, nobody,
    OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    theirs = tl.load(gathered_ptr + (j // width * n + row) * width + j % width, mask=j < n_all, other=0.0)
    theirs = tl.maximum(theirs, 0.0).to(tl.int32, bitcast=True)  # -0.0 is no candidate either
    theirs = tl.maximum(theirs, 0)

    # at least k patterns are >= low, or low is 1 and all above 0 are kept; fewer than k are >= high
    low = tl.full((), 1, tl.int32)
    high = tl.max(theirs, 0) + 1
    n_low = tl.sum((theirs >= low).to(tl.int32), 0)
    while (high - low > 1) & (n_low > k):
        middle = low + (high - low) // 2
        n_middle = tl.sum((theirs >= middle).to(tl.int32), 0)
        enough = n_middle >= k
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        high = tl.where(enough, high, middle)
    # with more than k left they are equal at the edge: lower shards go first
    room = (
        k - tl.sum((theirs >= high).to(tl.int32), 0) - tl.sum(((theirs == low) & (j < shard * width)).to(tl.int32), 0)
    )

    i = tl.arange(0, OWN)
    value = tl.load(value_ptr + row * width + i, mask=i < width, other=0.0)
    ours = tl.maximum(tl.maximum(value, 0.0).to(tl.int32, bitcast=True), 0)
    at_edge = (ours == low) & (n_low > k)
    keep = (ours >= low) & ((at_edge == 0) | (tl.cumsum(at_edge.to(tl.int32), 0) <= room))
    latent = tl.load(index_ptr + row * width + i, mask=i < width, other=0)
    tl.store(out_value_ptr + row * width + i, tl.where(keep, value, 0.0), mask=i < width)
    tl.store(out_index_ptr + row * width + i, tl.where(keep, latent, nobody), mask=i < width)
