"""Bytes of every collective of a training step, from the shapes alone.

The order is that of the step (`topkapi.step`). `payload` is the size of the tensor that each process hands to the
collective: tests count it in real runs.
"""

from dataclasses import dataclass
from typing import Literal

from topkapi.exchange import PIECES, pieces_of
from topkapi.ops.auxk import SPARSE_ENTRY_BYTES, chunks
from topkapi.parallel import Group
from topkapi.scaling.shapes import Job, Layout, Rank, rank_of

ACTIVATIONS, STOP = "activations", "whether to stop"
Kind = Literal["gather", "scatter_sum", "sum"]
Beside = Literal["", "step", "pieces", "decoding", "sorting", "reducing", "updating"]


@dataclass(frozen=True)
class Volume:
    """One collective."""

    name: str
    group: Group
    members: int
    kind: Kind
    payload: int
    """Bytes of the tensor that a process hands in."""
    beside: Beside = ""
    """What is computed while it travels: nothing, the step before, the decoding of other pieces of the batch,
    that of all of it, its sort, W_dec's gradient, or W_dec's update."""
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
    found += [*_between_replicas(job, layout, rank), *_small(job, layout), *_changed(job, layout, rank)]
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
    return Volume(ACTIVATIONS, "all", layout.n_ranks, "gather", payload, beside="step")


def _forward(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    shards, d = layout.n_shards, job.d_model
    own = sum(n * -(-rows // shards) for rows, n in rank.micro_batches)
    calls = sum(n * n_pieces(rows, layout) for rows, n in rank.micro_batches)
    values, partial = rank.rows * rank.candidates * 4, own * shards * d * 4
    return [
        Volume("candidates' values", "shards", shards, "gather", values, calls=rank.n_micro_batches),
        Volume("reconstruction", "shards", shards, "scatter_sum", partial, "pieces", calls),
        Volume("gradient of reconstruction", "shards", shards, "gather", own * d * job.itemsize, "pieces", calls),
    ]


def n_pieces(rows: int, layout: Layout) -> int:
    """In how many pieces a GPU's micro-batch of `rows` tokens is decoded, if there are several shards."""
    return len(list(pieces_of(rows, layout.n_shards, PIECES["cuda"])))


def _auxk(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    """AuxK's twins of the above, a chunk of tokens at a time, and the gradients of the dead latents' rows."""
    rows, shards, d = auxk_rows(job, layout, rank), layout.n_shards, job.d_model
    owned = sum(-(-n // shards) for n in rows)
    values = rank.rows * rank.auxk_candidates * 4
    return [
        Volume("AuxK: candidates' values", "shards", shards, "gather", values, calls=len(rows)),
        Volume("AuxK: reconstruction", "shards", shards, "scatter_sum", owned * shards * d * 4, calls=len(rows)),
        Volume(
            "AuxK: gradient of reconstruction", "shards", shards, "gather", owned * d * job.itemsize, calls=len(rows)
        ),
        Volume(
            "AuxK: gradients of dead rows", "replicas", layout.n_replicas, "sum", rank.dead * (2 * d + 1) * 4, calls=3
        ),
        Volume("AuxK: squared error", "all", layout.n_ranks, "gather", 4),
    ]


def auxk_rows(job: Job, layout: Layout, rank: Rank) -> list[int]:
    """Tokens of the chunks in which shards go through AuxK."""
    row_bytes = rank.auxk_candidates * (SPARSE_ENTRY_BYTES + 4 * layout.n_shards) + 8 * job.d_model
    return [len(range(rows)[part]) for rows, n in rank.micro_batches for part in n * list(chunks(rows, row_bytes))]


def _between_replicas(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    """What the gradients of latents are made of, or sums of them, on their way to the owners."""
    replicas, d = layout.n_replicas, job.d_model
    if rank.sums:
        weight = replicas * rank.owned_latents * d * 4
        return [
            Volume("replicas: W_enc's gradient", "replicas", replicas, "scatter_sum", weight, "reducing"),
            Volume("replicas: W_dec's gradient", "replicas", replicas, "scatter_sum", weight),
            Volume("replicas: latent_bias, fired", "replicas", replicas, "sum", rank.latents * (4 + 4), calls=2),
            Volume("replicas: pre_bias", "replicas", replicas, "gather", d * 4),
        ]
    rows, codes = rank.rows * d * job.itemsize, rank.rows * rank.candidates * 4
    return [
        Volume("replicas: active latents", "replicas", replicas, "gather", 2 * codes, "decoding", calls=2),
        Volume("replicas: activations", "replicas", replicas, "gather", rows, "decoding"),
        Volume("replicas: gradients", "replicas", replicas, "gather", rows + codes, "sorting", calls=2),
        Volume("replicas: latents that fired", "replicas", replicas, "gather", rank.owned_latents),
    ]


def _changed(job: Job, layout: Layout, rank: Rank) -> list[Volume]:
    """What the owners have updated. The next step can do next to nothing before it has all of it."""
    replicas, weight = layout.n_replicas, rank.owned_latents * job.d_model * job.itemsize
    biases = 4 * rank.owned_latents
    return [
        Volume("replicas: W_enc", "replicas", replicas, "gather", weight, "updating"),
        Volume("replicas: W_dec, latent_bias", "replicas", replicas, "gather", weight + biases, calls=2),
    ]


def _small(job: Job, layout: Layout) -> list[Volume]:
    """What costs latency alone: biases, the loss, the number of dead latents, and whether to stop."""
    everyone, shards, d = layout.n_ranks, layout.n_shards, job.d_model
    return [
        Volume("pre_bias", "all", everyone, "gather", d * 4),
        Volume("number of dead latents", "shards", shards, "sum", 8),
        Volume("loss and l0", "all", everyone, "gather", 16),
        Volume(STOP, "all", everyone, "sum", 8, "step"),
    ]
