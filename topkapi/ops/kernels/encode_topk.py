"""Encoder matmul and exact top-k without ever holding the (n, n_latents) pre-activations.

1. Sample: pre-activations of every 16th tile of latents and the maxima of groups of 8 columns, written as bf16. The
   row's j-th largest maximum is its bound: a guess just below the k-th largest pre-activation of all, of rank about
   16 j. The sample's groups that reach it are kept.
2. Screen (`screen`): the matmul over the other latents keeps, of each row, the groups whose maximum reaches the bound,
   too, about 16 j in all: 3 to 5 KB a row at k = 32 instead of 256 KB at 131 072 latents.
3. Select (`select`): the candidates are, of the kept groups, all columns within a margin of the k-th largest value, or
   with fp8 screening the 2 k largest (at least 1.25 k, as ties are taken together).
4. Re-score (`select`): candidates' dot products in float32, from the operands as given; the k largest stay. Those are
   known already where the screen's operands are 16-bit and as given (strict): its kept values are float32 sums from the
   matrix units, and only the sample's candidates, 1 in 16, are scored again.
5. A row is redone with a lower bound if it kept too few or too many groups, or if candidates reach below its bound. If
   that fails too (ties without end, not a number), one program computes its pre-activations one by one.

With 16-bit operands and bf16 screening (strict) the result is exact to the rounding of float32 sums: candidates are
found by their values rounded to bf16, and the margin covers that rounding. With float32 operands, screened as
bf16, and with fp8 screening, kept values are stored in bf16 and differ from the exact ones, and all candidates are
scored again; margin and 2 k are several standard deviations of the difference. docs/performance.md has the recall.

Traffic for n tokens: sample 2.5 n n_latents / 16 bytes, kept groups 2 * 20 * 16 j n (strict: 36 for 20), rows of
W_enc scored again (k to 2 k) d_model bytes_of(W_enc) n (strict: a 16th of that). Deterministic: groups arrive in any
order, but which arrive and what is selected depend on values and columns alone.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from topkapi.ops import reference
from topkapi.ops.kernels.fp8 import quantised, quantised_rows, require_fp8
from topkapi.ops.kernels.screen import is_hopper, screen
from topkapi.ops.kernels.select import bound_rows, copy_rows, encode_single_rows, rescore, select_candidates

SAMPLE_EVERY = 16  # tiles of latents; of 32 the bound is so loose that selection costs more than is saved
GROUP = 8
LARGEST_K = 256  # above it the candidates of a row no longer fit registers
SEGMENT = 2**20  # latents at a time
SAMPLE_BYTES = 2**30 + 2**27  # of sampled pre-activations held at a time
KEPT_BYTES = 2**29 + 2**27  # of kept values held at a time: 65 536 rows' at k 32
FIRST, SECOND = 2e-3, 1e-10  # chances that the sample misleads about a row's bound, and about its second
STRICT_MARGIN, BF16_MARGIN = 0.0043, 0.010  # of the k-th largest value, see above
SINGLE_BYTES = 2**27  # of pre-activations of single rows
SINGLE_FETCHED = 2**15  # bytes of the weight at a time, twice in shared memory, of which small GPUs have 99 KB


class Tiles(NamedTuple):
    """Shape of the matmul's tiles, for one size of its operands."""

    rows: int
    latents: int
    depth: int
    num_warps: int
    num_stages: int
    shared_rows: int
    """Tiles of rows that use a tile of latents while it is in the L2 cache."""
    programs: int = 1
    """A multiprocessor."""


TILES = {2: Tiles(128, 256, 64, 8, 3, 8), 1: Tiles(128, 256, 128, 8, 4, 12)}  # by bytes of an operand
# On Hopper from this d_model on: more is fetched ahead, and rows' tiles of 16 MB stay in the cache, not 8
WIDE, WIDE_TILES = 2048, {2: Tiles(128, 256, 64, 8, 4, 16), 1: TILES[1]}
BOUND_GROUPS = 1024  # of a row's sample, a warp
BOUND_BLOCK = 16  # kept groups of the sample at a time
SELECT_WARPS = 4  # at d_model 768, k 32, 131 072 latents; more from 128 values a thread on
RESCORED, RESCORED_ELEMENTS = 4, 2**14  # rows of the weight that are scored again at a time, and their elements at most


@dataclass
class Redone:
    """Of the last call: rows, and a device tensor (redone, redone one by one, in the second round) a part of them."""

    rows: int = 0
    counters: tuple[Int[Tensor, " 3"], ...] = ()


redone = Redone()


