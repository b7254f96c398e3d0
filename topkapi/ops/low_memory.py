"""How the low-memory optimiser state is stored: 4 bytes a parameter, in plain PyTorch, the specification of the kernel.

    weight   bf16, rounded stochastically from the float32 result of the update
    mean     int8   q:  m = scale sign(q) (q / 127)^2     scale = the row's largest |m|
    square   uint8  q:  v = scale (q / 255)^4             scale = the row's largest v

The powers give small entries of a row finer steps: a moment is resolved down to 6e-5 of its row's largest, a squared
gradient down to 2e-10. All three are rounded up or down at random so that their expectation is exact: changes much
smaller than a step, such as the 0.1 % that the squares decay by, are kept on average. A square above 0 never becomes 0,
as the mean divided by its root would be without bound; it is rounded up to 1 instead, which only makes steps smaller.

Random numbers are a hash of (row, column, key), with a key for each weight and step: the same run gives the same bits,
in any order of execution and on any device. One hash serves four columns, whose numbers are it times powers of a
constant, and all three roundings of an element, as the kernel computes for longer than it loads: 16 bits for the
weight, 16 for the mean, and a product of them for the square. 8 bits would be too few for a square, whose decay by
0.1 % is less than a 256th of a step.

Source: block-wise 8-bit state, Dettmers et al. 2022 (arXiv 2110.02861); the mixing function is Chris Wellons'
"lowbias32" (https://nullprogram.com/blog/2018/07/31/).
"""

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

MEAN_LEVELS = 127
SQUARE_LEVELS = 255
COLUMN_STEP = 0x9E3779B9  # 2^32 over the golden ratio: neighbouring columns start far apart
NEIGHBOUR = 0x297A2D39  # odd: a column's number is its left neighbour's times this within the four that share a hash
SECOND = 0xC2B2AE3D  # odd: the second number of an element is its first times this, of which the high bits are used
_WORD = 0xFFFFFFFF


def mix(x: Tensor | int) -> Tensor | int:
    """A 32-bit hash of a 32-bit number; tensors are int64 and hold values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def key_of(seed: int, n_steps: int) -> int:
    """The key of one weight's update number `n_steps`, in [0, 2^32)."""
    return mix((mix(seed & _WORD) + n_steps) & _WORD)


def random_bits(
    start: int, stop: int, d_model: int, key: int, device: torch.device
) -> tuple[Int[Tensor, "rows d_model"], Int[Tensor, "rows d_model"]]:
    """Two 32-bit numbers for each element of rows start..stop, as int64.

    The two halves of the first and the high bits of the second are independent in pairs, also those of neighbouring
    columns. Rows are mixed in full, columns by `mix` without its last step, which only improves lowest bits.
    """
    rows, columns = mix(torch.arange(start, stop, device=device) ^ key), torch.arange(d_model, device=device)
    x = (rows[:, None] + (columns >> 2) * COLUMN_STEP) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    first = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    first = torch.where((columns & 1) == 0, first, (first * NEIGHBOUR) & _WORD)
    first = torch.where((columns & 2) == 0, first, (first * (NEIGHBOUR**2 & _WORD)) & _WORD)
    return first, (first * SECOND) & _WORD


def round_weight(weight: Float[Tensor, "rows d_model"], bits: Int[Tensor, "rows d_model"]) -> Tensor:
    """bf16, rounded away from 0 with the probability that keeps the expectation (high 16 of `bits`)."""
    words = weight.view(torch.int32) + (bits >> 16).to(torch.int32)
    return (words & -0x10000).view(torch.float32).to(torch.bfloat16)


def encode_mean(
    mean: Float[Tensor, "rows d_model"], bits: Int[Tensor, "rows d_model"]
) -> tuple[Int8[Tensor, "rows d_model"], Float[Tensor, " rows"]]:
    """int8 codes and the row scales (low 16 of `bits`)."""
    size = mean.abs()
    scale = size.amax(1)
    y = size / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    low = (y.sqrt() * MEAN_LEVELS).floor()
    chance = (y * MEAN_LEVELS**2 - low * low) / (2 * low + 1)
    codes = (low + (((bits & 0xFFFF) + 0.5) * 2.0**-16 < chance)).clamp_max(MEAN_LEVELS)
    return (codes * mean.sign()).to(torch.int8), scale


def decode_mean(codes: Int8[Tensor, "rows d_model"], scale: Float[Tensor, " rows"]) -> Float[Tensor, "rows d_model"]:
    """The inverse of `encode_mean`."""
    root = codes.float() / MEAN_LEVELS
    return root * root.abs() * scale[:, None]


def encode_square(
    square: Float[Tensor, "rows d_model"], bits: Int[Tensor, "rows d_model"]
) -> tuple[UInt8[Tensor, "rows d_model"], Float[Tensor, " rows"]]:
    """uint8 codes, at least 1 where `square` is above 0, and the row scales (high 24 of `bits`)."""
    scale = square.amax(1)
    y = square / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    low = (y.sqrt().sqrt() * SQUARE_LEVELS).floor()
    between = (low + 1) ** 4 - low**4
    chance = (y * SQUARE_LEVELS**4 - low**4) / between
    codes = (low + ((bits >> 8) * 2.0**-24 < chance)).clamp_max(SQUARE_LEVELS)
    return torch.where(square > 0, codes.clamp_min(1), 0).to(torch.uint8), scale


def decode_square(codes: UInt8[Tensor, "rows d_model"], scale: Float[Tensor, " rows"]) -> Float[Tensor, "rows d_model"]:
    """The inverse of `encode_square`."""
    root = codes.float() / SQUARE_LEVELS
    return root * root * (root * root) * scale[:, None]
