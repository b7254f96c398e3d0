"""Seconds of each part of a training step.

A part is a list of amounts: so many operations, bytes, pairs to sort. The amounts follow from the shapes and from how
the kernels work (`topkapi/ops/kernels`); what a unit of each costs is the GPU's (`topkapi.scaling.hardware`). Parts
that a GPU computes are added up, as they run one after another; collectives too, but for a share of what travels while
something else is computed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from topkapi.auxk import DENSE_AUXK_BELOW
from topkapi.ops.auxk import SCRATCH_BYTES
from topkapi.scaling.hardware import Hardware, Link
from topkapi.scaling.shapes import Job, Layout, Rank, rank_of
from topkapi.scaling.volumes import Beside, Volume, auxk_rows, n_pieces, volumes
from topkapi.step import ADDED_ROWS

Number = int | float
Amounts = dict[str, Number]
"""By the name of a field of `hardware.Rates`."""

SEGMENT = 2**20  # latents that the encoder's kernels take at a time
LONGEST_ROW = 16_384  # candidates of all shards that one kernel compares
LARGEST_K = 256  # that they select; for more, and for small dictionaries, the matmul is followed by torch.topk
RESCORED = {"float32": 2.0, "bf16": 1.4 / 16, "fp8": 2.0}  # candidates per latent kept; in bf16 the sample's alone
SHORT_MESSAGE, FASTER_HOPS = 2**16, 4  # bytes that NCCL sends with its protocol of low latency (LL), and what it gains
WRITTEN, ADDED = 4, 16  # bytes of a dense gradient's number in the first micro-batch, and in each further one
OTHERS = 30  # bytes moved for each active latent to tell those of other owners apart

NORMALISE = "normalise"
ENCODE = "encode and top k"
KEEP = "keep the k largest"
DECODE = "decode, error, latent gradient"
SORT = "sort by latent"
BIASES = "bias gradients, latents that fired"
UPDATE = "weight gradients and Adam"
AUXK = "AuxK"
REST = "the rest"


@dataclass(frozen=True)
class Part:
    """One piece of a step."""

    name: str
    seconds: float
    volume: Volume | None = None
    """The collective that it is; None for work of the GPU's own."""
    hidden: float = 0.0
    """Seconds of it that pass while something else is computed."""

    @property
    def exposed(self) -> float:
        """What it adds to the step."""
        return self.seconds - self.hidden


