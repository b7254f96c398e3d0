"""Dead latents are counted in tokens, whatever the batch size, and lists made ahead hold exactly the dead ones.

Seen to catch: `>` instead of `>=`; counting batches; a list made ahead used one batch too late; latents that fired
since the list was made left in; a list kept after `silent_for` was written to.
"""

import pytest
import torch

from topkapi.dead import DeadCounter
from topkapi.gradients import PADDING, DeadSubset


def test_counts_tokens_and_resets_what_fired() -> None:
    counter = DeadCounter(3)
    fired = torch.tensor([True, False, False])
    counter.count_(fired, 10)
    counter.count_(torch.tensor([False, True, False]), 7)
    assert counter.silent_for.tolist() == [7, 0, 17]
    assert counter.dead(17).tolist() == [False, False, True]
    assert counter.dead(18).tolist() == [False, False, False]


def test_batch_size_does_not_matter() -> None:
    one, many = DeadCounter(2), DeadCounter(2)
    never = torch.zeros(2, dtype=torch.bool)
    one.count_(never, 12)
    for _ in range(4):
        many.count_(never, 3)
    assert torch.equal(one.silent_for, many.silent_for)


def chosen(subset: DeadSubset) -> list[int]:
    """The latents that take part, after checking the form of the list."""
    latents = subset.latents.tolist()
    assert latents == sorted(latents)
    assert subset.latents.dtype == torch.int64
    return subset.latents[subset.dead].tolist()


def ahead(n_latents: int) -> DeadCounter:
    """A counter that makes lists ahead, as on a GPU."""
    counter = DeadCounter(n_latents)
    counter.lists_ahead = True
    return counter


@pytest.mark.parametrize("n_latents", [1, PADDING, 150])
@pytest.mark.parametrize("rate", [0.02, 0.3])  # of firing
def test_the_subset_is_the_dead_latents(n_latents: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(n_latents)
    counter, plain = ahead(n_latents), DeadCounter(n_latents)
    sizes = set()
    for step in range(120):
        n_tokens = 10 if step < 60 else (25 if step < 90 else 7)
        subset = counter.subset(100, n_tokens)
        assert chosen(subset) == plain.dead(100).nonzero().flatten().tolist()
        assert chosen(plain.subset(100, n_tokens)) == chosen(subset)
        sizes.add(len(subset))
        fired = torch.rand(n_latents, generator=generator) < rate
        for each in (counter, plain):
            each.count_(fired, n_tokens)
    assert all(size % PADDING == 0 for size in sizes)
    if n_latents > 1 and rate < 0.1:
        assert 0 in sizes
        assert len(sizes) > 1


def test_a_list_is_of_the_batch_before_the_last() -> None:
    counter = ahead(4)
    never, all_fire = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    for _ in range(3):
        counter.subset(10, 5)
        counter.count_(never, 5)
    assert chosen(counter.subset(10, 5)) == [0, 1, 2, 3]
    counter.count_(all_fire, 5)
    fresh = counter.subset(10, 5)
    assert len(fresh) == PADDING  # what was near death then
    assert chosen(fresh) == []
    counter.count_(never, 5)
    assert len(counter.subset(10, 5)) == 0


def test_lists_are_made_anew_after_silent_for_was_written_to() -> None:
    counter = ahead(5)
    for _ in range(3):
        assert len(counter.subset(1000, 10)) == 0
        counter.count_(torch.zeros(5, dtype=torch.bool), 10)
    counter.silent_for[2] = 1000
    assert chosen(counter.subset(1000, 10)) == [2]
    counter.silent_for.copy_(torch.tensor([0, 5000, 1000, 0, 0]))  # as loading a checkpoint does
    assert chosen(counter.subset(1000, 10)) == [1, 2]
    counter.count_(torch.tensor([False, True, False, False, False]), 10)
    assert chosen(counter.subset(1000, 10)) == [2]
    assert chosen(counter.subset(10, 10)) == [0, 2, 3, 4]  # another threshold: at once as well
    counter.silent_for = torch.zeros(5, dtype=torch.int64)
    assert chosen(counter.subset(10, 10)) == []


@pytest.mark.parametrize("padding", [1, 8])
def test_subset_of_a_mask(padding: int) -> None:
    mask = torch.tensor([False, True, True, False, True])
    subset = DeadSubset.of(mask, padding)
    assert chosen(subset) == [1, 2, 4]
    assert subset.latents[3:].tolist() == [5] * (len(subset) - 3)
    assert len(subset) == (3 if padding == 1 else 8)
    assert len(DeadSubset.of(torch.zeros(5, dtype=torch.bool), padding)) == 0
