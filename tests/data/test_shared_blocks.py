"""Blocks and batches of processes that train together, two of them over gloo.

Seen to fail when: contexts are divided in the middle of a forward pass; outliers are left out before the rows are
exchanged; a replica takes every second row; a process that has begun fewer blocks does not decline the rest on closing.
"""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from topkapi.config import DataConfig, LanguageModelConfig, from_dict
from topkapi.data.activations import CachedBlocks, LiveBlocks, _shares
from topkapi.data.batches import ShuffledBatches, part_of_batch
from topkapi.data.language_model import LanguageModel
from topkapi.data.pipeline import BatchesAhead
from topkapi.data.tokens import tokenize
from topkapi.errors import TopkapiError
from topkapi.parallel import Mesh, open_mesh

CPU = torch.device("cpu")


@pytest.fixture
def together(fork_server, tmp_path, config, llama):
    """Calls a function of this file in two processes."""

    def call(function, *more, **changes):
        logs = tmp_path / f"logs-{function.__name__}"
        logs.mkdir()
        settings = json.dumps(asdict(replace(config, **changes)))
        called = f"tests.data.test_shared_blocks:{function.__name__}"
        ended = fork_server.run_world(2, [settings, str(llama), *more], logs, tmp_path / "cache", call=called)
        assert ended == [0, 0], "".join((logs / f"rank-{rank}").read_text() for rank in range(2))

    return call


def opened(settings, llama):
    torch.set_num_threads(1)
    config = from_dict(DataConfig, json.loads(settings))
    lm = LanguageModel.load(LanguageModelConfig(name=llama, site="resid_post.0", batch_contexts=4), CPU)
    return lm, tokenize(config, lm.tokenizer, lm.name).train, config


def compare_blocks(settings, llama):
    lm, tokens, config = opened(settings, llama)
    with open_mesh(1, "cpu") as mesh:
        passes, activations = [], lm.activations
        lm.activations = lambda some: passes.append(some) or activations(some)
        shared = LiveBlocks(lm, tokens, config, mesh.apart())
        blocks = [shared[i] for i in range(len(shared))]
        n_mine = len(passes)
        alone = LiveBlocks(lm, tokens, config)
        for i, block in enumerate(blocks):
            assert torch.equal(block.x, alone[i].x)
            assert torch.equal(block.positions, alone[i].positions)
        assert shared.counts == alone.counts
        assert n_mine < 0.7 * (len(passes) - n_mine)
        cache = CachedBlocks.build(shared, Path(os.environ["XDG_CACHE_HOME"]) / "built")
        assert all(torch.equal(cache[i].x, block.x) for i, block in enumerate(blocks))


def test_blocks_computed_together_are_those_of_one_process(together):
    together(compare_blocks, max_norm_ratio=1.2)


def compare_batches(settings, llama, n_shards):
    lm, tokens, config = opened(settings, llama)
    with open_mesh(n_shards, "cpu") as mesh:
        plain = ShuffledBatches(LiveBlocks(lm, tokens, config), 256, 0)
        beside = ShuffledBatches(LiveBlocks(lm, tokens, config, mesh.apart()), 256, 0, mesh)
        ahead = BatchesAhead(LiveBlocks(lm, tokens, config, mesh.apart()), 256, 0, CPU, mesh.apart())
        assert torch.equal(ahead.sample(100), plain.sample(100))
        for i in range(15):
            time.sleep(0.02 * mesh.rank * (i % 3))  # processes do not keep step
            whole = next(plain)
            mine = whole[part_of_batch(256, mesh)]
            assert len(mine) == 256 // mesh.n_replicas
            for batches in (ahead, beside):
                assert torch.equal(next(batches), mine)
                assert batches.state() == plain.state()
        ahead.close()


@pytest.mark.parametrize("n_shards", [1, 2])
def test_batches_of_all_replicas_are_those_of_one_process(together, n_shards):
    together(compare_batches, n_shards)


def close_at_different_progress(settings, llama):
    lm, tokens, config = opened(settings, llama)
    with open_mesh(1, "cpu") as mesh:
        for n_batches in range(4):
            ahead = BatchesAhead(LiveBlocks(lm, tokens, config, mesh.apart()), 256, 0, CPU, mesh.apart())
            for _ in range(n_batches):
                next(ahead)
            if mesh.rank == 1 and n_batches > 1:  # this process's thread begins the block after the next one already
                ahead._begin(*ahead._following(*ahead._following(ahead._epoch, ahead._place)))
            ahead.close()


def test_closing_waits_for_no_block_that_another_process_has_not_begun(together):
    started = time.monotonic()
    together(close_at_different_progress)
    assert time.monotonic() - started < 30


def fail_in_one(settings, llama):
    lm, tokens, config = opened(settings, llama)
    with open_mesh(1, "cpu") as mesh:
        if mesh.rank == 1:
            lm.activations = lambda some: torch.full((*some.shape, lm.d_model), float("nan"))
        blocks = LiveBlocks(lm, tokens, config, mesh.apart())
        with pytest.raises(TopkapiError, match="not finite"):
            blocks[0]
        if mesh.rank == 1:
            lm.activations = None
        with pytest.raises(TypeError, match="not callable"):
            blocks[0]


def test_a_failure_of_one_process_is_raised_by_all(together):
    together(fail_in_one)


def test_batches_that_replicas_cannot_share_are_refused():
    assert part_of_batch(12, Mesh(3, 2, rank=5)) == slice(8, 12)
    with pytest.raises(TopkapiError, match="--batch-tokens 100 cannot be divided among 3 replicas: take 99, or fewer"):
        part_of_batch(100, Mesh(3, 2))
    with pytest.raises(TopkapiError, match="take 8, or fewer"):
        part_of_batch(5, Mesh(8, 1))


def one_pass_for_two(settings, llama):
    lm, tokens, config = opened(settings, llama)
    lm.batch_contexts = 1000
    with open_mesh(1, "cpu") as mesh:
        assert torch.equal(LiveBlocks(lm, tokens, config, mesh)[0].x, LiveBlocks(lm, tokens, config)[0].x)


def test_a_process_for_which_no_forward_pass_is_left(together):
    together(one_pass_for_two)


def test_more_processes_than_forward_passes():
    kept = torch.ones(10, 16, dtype=torch.bool)
    kept[0, 0] = False
    shares = _shares(kept, 4, 5)
    assert [contexts for contexts, _ in shares] == [
        slice(0, 4),
        slice(4, 8),
        slice(8, 10),
        slice(10, 10),
        slice(10, 10),
    ]
    assert [rows.stop - rows.start for _, rows in shares] == [63, 64, 32, 0, 0]
