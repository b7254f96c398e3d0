"""What is trained, how it is laid out over GPUs, and the sizes that one of them then sees."""

import math
from dataclasses import dataclass
from typing import Literal

from topkapi.config import AuxKConfig, ParallelConfig, TrainConfig
from topkapi.errors import TopkapiError
from topkapi.exchange import auxk_candidates_of, candidates_of, cheaper_exchange, truncation_losses
from topkapi.parallel import Mesh

Precision = Literal["float32", "bf16", "fp8"]
State = Literal["float32", "low_memory"]
Selection = Literal["exact", "capacity"]
Exchange = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained."""

    n_latents: int
    """Dictionary size, all shards together."""
    d_model: int
    k: int
    batch_tokens: int = 131_072
    """Tokens of a step, all replicas together."""
    precision: Precision = "bf16"
    state: State = "float32"
    """As --optim.state."""
    ema: bool = True
    """Whether averaged weights are kept, as they are with --optim.ema-decay above 0."""
    dead: float = 0.0
    """Share of the latents that AuxK trains."""
    auxk: int = -1
    """As --auxk.auxk; below 0: what `auto` is for this d_model."""

    def __post_init__(self) -> None:
        for name in ("n_latents", "d_model", "k", "batch_tokens"):
            if getattr(self, name) < 1:
                raise TopkapiError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}.")
        if self.k > self.n_latents:
            raise TopkapiError(f"--k must be at most --n-latents {self.n_latents:,}; got {self.k:,}. Lower --k.")
        if not 0 <= self.dead < 1:
            raise TopkapiError(f"--dead is the share of latents that are dead, in [0, 1); got {self.dead:g}.")
        if self.precision == "float32" and self.state == "low_memory":
            raise TopkapiError("--state low_memory keeps weights in bf16: set --precision bf16 or fp8.")
        if self.auxk < 0:
            auto = TrainConfig(auxk=AuxKConfig(auxk="auto")).resolved(self.d_model).auxk.auxk
            object.__setattr__(self, "auxk", auto)

    @property
    def n_dead(self) -> int:
        """Latents that are dead."""
        return int(self.dead * self.n_latents)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype that a step computes in."""
        return 4 if self.precision == "float32" else 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a job is spread over GPUs."""

    n_replicas: int = 1
    n_shards: int = 1
    selection: Selection = "exact"
    capacity: float = 2.0
    candidates: int = 0
    """Latents that a shard offers for a token's k; 0: chosen."""
    exchange: Exchange | Literal["auto"] = "auto"
    micro_batch_tokens: int = 0
    """Tokens of a replica that a step goes through at a time; 0: all."""

    @property
    def parallel(self) -> ParallelConfig:
        """What training is told."""
        return ParallelConfig(
            shards=self.n_shards,
            selection=self.selection,
            capacity=self.capacity,
            candidates=self.candidates if self.selection == "capacity" else 0,
            exchange=self.exchange,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    @property
    def n_ranks(self) -> int:
        """GPUs in all."""
        return self.n_replicas * self.n_shards


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The sizes that the process with the largest shard sees."""

    rows: int
    """Tokens that its replica reads in a step."""
    micro_rows: int
    """Of these, the tokens that a step goes through at a time."""
    latents: int
    """Latents of its shard."""
    owned_latents: int
    """Of these, the latents whose parameters and state it has; the replicas of a shard divide them."""
    candidates: int
    """Latents that it offers for each token."""
    active: float
    """Of these, those that are kept, on average."""
    dead: int
    """Dead latents of its shard."""
    auxk_candidates: int
    """Dead latents that it offers for each token; 0: AuxK does nothing."""
    auxk_active: float
    """Of these, those that are kept, on average."""
    lost: float
    """Share of a token's k largest latents that no shard offers, expected."""
    exchange: Exchange | Literal["none"]
    """What replicas exchange."""

    @property
    def micro_batches(self) -> list[tuple[int, int]]:
        """The micro-batches of a step, as (tokens, how many of them)."""
        whole, left = divmod(self.rows, self.micro_rows)
        return [(self.micro_rows, whole)] + ([(left, 1)] if left else [])

    @property
    def n_micro_batches(self) -> int:
        """How many there are."""
        return -(-self.rows // self.micro_rows)

    @property
    def sums(self) -> bool:
        """Whether dense gradients are added up, over micro-batches or replicas."""
        return self.exchange == "dense" or self.n_micro_batches > 1


def rank_of(job: Job, layout: Layout) -> Rank:
    """The sizes of a layout.

    Raises:
        TopkapiError: processes without latents, or replicas that do not divide the batch.
    """
    mesh = Mesh(layout.n_replicas, layout.n_shards)
    for shard in (0, layout.n_shards - 1):  # the largest and the smallest
        mesh.owned(job.n_latents, shard)
    latents = mesh.latents(job.n_latents).stop
    if job.batch_tokens % layout.n_replicas:
        raise TopkapiError(
            f"a batch of {job.batch_tokens:,} tokens cannot be divided among {layout.n_replicas} replicas: make "
            "--batch-tokens a multiple of them."
        )
    rows = job.batch_tokens // layout.n_replicas
    dead = min(latents, -(-job.n_dead // layout.n_shards))
    auxk = min(job.auxk, job.n_dead)
    offered = candidates_of(job.k, job.n_latents, layout.n_shards, layout.parallel)
    return Rank(
        rows=rows,
        micro_rows=min(layout.micro_batch_tokens or rows, rows),
        latents=latents,
        owned_latents=mesh.largest_part(latents),
        candidates=offered,
        active=float(min(offered, job.k / layout.n_shards)),
        dead=dead,
        auxk_candidates=auxk_candidates_of(auxk, dead, layout.n_shards, layout.parallel) if auxk else 0,
        auxk_active=float(min(dead, auxk / layout.n_shards)),
        lost=truncation_losses(job.k, layout.n_shards)[offered] if offered < min(job.k, latents) else 0.0,
        exchange=_exchange(job, layout, rows, latents, offered),
    )


def _exchange(job: Job, layout: Layout, rows: int, latents: int, offered: int) -> Exchange | Literal["none"]:
    if layout.n_replicas == 1:
        return "none"
    if 0 < layout.micro_batch_tokens < rows:
        return "dense"
    if layout.exchange != "auto":
        return layout.exchange
    return cheaper_exchange(layout.n_replicas, rows, latents, job.d_model, offered, job.itemsize)


def divisors(n: int) -> list[int]:
    """The numbers that divide n, ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
