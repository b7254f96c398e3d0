"""Bytes that a GPU holds at the fullest moment of a step."""

import math
from dataclasses import replace

from topkapi.auxk import DENSE_AUXK_BELOW
from topkapi.ops.auxk import SCRATCH_BYTES, SPARSE_ENTRY_BYTES
from topkapi.scaling.hardware import Hardware
from topkapi.scaling.shapes import Job, Layout, Rank, rank_of
from topkapi.scaling.step_time import SEGMENT, takes_kernels
from topkapi.scaling.volumes import n_pieces
from topkapi.step import ADDED_ROWS

SAMPLE_BYTES = 2**30 + 2**27  # of sampled pre-activations, for which long batches are encoded in parts
GROUP_BYTES = {"bf16": 36, "fp8": 20, "float32": 20}  # a kept group: 8 values, of float32 or bf16, and where they are
KEPT_BYTES = 2**29 + 2**27  # of kept values at a time
PLAIN_BYTES = 2**28  # of pre-activations at a time where torch.topk selects
PAIR_BYTES = 40  # sorting an active latent: its key, its place, both again, and scratch
NEXT_BATCH = "next batch"  # made while this one is trained on
SMALL = 2**25  # what is too small to be listed


def weights_and_state(job: Job, latents: int, owned: int | None = None) -> dict[str, int]:
    """Bytes of the parameters of some latents and all that is kept beside them from step to step.

    Of the `latents` of a shard a replica owns `owned`, by default all: what is computed with exists for all of them,
    the rest for its own. Weights that are computed with as they are have no copies.
    """
    owned = latents if owned is None else owned
    low, is_copied = job.state == "low_memory", job.precision != "float32" and job.state != "low_memory"
    held, trained = 2 * latents * job.d_model, 2 * owned * job.d_model
    biases = owned + job.d_model
    found = {
        "weights": (4 * trained if is_copied else job.itemsize * held) + 4 * (latents + job.d_model),
        "moments": trained * (2 if low else 8) + 8 * biases + (16 * owned if low else 0),
        "average": 4 * (trained + biases) if job.ema else 0,
        "working copies": 2 * held if is_copied else 0,
        "silence of latents": 8 * latents,
    }
    return {name: size for name, size in found.items() if size}


def memory(job: Job, layout: Layout) -> dict[str, int]:
    """Bytes by part: what is kept, the batch, and what the moment of a step that takes most holds besides."""
    rank = rank_of(job, layout)
    moments = [{"encoder's scratch": _encoding(job, rank)}]
    moments += [_comparing(layout, rank), _in_pieces(job, layout, rank)] if layout.n_shards > 1 else []
    sums = _sums(job, layout, rank)
    if rank.n_micro_batches > 1:  # dense gradients are there from the second one on
        moments = [{**moment, "dense gradients": sums["dense gradients"]} for moment in moments]
    step = max([*moments, {**_backward(job, layout, rank), **sums}], key=total)
    raw = 2 * rank.rows * job.d_model
    batch = raw + (rank.rows + rank.micro_rows) * job.d_model * job.itemsize + 12 * rank.micro_rows * rank.candidates
    kept = weights_and_state(job, rank.latents, rank.owned_latents)
    lists = 2 * 8 * rank.latents  # of what may be dead, made ahead
    return {**kept, "batch": batch, NEXT_BATCH: raw, **step, "small things": lists + SMALL}


def total(found: dict[str, int]) -> int:
    """All of it."""
    return sum(found.values())


def fits(job: Job, layout: Layout, gpu: Hardware) -> bool:
    """Whether a GPU holds it."""
    return total(memory(job, layout)) <= gpu.memory * gpu.usable


