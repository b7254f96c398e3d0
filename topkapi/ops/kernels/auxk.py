"""AuxK on the dead subset, between its five dense products: selection and the mask.

Pre-activations of m dead latents are an (n, m) bf16 matrix that cuBLAS writes and reads; these kernels change it in
place, one pass each:

    select_topk_     reads and writes n m, writes n m / 8 bytes of mask       2 n m 2 B
    mask_selected_   reads the mask, reads and writes n m                     2 n m 2 B

Selection: one program a row, which stays in registers, two neighbouring columns in an int32. Rounded to bf16 and cut
off at 0, values are ordered as their 15-bit patterns, so the k-th largest is found by bisection on patterns. A pattern
is compared with both halves of an int32 at once: with the top bit of each half set, subtracting the pattern from both
clears it just where the half is smaller. Most rows have their k-th largest within WINDOW patterns of their maximum (128
patterns are a factor of 2), so the bisection starts there. Entries equal to the k-th largest are taken from the first
group of eight columns on, in a group the even columns first: counts of a group are nibbles of an int32, and the nibbles
of its product with 0x11111111 are their running sums. The mask is kept as bits, because reading the selected code again
would cost sixteen times as much; bit i of a byte is column 2 i, and bit 4 + i column 2 i + 1, of eight.

Deterministic. The mask's column sums, the gradient of latent_bias, are added up over ROWS_A_PROGRAM rows in registers,
and over programs by `torch.sum`.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.ops import reference

LONGEST_ROW = 65_536  # columns: 32 int32 a thread at 1 024 threads, which have 64 registers (some spill past 32 768)
GROUPS_A_THREAD = 8  # of 8 columns
WINDOW = 256  # bf16 patterns below the row's maximum among which the k-th largest is looked for first
ROWS_A_PROGRAM = 128  # of the mask
MASK_TILE = (4, 64)  # rows and bytes (8 columns each) at a time
MASK_WARPS = 4


def select_topk_(
    pre_acts: Float[Tensor, "n m"], bias: Float[Tensor, " m"], k: int, *, window: int = WINDOW, num_warps: int = 0
) -> Tensor:
    """See `topkapi.ops.reference.select_topk_`. The mask comes back as (n, m / 8) uint8, in the order said above.

    For bf16 and an m that is a multiple of 8, at most LONGEST_ROW; anything else goes to the reference.
    """
    n, m = pre_acts.shape
    if pre_acts.dtype != torch.bfloat16 or m % 8 or m > LONGEST_ROW:
        return reference.select_topk_(pre_acts, bias, k)
    require_contiguous(pre_acts, "pre_acts")
    selected = torch.empty(n, m // 8, dtype=torch.uint8, device=pre_acts.device)
    if n == 0 or m == 0:
        return selected
    halves = bias.float().view(-1, 2).T.contiguous()  # even columns, odd columns: both are then read in wide loads
    groups = max(triton.next_power_of_2(m // 8), 32)
    num_warps = num_warps or min(max(groups // (32 * GROUPS_A_THREAD), 1), 32)
    _select[(n,)](
        pre_acts.view(torch.int32), halves, selected, m // 2, min(k, m), window, GROUPS=groups, num_warps=num_warps
    )
    return selected


def mask_selected_(
    grad: Float[Tensor, "n m"],
    selected: Tensor,
    *,
    rows_a_program: int = ROWS_A_PROGRAM,
    tile: tuple[int, int] = MASK_TILE,
    num_warps: int = MASK_WARPS,
) -> Float[Tensor, " m"]:
    """See `topkapi.ops.reference.mask_selected_`."""
    if selected.dtype == torch.bool:
        return reference.mask_selected_(grad, selected)
    require_contiguous(grad, "grad")
    n, m = grad.shape
    parts = triton.cdiv(n, rows_a_program)
    sums = torch.empty(parts, m, dtype=torch.float32, device=grad.device)
    if n and m:
        grid = (parts, triton.cdiv(m // 8, tile[1]))
        _mask[grid](grad, selected, sums, n, m // 8, rows_a_program, STEP=tile[0], BYTES=tile[1], num_warps=num_warps)
    return sums.sum(0)


def require_contiguous(tensor: Tensor, name: str) -> None:
    """Raise a TopkapiError unless `tensor`, which is changed in place, is contiguous."""
    if not tensor.is_contiguous():
        raise TopkapiError(f"{name} is changed in place and must be contiguous; got strides {tensor.stride()}.")


@triton.jit
def _at_least(marked, pattern):
    """The top bit of each 16-bit half of `marked` that is, without the top bit which all have set, >= `pattern`."""
    return (marked - pattern.to(tl.uint32) * 0x00010001) & 0x80008000


@triton.jit
def _count(marked, pattern):
    """How many halves of `marked` are at least `pattern`, which is above 0."""
    both = tl.sum(_at_least(marked, pattern) >> 15)  # at most 32 768 in each half
    return ((both & 0xFFFF) + (both >> 16)).to(tl.int32)


@triton.jit
def _pattern(value):
    """The bits of a value rounded to bf16, 0 where it is not above 0."""
    return tl.maximum(value, 0.0).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _select(pre_ptr, bias_ptr, selected_ptr, n_pairs, k, window, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    in_group = tl.arange(0, 4)
    pair = group[:, None] * 4 + in_group[None, :]  # (GROUPS, 4): a thread holds whole groups, 16 bytes each
    inside = pair < n_pairs
    packed = tl.load(pre_ptr + row * n_pairs + pair, mask=inside, other=0).to(tl.uint32, bitcast=True)
    even = (packed << 16).to(tl.float32, bitcast=True) + tl.load(bias_ptr + pair, mask=inside, other=0.0)
    odd = (packed & 0xFFFF0000).to(tl.float32, bitcast=True)
    odd += tl.load(bias_ptr + n_pairs + pair, mask=inside, other=0.0)
    top = _pattern(tl.max(tl.maximum(even, odd))).to(tl.int32)
    marked = _pattern(even) | (_pattern(odd) << 16) | 0x80008000

    # at least k entries are >= low, and n_high < k are >= high; or low and high are 1, and no more than k are above 0
    low = tl.maximum(top - window, 1)
    high = top + 1
    n_low = _count(marked, low)
    n_high = tl.full((), 0, tl.int32)
    if n_low < k:
        high = low
        n_high = n_low
        low = tl.full((), 1, tl.int32)
        n_low = _count(marked, low)
        if n_low <= k:
            high = low
            n_high = n_low
    while (high - low > 1) & (n_low != k):
        middle = (low + high) // 2
        n_middle = _count(marked, middle)
        enough = n_middle >= k
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        high = tl.where(enough, high, middle)
        n_high = tl.where(enough, n_high, n_middle)

    # A group's 8 columns as nibbles of an int32, even columns first: all from high on, the first `room` at the edge
    nibble = (15 - 4 * in_group).to(tl.uint32)[None, :]
    surely = tl.sum(_at_least(marked, high) >> nibble, 1)  # (GROUPS,)
    edge = tl.sum(_at_least(marked, low) >> nibble, 1) ^ surely
    upto = edge * 0x11111111  # a nibble: entries of this group at the edge up to this one
    of_group = (upto >> 28).to(tl.int32)
    room = k - n_high - _exclusive_sum(of_group, GROUPS)
    first = (0x88888888 + tl.minimum(tl.maximum(room, 0), 7).to(tl.uint32) * 0x11111111 - upto) >> 3
    taken = surely | (edge & tl.where(room >= of_group, edge, first))
    packed = marked & (((taken[:, None] >> (4 * in_group).to(tl.uint32)[None, :]) & 0x00010001) * 0x7FFF)
    tl.store(pre_ptr + row * n_pairs + pair, packed.to(tl.int32, bitcast=True), mask=inside)

    bits = (taken | (taken >> 3)) & 0x03030303
    bits = (bits | (bits >> 6)) & 0x000F000F
    bits = bits | (bits >> 12)
    tl.store(selected_ptr + row * (n_pairs // 4) + group, bits.to(tl.uint8), mask=group < n_pairs // 4)


@triton.jit
def _exclusive_sum(x, SIZE: tl.constexpr):
    """The sum of all entries before each: within a warp, then over its sums, as one long scan costs twice as much."""
    rows = tl.reshape(x, (SIZE // 32, 32))
    sums = tl.sum(rows, 1)
    before = tl.cumsum(rows, 1) + (tl.cumsum(sums, 0) - sums)[:, None]
    return tl.reshape(before, (SIZE,)) - x


@triton.jit
def _mask(grad_ptr, selected_ptr, sums_ptr, n, n_bytes, rows_a_program, STEP: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    eight = tl.arange(0, 8)
    bit = (eight >> 1) + 4 * (eight & 1)
    column = byte[:, None] * 8 + eight[None, :]  # (BYTES, 8)
    sums = tl.zeros((STEP, BYTES, 8), dtype=tl.float32)
    first = tl.program_id(0) * rows_a_program
    for start in range(first, tl.minimum(first + rows_a_program, n), STEP):
        row = start + tl.arange(0, STEP)
        inside = (row < tl.minimum(first + rows_a_program, n))[:, None] & (byte < n_bytes)[None, :]  # (STEP, BYTES)
        row = row.to(tl.int64)
        selected = tl.load(selected_ptr + row[:, None] * n_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
        at = grad_ptr + (row * n_bytes * 8)[:, None, None] + column[None, :, :]  # (STEP, BYTES, 8)
        inside3 = inside[:, :, None] & (eight >= 0)[None, None, :]
        grad = tl.load(at, mask=inside3, other=0.0)
        kept = ((selected[:, :, None] >> bit[None, None, :]) & 1) != 0
        grad = tl.where(kept, grad, 0.0)
        tl.store(at, grad, mask=inside3)
        sums += grad.to(tl.float32)
    total = tl.sum(sums, 0)  # (BYTES, 8)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * n_bytes * 8 + column
    tl.store(out, total, mask=(byte < n_bytes)[:, None] & (eight >= 0)[None, :])
