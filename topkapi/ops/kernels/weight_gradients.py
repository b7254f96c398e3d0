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
import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.ops.kernels.screen import is_hopper
from topkapi.ops.reference import LatentOrder, RowGradient

SPLIT = 128  # pairs in a block; 8 latents on a third of 65 536 tokens are then 1 366 blocks, several a multiprocessor
MOST_BLOCKS = 32_768  # blocks are made longer rather than more numerous: their sums take blocks x d_model x 4 bytes
PAIRS = 4  # bf16 rows gathered at a time, half as many of float32; prefetching more through shared memory gains nothing
COLUMNS = 256  # 8 a lane for one warp, 16 bytes of bf16
BIASES = {"positions": 32, "columns": 1024, "warps": 2}
WITH_ROWS = {"latents": 4, "programs": 1056, "wide": 1024}  # latents at a time; 8 programs a multiprocessor of an H200
SUMS_ALONE = {"latents": 8, "programs": 1584, "wide": 512}
LONG = 512  # pairs of a latent from which on a whole program sums them, "wide" at a time: more would cost registers


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
        pairs: int = PAIRS,
        columns_a_warp: int = 4 * COLUMNS,
    ) -> None:
        num_warps = 1 if sliced else min(triton.next_power_of_2(triton.cdiv(d_model, columns_a_warp)), 16)
        block = COLUMNS * num_warps
        tiles = 1 if sliced else triton.cdiv(d_model, block)
        self.slices = triton.cdiv(d_model, block * tiles)
        self.launch = {"num_warps": num_warps}
        values, order, rows = gradient.values, gradient.order, gradient.rows
        self.constants = {
            "DIRECT": is_hopper((gradient.subset_rows if rows is None else rows).device),
            "D": d_model,
            "K": 1 if values is None else values.shape[1],
            "SPLIT": SPLIT,
            "BLOCK": block,
            "TILES": tiles,
            "R": max(pairs * 2 // (2 if rows is None else rows.element_size()), 2),
        }
        sums = None
        if order is not None and values.numel() == 0:
            order = values = rows = None
        if order is not None:
            values, rows = values.contiguous(), rows.contiguous()
            self.constants["SPLIT"] = split = split_of(len(order.pairs))
            n_blocks = len(order.pairs) // split
            sums = torch.empty(n_blocks, d_model, dtype=sum_dtype(rows), device=rows.device)
            if n_blocks:
                given = (values, order.pairs, order.latents, rows, sums, len(order.offsets) - 1)
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


def sum_dtype(like: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


@torch.no_grad()
def latent_sums(values: Float[Tensor, "n k"], order: LatentOrder, n_latents: int) -> Float[Tensor, " n_latents"]:
    """See `topkapi.ops.reference.latent_sums`."""
    return _bias_gradients(values, order, n_latents, None)[0]


@torch.no_grad()
def bias_gradients(
    values: Float[Tensor, "n k"], order: LatentOrder, weight: Float[Tensor, "n_latents d_model"]
) -> tuple[Float[Tensor, " n_latents"], Float[Tensor, " d_model"]]:
    """See `topkapi.ops.reference.bias_gradients`. Reads `weight` once: parts of its rows, then the parts' sum."""
    return _bias_gradients(values, order, len(weight), weight.contiguous())


def _bias_gradients(
    values: Tensor, order: LatentOrder, n_latents: int, weight: Tensor | None
) -> tuple[Float[Tensor, " n_latents"], Float[Tensor, " d_model"] | None]:
    dtype, d_model = sum_dtype(values), 0 if weight is None else weight.shape[1]
    sums = torch.empty(n_latents, dtype=dtype, device=values.device)
    block = max(min(triton.next_power_of_2(d_model), BIASES["columns"]), 16)
    turn = SUMS_ALONE if weight is None else WITH_ROWS
    programs = min(triton.cdiv(n_latents, turn["latents"]), turn["programs"])
    parts = torch.empty(programs, d_model, dtype=dtype, device=values.device)
    if values.numel() == 0:  # kernels take no pointers to nothing
        sums.zero_(), parts.zero_()
    elif n_latents:
        _bias_sums[(programs, max(triton.cdiv(d_model, block), 1))](
            values.contiguous(), order.pairs, order.offsets, weight, sums, parts, n_latents,
            D=d_model, LATENTS=turn["latents"], R=BIASES["positions"], LONG=LONG,
            WIDE=turn["wide"], BLOCK=block, num_warps=BIASES["warps"],
        )  # fmt: skip
    if weight is None:
        return sums, None
    row_sum = torch.empty(d_model, dtype=dtype, device=values.device)
    if d_model:
        _column_sums[(triton.cdiv(d_model, 8),)](parts, row_sum, programs, D=d_model, ROWS=512, COLUMNS=8, num_warps=8)
    return sums, row_sum


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


@triton.jit
def add_rows(
    acc, weights, rows, column, in_d,
    DIRECT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`acc` plus R rows, whose first columns `rows` points to, each times its weight."""
    c = column + tl.arange(0, BLOCK)
    found = ()
    for r in tl.static_range(R):  # all asked for before the first is used
        for t in tl.static_range(TILES):
            at = rows[r] + c + t * BLOCK
            if D % (BLOCK * TILES) == 0:
                x = tl.load(at, eviction_policy="evict_last")
            else:
                x = tl.load(at, mask=in_d[t], other=0.0, eviction_policy="evict_last")
            found = found + (x,)
    out = ()
    for t in tl.static_range(TILES):
        total = acc[t]
        for r in tl.static_range(R):
            total += widened(found[r * TILES + t], DIRECT, total.dtype) * weights[r]
        out = out + (total,)
    return out


@triton.jit
def widened(x, DIRECT: tl.constexpr, dtype: tl.constexpr):
    """`x.to(dtype)`; Triton's own way from bf16 takes two instructions for each second number."""
    if DIRECT and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:  # noqa: RET505 - the branch not taken must not be compiled
        return x.to(dtype)


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
def _pair(first_ptr, j, own, head, gap):
    """A latent's pair number j of those outside of whole blocks; beyond the last the last again."""
    j = tl.minimum(j, own - 1)
    return tl.load(first_ptr + tl.where(j < head, j, j + gap), mask=own > 0, other=0)


@triton.jit
def row_gradient(
    values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, latent, column,
    DIRECT: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, R: tl.constexpr, dtype: tl.constexpr,
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
        own = stop - start - gap
        pairs = ()
        for r in tl.static_range(R):
            pairs = pairs + (_pair(pairs_ptr + start, r, own, head, gap),)
        for j in range(0, own, R):
            weights = ()
            rows = ()
            more = ()
            for r in tl.static_range(R):
                rows = rows + (rows_ptr + (pairs[r].to(tl.uint32) // K).to(tl.int64) * D,)
                weights = weights + (tl.load(values_ptr + pairs[r], mask=j + r < own, other=0.0).to(dtype),)
            for r in tl.static_range(R):  # asked for while the rows are on their way
                more = more + (_pair(pairs_ptr + start, j + R + r, own, head, gap),)
            acc = add_rows(acc, weights, rows, column, in_d, DIRECT, D, BLOCK, TILES, R)
            pairs = more
        if whole:
            for b in range(first, last, R):
                weights = ()
                rows = ()
                for r in tl.static_range(R):
                    weights = weights + (tl.where(b + r < last, 1.0, 0.0).to(dtype),)
                    rows = rows + (sums_ptr + tl.minimum(b + r, last - 1).to(tl.int64) * D,)
                acc = add_rows(acc, weights, rows, column, in_d, DIRECT, D, BLOCK, TILES, R)
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
    DIRECT: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    latent = start + tl.program_id(0).to(tl.int64)
    acc = row_gradient(
        values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, latent, 0,
        DIRECT, D, K, SPLIT, BLOCK, TILES, R, out_ptr.dtype.element_ty,
    )  # fmt: skip
    for t in tl.static_range(TILES):
        c = t * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + (latent - start) * D + c, acc[t], mask=c < D)


@triton.jit
def _block_sums(
    values_ptr, pairs_ptr, latents_ptr, rows_ptr, sums_ptr, n_latents,
    DIRECT: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The sum of a block of SPLIT sorted pairs if they are all of one latent; pairs of nobody come last."""
    block = tl.program_id(0)
    column = tl.program_id(1) * BLOCK * TILES
    start = block * SPLIT
    first = tl.load(latents_ptr + start)
    if (first == tl.load(latents_ptr + start + SPLIT - 1)) & (first < n_latents):
        dtype: tl.constexpr = sums_ptr.dtype.element_ty
        acc, in_d = no_rows(column, D, BLOCK, TILES, dtype)
        for j in range(0, SPLIT, R):
            weights = ()
            rows = ()
            for r in tl.static_range(R):
                pair = tl.load(pairs_ptr + start + j + r)
                rows = rows + (rows_ptr + (pair.to(tl.uint32) // K).to(tl.int64) * D,)
                weights = weights + (tl.load(values_ptr + pair).to(dtype),)
            acc = add_rows(acc, weights, rows, column, in_d, DIRECT, D, BLOCK, TILES, R)
        for t in tl.static_range(TILES):
            c = column + t * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums_ptr + block.to(tl.int64) * D + c, acc[t], mask=in_d[t])


@triton.jit
def _sums_beyond(
    values_ptr, pairs_ptr, start, stop, LATENTS: tl.constexpr, R: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Sums of the values of LATENTS segments, R pairs of each at a time, of long ones WIDE, one after another."""
    length = stop - start
    short = tl.where(length < LONG, length, 0)
    acc = tl.zeros((LATENTS, R), dtype)
    for j0 in range(0, tl.max(short, 0), R):
        j = (j0 + tl.arange(0, R))[None, :]
        inside = j < short[:, None]
        pair = tl.load(pairs_ptr + start[:, None] + j, mask=inside, other=0)
        acc += tl.load(values_ptr + pair, mask=inside, other=0.0).to(dtype)
    total = tl.sum(acc, 1)
    if tl.max(length, 0) >= LONG:
        for i in range(LATENTS):
            this = tl.arange(0, LATENTS) == i
            start_i = tl.sum(tl.where(this, start, 0), 0)
            stop_i = tl.sum(tl.where(this, stop, 0), 0)
            if stop_i - start_i >= LONG:
                wide = tl.zeros((WIDE,), dtype)
                for j0 in range(start_i, stop_i, WIDE):
                    j = j0 + tl.arange(0, WIDE)
                    pair = tl.load(pairs_ptr + j, mask=j < stop_i, other=0)
                    wide += tl.load(values_ptr + pair, mask=j < stop_i, other=0.0).to(dtype)
                total = tl.where(this, tl.sum(wide, 0), total)
    return total


@triton.jit
def _bias_sums(
    values_ptr, pairs_ptr, offsets_ptr, weight_ptr, sums_ptr, parts_ptr, n_latents,
    D: tl.constexpr, LATENTS: tl.constexpr, R: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the latents' values and, where a weight is given, a part of the sum of its rows times them.

    Offsets, pairs and values are found one after another. Rows of the weight are on their way meanwhile, and the next
    latents' offsets and pairs too. Programs of other columns compute the same sums and store them once more.
    """
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK,), dtype)
    j = tl.arange(0, R)[None, :]
    step = tl.num_programs(0) * LATENTS
    latent = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    start = tl.load(offsets_ptr + latent, mask=latent < n_latents, other=0)
    stop = tl.load(offsets_ptr + latent + 1, mask=latent < n_latents, other=0)
    pair = tl.load(pairs_ptr + start[:, None] + j, mask=j < (stop - start)[:, None], other=0)
    for first in range(tl.program_id(0) * LATENTS, n_latents, step):
        latent = first + tl.arange(0, LATENTS)
        value = tl.load(values_ptr + pair, mask=j < (stop - start)[:, None], other=0.0).to(dtype)
        if weight_ptr is not None:
            mask = (latent < n_latents)[:, None] & (c < D)[None, :]
            rows = tl.load(weight_ptr + latent.to(tl.int64)[:, None] * D + c[None, :], mask=mask, other=0.0)
        more = latent + step
        next_start = tl.load(offsets_ptr + more, mask=more < n_latents, other=0)
        next_stop = tl.load(offsets_ptr + more + 1, mask=more < n_latents, other=0)
        total = tl.sum(value, 1)
        if tl.max(stop - start, 0) > R:
            begun = tl.minimum(start + R, stop)
            total += _sums_beyond(values_ptr, pairs_ptr, begun, stop, LATENTS, R, LONG, WIDE, dtype)
        pair = tl.load(pairs_ptr + next_start[:, None] + j, mask=j < (next_stop - next_start)[:, None], other=0)
        tl.store(sums_ptr + latent, total, mask=latent < n_latents)
        if weight_ptr is not None:
            tl.debug_barrier()  # the sums are read back by other threads than wrote them
            weights = tl.load(sums_ptr + latent, mask=latent < n_latents, other=0.0)
            acc += tl.sum(weights[:, None] * rows.to(dtype), 0)
        start = next_start
        stop = next_stop
    if weight_ptr is not None:
        tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + c, acc, mask=c < D)


@triton.jit
def _column_sums(x_ptr, out_ptr, n_rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the rows; many programs of few columns, as the rows are few and wait for each other."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty)
    for i0 in range(0, n_rows, ROWS):
        i = i0 + tl.arange(0, ROWS)
        mask = (i < n_rows)[:, None] & (c < D)[None, :]
        acc += tl.load(x_ptr + i[:, None] * D + c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + c, tl.sum(acc, 0), mask=c < D)


@triton.jit
def _mark(values_ptr, pairs_ptr, latents_ptr, out_ptr, n_pairs, BLOCK: tl.constexpr):
    """1 for each latent with a value above 0; several programs may write the same 1."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n_pairs
    pair = tl.load(pairs_ptr + j, mask=inside, other=0)
    above = tl.load(values_ptr + pair, mask=inside, other=0.0) > 0
    latent = tl.load(latents_ptr + j, mask=inside, other=0)
    tl.store(out_ptr + latent, tl.full((BLOCK,), 1, tl.uint8), mask=inside & above)
