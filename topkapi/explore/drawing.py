"""Tokens drawn at random, on the device that has the logits, from random numbers that are counted, not remembered.

A random number is a function of its place alone: seed, stream, sample, position and token. So a sample is the same in
any batch, whatever was drawn before it, on every device but for the last bits of logarithms; and the host, which has
nothing to do with them, need not wait for the device.

`splitmix` takes one step in a tree: a number of 64 bits is the state of a generator, and each number that the generator
puts out is the state of another. From the root 0 down: seed, stream, sample (`sample_keys`), position, token.
"""

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # int64 has the bits of unsigned numbers, and its products are modulo 2^64
MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def splitmix(state: Int64[Tensor, "*a"], i: Int64[Tensor, "*b"]) -> Int64[Tensor, "*c"]:
    """Output i, from 0, of the generator SplitMix64 that starts from `state`: 64 uniform bits. Shapes are broadcast.

        x = state + (i + 1) GOLDEN,  x = (x ^ x >> 30) M1,  x = (x ^ x >> 27) M2,  x ^ x >> 31      modulo 2^64

    Source: Steele, Lea and Flood 2014; multipliers of Vigna's splitmix64.c, variant 13 of Stafford's.
    """
    x = state + (i + 1) * GOLDEN
    for shift, multiplier in MULTIPLIERS:
        x.bitwise_xor_(_shifted(x, shift)).mul_(multiplier)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Int64[Tensor, "*a"], by: int) -> Int64[Tensor, "*a"]:
    """x >> by of unsigned numbers."""
    return (x >> by).bitwise_and_((1 << 64 - by) - 1)


def sample_keys(seed: int, stream: int, n: int, device: torch.device) -> Int64[Tensor, " n"]:
    """A key of its own for each of n samples; sample i has the same one for any n."""
    root, *path = (torch.tensor(number) for number in (0, seed, stream))
    for number in path:
        root = splitmix(root, number)
    return splitmix(root, torch.arange(n)).to(device)


def exponential(keys: Int64[Tensor, " n"], m: int) -> Float64[Tensor, "n m"]:
    """m numbers of the standard exponential distribution for each key, between 1e-16 and 37.

    -log u for u = (52 bits + 1/2) / 2^52, which is neither 0 nor 1.
    """
    bits = _shifted(splitmix(keys[:, None], torch.arange(m, device=keys.device)), 12)
    return bits.double().add_(0.5).mul_(2.0**-52).log_().neg_()


def draw(logits: Float[Tensor, "n vocab"], keys: Int64[Tensor, " n"], temperature: float) -> Int[Tensor, " n"]:
    """A token of each row, drawn from softmax(logits / temperature) with the random numbers of the row's key.

    argmax(logits / temperature - log e) for e of the standard exponential distribution: the same numbers always go to
    the same tokens, so rows of equal logits and equal keys give equal tokens, and those of nearly equal ones mostly.
    In float64, some 25 passes over it.
    """
    noise = exponential(keys, logits.shape[1]).log_()
    return (logits.double() / temperature).sub_(noise).argmax(1)
