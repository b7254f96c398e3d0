"""The fused optimiser: a weight's gradient is reduced, projected, scaled and applied in one pass over its rows.

One program a latent:

1. the row's gradient from the sorted pairs (`weight_gradients`), plus its row of the AuxK subset if it has one
2. minus its part along the weight's row (decoder), times the clipping factor, which is read from the device
3. Adam, unit norm (decoder), the average, and the copy that the next step computes with

so that weight, moments, average and copy are read and written once and no gradient is stored. Memory traffic a
parameter: 26 bytes (weight, mean and square in float32, a bf16 copy), 34 with the average, 8 in low memory; plus the
gathered rows. Encoder and decoder are separate launches, each gathering from one array of rows: the level-2 cache holds
half of one at 65 536 tokens of width 768, and state passes by it with the hint to be evicted first.

Offsets, pairs, values and gathered rows are found one after another. Wide rows of weight and moments are asked for
before that, into the level-2 cache, which takes no registers.

Where a row needs no sum over all its columns (the encoder in float32) it may also be cut into slices, all latents of
one slice before those of the next: the slice of the gathered rows then fits the cache.

Low memory is specified by `topkapi.ops.low_memory`; the random numbers here are the same to the bit.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking into tuples
import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from topkapi.ops import low_memory, reference
from topkapi.ops.kernels.weight_gradients import Parts, row_gradient, sum_dtype, widened
from topkapi.ops.reference import AdamStep, RowGradient, RowState

# From this d_model on rows of state are asked for ahead, and fewer pairs of a low-memory row are gathered at a time:
# registers are what is short.
WIDE = 2048
LOW_MEMORY_WIDE = {"pairs": 2}


@torch.no_grad()
def update_rows_(
    state: RowState,
    gradient: RowGradient,
    step: AdamStep,
    grad_scale: Float[Tensor, ""] | None = None,
    **launch: int,
) -> None:
    """See `topkapi.ops.reference.update_rows_`. `launch` replaces what is chosen of the launch parameters."""
    n_latents, d_model = state.weight.shape
    low = state.mean_scale is not None
    if not state.weight.numel():
        return
    if state.weight.dtype == torch.float64:  # a kernel's float arguments are float32
        reference.update_rows_(state, gradient, step, grad_scale)
        return
    chosen = {"sliced": not (low or step.unit_norm)}  # where no sum over a whole row is needed
    if low and d_model >= WIDE:
        chosen |= LOW_MEMORY_WIDE
    parts = Parts(gradient, d_model, **(chosen | launch))
    key = low_memory.key_of(step.seed, step.n_steps)
    key -= 2**32 if key >= 2**31 else 0  # a kernel's int argument is signed
    tensors = (state.weight, state.mean, state.square, state.ema, state.working, state.mean_scale, state.square_scale)
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
    _update[(n_latents, parts.slices)](
        *parts.pointers,
        grad_scale,
        *tensors,
        step.lr / (1 - step.beta1**step.n_steps),
        step.beta1,
        step.beta2,
        step.eps,
        1 / math.sqrt(1 - step.beta2**step.n_steps),
        1 - step.ema_decay,
        key,
        step.first_latent,
        UNIT_NORM=step.unit_norm,
        AHEAD=_fetched_ahead(state, d_model, parts),
        **parts.constants,
        **parts.launch,
    )


def _fetched_ahead(state: RowState, d_model: int, parts: Parts) -> bool:
    """Whether a row's state is asked for while its gradient is gathered: wide rows, aligned as the copy wants them."""
    aligned = d_model % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (state.weight, state.mean, state.square))
    return aligned and d_model >= WIDE and parts.slices == 1 and parts.constants["DIRECT"]


@torch.no_grad()
def gradient_squares(
    gradient: RowGradient, weight: Float[Tensor, "n_latents d_model"], project: bool
) -> Float[Tensor, ""]:
    """See `topkapi.ops.reference.gradient_squares`. One number a latent is stored, then they are summed."""
    n_latents, d_model = weight.shape
    squares = torch.empty(n_latents, dtype=sum_dtype(weight), device=weight.device)
    if weight.numel():
        parts = Parts(gradient, d_model)
        _squares[(n_latents,)](
            *parts.pointers, weight.contiguous(), squares, PROJECT=project, **parts.constants, **parts.launch
        )
    return squares.sum(dtype=torch.float64)


ASK_FOR_BYTES = tl.constexpr("""{
    .reg .pred p;
    .reg .b32 t;
    mov.u32 t, %tid.x;
    setp.eq.u32 p, t, 0;
    @p cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
}""")


