"""Bytes of every collective of a training step, from the shapes alone.

The order is that of the step (`topkapi.gradients`). `payload` is the size of the tensor that each process hands to the
collective: tests count it in real runs.
"""

from dataclasses import dataclass
from typing import Literal

from topkapi.parallel import Group
from topkapi.scaling.shapes import Job, Layout, Rank, rank_of

ACTIVATIONS, STOP = "activations", "whether to stop"
Kind = Literal["gather", "scatter_sum", "sum"]


@dataclass(frozen=True)
class Volume:
    """One collective."""

    name: str
    group: Group
    members: int
    kind: Kind
    payload: int
    """Bytes of the tensor that a process hands in."""
    asynchronous: bool = False
    """Whether it travels while the next part is computed."""
    calls: int = 1
    """Collectives that share the payload."""

    @property
    def sent(self) -> float:
        """Bytes that a process sends, and receives, at least."""
        others = self.members - 1
        if self.kind == "gather":
            return float(others * self.payload)
        return (2 if self.kind == "sum" else 1) * others / self.members * self.payload


def volumes(job: Job, layout: Layout) -> list[Volume]:
    """The collectives of a step, in order; those of groups of one process are left out."""
    rank = rank_of(job, layout)
    found = [_inputs(job, layout), *_forward(job, layout, rank)]
    found += _auxk(job, layout, rank) if rank.auxk_candidates else []
    found += [*_between_replicas(job, layout, rank), *_small(job, layout, rank)]
    return [volume for volume in found if volume.members > 1]


def by_group(found: list[Volume]) -> dict[tuple[str, str], int]:
    """Payloads added up by (group, kind)."""
    sums: dict[tuple[str, str], int] = {}
    for volume in found:
        key = (volume.group, volume.kind)
        sums[key] = sums.get(key, 0) + volume.payload
    return sums


def _inputs(job: Job, layout: Layout) -> Volume:
    """Each process computes its share of the activations, in bf16, and all of them receive it (`topkapi.data`)."""
    payload = -(-job.batch_tokens // layout.n_ranks) * job.d_model * 2
    return Volume(ACTIVATIONS, "all", layout.n_ranks, "gather", payload, asynchronous=True)


def _forward(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    sums, own = rank.owned_rows * layout.n_shards * job.d_model * 4, rank.owned_rows * job.d_model * job.itemsize
    return [
        Volume("candidates' values", "shards", layout.n_shards, "gather", rank.rows * rank.candidates * 4),
        Volume("reconstruction", "shards", layout.n_shards, "scatter_sum", sums),
        Volume("gradient of reconstruction", "shards", layout.n_shards, "gather", own),
    ]


def _auxk(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    """AuxK's twins of the above, and the gradients of the dead latents' rows."""
    padded = rank.owned_rows * layout.n_shards
    gradient = rank.owned_rows * job.d_model * job.itemsize
    rows = rank.dead * (2 * job.d_model + 1) * 4
    return [
        Volume("AuxK: candidates' values", "shards", layout.n_shards, "gather", rank.rows * rank.auxk_candidates * 4),
        Volume("AuxK: reconstruction", "shards", layout.n_shards, "scatter_sum", padded * job.d_model * 4),
        Volume("AuxK: gradient of reconstruction", "shards", layout.n_shards, "gather", gradient),
        Volume("AuxK: gradients of dead rows", "replicas", layout.n_replicas, "sum", rows, calls=3),
    ]


def _between_replicas(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    if rank.exchange == "sparse":
        rows, codes = rank.rows * job.d_model * job.itemsize, rank.rows * rank.candidates * 4
        return [
            Volume("replicas: activations, gradients", "replicas", layout.n_replicas, "gather", 2 * rows, calls=2),
            Volume("replicas: active latents", "replicas", layout.n_replicas, "gather", 3 * codes, calls=3),
        ]
    weight = rank.latents * job.d_model * 4
    return [
        Volume("replicas: W_enc's gradient", "replicas", layout.n_replicas, "sum", weight, asynchronous=True),
        Volume("replicas: W_dec's gradient", "replicas", layout.n_replicas, "sum", weight),
        Volume("replicas: latent_bias, fired", "replicas", layout.n_replicas, "sum", rank.latents * (4 + 1), calls=2),
    ]


def _small(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    """What costs latency alone: pre_bias's gradient, the loss, whether AuxK runs, and whether to stop."""
    dense = layout.n_replicas > 1 and rank.exchange == "dense"
    return [
        Volume("pre_bias and scalars", "shards", layout.n_shards, "sum", job.d_model * 4 + 4 * 4, calls=3),
        Volume("pre_bias over replicas", "replicas", layout.n_replicas if dense else 1, "sum", job.d_model * 4),
        Volume(STOP, "all", layout.n_ranks, "sum", 8, asynchronous=True),
    ]
