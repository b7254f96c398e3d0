"""Seen to fail when: positions ignore the dropped tokens; the order of contexts ignores the seed; the cache, read
or half built, trusts a block without its checksum; identity leaves out the seed; only an all-NaN block is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from topkapi.config import DataConfig
from topkapi.data.activations import CachedBlocks, HarvestCounts, LiveBlocks, harvest, kept_positions
from topkapi.errors import TopkapiError


@pytest.fixture
def live(lm, splits, config):
    return LiveBlocks(lm, splits.train, config)


def test_kept_positions_follow_the_config():
    tokens = torch.tensor([[0, 5, 0, 7], [3, 4, 5, 6]])
    config = DataConfig(context=4)
    assert kept_positions(tokens, config, {0, 7}).tolist() == [[False, True, False, False], [False, True, True, True]]
    config = replace(config, drop_first_position=False)
    assert kept_positions(tokens, config, {0, 7}).tolist() == [[False, True, False, False], [True] * 4]
    config = replace(config, drop_special_tokens=False)
    assert kept_positions(tokens, config, {0, 7}).all()


def test_a_block_is_the_models_activations_at_its_positions(live, lm, splits, config):
    block = live[0]
    tokens = splits.train.context_tokens(live.groups[0], config.context)
    flat = {
        int(start) * config.context + j: row
        for start, rows in zip(live.groups[0], lm.activations(tokens), strict=True)
        for j, row in enumerate(rows)
    }
    assert block.x.dtype == torch.bfloat16
    expected = torch.stack([flat[position] for position in block.positions.tolist()])
    torch.testing.assert_close(block.x, expected.bfloat16())
    left_out = set(flat) - set(block.positions.tolist())
    for position in left_out:
        assert position % config.context == 0 or int(splits.train.tokens[position]) in lm.special_ids


def test_blocks_hold_every_context_once(live, splits, config):
    assert len(live) == -(-splits.train.n_contexts(16) // 32) > 3
    assert sorted(np.concatenate(live.groups)) == list(range(splits.train.n_contexts(16)))
    assert [len(group) for group in live.groups[:-1]] == [32] * (len(live) - 1)


def test_counts_add_up_to_the_tokens(live, splits, config):
    for _ in range(2):  # a block read again is not counted again
        list(live)
    counts = live.counts
    total = counts.kept + counts.first_position + counts.special_tokens + counts.outlier_norms
    assert total == splits.train.n_contexts(16) * 16
    assert counts.first_position == splits.train.n_contexts(16)
    assert counts.special_tokens > 0
    assert HarvestCounts(1, 2, 3, 4) + HarvestCounts(kept=1) == HarvestCounts(2, 2, 3, 4)


def test_a_block_is_the_same_bits_whenever_it_is_computed(live, lm, splits, config):
    first = live[2]
    again = LiveBlocks(lm, splits.train, config)[2]
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.positions, again.positions)
    other = LiveBlocks(lm, splits.train, replace(config, seed=1))
    assert not torch.equal(other[2].positions, first.positions)


def test_how_many_rows_a_block_has_is_known_before(live, lm, splits, config, tmp_path):
    rows = [len(live[i].x) for i in range(len(live))]
    assert [live.most_rows(i) for i in range(len(live))] == rows
    cached = CachedBlocks.build(live, tmp_path / "cache")
    assert [cached.most_rows(i) for i in range(len(cached))] == rows
    fewer = LiveBlocks(lm, splits.train, replace(config, max_norm_ratio=1.0001))
    assert fewer.most_rows(0) == rows[0] > len(fewer[0].x)


def test_outlier_norms_are_left_out(lm, splits, config):
    ids = np.arange(20)
    everything, _ = harvest(lm, splits.train, ids, config)
    norms = everything.x.float().norm(dim=1)
    ratio = float((norms.max() / norms.median()).sqrt())
    block, counts = harvest(lm, splits.train, ids, replace(config, max_norm_ratio=ratio))
    kept = norms <= ratio * norms.median()
    assert 0 < counts.outlier_norms == int((~kept).sum())
    assert counts.kept == len(block.x)
    assert torch.equal(block.x, everything.x[kept])
    assert torch.equal(block.positions, everything.positions[kept])


def test_progress_is_heard_by_forward_pass(lm, splits, config):
    heard = []
    harvest(lm, splits.train, np.arange(6), config, heard.append)
    assert heard == [64, 32]  # batch_contexts is 4


def test_an_activation_that_is_not_finite_names_its_context(lm, splits, config, monkeypatch):
    def broken(tokens):
        x = torch.ones(*tokens.shape, 64)
        x[1, 3, 5] = float("nan")
        return x

    monkeypatch.setattr(lm, "activations", broken)
    with pytest.raises(TopkapiError, match=r"not finite at resid_post\.0, context 7, position 3"):
        harvest(lm, splits.train, np.array([5, 7]), config)


def test_cached_blocks_are_the_live_ones_bit_for_bit(live, tmp_path):
    built = CachedBlocks.build(live, tmp_path / "blocks")
    opened = CachedBlocks.open(tmp_path / "blocks", live.identity)
    assert len(built) == len(opened) == len(live)
    for i in range(len(live)):
        assert torch.equal(opened[i].x, live[i].x)
        assert torch.equal(opened[i].positions, live[i].positions)
    assert opened.counts == live.counts
    assert (opened.identity, opened.d_model) == (live.identity, 64)
    with pytest.raises(IndexError):
        opened[len(live)]


def harvested(live, monkeypatch) -> list[int]:
    """The numbers of the blocks that `live` computes from now on."""
    numbers: list[int] = []
    original = LiveBlocks.harvest
    monkeypatch.setattr(LiveBlocks, "harvest", lambda self, i, *a: (numbers.append(i), original(self, i, *a))[1])
    return numbers


def test_a_half_built_cache_is_finished(live, tmp_path, monkeypatch):
    original = LiveBlocks.harvest

    def stops(self, i, *rest):
        if i == 2:
            raise KeyboardInterrupt
        return original(self, i, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(LiveBlocks, "harvest", stops)
        with pytest.raises(KeyboardInterrupt):
            CachedBlocks.build(live, tmp_path)
    with pytest.raises(TopkapiError, match=f"half built: 2 of {len(live)} blocks"):
        CachedBlocks.open(tmp_path, live.identity)
    numbers = harvested(live, monkeypatch)
    CachedBlocks.build(live, tmp_path)
    assert numbers == list(range(2, len(live)))


def test_only_damaged_blocks_are_built_again(live, tmp_path, monkeypatch):
    cached = CachedBlocks.build(live, tmp_path)
    good = cached[1].x
    path = tmp_path / "block-000001.safetensors"
    for damaged in (path.read_bytes()[:-1], bytes(len(path.read_bytes()))):
        path.write_bytes(damaged)
        with pytest.raises(TopkapiError, match="Block 1 of the activation cache is damaged"):
            cached[1]
    path.unlink()
    with pytest.raises(TopkapiError, match="Block 1 of the activation cache is missing"):
        cached[1]
    numbers = harvested(live, monkeypatch)
    assert torch.equal(CachedBlocks.build(live, tmp_path)[1].x, good)
    path.write_bytes(damaged)
    assert torch.equal(CachedBlocks.build(live, tmp_path)[1].x, good)
    assert numbers == [1, 1]
    assert not list(tmp_path.glob(".*")), "no temporary files"


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"context": 8}, {"shuffle_tokens": 600}, {"drop_special_tokens": False}, {"max_norm_ratio": 3.0}],
)
def test_a_cache_made_for_something_else_names_the_difference(live, lm, splits, config, tmp_path, change):
    CachedBlocks.build(live, tmp_path)
    other = LiveBlocks(lm, splits.train, replace(config, **change))
    (field,) = change
    for use in (lambda: CachedBlocks.open(tmp_path, other.identity), lambda: CachedBlocks.build(other, tmp_path)):
        with pytest.raises(TopkapiError, match=f"made with another {field} "):
            use()
    with pytest.raises(TopkapiError, match="made with another tokens "):
        CachedBlocks.open(tmp_path, LiveBlocks(lm, splits.held_out, config).identity)


def test_a_missing_or_damaged_manifest_is_told(live, tmp_path):
    with pytest.raises(TopkapiError, match="Activation cache: no file"):
        CachedBlocks.open(tmp_path, live.identity)
    CachedBlocks.build(live, tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TopkapiError, match="damaged"):
        CachedBlocks.open(tmp_path, live.identity)


def test_a_full_disk_is_an_os_error(live, tmp_path, monkeypatch):
    from pathlib import Path

    def write_bytes(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        CachedBlocks.build(live, tmp_path)


def test_a_corpus_smaller_than_a_context_is_told(lm, numbers):
    with pytest.raises(TopkapiError, match="100 tokens, fewer than one context of 101"):
        LiveBlocks(lm, numbers, DataConfig(context=101))
