"""The matmul of the encoder, which keeps of each row only the groups of columns that reach the row's bound.

A persistent kernel: one program a multiprocessor walks over tiles of rows and latents, operands come through the tensor
memory accelerator. Its output goes one of two ways:

- SAMPLE: pre-activations of every EVERY-th tile of latents, as bf16, all of them, and each group's maximum. A group is
  the 8 columns 8 i + 2 q + {0, 1}, i in 0..3, of 32 that one thread holds of a row.
- otherwise, over the other tiles alone: a group whose maximum reaches the row's bound is appended to the row's list,
  values and number. Values are the accumulator's float32 sums, 32 bytes, where the list is float32, and rounded to
  bf16, 16 bytes, where it is bf16. Nothing crosses threads but one atomic a row, quarter and tile.

On Hopper values are stored straight from the accumulator's registers; elsewhere Triton moves the tile through shared
memory first (docs/LOG.md has the difference).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl


def _stores(values: int, numbers: int = 0, exact: bool = False) -> str:
    """Stores from the matmul's own register layout, so that nothing moves through shared memory.

    The 16 values of a thread, operands $4 to $19, are a group of each of two rows, 8 apart: registers 0 1 4 5 8 9 12 13
    and 2 3 6 7 10 11 14 15. They are stored in this order, as bf16 or, if `exact`, as they are. $20 to $35 are slots
    (-1: not stored). Every other operand comes 16 times too: the address of slot 0's values from $`values` on and,
    where groups' numbers are stored, these from $36 and their address from $`numbers` on.
    """
    text = """{
    .reg .pred p, r;
    .reg .b32 a, b, c, d;
    .reg .b64 to;
    mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
    setp.ge.s32 p, $20, 0;
    setp.ge.s32 r, $22, 0;
"""
    for row, (stored, after) in enumerate((("p", "SECOND"), ("r", "DONE"))):
        slot, lows = 20 + 2 * row, [4 + 4 * pair + 2 * row for pair in range(4)]
        text += f"    @!{stored} bra {after};\n    mad.wide.s32 to, ${slot}, {32 if exact else 16}, ${values};\n"
        if exact:
            for at, (low, next_low) in ((0, lows[:2]), (16, lows[2:])):
                four = f"${low}, ${low + 1}, ${next_low}, ${next_low + 1}"
                text += f"    st.global.v4.f32 [to + {at}], {{{four}}};\n"
        else:
            for register, low in zip("abcd", lows, strict=True):
                text += f"    cvt.rn.bf16x2.f32 {register}, ${low + 1}, ${low};\n"
            text += "    st.global.v4.b32 [to], {a, b, c, d};\n"
        if numbers:
            text += f"    mad.wide.s32 to, ${slot}, 4, ${numbers};\n    st.global.b32 [to], ${36 + 2 * row};\n"
        text += f"{after}:\n"
    return text + "}"


STORE_GROUPS = tl.constexpr(_stores(values=52, numbers=68))
STORE_EXACT_GROUPS = tl.constexpr(_stores(values=52, numbers=68, exact=True))
STORE_SAMPLE = tl.constexpr(_stores(values=36))
ATOMIC_ADD = tl.constexpr("""{
    .reg .pred p;
    mov.b32 $0, 0;
    setp.gt.s32 p, $2, 0;
    @p atom.relaxed.gpu.global.add.u32 $0, [$1], $2;
}""")


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether the matmul's accumulator has the layout that STORE_GROUPS is written for."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@triton.jit
def screen(
    x_desc, w_desc, bias_ptr, scale_ptr, counter_ptr, bound_ptr, count_ptr, group_ptr, value_ptr, sample_ptr,
    largest_ptr, n_rows, n_latents, d_model, n_tiles, n_sampled, capacity,
    SAMPLE: tl.constexpr, SCALED: tl.constexpr, COUNTED: tl.constexpr, INTERPRETED: tl.constexpr,
    DIRECT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GM: tl.constexpr, EVERY: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    if COUNTED:
        n_rows = tl.load(counter_ptr + 2)
    row_tiles = tl.cdiv(n_rows, BM)
    latent_tiles = n_sampled if SAMPLE else n_tiles - n_sampled
    steps = tl.cdiv(d_model, BK)
    NB: tl.constexpr = BN // 32
    for tile in tl.range(tl.program_id(0), row_tiles * latent_tiles, PROGRAMS, flatten=True):
        first = tile // (GM * latent_tiles) * GM
        height = min(row_tiles - first, GM)
        row_tile = first + tile % height
        place = tile % (GM * latent_tiles) // height
        # of the others, those of the sample are left out
        latent_tile = place * EVERY if SAMPLE else place + min(place // (EVERY - 1) + 1, n_sampled)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(steps):
            x = x_desc.load([row_tile * BM, step * BK])
            w = w_desc.load([latent_tile * BN, step * BK])
            if INTERPRETED:  # Triton's interpreter multiplies the bits of bf16 numbers
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w.T, acc)
        rows = row_tile * BM + tl.arange(0, BM)
        latents = latent_tile * BN + tl.arange(0, BN)
        bias = tl.load(bias_ptr + latents, mask=latents < n_latents, other=float("-inf"))
        if SCALED:
            pre_acts = bias[None, :] * tl.load(scale_ptr + rows, mask=rows < n_rows, other=1.0)[:, None] + acc
        else:
            pre_acts = acc + bias[None, :]
        # (row, block of 32, q, 8): a thread holds whole groups, so nothing below crosses threads
        split = tl.permute(tl.reshape(pre_acts, (BM, NB, 4, 4, 2)), (0, 1, 3, 2, 4))
        groups = tl.reshape(split, (BM, NB, 4, 8))
        block = tl.arange(0, NB)[None, :, None]
        q = tl.arange(0, 4)[None, None, :]
        all8 = tl.zeros((BM, NB, 4, 8), tl.int32)
        largest = tl.max(groups, 3)  # (BM, NB, 4)
        if SAMPLE:
            at = rows[:, None, None] * (n_sampled * (BN // 8)) + (place * (BN // 8) + block * 4 + q)
            inside = (rows < n_rows)[:, None, None] & (block >= 0) & (q >= 0)
            tl.store(largest_ptr + at, largest.to(tl.bfloat16), mask=inside)
            if DIRECT:
                slot = tl.where(inside, at, -1)[:, :, :, None] + all8
                tl.inline_asm_elementwise(
                    STORE_SAMPLE,
                    "=r,=r,=r,=r" + ",f" * 16 + ",r" * 16 + ",l" * 16,
                    [groups, slot, sample_ptr.to(tl.int64) + all8],
                    dtype=tl.int8,
                    is_pure=False,
                    pack=16,
                )
            else:
                to = (at.to(tl.int64) * 8)[:, :, :, None] + tl.arange(0, 8)
                tl.store(sample_ptr + to, groups.to(tl.bfloat16), mask=inside[:, :, :, None])
        else:
            bound = tl.load(bound_ptr + rows, mask=rows < n_rows, other=float("nan"))  # which nothing reaches
            hit = (largest >= bound[:, None, None]).to(tl.int32)
            bits = tl.sum(hit << block, 1)  # (BM, 4)
            n_hits = _bits_set(bits, DIRECT)
            counts = count_ptr + rows[:, None] + tl.zeros((BM, 4), tl.int32)
            if DIRECT:
                base = tl.inline_asm_elementwise(
                    ATOMIC_ADD, "=r,l,r", [counts.to(tl.int64), n_hits], dtype=tl.int32, is_pure=False, pack=1
                )
            else:
                base = tl.atomic_add(counts, n_hits, mask=n_hits > 0, sem="relaxed")
            at = base[:, None, :] + _bits_set(bits[:, None, :] & ((1 << block) - 1), DIRECT)
            keep = (hit > 0) & (at < capacity)
            at += rows[:, None, None] * capacity
            number = latent_tile * (BN // 8) + block * 4 + q + tl.zeros((BM, NB, 4), tl.int32)
            EXACT: tl.constexpr = value_ptr.dtype.element_ty == tl.float32
            if DIRECT:
                tl.inline_asm_elementwise(
                    STORE_EXACT_GROUPS if EXACT else STORE_GROUPS,
                    "=r,=r,=r,=r" + ",f" * 16 + ",r" * 32 + ",l" * 32,
                    [
                        groups,
                        tl.where(keep, at, -1)[:, :, :, None] + all8,
                        number[:, :, :, None] + all8,
                        value_ptr.to(tl.int64) + all8,
                        group_ptr.to(tl.int64) + all8,
                    ],
                    dtype=tl.int8,
                    is_pure=False,
                    pack=16,
                )
            else:
                tl.store(group_ptr + at, number, mask=keep)
                to = (at.to(tl.int64) * 8)[:, :, :, None] + tl.arange(0, 8)
                tl.store(value_ptr + to, groups.to(value_ptr.dtype.element_ty), mask=keep[:, :, :, None])


@triton.jit
def _bits_set(bits, DIRECT: tl.constexpr):
    """How many of the lowest 8 bits are set."""
    if DIRECT:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = bits - ((bits >> 1) & 0x55)
        fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        count = (fours + (fours >> 4)) & 0x0F
    return count