def largest_batch(job: Job, layout: Layout, gpu: Hardware) -> int:
    """Tokens of the longest step that fits, at most those of the job; 0 if the weights alone do not."""
    low, high = 0, job.batch_tokens // layout.n_replicas  # in tokens of a replica
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(job, batch_tokens=middle * layout.n_replicas), layout, gpu):
            low = middle
        else:
            high = middle - 1
    step = 2 ** max(0, low.bit_length() - 5)  # 4 to 5 digits in binary: a batch that one would choose
    return (low if low * layout.n_replicas == job.batch_tokens else low // step * step) * layout.n_replicas


def _encoding(job: Job, rank: Rank) -> int:
    """Sampled pre-activations and their groups' maxima, kept groups and, in fp8, what is screened."""
    latents = min(rank.latents, SEGMENT)
    if not takes_kernels(job.d_model, rank.latents, rank.candidates):
        return 2 * PLAIN_BYTES
    sampled = 2 * latents // 16 * 9 // 8
    groups = 64 * math.ceil(
        (285 + 3.15 * rank.candidates if job.precision == "fp8" else 240 + 2.4 * rank.candidates) / 64
    )
    group = GROUP_BYTES[job.precision]
    rows = min(rank.micro_rows, max(128, min(SAMPLE_BYTES // sampled, KEPT_BYTES // (groups * (group - 4)))))
    screened = {"bf16": 0, "fp8": (latents + rows) * job.d_model, "float32": 2 * (latents + rows) * job.d_model}
    # a sixteenth of the rows may be encoded again
    return rows * (sampled + (groups * group + 8 * rank.candidates) * 17 // 16) + screened[job.precision]


def _comparing(layout: Layout, rank: Rank) -> dict[str, int]:
    """All shards' candidates, and what is kept of this one's."""
    return {"all shards' candidates": rank.micro_rows * rank.candidates * (4 * layout.n_shards + 12)}


def _in_pieces(job: Job, layout: Layout, rank: Rank) -> dict[str, int]:
    """Reconstructions on their way, of two pieces in float32, with the sums; then their gradients, of three."""
    d, rows = job.d_model, rank.micro_rows
    piece = -(-rows // n_pieces(rows, layout))
    sums = 2 * 4 * d * (piece + -(-piece // layout.n_shards))
    return {
        "gradient of recon": rows * d * job.itemsize,
        "gradients of codes": 4 * rows * rank.candidates,
        "pieces of reconstructions": sums + 3 * piece * d * job.itemsize,
        **_gathered(job, layout, rank, tensors=1),
    }


def _gathered(job: Job, layout: Layout, rank: Rank, tensors: int) -> dict[str, int]:
    """What owners have of other replicas: activations and codes, then with `tensors` = 2 the gradients as well."""
    if rank.sums or layout.n_replicas == 1:
        return {}
    row = tensors * job.d_model * job.itemsize + (8 if tensors == 1 else 12) * rank.candidates
    return {"other replicas' batch": layout.n_replicas * rank.rows * row}


def _backward(job: Job, layout: Layout, rank: Rank) -> dict[str, int]:
    d, size, rows = job.d_model, job.itemsize, rank.micro_rows
    pairs = rows * rank.candidates * (1 if rank.sums else layout.n_replicas)
    found = {
        "gradients of codes": 4 * rows * rank.candidates + PAIR_BYTES * pairs,
        "gradient of recon": rows * d * size,
        **_gathered(job, layout, rank, tensors=2),
    }
    if rank.auxk_candidates and rank.dead:
        found["AuxK"] = _auxk(job, layout, rank)
    return found


def _sums(job: Job, layout: Layout, rank: Rank) -> dict[str, int]:
    """Dense gradients, with what replicas get of their sum, or with the rows that are being added."""
    if not rank.sums:
        return {}
    summed = 2 * rank.owned_latents if layout.n_replicas > 1 else 0
    block = min(rank.latents, ADDED_ROWS) if rank.n_micro_batches > 1 else 0
    return {
        "dense gradients": 2 * 4 * layout.n_replicas * rank.owned_latents * job.d_model,
        "rows of dense gradients": 4 * max(summed, block) * job.d_model,
    }


def _auxk(job: Job, layout: Layout, rank: Rank) -> int:
    """Rows of the dead latents, their gradients, and a chunk's pre-activations."""
    d, size, dead, k, n = job.d_model, job.itemsize, rank.dead, rank.auxk_candidates, rank.micro_rows
    rows = dead * d * (2 * size + 16)
    is_dense = dead <= DENSE_AUXK_BELOW["cuda"] * k
    if layout.n_shards == 1:
        return rows + min(2 * n * dead * size if is_dense else n * k * SPARSE_ENTRY_BYTES, SCRATCH_BYTES)
    row_bytes = k * (SPARSE_ENTRY_BYTES + 4 * layout.n_shards) + 8 * d
    return rows + min(n * row_bytes, SCRATCH_BYTES)
