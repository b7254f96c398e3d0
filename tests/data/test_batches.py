"""Seen to fail when: the order of rows, or of blocks, ignores the epoch; a block starts at its second row; the
block in memory is read again for each batch."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topkapi.data.activations import Block, HarvestCounts, LiveBlocks
from topkapi.data.batches import ShuffledBatches
from topkapi.errors import TopkapiError


class Numbered:
    """Blocks whose rows are consecutive numbers; counts how often each is read."""

    d_model = 2
    counts = HarvestCounts()

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.reads, self.identity = sizes, [], {}

    def __len__(self) -> int:
        return len(self.sizes)

    def most_rows(self, i: int) -> int:
        return self.sizes[i] + i % 2  # as where a row is left out for its norm

    def __getitem__(self, i: int) -> Block:
        self.reads.append(i)
        start = sum(self.sizes[:i])
        rows = torch.arange(start, start + self.sizes[i])
        return Block(torch.stack([rows, -rows], dim=1).bfloat16(), rows)


def rows(batches: ShuffledBatches, n: int) -> list[int]:
    found = []
    for _ in range(n):
        x = next(batches)
        assert x.dtype == torch.bfloat16
        assert x.shape == (batches.batch_tokens, 2)
        assert torch.equal(x[:, 0], -x[:, 1])
        found += x[:, 0].int().tolist()
    return found


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, batch_tokens=st.integers(1, 20), seed=st.integers(0, 5))
def test_each_epoch_holds_every_row_once(sizes, batch_tokens, seed):
    total = sum(sizes)
    found = rows(ShuffledBatches(Numbered(*sizes), batch_tokens, seed), 3 * total)
    for epoch in range(3):
        assert sorted(found[epoch * total : (epoch + 1) * total]) == list(range(total))


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, batch_tokens=st.integers(1, 20), done=st.integers(0, 12))
def test_a_state_continues_exactly(sizes, batch_tokens, done):
    whole = ShuffledBatches(Numbered(*sizes), batch_tokens, 3)
    rows(whole, done)
    blocks = Numbered(*sizes)
    resumed = ShuffledBatches(blocks, batch_tokens, 3)
    resumed.load_state(whole.state())
    assert blocks.reads == []
    assert rows(resumed, 4) == rows(whole, 4)
    assert resumed.state() == whole.state()


def test_orders_differ_by_seed_epoch_and_block():
    def order(seed: int) -> list[list[int]]:
        found = rows(ShuffledBatches(Numbered(50, 50), 50, seed), 4)
        return [found[i : i + 50] for i in range(0, 200, 50)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    within = [tuple(row % 50 for row in part) for part in order(0)]
    assert len(set(within)) == 4
    assert within[0] != tuple(range(50))


def test_blocks_come_in_another_order_each_epoch():
    found = rows(ShuffledBatches(Numbered(*[4] * 6), 4, 0), 18)
    blocks = [row // 4 for row in found[::4]]
    assert len({tuple(blocks[i : i + 6]) for i in (0, 6, 12)}) == 3


def test_a_block_is_read_once_an_epoch():
    blocks = Numbered(64, 64, 64, 64)
    batches = ShuffledBatches(blocks, 10, 0)
    batches.sample(100)
    rows(batches, 25)
    assert Counter(blocks.reads) == Counter([0, 1, 2, 3])


def test_a_single_block_is_read_once():
    blocks = Numbered(30)
    rows(ShuffledBatches(blocks, 20, 0), 30)
    assert blocks.reads == [0]


def test_a_sample_is_the_start_of_the_stream():
    batches = ShuffledBatches(Numbered(40, 40), 16, 0)
    sample = batches.sample(16)
    assert torch.equal(next(batches), sample)
    assert len(batches.sample(1000)) == 40
    assert batches.state() == {"epoch": 0, "place": 0, "row": 16}


def test_a_state_of_another_stream_is_refused():
    batches = ShuffledBatches(Numbered(40), 16, 0)
    for state in ({"epoch": 0, "place": 1, "row": 0}, {"epoch": 0, "place": 0}, {"epoch": -1, "place": 0, "row": 0}):
        with pytest.raises(TopkapiError, match="does not fit these activations of 1 blocks"):
            batches.load_state(state)


def test_a_corpus_of_which_nothing_is_kept_is_told():
    with pytest.raises(TopkapiError, match="No token of the corpus is kept"):
        next(ShuffledBatches(Numbered(0, 0), 4, 0))


def test_batches_of_a_language_model(lm, splits, config):
    live = LiveBlocks(lm, splits.train, config)
    batches = ShuffledBatches(live, 256, config.seed)
    first = next(batches)
    assert first.shape == (256, 64)
    again = ShuffledBatches(live, 256, config.seed)
    assert torch.equal(next(again), first)
