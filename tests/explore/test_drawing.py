"""The random numbers that tokens are drawn with, and the tokens.

Mutations seen caught: shifts of signed numbers; the half left out; 12 bits in place of 52; keys of neighbouring samples
that are neighbouring numbers; generators that run into each other; the stream, or the temperature, left out; a part of
the global generator; noise e in place of log e.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from topkapi.explore.drawing import GOLDEN, draw, exponential, sample_keys, splitmix

CPU = torch.device("cpu")
UNLIKELY = 1e-4  # the seeds are fixed: what passes once passes always


def keys_of_positions(seed=0, stream=0, samples=60, positions=60):
    return splitmix(sample_keys(seed, stream, samples, CPU)[:, None], torch.arange(positions))


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_the_generator_is_splitmix64(seed, published):
    assert [number % 2**64 for number in splitmix(torch.tensor(seed), torch.arange(4)).tolist()] == published


def test_numbers_are_exponential_over_samples_positions_and_tokens():
    e = exponential(keys_of_positions().flatten(), 60).view(60, 60, 60).numpy()
    assert stats.kstest(e.ravel(), "expon").pvalue > UNLIKELY
    for axis in range(3):
        lines = np.moveaxis(e, axis, 0)[:4, 0].tolist() + np.moveaxis(e, axis, 2)[0, :4].tolist()
        assert min(stats.kstest(line, "expon").pvalue for line in lines) > UNLIKELY
    assert 0 < e.min() < 1e-4
    assert 9 < e.max() < 37
    of_no_bits = torch.tensor([-GOLDEN])  # the state whose first number is 0
    assert exponential(of_no_bits, 1).item() == pytest.approx(53 * np.log(2))


def test_neighbours_are_independent():
    u = np.exp(-exponential(keys_of_positions().flatten(), 60).view(60, 60, 60).numpy())
    assert len(np.unique(u)) == u.size, "no generator runs into another"
    error = 60**-1.5  # of a correlation of independent numbers
    for axis in range(3):
        for gap in (1, 2, 8, 32):
            a, b = np.take(u, range(60 - gap), axis), np.take(u, range(gap, 60), axis)
            for one, other in ((a, b), (a, b > 0.5), ((a - 0.5) ** 2, (b - 0.5) ** 2)):
                assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 * error
    for other in (keys_of_positions(seed=1), keys_of_positions(stream=1), keys_of_positions(seed=1, stream=2)):
        v = np.exp(-exponential(other.flatten(), 60).view(60, 60, 60).numpy())
        assert abs(np.corrcoef(u.ravel(), v.ravel())[0, 1]) < 5 * error
        assert not np.intersect1d(u, v).size


def test_numbers_are_of_their_place_alone():
    keys = sample_keys(5, 1, 7, CPU)
    assert torch.equal(sample_keys(5, 1, 3, CPU), keys[:3])
    torch.manual_seed(0)
    whole = exponential(keys, 50)
    torch.manual_seed(1)
    assert torch.equal(exponential(keys[2:4], 20), whole[2:4, :20])
    places = {(seed, stream): sample_keys(seed, stream, 7, CPU).tolist() for seed in range(7) for stream in range(7)}
    assert len({key for keys in places.values() for key in keys}) == 7**3
    assert sample_keys(2**63 - 1, 0, 1, CPU).dtype == torch.int64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_drawn_from_the_softmax(temperature, dtype):
    n, keys = 40_000, keys_of_positions(samples=400, positions=100).flatten()
    logits = torch.tensor([1.0, -torch.inf, 0.0, -1.0, 2.0, 0.0, 0.5, -2.0], dtype=dtype)
    drawn = np.bincount(draw(logits.expand(n, -1), keys, temperature).numpy(), minlength=8)
    wanted = n * (logits.double() / temperature).softmax(0).numpy()
    assert drawn[1] == 0
    assert stats.chisquare(np.delete(drawn, 1), np.delete(wanted, 1)).pvalue > UNLIKELY


def test_many_equal_tokens_are_drawn_equally():
    drawn = draw(torch.zeros(40_000, 500), keys_of_positions(samples=400, positions=100).flatten(), 1.0)
    assert stats.chisquare(np.bincount(drawn.numpy(), minlength=500)).pvalue > UNLIKELY
