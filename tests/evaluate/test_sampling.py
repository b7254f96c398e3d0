"""Resampled sums against numpy, and the coverage of their intervals.

Mutations seen caught: weights of mean 2; intervals of half the width; no origin in the spread; a context that two
chunks share counted as two.
"""

import numpy as np
import pytest
import torch

from tests.evaluate.stand_ins import D_MODEL, random_autoencoder
from topkapi.evaluate.sampling import ResampledSums, TokenSums, chunks


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of(rows: torch.Tensor, seed: int = 0):
    sums = ResampledSums(2, seed=seed)
    sums.add(torch.stack([torch.ones_like(rows), rows], 1))
    return sums.estimate(sums.sums[:, 1] / sums.sums[:, 0])


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    found = mean_of(draw(10_000))
    error = 1 / np.sqrt(10_000)
    assert found.value == pytest.approx(draw(10_000).mean().item(), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_intervals_of_95_percent_cover_the_truth_about_that_often():
    truths = [found.low <= 0 <= found.high for i in range(300) if (found := mean_of(draw(60, seed=i), seed=i))]
    assert 0.9 <= np.mean(truths) <= 0.985


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    assert mean_of(draw(50), 3) == mean_of(draw(50), 3) != mean_of(draw(50), 4)


def test_the_spread_of_tokens_that_lie_close_together():
    """Spread 1e-7 about a mean of length 1: without an origin two digits are left."""
    x = torch.tensor([0.8, 0, 0.6, 0], dtype=torch.float64) + 1e-7 * draw(500, D_MODEL)
    sums = TokenSums(random_autoencoder(), 1)
    for part in x.split(99):
        sums.add(part, part[:, :1])
    assert sums.spread[0].item() == pytest.approx((x - x.mean(0)).square().sum().item(), rel=1e-6, abs=0)
    assert sums.columns[0, 0].item() == pytest.approx(x[:, 0].sum().item(), rel=1e-12)


def test_tokens_of_one_context_are_drawn_together():
    """Each context repeats one token 20 times: the interval is that of the 50 contexts, not of 1000 tokens."""
    ae, n = random_autoencoder(), 50
    x, z = draw(n, D_MODEL).repeat_interleave(20, 0), draw(n, seed=1)
    sums = TokenSums(ae, 1, contexts=torch.arange(n).repeat_interleave(20))
    tokens = TokenSums(ae, 1)
    for start in range(0, 20 * n, 100):
        part = slice(start, start + 100)
        for each in (sums, tokens):
            each.add(x[part], z.repeat_interleave(20)[part, None])
    found, narrow = (each.estimate(each.columns[:, 0] / each.count) for each in (sums, tokens))
    assert found.value == pytest.approx(z.mean().item(), abs=1e-12)
    assert (found.n, narrow.n) == (n, 20 * n)
    assert found.high - found.low == pytest.approx(2 * 1.96 * z.std().item() / np.sqrt(n), rel=0.25)
    assert (found.high - found.low) / (narrow.high - narrow.low) == pytest.approx(np.sqrt(20), rel=0.3)


@pytest.mark.parametrize("rows", [1, 7, 20, 33])
def test_a_context_in_several_chunks_is_one(rows: int):
    """Wide dictionaries are encoded a few tokens at a time: contexts must not fall apart into narrower ones."""
    contexts, x, z = torch.arange(50).repeat_interleave(20), draw(1000, D_MODEL), draw(1000, 1, seed=1)
    whole, parts = (TokenSums(random_autoencoder(), 1, contexts=contexts) for _ in range(2))
    whole.add(x, z)
    for part in torch.arange(1000).split(rows):
        parts.add(x[part], z[part])
    found, wanted = (each.estimate(each.columns[:, 0] / each.spread) for each in (parts, whole))
    assert found.n == wanted.n == 50
    assert found[:3] == pytest.approx(wanted[:3], rel=1e-9)


def test_chunks_hold_all_rows_once():
    ae, x = random_autoencoder(), draw(20, D_MODEL).float()
    parts = list(chunks(ae, iter([x[:13], x[13:13], x[13:]]), elements=5 * ae.n_latents))
    assert [len(part) for part in parts] == [5, 5, 3, 5, 2]
    assert torch.equal(torch.cat(parts), x)
