"""8-bit moments and bf16 weights: what is stored has the right expectation, and no square is lost.

Seen to catch: the random number compared with the share that is rounded down; squares allowed to become 0; one random
number used for both of an element; one number for all four columns of a hash.
"""

import torch

from topkapi.ops import low_memory

ROWS, D_MODEL = 6, 200


def moments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries over eight orders of magnitude, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(ROWS, D_MODEL, generator=generator) * 10 ** (-4 * torch.rand(ROWS, D_MODEL, generator=generator))
    return mean, (mean * torch.randn(ROWS, D_MODEL, generator=generator)) ** 2


def bits(key: int) -> tuple[torch.Tensor, torch.Tensor]:
    return low_memory.random_bits(0, ROWS, D_MODEL, key, torch.device("cpu"))


def test_rounding_keeps_the_expectation() -> None:
    mean, square = moments()
    weight = mean * 0.01
    n = 8000
    sums = [torch.zeros(ROWS, D_MODEL, dtype=torch.float64) for _ in range(6)]
    for key in range(n):
        first, second = bits(low_memory.key_of(3, key))
        found = (
            low_memory.decode_mean(*low_memory.encode_mean(mean, first)),
            low_memory.decode_square(*low_memory.encode_square(square, second)),
            low_memory.round_weight(weight, first).float(),
        )
        for i, value in enumerate(found):
            sums[2 * i] += value.double()
            sums[2 * i + 1] += value.double() ** 2
    lowest = square / square.amax(1, keepdim=True) < 255.0**-4  # rounded up to 1: larger, as said
    for i, wanted in enumerate((mean, square, weight)):
        average = sums[2 * i] / n
        noise = ((sums[2 * i + 1] / n - average**2).clamp_min(0) / n).sqrt()
        error = (average - wanted.double()).abs() / (noise + 1e-4 * wanted.double().abs())
        assert error[~lowest].max() < 5.5  # of 1 200 normal numbers the largest is about 3.5
        assert noise.max() > 0


def test_codes_stay_while_a_row_has_no_gradient() -> None:
    """Its scales decay and its codes are exact: random numbers change them as rarely as float32 rounds."""
    mean, square = moments()
    mean_codes, mean_scale = low_memory.encode_mean(mean, bits(0)[0])
    square_codes, square_scale = low_memory.encode_square(square, bits(0)[1])
    for key in range(1, 50):
        first, second = bits(low_memory.key_of(0, key))
        again, mean_scale = low_memory.encode_mean(0.9 * low_memory.decode_mean(mean_codes, mean_scale), first)
        assert (again != mean_codes).float().mean() < 1e-3
        decoded = 0.999 * low_memory.decode_square(square_codes, square_scale)
        again, square_scale = low_memory.encode_square(decoded, second)
        assert (again != square_codes).float().mean() < 1e-3


def test_no_square_above_zero_becomes_zero() -> None:
    square = torch.cat([torch.full((1, 40), 1e-12), torch.zeros(1, 40)])
    square[:, 0] = 1.0
    codes, scale = low_memory.encode_square(square, bits(1)[1][:2, :40])
    assert (codes[0] >= 1).all()
    assert (codes[1, 1:] == 0).all()
    assert (low_memory.decode_square(codes, scale)[0] > 0).all()


def test_zeros_stay_zeros() -> None:
    zeros, (first, second) = torch.zeros(ROWS, D_MODEL), bits(7)
    for codes, scale in (low_memory.encode_mean(zeros, first), low_memory.encode_square(zeros, second)):
        assert not codes.any()
        assert not scale.any()
    assert not low_memory.round_weight(zeros, first).any()


def test_random_numbers_are_uniform_and_differ_by_row_column_and_key() -> None:
    seen = torch.stack([part for key in range(40) for part in bits(low_memory.key_of(0, key))])  # (80, rows, columns)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(((seen >> shift) & 255).flatten(), minlength=256).double()
        expected = seen.numel() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi squared
    assert len(seen.unique()) > 0.9999 * seen.numel()
    halves = torch.stack([seen[0::2].flatten() & 0xFFFF, seen[0::2].flatten() >> 16, seen[1::2].flatten() >> 8])
    assert (torch.corrcoef(halves.double()) - torch.eye(3)).abs().max() < 0.03


def test_numbers_of_the_four_columns_of_a_hash_are_not_correlated() -> None:
    first, second = (
        torch.cat(parts) for parts in zip(*(bits(low_memory.key_of(1, k)) for k in range(40)), strict=True)
    )
    columns = [part[:, i::4].flatten() for i in range(4) for part in (first >> 16, first & 0xFFFF, second >> 8)]
    off = torch.corrcoef(torch.stack(columns).double()) - torch.eye(12)
    assert off.abs().max() < 0.05  # 12 000 numbers each: 5.5 times the noise