@dataclass(frozen=True)
class StepTime:
    """A step, by part."""

    parts: list[Part] = field(default_factory=list)
    host: float = 0.0
    """Seconds that the host needs to queue it."""

    @property
    def device(self) -> float:
        """Seconds of the parts that are not hidden."""
        return math.fsum(part.exposed for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of the step: no shorter than the host needs."""
        return max(self.device, self.host)

    @property
    def communication(self) -> float:
        """Seconds of collectives that are not hidden."""
        return math.fsum(part.exposed for part in self.parts if part.volume is not None)


def step_time(job: Job, layout: Layout, gpu: Hardware) -> StepTime:
    """The step of a layout on GPUs of one kind."""
    rank = rank_of(job, layout)
    own = compute(job, layout, rank, gpu.cache)
    seconds = {name: cost(amounts, gpu) for name, amounts in own.items()}
    parts = [Part(name, value) for name, value in seconds.items()]
    found, left = volumes(job, layout), _beside(job, layout, rank, seconds, gpu)
    for volume in found:
        taken = collective_seconds(volume, path_of(volume, layout, gpu.gpus_per_node), gpu)
        beside = min(taken, left.get(volume.beside, 0.0))
        if volume.beside:
            left[volume.beside] -= beside
        parts.append(Part(volume.name, taken, volume, gpu.overlap * beside))
    launches = sum(amounts.get("launches", 0) for amounts in own.values()) + sum(volume.calls for volume in found)
    base = sum(one.get("launches", 0) for one in compute(ONE_GPU, Layout(), rank_of(ONE_GPU, Layout()), 1).values())
    return StepTime(parts, gpu.host * launches / base)


def _beside(job: Job, layout: Layout, rank: Rank, seconds: Mapping[str, float], gpu: Hardware) -> dict[Beside, float]:
    """Seconds of what is computed while something travels."""
    rows, n = rank.micro_rows, rank.n_micro_batches
    reduced = _reduction(job, layout, rank, rows, gpu.cache)
    if rank.sums:
        reduced = added(reduced, {"bytes": (ADDED if n > 1 else WRITTEN) * rank.latents * job.d_model})
    return {
        "step": math.fsum(seconds.values()),
        "pieces": seconds[DECODE] * (1 - 1 / n_pieces(rows, layout)),
        "decoding": seconds[DECODE],
        "sorting": seconds[SORT],
        "reducing": cost(reduced, gpu) + seconds[BIASES] / n,
        "updating": seconds[UPDATE] / 2,
    }


ONE_GPU = Job(n_latents=131_072, d_model=768, k=32, batch_tokens=65_536)  # whose host time `Hardware.host` is


def cost(amounts: Mapping[str, Number], gpu: Hardware) -> float:
    """Seconds of some amounts."""
    return math.fsum(amount / getattr(gpu.rates, name) for name, amount in amounts.items())


def compute(job: Job, layout: Layout, rank: Rank, cache: int) -> dict[str, Amounts]:
    """The amounts of each part that a GPU computes itself, in order."""
    found: dict[str, Amounts] = {}
    for rows, times in rank.micro_batches:
        for name, amounts in _micro_batch(job, layout, rank, rows, cache).items():
            more = {what: times * amount for what, amount in amounts.items()}
            found[name] = added(found.get(name, {}), more)
    found[UPDATE] = added(found[UPDATE], _update(job, rank))
    return found


def _micro_batch(job: Job, layout: Layout, rank: Rank, rows: int, cache: int) -> dict[str, Amounts]:
    """What is computed of some tokens."""
    d, size = job.d_model, job.itemsize
    found = {
        NORMALISE: {"bytes": 2 * rows * d * size, "launches": 2},
        ENCODE: _encode(job, rows, rank.latents, rank.candidates, cache),
    }
    if layout.n_shards > 1:
        found[KEEP] = _keep(rows, rank.candidates, layout.n_shards)
    found[DECODE] = _decode(job, layout, rank, rows, cache)
    found[SORT], found[BIASES] = _sort(job, layout, rank, rows)
    reduced = _reduction(job, layout, rank, rows, cache)
    found[UPDATE] = added(reduced, reduced)
    if rank.auxk_candidates and rank.dead:
        found[AUXK] = _auxk(job, layout, rank, rows, cache)
    found[REST] = {"bytes": 3 * rows * d * size + 8 * rows * rank.candidates + 24 * rank.latents, "launches": 40}
    return found


def gathered(n_rows: Number, row_bytes: Number, table_bytes: Number, cache: int) -> Amounts:
    """Rows of a table read in random order, of which a share is found in the cache."""
    hit = cache / (cache + table_bytes)
    return {"bytes": (1 - hit) * n_rows * row_bytes, "cached_bytes": hit * n_rows * row_bytes}


def added(*parts: Amounts) -> Amounts:
    """The sum of some amounts."""
    return {name: sum(part.get(name, 0.0) for part in parts) for name in {name: 0 for part in parts for name in part}}


def _encode(job: Job, rows: int, latents: int, k: int, cache: int) -> Amounts:
    """The encoder's matmul, what bounds and selects its output, and candidates scored again."""
    d, size = job.d_model, job.itemsize
    flops = {f"{job.precision}_flops": 2.0 * rows * d * latents}
    if not takes_kernels(d, latents, k):
        wide = {"float32_flops" if job.precision == "float32" else "bf16_flops": 2.0 * rows * d * latents}
        return added(wide, {"sorted_pre_activations": rows * latents, "bytes": 4.0 * rows * latents, "launches": 4})
    segments = -(-latents // SEGMENT)
    again = gathered(RESCORED[job.precision] * segments * rows * k, d * size, latents * d * size, cache)
    made = {"fp8": 3 * latents * d, "float32": 6 * latents * d}.get(job.precision, 0)  # operands of the screen
    per_row = {"selected": segments * rows * k, "pre_activations": rows * latents, "bytes": made}
    return added(flops, again, per_row, {"launches": 16 * segments})


def takes_kernels(d_model: int, latents: int, k: int) -> bool:
    """Whether the encoder's kernels take a shape, rather than a matmul followed by `torch.topk`."""
    return latents >= max(256 * 16, 64 * k) and k <= LARGEST_K and d_model % 16 == 0


def _keep(rows: int, offered: int, n_shards: int) -> Amounts:
    """All shards' values of a token, counted again and again in registers; three reads' time is a guess.

    Rows too long for the kernel go through `torch.topk` and some ten passes.
    """
    values = rows * offered * n_shards
    if offered * n_shards > LONGEST_ROW:
        return {"sorted_pre_activations": values, "bytes": 40 * values, "launches": 40}
    return {"bytes": 3 * 4 * values + 24 * rows * offered, "launches": 2}


def _decode(job: Job, layout: Layout, rank: Rank, rows: int, cache: int) -> Amounts:
    """One pass over a token's decoder rows; with shards two, as the sum over shards lies between them."""
    d, size = job.d_model, job.itemsize
    once = gathered(rows * rank.active, d * size, rank.latents * d * size, cache)
    codes = 16 * rows * rank.candidates
    if layout.n_shards == 1:
        return added(once, {"bytes": 2 * rows * d * size + codes, "launches": 4})
    own = -(-rows // layout.n_shards) * d * (4 + 2 * size)  # the error and the gradient made of it
    moved = {"bytes": (4 + 3 * size) * rows * d + own + codes, "launches": 10 * n_pieces(rows, layout)}
    return added(once, once, moved)


def _sort(job: Job, layout: Layout, rank: Rank, rows: int) -> tuple[Amounts, Amounts]:
    """The sort by latent, and what is found from it alone. Of all replicas' pairs an owner sorts all and sums its own.

    The biases' gradients read sectors of 32 bytes.
    """
    d, size, pairs = job.d_model, job.itemsize, rows * rank.candidates
    if rank.sums or layout.n_replicas == 1:
        own = {"reduced_bytes": rank.latents * d * size, "bytes": 64 * pairs, "launches": 12}
        return {"sorted_pairs": pairs, "launches": 16}, own
    everyone = layout.n_replicas * pairs
    own = {"reduced_bytes": rank.owned_latents * d * size, "launches": 12}
    own["bytes"] = 64 * pairs + (layout.n_replicas - 1) * rows * d * size
    return {"sorted_pairs": everyone, "bytes": OTHERS * everyone, "launches": 22}, own


def _update(job: Job, rank: Rank) -> Amounts:
    """Adam for the latents that a process owns, state read and written once; dense gradients made and read."""
    parameters = 2 * rank.owned_latents * job.d_model
    state = 8 if job.state == "low_memory" else 24 + (2 if job.itemsize == 2 else 0)
    state += 8 if job.ema else 0
    moved = {"bytes": parameters * state, "launches": 8}
    if job.state == "low_memory":
        moved["coded_parameters"] = parameters
    if not rank.sums:
        return moved
    further = ADDED * (rank.n_micro_batches - 1)
    dense = 2 * rank.latents * job.d_model * (WRITTEN + further) + 4 * parameters
    return added(moved, {"bytes": dense, "launches": 6 * rank.n_micro_batches * -(-rank.latents // ADDED_ROWS)})


def _reduction(job: Job, layout: Layout, rank: Rank, rows: int, cache: int) -> Amounts:
    """The rows that one weight's gradient is made of: an owner has a share of the pairs of all replicas."""
    read = rows if rank.sums else layout.n_replicas * rows
    return gathered(rows * rank.active, job.d_model * job.itemsize, read * job.d_model * job.itemsize, cache)


def _auxk(job: Job, layout: Layout, rank: Rank, rows: int, cache: int) -> Amounts:
    """Five dense products of the tokens and the dead latents; or one and four sparse ones, as always with shards."""
    d, size, dead, k = job.d_model, job.itemsize, rank.dead, rank.auxk_candidates
    moved = {"bytes": dead * d * (4 * size + 32) + 6 * rows * d * size}  # rows gathered, summed, put back; residual
    if layout.n_shards == 1 and dead <= DENSE_AUXK_BELOW["cuda"] * k:
        flop = "float32_flops" if job.precision == "float32" else "bf16_flops"
        chunked = -(-2 * rows * dead * size // SCRATCH_BYTES)
        code = {"bytes": 8 * rows * dead * size, "launches": 12 * chunked + 20}
        return added({flop: 10 * rows * d * dead}, code, moved)
    encoded, active = _encode(job, rows, dead, k, cache), rows * rank.auxk_active
    decoder = gathered(2 * active, d * size, dead * d * size, cache)
    tokens = gathered(2 * active, d * size, rows * d * size, cache)
    sort = {"sorted_pairs": rows * k, "launches": 40}
    if layout.n_shards == 1:
        return added(encoded, decoder, tokens, sort, moved)
    chunked = len(auxk_rows(job, layout, rank)) / rank.n_micro_batches
    sums = {"bytes": 16 * chunked * dead * d + 8 * rows * d, "launches": 60 * chunked}
    return added(encoded, decoder, tokens, sort, moved, sums, _keep(rows, k, layout.n_shards))


class Path(NamedTuple):
    """What a collective's ring runs over."""

    members: int
    nodes: int


def path_of(volume: Volume, layout: Layout, gpus_per_node: int) -> Path:
    """How many nodes a group spreads over: ranks count through the shards first, and nodes through the ranks."""
    stride = layout.n_shards if volume.group == "replicas" else 1
    span = (volume.members - 1) * stride + 1
    return Path(volume.members, min(volume.members, -(-span // gpus_per_node)))


def collective_seconds(volume: Volume, path: Path, gpu: Hardware) -> float:
    """Seconds of a collective: hops of a ring, and its bytes at the speed of the ring's slowest link.

    A ring that takes in p GPUs of each node crosses to the next node through p network cards at once. Small sums go
    along a tree.
    """
    crossing = path.members / path.nodes
    inside, between = (getattr(link, "sum" if volume.kind == "sum" else "gather") for link in (gpu.inside, gpu.between))
    bandwidth = inside if path.nodes == 1 else min(inside, crossing * between)
    if path.nodes == path.members:
        bandwidth = between
    hops = _hops(path.members - 1, path.nodes - 1, gpu.inside, gpu.between)
    if volume.kind == "sum":
        tree = _hops(
            crossing - 1 + (path.nodes - 1).bit_length(), (path.nodes - 1).bit_length(), gpu.inside, gpu.between
        )
        hops = 2 * min(hops, tree)
    hops /= FASTER_HOPS if volume.payload <= volume.calls * SHORT_MESSAGE else 1
    return volume.calls * (gpu.collective + hops) + volume.sent / bandwidth


def _hops(steps: Number, crossings: Number, inside: Link, between: Link) -> float:
    return (steps - crossings) * inside.hop + crossings * between.hop
