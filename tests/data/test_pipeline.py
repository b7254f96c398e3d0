"""On a CPU: the thread, the order and the states; streams are tested in test_pipeline_gpu.py.

Seen to fail when: the state is that of the batches gathered, not of those handed out; a batch waits for a block that
only the next one needs; a block is begun before the one two before it is let go of; a failure is raised a batch early;
closing waits for a block to be finished.
"""

import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_batches import SIZES, Numbered
from topkapi.data.activations import LiveBlocks
from topkapi.data.batches import ShuffledBatches
from topkapi.data.pipeline import BatchesAhead, open_batches
from topkapi.errors import TopkapiError

CPU = torch.device("cpu")


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, batch_tokens=st.integers(1, 20), seed=st.integers(0, 5), done=st.integers(0, 6))
def test_batches_and_states_are_those_made_one_after_another(sizes, batch_tokens, seed, done):
    plain = ShuffledBatches(Numbered(*sizes), batch_tokens, seed)
    for _ in range(done):
        next(plain)
    ahead = BatchesAhead(Numbered(*sizes), batch_tokens, seed, CPU)
    ahead.load_state(plain.state())
    for _ in range(8):
        assert torch.equal(next(ahead), next(plain))
        assert ahead.state() == plain.state()
    ahead.close()


def test_a_sample_does_not_move_on():
    plain, ahead = ShuffledBatches(Numbered(40, 40), 16, 0), BatchesAhead(Numbered(40, 40), 16, 0, CPU)
    assert torch.equal(ahead.sample(30), plain.sample(30))
    assert ahead.state() == plain.state()
    assert torch.equal(next(ahead), next(plain))
    ahead.close()


class Slow(Numbered):
    """Blocks of which each is read when told to."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.may_read = threading.Semaphore(0)

    def __getitem__(self, i):
        assert self.may_read.acquire(timeout=20)
        return super().__getitem__(i)


def test_a_batch_waits_for_its_own_blocks_only():
    blocks = Slow(20, 20)
    ahead = BatchesAhead(blocks, 10, 0, CPU)
    blocks.may_read.release()
    next(ahead)
    next(ahead)  # the next batch is of the second block, which is not there yet
    threading.Timer(0.3, blocks.may_read.release).start()
    started = time.monotonic()
    next(ahead)
    assert 0.1 < time.monotonic() - started < 10
    blocks.may_read.release(4)
    ahead.close()


class Counted(Numbered):
    """Knows how many of its blocks are in memory when one is read."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.alive, self.most = weakref.WeakSet(), 0

    def __getitem__(self, i):
        time.sleep(0.01)  # the loop goes on meanwhile
        gc.collect()
        block = super().__getitem__(i)
        self.alive.add(block.x)
        self.most = max(self.most, len(self.alive))
        return block


def test_two_blocks_are_in_memory_and_none_is_read_twice():
    blocks, others = Counted(*[32] * 5), Numbered(*[32] * 5)
    ahead, plain = BatchesAhead(blocks, 24, 0, CPU), ShuffledBatches(others, 24, 0)
    for _ in range(19):
        next(ahead)
        next(plain)
    ahead.close()
    assert blocks.most == 2
    assert blocks.reads[: len(others.reads)] == others.reads
    assert len(blocks.reads) <= len(others.reads) + 1


class Failing(Numbered):
    """Blocks of which the second to be read is broken."""

    def __getitem__(self, i):
        if len(self.reads) == 1:
            raise TopkapiError("not finite")
        return super().__getitem__(i)


def test_a_failure_is_raised_where_the_block_is_needed():
    ahead = BatchesAhead(Failing(20, 20), 10, 0, CPU)
    next(ahead)
    ahead._coming.block.exception(timeout=20)
    next(ahead)
    with pytest.raises(TopkapiError, match="not finite"):
        next(ahead)
    ahead.close()


def test_a_corpus_of_which_nothing_is_kept_is_told():
    ahead = BatchesAhead(Numbered(0, 0), 4, 0, CPU)
    with pytest.raises(TopkapiError, match="No token of the corpus is kept"):
        next(ahead)
    ahead.close()


def test_closing_ends_a_block_in_the_middle(lm, splits, config, monkeypatch):
    live = LiveBlocks(lm, splits.train, config)
    ahead = BatchesAhead(live, 256, config.seed, CPU)
    original, passes, inside = lm.activations, [], threading.Event()

    def activations(tokens):
        passes.append(len(tokens))
        inside.set()
        ahead._closed.wait(20)
        return original(tokens)

    next(ahead)
    ahead._coming.block.result()  # the second block
    monkeypatch.setattr(lm, "activations", activations)
    next(ahead)
    next(ahead)  # the third is begun
    assert inside.wait(20)
    ahead.close()
    assert len(passes) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("topkapi-blocks")]


def test_live_blocks_ahead_are_the_same(lm, splits, config):
    live = LiveBlocks(lm, splits.train, config)
    plain, ahead = ShuffledBatches(live, 256, config.seed), BatchesAhead(live, 256, config.seed, CPU)
    for _ in range(12):  # more than an epoch
        assert torch.equal(next(ahead), next(plain))
    ahead.close()


def test_a_cpu_makes_batches_one_after_another():
    assert type(open_batches(Numbered(4), 2, 0, CPU)) is ShuffledBatches
