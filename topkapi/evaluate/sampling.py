"""What the measures of this folder share: chunks of bounded memory, and estimates with a bootstrap interval.

A measure is a function of sums over tokens (or labelled examples). `ResampledSums` takes each sum 1 + 200 times: once
with all weights 1, which gives the value, and 200 times with weights drawn from Poisson(1), which stands for drawing
the tokens anew and needs one pass and no memory of them. The interval is the middle 95 % of the 200.

Source: Hanley and MacGibbon 2006 (the Poisson bootstrap); Efron 1979.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.evaluate.reconstruction import CHUNK_ELEMENTS
from topkapi.model import Autoencoder

REPLICATES = 200
ROWS = 8_192  # weights drawn at once: 13 MB


class Estimate(NamedTuple):
    """A value, and its 95 % bootstrap interval. Draws are taken as independent: tokens of one text are not quite."""

    value: float
    low: float
    high: float


def estimate(replicates: Float64[Tensor, " replicates"]) -> Estimate | None:
    """The first number with the middle 95 % of the others; None where the first is not finite."""
    value, others = replicates[0].item(), replicates[1:]
    if not math.isfinite(value):
        return None
    low, high = others[others.isfinite()].quantile(others.new_tensor([0.025, 0.975])).tolist()
    return Estimate(value, low, high)


def chunks(ae: Autoencoder, x: Tensor | Iterable[Tensor], elements: int = 0) -> Iterator[Float[Tensor, "n d_model"]]:
    """Rows of normalised activations, a tensor or blocks of them, on the autoencoder's device in its dtype.

    So few at a time that one float a row and latent stays below `elements` (default CHUNK_ELEMENTS) floats.

    Raises:
        TopkapiError: a block is not (n, d_model).
    """
    rows = max(1, (elements or CHUNK_ELEMENTS) // ae.n_latents)
    for block in [x] if isinstance(x, Tensor) else x:
        if block.ndim != 2 or block.shape[1] != ae.d_model:
            raise TopkapiError(
                f"x must be (n, d_model={ae.d_model}) or blocks of that; got {tuple(block.shape)}. "
                "Flatten batch and context first: x.flatten(0, 1)."
            )
        for part in block.split(rows):
            if len(part):
                yield part.to(ae.W_dec)


class ResampledSums:
    """Sums of columns over rows, 1 + REPLICATES times: with weights 1, and with Poisson(1) weights from `seed`."""

    def __init__(self, n_columns: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sums = torch.zeros(1 + REPLICATES, n_columns, dtype=torch.float64, device=device)

    def add(self, columns: Float64[Tensor, "n columns"]) -> None:
        """Count n more rows."""
        for part in columns.split(ROWS):
            weights = part.new_ones(len(part), 1 + REPLICATES)
            weights[:, 1:] = torch.poisson(weights[:, 1:], generator=self.generator)
            self.sums += weights.T @ part


class TokenSums:
    """Resampled sums of the tokens' spread about their mean and of named further columns.

        spread = sum |x - mean|^2 = sum |x - o|^2 - |sum (x - o)|^2 / n

    with o the mean of the first chunk: without it the difference cancels when the tokens lie close together.
    """

    def __init__(self, ae: Autoencoder, n_columns: int, seed: int = 0) -> None:
        self.n_tokens, self.d_model = 0, ae.d_model
        self.origin: Tensor | None = None
        self.resampled = ResampledSums(2 + ae.d_model + n_columns, ae.W_dec.device, seed)

    def add(self, x: Float[Tensor, "n d_model"], columns: Float64[Tensor, "n columns"]) -> None:
        """Count n more tokens with their columns."""
        x = x.double()
        if self.origin is None:
            self.origin = x.mean(0)
        shifted = x - self.origin
        squares = shifted.square().sum(1, keepdim=True)
        self.resampled.add(torch.cat([torch.ones_like(squares), squares, shifted, columns], 1))
        self.n_tokens += len(x)

    @property
    def spread(self) -> Float64[Tensor, " replicates"]:
        """sum |x - mean|^2, the denominator of normalized MSE; NaN where all tokens are the same."""
        sums = self.resampled.sums
        spread = sums[:, 1] - sums[:, 2 : 2 + self.d_model].square().sum(1) / sums[:, 0]
        return torch.where(spread > 1e-15 * sums[:, 0], spread, math.nan)

    @property
    def columns(self) -> Float64[Tensor, "replicates columns"]:
        """Sums of the further columns."""
        return self.resampled.sums[:, 2 + self.d_model :]

    @property
    def count(self) -> Float64[Tensor, " replicates"]:
        """Tokens, 0 where none was drawn."""
        return self.resampled.sums[:, 0]