@torch.no_grad()
def encode_topk(
    x: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    latent_bias: Float[Tensor, " n_latents"],
    pre_bias: Float[Tensor, " d_model"] | None,
    k: int,
    screening: Literal["bf16", "fp8"] = "bf16",
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """See `topkapi.ops.encode_topk`; values are float32 (float64 for float64). `pre_bias` None stands for zeros."""
    if torch.float64 in (x.dtype, W_enc.dtype):
        return reference.encode_topk(x, W_enc, latent_bias, pre_bias, k)
    centred = (x if pre_bias is None else x - pre_bias).to(W_enc.dtype).contiguous()
    W_enc, latent_bias = W_enc.contiguous(), latent_bias.float().contiguous()
    redone.rows, redone.counters = len(x), ()
    n_latents, d_model = W_enc.shape
    tile = max(tiles.latents for tiles in TILES.values())
    fewest = max(tile * SAMPLE_EVERY, 64 * k)
    if len(x) == 0 or n_latents < fewest or k > LARGEST_K or d_model % 16:
        return _dense(centred, W_enc, latent_bias, k)
    starts = [start for start in range(0, n_latents, SEGMENT) if n_latents - start >= fewest]
    found = []
    for start, stop in zip(starts, [*starts[1:], n_latents], strict=True):
        values, indices = _encode(centred, W_enc[start:stop], latent_bias[start:stop], k, screening)
        found.append((values, indices.add_(start) if start else indices))
    if len(found) == 1:
        return found[0]
    values, chosen = torch.cat([values for values, _ in found], dim=1).topk(k)
    return values, torch.cat([indices for _, indices in found], dim=1).gather(1, chosen)


def _dense(centred: Tensor, W_enc: Tensor, latent_bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chunks of float32 pre-activations and `torch.topk`, for shapes that screening does not suit."""
    n, n_latents = len(centred), len(W_enc)
    values = torch.empty(n, k, dtype=torch.float32, device=centred.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=centred.device)
    rows = max(1, reference.SCRATCH_BYTES // n_latents)
    for start in range(0, n, rows):
        part = centred[start : start + rows]
        if part.is_cuda and part.dtype != torch.float32:
            pre_acts = torch.mm(part, W_enc.T, out_dtype=torch.float32).add_(latent_bias)
        else:
            pre_acts = torch.addmm(latent_bias, part.float(), W_enc.float().T)
        values[start : start + rows], indices[start : start + rows] = pre_acts.topk(k)
    return values.relu_(), indices


def _encode(
    centred: Tensor, W_enc: Tensor, latent_bias: Tensor, k: int, screening: str
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    values = torch.empty(len(centred), k, dtype=torch.float32, device=centred.device)
    indices = torch.empty(len(centred), k, dtype=torch.int64, device=centred.device)
    W, W_scale = W_enc, None
    if screening == "fp8":
        require_fp8(W_enc.device)
        W, W_scale = quantised(W_enc)
    elif W_enc.dtype == torch.float32:
        W = W_enc.to(torch.bfloat16)
    rows = _rows_at_once(W, k, strict=W is W_enc)
    for start in range(0, len(centred), rows):
        part = slice(start, start + rows)
        some = centred[part]
        x, scales = quantised_rows(some, W_scale) if W_scale is not None else (some.to(W.dtype), None)
        _Encoder(some, W_enc, latent_bias, k, x, W, scales).run(values[part], indices[part])
    return values, indices


def _rows_at_once(W: Tensor, k: int, strict: bool) -> int:
    """Tokens in a chunk: few enough to bound the memory, and so that numbers of groups stay within 32 bits."""
    sampled = _n_sampled(W) * TILES[W.element_size()].latents // GROUP * (GROUP + 1) * torch.bfloat16.itemsize
    kept = _plan(W, k, FIRST).capacity * GROUP * _kept_type(strict).itemsize
    return max(128, min(SAMPLE_BYTES // sampled, KEPT_BYTES // kept) // 128 * 128)


def _n_sampled(W: Tensor) -> int:
    """Tiles of latents in the sample."""
    return len(W) // (TILES[W.element_size()].latents * SAMPLE_EVERY)


def _kept_type(strict: bool) -> torch.dtype:
    """What kept values are stored as: bf16 where they are scored again."""
    return torch.float32 if strict else torch.bfloat16


@dataclass(frozen=True)
class _Encoder:
    """A chunk of tokens on its way through the five steps; `x` and `W` are what is screened."""

    centred: Float[Tensor, "n d_model"]
    W_enc: Float[Tensor, "n_latents d_model"]
    latent_bias: Float[Tensor, " n_latents"]
    k: int
    x: Float[Tensor, "n d_model"]
    W: Float[Tensor, "n_latents d_model"]
    scales: Float[Tensor, " n"] | None
    """What x and W are scaled by, together."""

    def run(self, values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]) -> None:
        """Encode into `values` and `indices`."""
        n, device = len(self.x), self.x.device
        counters = torch.zeros(3, dtype=torch.int32, device=device)
        redone.counters += (counters,)
        failed = torch.empty(n, dtype=torch.int32, device=device)
        sample = _Sample.empty(n, self.n_sampled * self.tiles.latents // GROUP, device)
        self._screen(self.x, self.scales, None, sample=sample)
        kept = self._bound(sample, n, FIRST, failed, counters, second=False)
        self._screen(self.x, self.scales, None, kept=kept)
        self._finish(kept, None, failed, counters, values, indices)

        n_second = max(128, n // 16)  # rows of the second round at most
        failed_again = torch.empty(n_second, dtype=torch.int32, device=device)
        x2 = self.x.new_zeros(n_second, self.d_model)
        scales2 = None if self.scales is None else torch.empty(n_second, device=device)
        copy_rows[(n_second,)](
            self.x, self.scales, x2, scales2, failed, counters, n_second, self.d_model,
            SCALED=scales2 is not None, BD=triton.next_power_of_2(self.d_model),
        )  # fmt: skip
        kept = self._bound(sample, n_second, SECOND, failed, counters, second=True)
        self._screen(x2, scales2, counters, kept=kept)
        self._finish(kept, failed, failed_again, counters, values, indices)
        self._encode_single_rows(failed, failed_again, counters, values, indices)

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.W.shape[1]

    @property
    def tiles(self) -> Tiles:
        """Tiles of the matmul."""
        wide = self.d_model >= WIDE and is_hopper(self.x.device)
        return (WIDE_TILES if wide else TILES)[self.W.element_size()]

    @property
    def n_sampled(self) -> int:
        """Tiles of latents in the sample."""
        return _n_sampled(self.W)

    @property
    def strict(self) -> bool:
        """Whether what is screened is what is re-scored, so that rows are proven exact."""
        return self.W is self.W_enc

    @property
    def n_candidates(self) -> int:
        """Candidates of a row at most."""
        return max(16, triton.next_power_of_2(2 * self.k))

    @property
    def margin(self) -> float:
        """How far below the k-th largest value candidates reach, as a share of it (bf16 screening)."""
        return STRICT_MARGIN if self.strict else BF16_MARGIN

    @property
    def programs(self) -> int:
        """Persistent programs."""
        if not self.x.is_cuda:
            return 2
        return self.tiles.programs * torch.cuda.get_device_properties(self.x.device).multi_processor_count

    def _screen(
        self,
        x: Tensor,
        scales: Tensor | None,
        counters: Tensor | None,
        sample: "_Sample | None" = None,
        kept: "_Kept | None" = None,
    ) -> None:
        """The matmul of `x` (counters[2] rows of it, where given) with the sampled latents, or with the others."""
        tiles = self.tiles
        values, largest = (None, None) if sample is None else sample
        if kept is None:
            kept = _Kept(*[sample.value] * len(_Kept._fields))  # never read
        screen[(self.programs,)](
            TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth]),
            TensorDescriptor.from_tensor(self.W, [tiles.latents, tiles.depth]),
            self.latent_bias, scales, counters, kept.bound, kept.count, kept.group, kept.value, values,
            largest, len(x), len(self.W), self.d_model, triton.cdiv(len(self.W), tiles.latents), self.n_sampled,
            kept.group.shape[1], SAMPLE=sample is not None, SCALED=scales is not None, COUNTED=counters is not None,
            INTERPRETED=not x.is_cuda, DIRECT=is_hopper(x.device), BM=tiles.rows, BN=tiles.latents, BK=tiles.depth,
            GM=tiles.shared_rows, EVERY=SAMPLE_EVERY, PROGRAMS=self.programs,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

    def _bound(
        self, sample: "_Sample", n: int, chance: float, failed: Tensor, counters: Tensor, second: bool
    ) -> "_Kept":
        """Bounds of the rows, or of those that failed, and lists that begin with the sample's groups."""
        n_groups, plan = sample.largest.shape[1], _plan(self.W, self.k, chance)
        kept = _Kept.empty(n, plan.capacity, _kept_type(self.strict), sample.largest.device)
        GROUPS = triton.next_power_of_2(n_groups)
        bound_rows[(n,)](
            sample.value, sample.largest, kept.count, kept.of_sample, kept.group, kept.value, kept.bound, failed,
            counters, n_groups, plan.capacity, plan.rank, SECOND=second, GROUPS=GROUPS,
            TILE_GROUPS=self.tiles.latents // GROUP, EVERY=SAMPLE_EVERY, BLOCK=BOUND_BLOCK,
            num_warps=max(1, GROUPS // BOUND_GROUPS),
        )  # fmt: skip
        return kept

    def _finish(
        self, kept: "_Kept", rows: Tensor | None, failed: Tensor, counters: Tensor, values: Tensor, indices: Tensor
    ) -> None:
        """Candidates, then their exact scores; row i of `kept` is row rows[i] of the output."""
        n, capacity = kept.group.shape
        C, second = self.n_candidates, rows is not None
        candidates = torch.empty(n, C, dtype=torch.int32, device=failed.device)
        places = torch.empty_like(candidates) if self.strict else None
        n_found = torch.empty(n, dtype=torch.int32, device=failed.device)
        select_candidates[(n,)](
            kept.count, kept.group, kept.value, kept.bound, candidates, places, n_found, rows, failed, counters,
            self.k, capacity, self.margin, STRICT=self.strict, WIDE=self.scales is not None, SECOND=second, C=C,
            LARGE=triton.next_power_of_2(capacity),
            num_warps=min(16, max(SELECT_WARPS, triton.next_power_of_2(GROUP * capacity) // 4096)),
        )  # fmt: skip
        BD = triton.next_power_of_2(self.d_model)
        rescore[(n,)](
            self.centred, self.W_enc, self.latent_bias, candidates, places, n_found, kept.of_sample, kept.value, rows,
            counters, values, indices, self.d_model, self.k, capacity, STRICT=self.strict, SECOND=second, C=C, BD=BD,
            R=max(1, min(RESCORED, RESCORED_ELEMENTS // BD)),
            num_warps=1 if BD <= 1024 else min(16, BD // 512),
        )  # fmt: skip

    def _encode_single_rows(
        self, failed: Tensor, failed_again: Tensor, counters: Tensor, values: Tensor, indices: Tensor
    ) -> None:
        n_latents = len(self.W)
        programs = max(1, min(self.programs, SINGLE_BYTES // (4 * n_latents)))
        scratch = torch.empty(programs, n_latents, dtype=torch.float32, device=values.device)
        BD = triton.next_power_of_2(self.d_model)
        encode_single_rows[(programs,)](
            self.centred, self.W_enc, self.latent_bias, failed, failed_again, counters, scratch, values, indices,
            n_latents, self.d_model, self.k, len(failed_again), programs, BD=BD,
            R=max(1, SINGLE_FETCHED // (BD * self.W_enc.element_size())), BLOCK=4096,
            num_warps=16,
        )  # fmt: skip


class _Sample(NamedTuple):
    """Pre-activations of every 16th tile of latents, and the largest of each group."""

    value: Float[Tensor, "n groups group"]
    largest: Float[Tensor, "n groups"]

    @classmethod
    def empty(cls, n: int, n_groups: int, device: torch.device) -> "_Sample":
        shape = (n, n_groups)
        return cls(*(torch.empty(s, dtype=torch.bfloat16, device=device) for s in ((*shape, GROUP), shape)))


class _Kept(NamedTuple):
    """Groups that reached their row's bound."""

    count: Int[Tensor, " n"]
    of_sample: Int[Tensor, " n"]
    """How many of them are of the sample; they come first."""
    group: Int[Tensor, "n capacity"]
    value: Float[Tensor, "n capacity group"]
    bound: Float[Tensor, " n"]

    @classmethod
    def empty(cls, n: int, capacity: int, dtype: torch.dtype, device: torch.device) -> "_Kept":
        return cls(
            torch.empty(n, dtype=torch.int32, device=device),
            torch.empty(n, dtype=torch.int32, device=device),
            torch.empty(n, capacity, dtype=torch.int32, device=device),
            torch.empty(n, capacity, GROUP, dtype=dtype, device=device),
            torch.empty(n, dtype=torch.float32, device=device),
        )


class _Plan(NamedTuple):
    """How a row's bound is chosen, and how many groups a row may keep."""

    rank: int
    """The bound is the rank-th largest group maximum of the sample."""
    capacity: int


def _plan(W: Tensor, k: int, chance: float) -> _Plan:
    """For what is screened with W; fp8 needs more than k columns to choose from."""
    sampled = _n_sampled(W) * TILES[W.element_size()].latents
    return _smallest_plan(math.ceil((1.6 if W.element_size() == 1 else 1.15) * k), sampled / len(W), chance)


@lru_cache
def _smallest_plan(needed: int, fraction: float, chance: float) -> _Plan:
    """The smallest rank that leaves out one of the `needed` largest columns by `chance`, and the capacity to match.

    Latents are in no particular order and the sample spreads over them, so that how many of the r largest columns are
    in it is binomial(r, fraction).
    """
    rank = next(j for j in range(1, needed + 2) if 1 - _below(j, needed, fraction) <= chance)
    capacity = 64
    while _below(rank, capacity, fraction) > chance / 2:
        capacity += 64
    return _Plan(rank, capacity)


def _below(j: int, trials: int, p: float) -> float:
    """Chance of fewer than j successes."""
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(i + 1)
        - math.lgamma(trials - i + 1)
        + i * math.log(p)
        + (trials - i) * math.log1p(-p)
        for i in range(min(j, trials + 1))
    )
    return min(1.0, math.fsum(map(math.exp, logs)))
