"""Weight gradients of a sparse layer, a latent's row at a time, from the pairs sorted by latent.

    out[l] = sum over the pairs p of latent l of values[p] rows[token of p]

One program a latent walks the latent's segment of the sorted pairs, R pairs at a time, and keeps the sum of the rows
it gathers in registers: TILES blocks of BLOCK columns, so that a row of 768 is three blocks of 256 and none is wasted.
The gathered rows are 2 n k d_model bytes of bf16, of which the level-2 cache serves what fits; everything else is
small. The same walk is the first half of `update_rows_`, which then never stores the gradient.

Long segments. A latent that fires on a third of the tokens would keep its one program busy for longer than all others
together. So the sorted pairs are also cut at multiples of SPLIT, and a block that lies inside one segment is summed by
a program of its own, in a launch before. A latent's program adds the pairs before its first whole block, those
after its last, and then the sums of its blocks, always in that order: the result does not depend on timing.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking into tuples
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.ops.reference import LatentOrder, RowGradient

SPLIT = 128  # pairs in a block; 8 latents on a third of 65 536 tokens are then 1 366 blocks, several a multiprocessor
MOST_BLOCKS = 32_768  # blocks are made longer rather than more numerous: their sums take blocks x d_model x 4 bytes
LAUNCH = {"pairs": 4, "stages": 1}  # bf16 rows gathered at a time; stages > 1 prefetches through shared memory
COLUMNS = 256  # 8 a lane for one warp, 16 bytes of bf16
SUMS = {"latents": 32, "positions": 16, "num_warps": 4}


@torch.no_grad()
def order_by_latent(indices: Int[Tensor, "n k"], n_latents: int) -> LatentOrder:
    """See `topkapi.ops.reference.order_by_latent`; int32 throughout.

    Raises:
        TopkapiError: n k or n_latents is 2^31 or more.
    """
    if max(indices.numel(), n_latents) >= 2**31:
        raise TopkapiError(
            f"a batch may hold fewer than 2^31 active latents, and so may the dictionary; got n k={indices.numel()}, "
            f"n_latents={n_latents}. Make the batch smaller."
        )
    latents, pairs = indices.flatten().to(torch.int32).sort(stable=True)
    bounds = torch.arange(n_latents + 1, dtype=torch.int32, device=indices.device)
    return LatentOrder(pairs.to(torch.int32), latents, torch.searchsorted(latents, bounds, out_int32=True))


@torch.no_grad()
def transposed_dense_sparse_matmul(
    values: Float[Tensor, "n k"],
    order: LatentOrder,
    rows: Float[Tensor, "n d_model"],
    start: int,
    stop: int,
) -> Float[Tensor, "stop_minus_start d_model"]:
    """See `topkapi.ops.reference.transposed_dense_sparse_matmul`."""
    out = torch.empty(stop - start, rows.shape[1], dtype=sum_dtype(rows), device=rows.device)
    if out.numel() == 0:
        return out
    parts = Parts(RowGradient(values, order, rows), rows.shape[1])
    _row_sums[(stop - start,)](*parts.pointers, out, start, **parts.constants, **parts.launch)
    return out


class Parts:
    """A gradient as the kernels take it: contiguous tensors, the sums of whole blocks, and the launch parameters."""

    def __init__(
        self,
        gradient: RowGradient,
        d_model: int,
        *,
        sliced: bool = False,
        pairs: int = 0,
        stages: int = 0,
        warps: int = 0,
    ) -> None:
        self.num_warps = warps or min(max(triton.next_power_of_2(triton.cdiv(d_model, 4 * COLUMNS)), 1), 16)
        block = min(COLUMNS * self.num_warps, max(triton.next_power_of_2(d_model), 16))
        tiles = 1 if sliced else triton.cdiv(d_model, block)
        self.slices = triton.cdiv(d_model, block * tiles)
        self.launch = {"num_warps": self.num_warps}
        values, order, rows = gradient.values, gradient.order, gradient.rows
        self.constants = {
            "D": d_model,
            "K": 1 if values is None else values.shape[1],
            "SPLIT": SPLIT,
            "BLOCK": block,
            "TILES": tiles,
            "R": max((pairs or LAUNCH["pairs"]) * 2 // (2 if rows is None else rows.element_size()), 2),
            "STAGES": stages or LAUNCH["stages"],
        }
        if rows is not None:
            n_bytes = self.constants["R"] * block * tiles * rows.element_size()
            self.constants["STAGES"] = fitting_stages(self.constants["STAGES"], n_bytes, rows.device)
        sums = None
        if order is not None and values.numel() == 0:
            order = values = rows = None
        if order is not None:
            values, rows = values.contiguous(), rows.contiguous()
            self.constants["SPLIT"] = split = split_of(len(order.pairs))
            n_blocks = len(order.pairs) // split
            sums = torch.empty(n_blocks, d_model, dtype=sum_dtype(rows), device=rows.device)
            if n_blocks:
                given = (values, order.pairs, order.latents, rows, sums)
                _block_sums[(n_blocks, self.slices)](*given, **self.constants, **self.launch)
        subset_rows, position = gradient.subset_rows, gradient.position
        if subset_rows is not None and subset_rows.numel() == 0:
            subset_rows = position = None
        offsets, sorted_pairs = (None, None) if order is None else (order.offsets, order.pairs)
        subset_rows = None if subset_rows is None else subset_rows.contiguous()
        self.pointers = (values, sorted_pairs, offsets, rows, sums, subset_rows, position)


def split_of(n_pairs: int) -> int:
    """Pairs in a block."""
    return SPLIT * max(1, triton.next_power_of_2(triton.cdiv(n_pairs, SPLIT * MOST_BLOCKS)))


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program can have."""
    if device.type != "cuda":
        return 2**31
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def fitting_stages(stages: int, n_bytes: int, device: torch.device) -> int:
    """`stages`, or 1 where what is fetched ahead, `n_bytes` at a time, would not fit into shared memory."""
    reductions = 2**13  # what else a kernel keeps there, at most
    return stages if (stages - 1) * n_bytes + reductions <= _shared_bytes(device) else 1


