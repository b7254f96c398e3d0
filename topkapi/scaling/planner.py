"""The fastest layouts of a job over some GPUs, among those that fit in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from topkapi.errors import TopkapiError
from topkapi.scaling.hardware import Hardware
from topkapi.scaling.memory import fits, largest_batch, memory, total, weights_and_state
from topkapi.scaling.quantities import bytes_text
from topkapi.scaling.shapes import Exchange, Job, Layout, Rank, Selection, divisors, rank_of
from topkapi.scaling.step_time import StepTime, step_time

SECONDS_A_DAY = 86_400
PREFERRED = 0.98  # what loses nothing, or needs no flag, wins if it is this close
LEAST_TOKENS = 1024  # of a micro-batch: gradients are read and written for each, and the encoder wants many tokens


@dataclass(frozen=True)
class Plan:
    """A layout of a job, and what it takes."""

    wanted: Job
    job: Job
    """With the batch that fits, which is shorter than what was wanted where no micro-batch fits either."""
    layout: Layout
    gpu: Hardware
    rank: Rank
    memory: dict[str, int]
    step: StepTime
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Of the steps alone."""
        return self.job.batch_tokens / self.step.seconds

    @property
    def tokens_per_day(self) -> float:
        """Of the steps alone."""
        return self.tokens_per_second * SECONDS_A_DAY

    @property
    def is_shortened(self) -> bool:
        """Whether the batch is shorter than wanted."""
        return self.job.batch_tokens < self.wanted.batch_tokens

    @property
    def mesh(self) -> str:
        """`4 x 8`: replicas x shards."""
        return f"{self.layout.n_replicas} x {self.layout.n_shards}"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the planner may choose."""

    n_gpus: int
    selection: Selection | Literal["auto"] = "auto"
    capacity: float = 2.0
    candidates: int = 0
    exchange: Exchange | Literal["auto"] = "auto"
    shards: int = 0
    """Shards that the mesh must have; 0: any number."""

    def __post_init__(self) -> None:
        if not 0 < self.capacity < math.inf:
            raise TopkapiError(f"--capacity must be a finite number above 0; got {self.capacity:g}.")
        if self.candidates and self.selection == "exact":
            raise TopkapiError(f"--candidates {self.candidates} goes with --selection capacity; exact takes k of them.")


def plan(job: Job, layout: Layout, gpu: Hardware, *, shorten: bool = True) -> Plan:
    """What a layout takes, with as many of the job's tokens a step as fit; all of them without `shorten`."""
    holds, planned = fits(job, layout, gpu), job
    if shorten and not holds:
        batch = largest_batch(job, layout, gpu)
        holds = batch > 0
        planned = replace(job, batch_tokens=batch) if holds else job
    return Plan(
        wanted=job,
        job=planned,
        layout=layout,
        gpu=gpu,
        rank=rank_of(planned, layout),
        memory=memory(planned, layout),
        step=step_time(planned, layout, gpu),
        fits=holds,
    )


def plans(job: Job, gpu: Hardware, search: Search) -> list[Plan]:
    """The best plan for each number of shards that fits: the whole batch first, then the fastest.

    Raises:
        TopkapiError: the GPUs hold the job in no way.
    """
    found = [max(rivals, key=_merit) for rivals in _by_shards(job, gpu, search) if rivals]
    if not found:
        raise TopkapiError(_too_large(job, gpu, search))
    return sorted(found, key=lambda plan: (plan.is_shortened, -plan.tokens_per_second))


def for_picture(job: Job, gpu: Hardware, search: Search) -> list[Plan]:
    """The fastest plan for each number of shards with the whole batch, whether it fits or not."""
    found = []
    for layouts in _layouts(job, search):
        tried = [plan(job, layout, gpu, shorten=False) for layout in layouts]
        holding = [one for one in tried if one.fits] or tried
        found.append(max(holding, key=_merit))
    return found


def _by_shards(job: Job, gpu: Hardware, search: Search) -> Iterator[list[Plan]]:
    for layouts in _layouts(job, search):
        whole = [plan(job, layout, gpu) for layout in layouts if fits(job, layout, gpu)]
        yield whole or [one for one in (plan(job, layout, gpu) for layout in layouts) if one.fits]


def _layouts(job: Job, search: Search) -> Iterator[list[Layout]]:
    """For each number of shards, the ways to select and to exchange, and the sizes of micro-batches."""
    numbers = divisors(search.n_gpus)
    if search.shards and search.shards not in numbers:
        raise TopkapiError(
            f"--shards {search.shards} does not divide --gpus {search.n_gpus}: take {', '.join(map(str, numbers))}."
        )
    selections = ("exact", "capacity") if search.selection == "auto" else (search.selection,)
    exchanges = ("auto", "sparse", "dense") if search.exchange == "auto" else (search.exchange,)
    for n_shards in [search.shards] if search.shards else numbers:
        n_replicas = search.n_gpus // n_shards
        try:
            rows = rank_of(job, Layout(n_replicas=n_replicas, n_shards=n_shards)).rows
        except TopkapiError:
            continue
        ways = [(exchange, 0) for exchange in (exchanges if n_replicas > 1 else exchanges[:1])]
        if search.exchange != "sparse" or n_replicas == 1:
            ways += [("auto", size) for size in _micro_batches(rows)]
        yield [
            Layout(
                n_replicas=n_replicas,
                n_shards=n_shards,
                selection=selection,
                capacity=search.capacity,
                candidates=search.candidates,
                exchange=exchange,
                micro_batch_tokens=size,
            )
            for selection in (selections if n_shards > 1 else selections[:1])
            for exchange, size in ways
        ]


def _micro_batches(rows: int) -> Iterator[int]:
    """Sizes to try: a replica's tokens in 2, 4, 8 parts and so on."""
    n = 2
    while (size := -(-rows // n)) >= LEAST_TOKENS:
        yield size
        n *= 2


def _merit(plan: Plan) -> float:
    """Tokens a second, with a little added for losing nothing and for needing no further flag."""
    layout = plan.layout
    preferred = (layout.selection == "exact") + (layout.exchange == "auto") + (layout.micro_batch_tokens == 0)
    return plan.tokens_per_second * PREFERRED**-preferred


def _too_large(job: Job, gpu: Hardware, search: Search) -> str:
    tried = [plan(job, layout, gpu, shorten=False) for layouts in _layouts(job, search) for layout in layouts]
    if not tried:
        return (
            f"{search.n_gpus} GPUs can divide neither {job.n_latents:,} latents nor {job.batch_tokens:,} tokens among "
            "them: take another number of GPUs, or make --batch-tokens a multiple of it."
        )
    smaller = "" if job.state == "low_memory" else "--state low_memory, "
    smaller += "--no-ema, " if job.ema else ""
    usable = gpu.memory * gpu.usable
    kept = min(sum(weights_and_state(job, one.rank.latents, one.rank.owned_latents).values()) for one in tried)
    if kept < usable:
        least = min(tried, key=lambda one: total(one.memory))
        return (
            f"{search.n_gpus} {gpu.name}: weights and state take {bytes_text(kept)} a GPU at least, of which it has "
            f"{bytes_text(usable)} to use, and not one token fits beside them ({least.mesh}). Take {smaller}"
            "more GPUs or fewer latents."
        )
    everything = sum(weights_and_state(job, job.n_latents).values())
    return (
        f"{search.n_gpus} {gpu.name} are too few: weights and state take {bytes_text(everything)}, "
        f"{bytes_text(kept)} a GPU at least, of which it has {bytes_text(usable)} to use. Take {smaller}fewer latents, "
        f"or more than {int(everything / usable)} GPUs."
    )
