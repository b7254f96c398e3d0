"""From kept groups to the k largest pre-activations of a row: bound, candidates, exact scores, and single rows.

One program a row everywhere. Values are compared as integers in the order of bf16 numbers, thresholds are found by
bisection over them. STRICT: kept values are float32 sums of the very operands that scores are made of. They are the
scores of all candidates but the sample's, whose values were rounded to bf16 before.
"""

import triton
import triton.language as tl


@triton.jit
def _key(value):
    """Order-preserving integer in [0, 65535] of bf16 values."""
    bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit
def _value(key):
    """The inverse of `_key`, as float32."""
    bits = tl.where(key >= 0x8000, key - 0x8000, 0xFFFF - key)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _largest_with(key, wanted, low, high):
    """The largest t with at least `wanted` keys >= t, known to lie in [low, high).

    Steps down from `high`, twice as far each time, until there are enough: most thresholds are within an octave or two
    of the largest key, 128 keys each, where halving the whole range would take 16 steps.
    """
    low, high = low + tl.zeros((), tl.int32), high + tl.zeros((), tl.int32)
    reach = tl.full((), 128, tl.int32)
    while high - low > 1:
        middle = tl.maximum((low + high) // 2, high - reach)
        enough = tl.sum((key >= middle).to(tl.int32)) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reach = tl.minimum(2 * reach, 65536)
    return low


@triton.jit
def bound_rows(
    sample_ptr, largest_ptr, count_ptr, of_sample_ptr, group_ptr, value_ptr, bound_ptr, failed_ptr, counter_ptr,
    n_groups, capacity, rank,
    SECOND: tl.constexpr, GROUPS: tl.constexpr, TILE_GROUPS: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's bound, from the maxima of its sample's groups, and the groups that reach it."""
    slot = tl.program_id(0).to(tl.int64)
    row = slot
    if SECOND:
        if slot >= tl.load(counter_ptr + 2):
            return
        row = tl.load(failed_ptr + slot).to(tl.int64)
    g = tl.arange(0, GROUPS)
    inside = g < n_groups
    largest = tl.load(largest_ptr + row * n_groups + g, mask=inside, other=float("-inf"))
    key = tl.where(inside, _key(largest), 0)
    reached = _largest_with(key, rank, 0, tl.max(key) + 1)
    hit = (key >= reached) & inside
    to = tl.cumsum(hit.to(tl.int32), 0) - 1
    tile = g // TILE_GROUPS  # of the sample
    number = tile * (EVERY * TILE_GROUPS) + g % TILE_GROUPS
    tl.store(group_ptr + slot * capacity + to, number, mask=hit & (to < capacity))
    n_hits = tl.sum(hit.to(tl.int32))
    tl.store(count_ptr + slot, n_hits)  # to which the screen adds the other tiles' groups
    tl.store(of_sample_ptr + slot, n_hits)
    tl.store(bound_ptr + slot, _value(reached))
    tl.debug_barrier()  # numbers are read back by other threads than wrote them
    e = tl.arange(0, 8)
    for start in range(0, min(n_hits, capacity), BLOCK):
        place = start + tl.arange(0, BLOCK)
        some = place < min(n_hits, capacity)
        kept = tl.load(group_ptr + slot * capacity + place, mask=some, other=0)
        of_sample = kept // (EVERY * TILE_GROUPS) * TILE_GROUPS + kept % TILE_GROUPS
        some8 = some[:, None] & (e >= 0)[None, :]
        values = tl.load(sample_ptr + (row * n_groups + of_sample)[:, None] * 8 + e[None, :], mask=some8, other=0.0)
        at = (slot * capacity + place)[:, None] * 8 + e[None, :]
        tl.store(value_ptr + at, values.to(value_ptr.dtype.element_ty), mask=some8)


@triton.jit
def copy_rows(
    x_ptr, scale_ptr, out_ptr, out_scale_ptr, failed_ptr, counter_ptr, limit, d_model,
    SCALED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gather the rows that failed; their number, at most `limit`, goes to counter 2."""
    slot = tl.program_id(0)
    n_failed = tl.load(counter_ptr)
    if slot == 0:
        tl.store(counter_ptr + 2, min(n_failed, limit))
    if slot < n_failed:
        row = tl.load(failed_ptr + slot).to(tl.int64)
        d = tl.arange(0, BD)
        x = tl.load(x_ptr + row * d_model + d, mask=d < d_model, other=0.0)
        tl.store(out_ptr + slot.to(tl.int64) * d_model + d, x, mask=d < d_model)
        if SCALED:
            tl.store(out_scale_ptr + slot, tl.load(scale_ptr + row))


@triton.jit
def _group_values(value_ptr, at, live, GROUPS: tl.constexpr):
    """Values (GROUPS, 8) of groups, and the columns of a group that they belong to.

    A thread holds whole groups. It loads float32 ones in halves, whose columns then alternate: put in order, or loaded
    in one piece, they would move between threads.
    """
    if value_ptr.dtype.element_ty == tl.float32:
        half = tl.arange(0, 4)
        to = value_ptr + at[:, None] * 8 + half[None, :]
        live2 = live[:, None] & (half >= 0)[None, :]
        low = tl.load(to, mask=live2, other=float("-inf"))
        high = tl.load(to + 4, mask=live2, other=float("-inf"))
        values = tl.reshape(tl.join(low, high), (GROUPS, 8))
        e = tl.reshape(tl.join(half, half + 4), (8,))
    else:
        e = tl.arange(0, 8)
        live2 = live[:, None] & (e >= 0)[None, :]
        values = tl.load(value_ptr + at[:, None] * 8 + e[None, :], mask=live2, other=float("-inf"))
    return values, e


@triton.jit
def _candidates(
    slot, n_kept, group_ptr, value_ptr, bound, out_ptr, place_ptr, k, capacity, margin,
    STRICT: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write a row's candidates and return their number; 0 if they cannot be trusted."""
    g = tl.arange(0, GROUPS)
    live = g < n_kept
    at = slot.to(tl.int64) * capacity + g
    values, e = _group_values(value_ptr, at, live, GROUPS)
    key = tl.where(live[:, None], _key(values.to(tl.bfloat16)), -1)
    first, top = _key(bound.to(tl.bfloat16)), tl.max(key) + 1
    if WIDE:
        reaches = True
        wanted = k + k // 4
    else:
        kth = _largest_with(key, k, first, top)  # below the bound nothing is trusted
        cut = _value(kth) - margin * tl.abs(_value(kth))
        first = _key(cut.to(tl.bfloat16))
        reaches = cut >= bound
        wanted = k
    n_wide = tl.sum((key >= first).to(tl.int32))
    if n_wide > C:  # the smallest key with at most C candidates
        first = _largest_with(key, C + 1, first, top) + 1
    n_found = tl.sum((key >= first).to(tl.int32))
    trusted = reaches & (n_found >= wanted)
    if STRICT:
        trusted = trusted & (n_wide <= C)
    take = (key >= first).to(tl.int32)
    in_group = tl.sum(take, 1)
    to = (tl.cumsum(in_group, 0) - in_group)[:, None] + tl.cumsum(take, 1) - take
    group = tl.load(group_ptr + at, mask=live, other=0)
    latent = (group // 4 * 32 + group % 4 * 2)[:, None] + (e // 2 * 8 + e % 2)[None, :]
    tl.store(out_ptr + slot.to(tl.int64) * C + to, latent, mask=(take > 0) & (to < C))
    if STRICT:
        place = g[:, None] * 8 + e[None, :]
        tl.store(place_ptr + slot.to(tl.int64) * C + to, place, mask=(take > 0) & (to < C))
    return tl.where(trusted, n_found, 0)


@triton.jit
def select_candidates(
    count_ptr, group_ptr, value_ptr, bound_ptr, out_ptr, place_ptr, n_found_ptr, rows_ptr, failed_ptr, counter_ptr, k,
    capacity, margin,
    STRICT: tl.constexpr, WIDE: tl.constexpr, SECOND: tl.constexpr, C: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Candidates of each row, group by group as they were kept; if STRICT, also their places among its kept values.

    Rows that cannot be trusted are listed as failed. Most rows need a small tile.
    """
    slot = tl.program_id(0)
    row = slot
    if SECOND:
        if slot >= tl.load(counter_ptr + 2):
            return
        row = tl.load(rows_ptr + slot)
    n_kept = tl.load(count_ptr + slot)
    bound = tl.load(bound_ptr + slot)
    n_found = 0
    if n_kept <= LARGE // 4:
        n_found = _candidates(
            slot, n_kept, group_ptr, value_ptr, bound, out_ptr, place_ptr, k, capacity, margin,
            STRICT, WIDE, C, LARGE // 4,
        )  # fmt: skip
    elif n_kept <= LARGE // 2:
        n_found = _candidates(
            slot, n_kept, group_ptr, value_ptr, bound, out_ptr, place_ptr, k, capacity, margin,
            STRICT, WIDE, C, LARGE // 2,
        )  # fmt: skip
    elif n_kept <= capacity:
        n_found = _candidates(
            slot, n_kept, group_ptr, value_ptr, bound, out_ptr, place_ptr, k, capacity, margin,
            STRICT, WIDE, C, LARGE,
        )  # fmt: skip
    tl.store(n_found_ptr + slot, n_found)
    if n_found == 0:
        place = tl.atomic_add(counter_ptr + SECOND, 1, sem="relaxed")
        tl.store(failed_ptr + place, row)


@triton.jit
def rescore(
    x_ptr, w_ptr, bias_ptr, candidate_ptr, place_ptr, n_found_ptr, of_sample_ptr, kept_ptr, rows_ptr, counter_ptr,
    value_ptr, index_ptr, d_model, k, capacity, STRICT: tl.constexpr, SECOND: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Exact pre-activations of a row's candidates; the k largest, by value and then column."""
    slot = tl.program_id(0).to(tl.int64)
    row = slot
    if SECOND:
        if slot >= tl.load(counter_ptr + 2):
            return
        row = tl.load(rows_ptr + slot).to(tl.int64)
    n_found = tl.load(n_found_ptr + slot)
    if n_found > 0:
        d, c = tl.arange(0, BD), tl.arange(0, C)
        inside = d < d_model
        x = tl.load(x_ptr + row * d_model + d, mask=inside, other=0.0).to(tl.float32)
        score = tl.full((C,), float("-inf"), tl.float32)
        to_score = n_found
        if STRICT:  # what is to be scored, the sample's, comes first
            place = tl.load(place_ptr + slot * C + c, mask=c < n_found, other=0)
            is_score = (c < n_found) & (place >= tl.load(of_sample_ptr + slot) * 8)
            to_score -= tl.sum(is_score.to(tl.int32))
            kept = tl.load(kept_ptr + slot * capacity * 8 + place, mask=is_score, other=float("-inf"))
            score = tl.maximum(score, kept)  # which leaves out what is not a number, as below
        for start in range(0, to_score, R):
            some = start + tl.arange(0, R)
            latent = tl.load(candidate_ptr + slot * C + some, mask=some < to_score, other=0).to(tl.int64)
            at = latent[:, None] * d_model + d[None, :]
            w = tl.load(w_ptr + at, mask=(some < to_score)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            dots = tl.sum(w * x[None, :], 1) + tl.load(bias_ptr + latent)
            here = (c[:, None] == some[None, :]) & (some < to_score)[None, :]
            score = tl.maximum(score, tl.max(tl.where(here, dots[None, :], float("-inf")), 1))
        latent = tl.load(candidate_ptr + slot * C + c, mask=c < n_found, other=0)
        # descending by value, then ascending by column, as one integer
        bits = score.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = (ordered << 32) | (0x7FFFFFFF - latent).to(tl.int64)
        key = tl.where(c < n_found, key, -0x7FFFFFFFFFFFFFFF)  # behind candidates that are not a number, too
        if C <= 64:
            place = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)
        else:
            key = tl.sort(key, descending=True)
            place = c
            latent = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
            ordered32 = (key >> 32).to(tl.int32)
            score = tl.where(ordered32 < 0, ordered32 ^ 0x7FFFFFFF, ordered32).to(tl.float32, bitcast=True)
        keep = place < k
        tl.store(value_ptr + row * k + place, tl.maximum(score, 0.0), mask=keep)
        tl.store(index_ptr + row * k + place, latent.to(tl.int64), mask=keep)


@triton.jit
def encode_single_rows(
    x_ptr, w_ptr, bias_ptr, failed_ptr, failed_again_ptr, counter_ptr, scratch_ptr, value_ptr, index_ptr,
    n_latents, d_model, k, n_second, programs, BD: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that failed twice, or found no place in the second round: all pre-activations, then bisection."""
    n_again = tl.load(counter_ptr + 1)
    n_rows = n_again + max(tl.load(counter_ptr) - n_second, 0)
    scratch_ptr += tl.program_id(0).to(tl.int64) * n_latents
    d, i = tl.arange(0, BD), tl.arange(0, BLOCK)
    for number in range(tl.program_id(0), n_rows, programs):
        row = tl.load(failed_again_ptr + number, mask=number < n_again, other=0)
        if number >= n_again:
            row = tl.load(failed_ptr + n_second + number - n_again)
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
        for start in tl.range(0, n_latents, R, num_stages=3):
            latent = start + tl.arange(0, R)
            at = latent.to(tl.int64)[:, None] * d_model + d[None, :]
            w = tl.load(w_ptr + at, mask=(latent < n_latents)[:, None] & (d < d_model)[None, :], other=0.0)
            dots = tl.sum(w.to(tl.float32) * x[None, :], 1)
            dots += tl.load(bias_ptr + latent, mask=latent < n_latents, other=0.0)
            tl.store(scratch_ptr + latent, dots, mask=latent < n_latents)
        tl.debug_barrier()  # the row is read back by other threads than wrote it
        low = tl.full((), -2147483648, tl.int64)
        high = tl.full((), 2147483648, tl.int64)
        while high - low > 1:
            middle = (low + high) >> 1
            n_above = 0
            for start in range(0, n_latents, BLOCK):
                bits = tl.load(scratch_ptr + start + i, mask=start + i < n_latents, other=0.0).to(
                    tl.int32, bitcast=True
                )
                ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
                n_above += tl.sum(((ordered >= middle) & (start + i < n_latents)).to(tl.int32))
            low = tl.where(n_above >= k, middle, low)
            high = tl.where(n_above >= k, high, middle)
        n_written = 0
        for strict in range(2):  # all above the threshold, then as many of those at it as are wanted
            for start in range(0, n_latents, BLOCK):
                value = tl.load(scratch_ptr + start + i, mask=start + i < n_latents, other=0.0)
                bits = value.to(tl.int32, bitcast=True)
                ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
                chosen = tl.where(strict == 0, ordered > low, ordered == low) & (start + i < n_latents)
                to = n_written + tl.cumsum(chosen.to(tl.int32), 0) - 1
                keep = chosen & (to < k)
                tl.store(value_ptr + row * k + to, tl.maximum(value, 0.0), mask=keep)
                tl.store(index_ptr + row * k + to, (start + i).to(tl.int64), mask=keep)
                n_written += tl.sum(chosen.to(tl.int32))
        tl.debug_barrier()  # nobody reads the scratch any more