@triton.jit
def _ask_for_row(ptr, offset, D: tl.constexpr):
    """Ask for a row to be brought into the L2 cache."""
    n_bytes: tl.constexpr = D * ptr.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        ASK_FOR_BYTES, "=r,l,r", [(ptr + offset).to(tl.int64), n_bytes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _dot(a, b, TILES: tl.constexpr):
    """Of two rows; threads wait for each other once, whatever TILES is."""
    products = a[0] * b[0]
    for t in tl.static_range(1, TILES):
        products += a[t] * b[t]
    return tl.sum(products, 0)


@triton.jit
def _projected(acc, weight, TILES: tl.constexpr):
    """`acc` minus its part along `weight`, whose norm is 1."""
    along = _dot(acc, weight, TILES)
    out = ()
    for t in tl.static_range(TILES):
        out = out + (acc[t] - along * weight[t],)
    return out


@triton.jit
def _load_row(
    ptr, offset, column,
    DIRECT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A row as a tuple of TILES blocks; it is read once, so the cache may drop it."""
    out = ()
    for t in tl.static_range(TILES):
        c = column + t * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(ptr + offset + c, mask=(c < D) | (D % (BLOCK * TILES) == 0), other=0, eviction_policy="evict_first")
        if ptr.dtype.element_ty == tl.int8:
            x = x.to(tl.int32) << 24  # converted as fast as it is added; 8 bits are not
        out = out + (widened(x, DIRECT, dtype),)
    return out


@triton.jit
def _store_row(ptr, offset, column, row, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    for t in tl.static_range(TILES):
        c = column + t * BLOCK + tl.arange(0, BLOCK)
        x = row[t]
        if ptr.dtype.element_ty == tl.bfloat16:
            x = x.to(tl.float32)  # the interpreter cannot make bf16 of float64
        tl.store(
            ptr + offset + c,
            x.to(ptr.dtype.element_ty),
            mask=(c < D) | (D % (BLOCK * TILES) == 0),
            eviction_policy="evict_first",
        )


@triton.jit
def _mix(x):
    """See `topkapi.ops.low_memory.mix`; x is uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random_bits(latent, c, key):
    """See `topkapi.ops.low_memory.random_bits`."""
    row = _mix(latent.to(tl.uint32) ^ (key.to(tl.uint32) + tl.zeros_like(c).to(tl.uint32)))
    x = row + (c >> 2).to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    first = (x ^ (x >> 15)) * 0x846CA68B
    first = tl.where((c & 1) == 0, first, first * 0x297A2D39)
    first = tl.where((c & 2) == 0, first, first * 0x645116B1)  # which is known of each register: no select is left
    return first, first * 0xC2B2AE3D


@triton.jit
def _encode_mean(mean, factor, bits):
    """Codes of `mean`, `factor` times which is at most 127^2.

    Rounded up from a level l of x = |mean| factor if l^2 + u (2 l + 1) < x, for u uniform in [0, 1). The left side is
    (l + u)^2 + u (1 - u), so that the code is sqrt(x - u (1 - u)) - u rounded up: no level has to be found first.
    """
    centred = (bits << 16).to(tl.float32) * (1.0 / 4294967296) - (0.5 - 1.0 / 131072)  # u - 1/2
    root = tl.sqrt(tl.maximum(tl.abs(mean) * factor + (centred * centred - 0.25), 0.0)) - centred
    sign = mean.to(tl.uint32, bitcast=True) & 0x80000000
    root = (root.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    # the nearest integer is in the last bits of the sum with 1.5 2^23, negative ones as two's complement
    return (root + 12582912.0).to(tl.uint32, bitcast=True).to(tl.int8)


@triton.jit
def _encode_square(root, bits):
    """Codes of squares, of which `root` is the square root in units of the smallest: at most 255^2.

    With h = l + 1/2 and c = u - 1/2, l^4 + u ((l + 1)^4 - l^4) is h^4 + 4 c h^3 + 3/2 h^2 + c h + 1/16. The code is
    the level l below, or l + 1 if that is less than root^2.
    """
    c = bits.to(tl.float32) * (0.999996 / 4294967296) - 0.5
    at_least = tl.maximum(root, 0.999999)  # a square above 0 becomes at least 1: this squared is above any u
    level = tl.sqrt(at_least) + 8388607.5  # whose last bits are the root rounded down
    h = level - 8388607.5
    between = (((h + 4.0 * c) * h + 1.5) * h + c) * h + 0.0625
    below = (between - at_least * at_least) * root + 0.0  # and 0 stays 0; the sum makes -0 into 0
    return (level.to(tl.uint32, bitcast=True) + (below.to(tl.uint32, bitcast=True) >> 31)).to(tl.uint8)


@triton.jit
def _row_maxima(a, b, TILES: tl.constexpr):
    """The largest sizes of two rows, found together."""
    size_a = tl.abs(a[0])
    size_b = tl.abs(b[0])
    for t in tl.static_range(1, TILES):
        size_a = tl.maximum(size_a, tl.abs(a[t]))
        size_b = tl.maximum(size_b, tl.abs(b[t]))
    return tl.split(tl.max(tl.join(size_a, size_b), 0))


@triton.jit
def _load_state(
    weight_ptr, mean_ptr, square_ptr, latent, column,
    DIRECT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Weight, mean and square of a row; in low memory the codes of the latter."""
    weight = _load_row(weight_ptr, latent * D, column, DIRECT, D, BLOCK, TILES, dtype)
    mean = _load_row(mean_ptr, latent * D, column, DIRECT, D, BLOCK, TILES, dtype)
    square = _load_row(square_ptr, latent * D, column, DIRECT, D, BLOCK, TILES, dtype)
    return weight, mean, square


@triton.jit
def _adam_low_memory(
    acc, weight, mean, square, mean_scale, square_scale, rate, beta1, beta2, eps, correction, TILES: tl.constexpr
):
    """The row after Adam's step, and what is encoded of the state: m / (1 - beta1) and sqrt(v / (1 - beta2)).

    Mean and square come as codes. The divisors belong to the row and are multiplied back where one number a row is
    computed: the kernel computes for as long as it loads.
    """
    # mean codes come times 2^24, see `_load_row`
    mean_factor = mean_scale * beta1 / ((1 - beta1) * 16129) * 2.0**-48
    square_factor = square_scale * beta2 / ((1 - beta2) * 4228250625.0)
    rate = rate * (1 - beta1)
    correction = correction * tl.sqrt(1 - beta2)
    w = ()
    m = ()
    r = ()
    for t in tl.static_range(TILES):
        m_t = mean[t] * tl.abs(mean[t]) * mean_factor + acc[t]
        code = square[t] * square[t]
        r_t = tl.sqrt(code * (code * square_factor) + acc[t] * acc[t])
        inverse = tl.rsqrt(r_t * correction + eps)  # squared it is the inverse; a division takes many instructions
        w = w + (weight[t] - (m_t * inverse) * (inverse * rate),)
        m = m + (m_t,)
        r = r + (r_t,)
    return w, m, r


@triton.jit
def _store_low_memory(
    weight_ptr, mean_ptr, square_ptr, mean_scale_ptr, square_scale_ptr, latent, first_latent, key, weight, mean, root,
    beta1, beta2, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What `_adam_low_memory` returns rounded and stored, see `topkapi.ops.low_memory`; the rounded weight."""
    mean_max, root_max = _row_maxima(mean, root, TILES)
    tl.store(mean_scale_ptr + latent, mean_max * (1 - beta1))
    tl.store(square_scale_ptr + latent, root_max * root_max * (1 - beta2))
    # no rounding error may lead to code 128 or 256: the largest mean comes out a little below 127^2, the largest root
    # not above 255^2; a literal below float32's range would make all of this float64
    mean_factor = 16128.98 / tl.maximum(mean_max, 1e-30)
    root_factor = 65025 / tl.maximum(root_max, 1e-30)
    root_factor = tl.where(root_max * root_factor > 65025, root_factor * (1 - 2.0**-22), root_factor)
    rounded = ()
    for t in tl.static_range(TILES):
        c = t * BLOCK + tl.arange(0, BLOCK)
        in_d = (c < D) | (D % BLOCK == 0)
        first, second = _random_bits(latent + first_latent, c, key)
        words = weight[t].to(tl.uint32, bitcast=True) + (first >> 16)
        rounded = rounded + ((words & 0xFFFF0000).to(tl.float32, bitcast=True),)
        value = (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(weight_ptr + latent * D + c, value, mask=in_d, eviction_policy="evict_first")
        code = _encode_mean(mean[t], mean_factor, first)
        tl.store(mean_ptr + latent * D + c, code, mask=in_d, eviction_policy="evict_first")
        code = _encode_square(root[t] * root_factor, second)
        tl.store(square_ptr + latent * D + c, code, mask=in_d, eviction_policy="evict_first")
    return rounded


@triton.jit
def _adam(acc, weight, mean, square, rate, beta1, beta2, eps, correction, TILES: tl.constexpr):
    """The row, mean and square after Adam's step."""
    w = ()
    m = ()
    v = ()
    for t in tl.static_range(TILES):
        m_t = beta1 * mean[t] + (1 - beta1) * acc[t]
        v_t = beta2 * square[t] + (1 - beta2) * acc[t] * acc[t]
        w = w + (weight[t] - rate * m_t / (tl.sqrt(v_t) * correction + eps),)
        m = m + (m_t,)
        v = v + (v_t,)
    return w, m, v


@triton.jit
def _unit_norm(row, TILES: tl.constexpr):
    squares = _dot(row, row, TILES)
    factor = 1 / tl.sqrt(tl.where(squares > 0, squares, 1.0))  # a row of zeros stays
    out = ()
    for t in tl.static_range(TILES):
        out = out + (row[t] * factor,)
    return out


@triton.jit(do_not_specialize=["key", "first_latent"])
def _update(
    values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, grad_scale_ptr,
    weight_ptr, mean_ptr, square_ptr, ema_ptr, working_ptr, mean_scale_ptr, square_scale_ptr,
    rate, beta1, beta2, eps, correction, ema_step, key, first_latent,
    UNIT_NORM: tl.constexpr, AHEAD: tl.constexpr, DIRECT: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    column = 0 if D <= BLOCK * TILES else tl.program_id(1) * BLOCK * TILES
    offset = latent * D
    dtype: tl.constexpr = tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    if AHEAD:
        _ask_for_row(weight_ptr, offset, D)
        _ask_for_row(mean_ptr, offset, D)
        _ask_for_row(square_ptr, offset, D)
    if mean_scale_ptr is not None:
        mean_scale = tl.load(mean_scale_ptr + latent)
        square_scale = tl.load(square_scale_ptr + latent)
    acc = row_gradient(
        values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, latent, column,
        DIRECT, D, K, SPLIT, BLOCK, TILES, R, dtype,
    )  # fmt: skip
    weight, mean, square = _load_state(weight_ptr, mean_ptr, square_ptr, latent, column, DIRECT, D, BLOCK, TILES, dtype)
    if UNIT_NORM:
        acc = _projected(acc, weight, TILES)
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(dtype)
        scaled = ()
        for t in tl.static_range(TILES):
            scaled = scaled + (acc[t] * grad_scale,)
        acc = scaled
    if mean_scale_ptr is not None:
        weight, mean, root = _adam_low_memory(
            acc, weight, mean, square, mean_scale, square_scale, rate, beta1, beta2, eps, correction, TILES
        )
    else:
        weight, mean, square = _adam(acc, weight, mean, square, rate, beta1, beta2, eps, correction, TILES)
        # before the norm is known, so that their registers are free
        _store_row(mean_ptr, offset, column, mean, D, BLOCK, TILES)
        _store_row(square_ptr, offset, column, square, D, BLOCK, TILES)
    if UNIT_NORM:
        weight = _unit_norm(weight, TILES)
    if mean_scale_ptr is not None:
        weight = _store_low_memory(
            weight_ptr, mean_ptr, square_ptr, mean_scale_ptr, square_scale_ptr, latent, first_latent, key,
            weight, mean, root, beta1, beta2, D, BLOCK, TILES,
        )  # fmt: skip
    else:
        _store_row(weight_ptr, offset, column, weight, D, BLOCK, TILES)
    if working_ptr is not None:
        _store_row(working_ptr, offset, column, weight, D, BLOCK, TILES)
    if ema_ptr is not None:
        ema = _load_row(ema_ptr, offset, column, DIRECT, D, BLOCK, TILES, dtype)
        averaged = ()
        for t in tl.static_range(TILES):
            averaged = averaged + (ema[t] + ema_step * (weight[t] - ema[t]),)
        _store_row(ema_ptr, offset, column, averaged, D, BLOCK, TILES)


@triton.jit
def _squares(
    values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, weight_ptr, out_ptr,
    PROJECT: tl.constexpr, DIRECT: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = row_gradient(
        values_ptr, pairs_ptr, offsets_ptr, rows_ptr, sums_ptr, subset_ptr, position_ptr, latent, 0,
        DIRECT, D, K, SPLIT, BLOCK, TILES, R, dtype,
    )  # fmt: skip
    if PROJECT:
        acc = _projected(acc, _load_row(weight_ptr, latent * D, 0, DIRECT, D, BLOCK, TILES, dtype), TILES)
    tl.store(out_ptr + latent, _dot(acc, acc, TILES))