def sum_dtype(like: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


@torch.no_grad()
def latent_sums(values: Float[Tensor, "n k"], order: LatentOrder, n_latents: int) -> Float[Tensor, " n_latents"]:
    """See `topkapi.ops.reference.latent_sums`."""
    values = values.contiguous()
    out = torch.zeros(n_latents, dtype=sum_dtype(values), device=values.device)
    if values.numel() == 0 or n_latents == 0:
        return out
    split = split_of(len(order.pairs))
    n_blocks = len(order.pairs) // split
    sums = torch.empty(n_blocks, dtype=out.dtype, device=out.device)
    if n_blocks:
        _block_value_sums[(n_blocks,)](values, order.pairs, order.latents, sums, SPLIT=split, num_warps=1)
    latents, positions = SUMS["latents"], SUMS["positions"]
    _value_sums[(triton.cdiv(n_latents, latents),)](
        values, order.pairs, order.offsets, sums, out, n_latents, SPLIT=split, LATENTS=latents, R=positions,
        num_warps=SUMS["num_warps"],
    )  # fmt: skip
    return out


@torch.no_grad()
def fired(values: Float[Tensor, "n k"], order: LatentOrder) -> Bool[Tensor, " n_latents"]:
    """See `topkapi.ops.reference.fired`."""
    n_latents = len(order.offsets) - 1
    out = torch.zeros(n_latents, dtype=torch.uint8, device=values.device)
    if values.numel():
        _mark[(triton.cdiv(values.numel(), 1024),)](
            values.contiguous(), order.pairs, order.latents, out, values.numel(), BLOCK=1024, num_warps=4
        )
    return out.view(torch.bool)


@torch.no_grad()
def weighted_row_sum(
    weights: Float[Tensor, " n_latents"], weight: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, " d_model"]:
    """See `topkapi.ops.reference.weighted_row_sum`. Reads `weight` once: parts of its rows, then the parts' sum."""
    n_latents, d_model = weight.shape
    n_parts = min(triton.cdiv(n_latents, 16), 1024)  # several programs a multiprocessor; the parts stay small
    sums = torch.empty(n_parts, d_model, dtype=sum_dtype(weight), device=weight.device)
    if sums.numel():
        block = min(triton.next_power_of_2(d_model), COLUMNS)
        _weighted_rows[(n_parts, triton.cdiv(d_model, block))](
            weights.contiguous(), weight.contiguous(), sums, n_latents, D=d_model, BLOCK=block, R=16, num_warps=4
        )
    return sums.sum(0)


@triton.jit
def add_rows(acc, weights, rows, column, inside, in_d, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """`acc` plus R rows, each times its weight. `rows` points to their first columns; `inside` masks them."""
    out = ()
    for t in tl.static_range(TILES):
        c = column + t * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & in_d[t][None, :]
        x = tl.load(rows[:, None] + c[None, :], mask=mask, other=0.0, eviction_policy="evict_last")  # (R, BLOCK)
        out = out + (acc[t] + tl.sum(x.to(weights.dtype) * weights[:, None], 0),)
    return out


@triton.jit
def no_rows(column, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, dtype: tl.constexpr):
    """TILES blocks of zeros, and of masks that say which columns exist."""
    acc = ()
    in_d = ()
    for t in tl.static_range(TILES):
        acc = acc + (tl.zeros((BLOCK,), dtype),)
        in_d = in_d + (column + t * BLOCK + tl.arange(0, BLOCK) < D,)
    return acc, in_d


@triton.jit
def row_gradient(
    values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, latent, column,
    D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The gradient of one latent's row from `column` on, as a tuple of TILES blocks."""
    acc, in_d = no_rows(column, D, BLOCK, TILES, dtype)
    if pairs_ptr is not None:
        start = tl.load(offsets_ptr + latent)
        stop = tl.load(offsets_ptr + latent + 1)
        first = (start + SPLIT - 1) // SPLIT  # whole blocks of the segment
        last = stop // SPLIT
        whole = last > first
        head = tl.where(whole, first * SPLIT, stop) - start
        gap = tl.where(whole, (last - first) * SPLIT, 0)
        for j0 in tl.range(0, stop - start - gap, R, num_stages=STAGES):
            j = j0 + tl.arange(0, R)
            inside = j < stop - start - gap
            pair = tl.load(pairs_ptr + start + tl.where(j < head, j, j + gap), mask=inside, other=0)
            weights = tl.load(values_ptr + pair, mask=inside, other=0.0).to(dtype)
            rows = rows_ptr + (pair // K).to(tl.int64) * D
            acc = add_rows(acc, weights, rows, column, inside, in_d, D, BLOCK, TILES)
        if whole:
            for b0 in range(first, last, R):
                b = b0 + tl.arange(0, R)
                inside = b < last
                ones = tl.full((R,), 1.0, dtype)
                acc = add_rows(acc, ones, sums_ptr + b.to(tl.int64) * D, column, inside, in_d, D, BLOCK, TILES)
    if subset_ptr is not None:
        place = latent
        if position_ptr is not None:
            place = tl.load(position_ptr + latent).to(tl.int64)
        end = tl.where(place >= 0, D, 0)
        out = ()
        for t in tl.static_range(TILES):
            c = column + t * BLOCK + tl.arange(0, BLOCK)
            row = tl.load(subset_ptr + place * D + c, mask=c < end, other=0.0)
            out = out + (acc[t] + row.to(dtype),)
        acc = out
    return acc


@triton.jit
def _row_sums(
    values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, out_ptr, start,
    D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    latent = start + tl.program_id(0).to(tl.int64)
    acc = row_gradient(
        values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, latent, 0,
        D, K, SPLIT, BLOCK, TILES, R, STAGES, out_ptr.dtype.element_ty,
    )  # fmt: skip
    for t in tl.static_range(TILES):
        c = t * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + (latent - start) * D + c, acc[t], mask=c < D)


@triton.jit
def _block_sums(
    values_ptr, pairs_ptr, latents_ptr, rows_ptr, sums_ptr,
    D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of a block of SPLIT sorted pairs if they are all of one latent."""
    block = tl.program_id(0)
    column = tl.program_id(1) * BLOCK * TILES
    start = block * SPLIT
    if tl.load(latents_ptr + start) == tl.load(latents_ptr + start + SPLIT - 1):
        dtype: tl.constexpr = sums_ptr.dtype.element_ty
        acc, in_d = no_rows(column, D, BLOCK, TILES, dtype)
        for j0 in tl.range(0, SPLIT, R, num_stages=STAGES):
            pair = tl.load(pairs_ptr + start + j0 + tl.arange(0, R))
            weights = tl.load(values_ptr + pair).to(dtype)
            rows = rows_ptr + (pair // K).to(tl.int64) * D
            acc = add_rows(acc, weights, rows, column, tl.full((R,), 1, tl.int1), in_d, D, BLOCK, TILES)
        for t in tl.static_range(TILES):
            c = column + t * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums_ptr + block.to(tl.int64) * D + c, acc[t], mask=in_d[t])


@triton.jit
def _block_value_sums(values_ptr, pairs_ptr, latents_ptr, sums_ptr, SPLIT: tl.constexpr):
    """The sum of the values of a block of SPLIT sorted pairs if they are all of one latent."""
    block = tl.program_id(0)
    start = block * SPLIT
    if tl.load(latents_ptr + start) == tl.load(latents_ptr + start + SPLIT - 1):
        pairs = tl.load(pairs_ptr + start + tl.arange(0, SPLIT))
        total = tl.sum(tl.load(values_ptr + pairs).to(sums_ptr.dtype.element_ty), 0)
        tl.store(sums_ptr + block, total)


@triton.jit
def _value_sums(
    values_ptr, pairs_ptr, offsets_ptr, sums_ptr, out_ptr, n_latents,
    SPLIT: tl.constexpr, LATENTS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sums of values for LATENTS latents, as in `row_gradient`: the rows here are single numbers."""
    latent = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    exists = latent < n_latents
    start = tl.load(offsets_ptr + latent, mask=exists, other=0)
    stop = tl.load(offsets_ptr + latent + 1, mask=exists, other=0)
    first = (start + SPLIT - 1) // SPLIT
    last = tl.maximum(stop // SPLIT, first)
    whole = last > first
    head = tl.where(whole, first * SPLIT, stop) - start
    gap = tl.where(whole, (last - first) * SPLIT, 0)
    direct = stop - start - gap
    acc = tl.zeros((LATENTS, R), out_ptr.dtype.element_ty)
    for j0 in range(0, tl.max(direct, 0), R):
        j = (j0 + tl.arange(0, R))[None, :]
        inside = j < direct[:, None]
        place = start[:, None] + tl.where(j < head[:, None], j, j + gap[:, None])
        pair = tl.load(pairs_ptr + place, mask=inside, other=0)
        acc += tl.load(values_ptr + pair, mask=inside, other=0.0).to(acc.dtype)  # (LATENTS, R)
    for b0 in range(0, tl.max(last - first, 0), R):
        b = first[:, None] + b0 + tl.arange(0, R)[None, :]
        acc += tl.load(sums_ptr + b, mask=b < last[:, None], other=0.0)
    tl.store(out_ptr + latent, tl.sum(acc, 1), mask=exists)


@triton.jit
def _mark(values_ptr, pairs_ptr, latents_ptr, out_ptr, n_pairs, BLOCK: tl.constexpr):
    """1 for each latent with a value above 0; several programs may write the same 1."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n_pairs
    pair = tl.load(pairs_ptr + j, mask=inside, other=0)
    above = tl.load(values_ptr + pair, mask=inside, other=0.0) > 0
    latent = tl.load(latents_ptr + j, mask=inside, other=0)
    tl.store(out_ptr + latent, tl.full((BLOCK,), 1, tl.uint8), mask=inside & above)


@triton.jit
def _weighted_rows(weights_ptr, weight_ptr, sums_ptr, n_latents, D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr):
    """Part `program_id(0)` of the rows, a stride of all parts apart, times their weights."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    acc = tl.zeros((R, BLOCK), dtype)
    for i0 in range(part * R, n_latents, tl.num_programs(0) * R):
        i = i0 + tl.arange(0, R)
        weights = tl.load(weights_ptr + i, mask=i < n_latents, other=0.0).to(dtype)
        mask = (i < n_latents)[:, None] & (c < D)[None, :]
        rows = tl.load(weight_ptr + i.to(tl.int64)[:, None] * D + c[None, :], mask=mask, other=0.0)
        acc += weights[:, None] * rows.to(dtype)  # (R, BLOCK)
    tl.store(sums_ptr + part.to(tl.int64) * D + c, tl.sum(acc, 0), mask=c < D)
