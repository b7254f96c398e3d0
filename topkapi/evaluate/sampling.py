"""What the measures of this folder share: chunks of bounded memory, and estimates with a bootstrap interval.

A measure is a function of sums over tokens (or labelled examples). `ResampledSums` takes each sum 1 + 200 times: once
with all weights 1, which gives the value, and 200 times with weights drawn from Poisson(1), which stands for drawing
the tokens anew and needs one pass and no memory of them. The interval is the middle 95 % of the 200.

Source: Hanley and MacGibbon 2006 (the Poisson bootstrap); Efron 1979.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.model import Autoencoder
from topkapi.statistics.intervals import Estimate, estimate

CHUNK_ELEMENTS = 2**25  # rows x n_latents encoded at once: 128 MiB of float32 pre-activations
REPLICATES = 200
ROWS = 8_192  # weights drawn at once: 13 MB


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
        self.n = 0
        """Rows so far."""

    def add(self, columns: Float64[Tensor, "n columns"]) -> None:
        """Count n more rows, which are independent of each other."""
        self.n += len(columns)
        for part in columns.split(ROWS):
            weights = part.new_ones(len(part), 1 + REPLICATES)
            weights[:, 1:] = torch.poisson(weights[:, 1:], generator=self.generator)
            self.sums += weights.T @ part

    def estimate(self, replicates: Float64[Tensor, " replicates"]) -> Estimate:
        """The estimate that a function of `sums` comes to; undefined where it is not finite."""
        return estimate(replicates.cpu().numpy(), self.n)


class TokenSums:
    """Resampled sums of the tokens' spread about their mean and of named further columns.

        spread = sum |x - mean|^2 = sum |x - o|^2 - |sum (x - o)|^2 / n

    with o the mean of the first chunk: without it the difference cancels when the tokens lie close together.

    Tokens of one context resemble each other. Where `contexts` says which context each token is of, here for all tokens
    in the order in which they come or when they are added, contexts are resampled, and otherwise tokens.
    """

    def __init__(
        self, ae: Autoencoder, n_columns: int, seed: int = 0, contexts: Int[Tensor, " tokens"] | None = None
    ) -> None:
        self.n_tokens, self.d_model, self.contexts = 0, ae.d_model, contexts
        self.origin: Tensor | None = None
        self._resampled = ResampledSums(2 + ae.d_model + n_columns, ae.W_dec.device, seed)
        self._open: tuple[int, Tensor] | None = None  # the last context so far, whose next tokens may be yet to come

    def add(
        self,
        x: Float[Tensor, "n d_model"],
        columns: Float64[Tensor, "n columns"],
        contexts: Int[Tensor, " n"] | None = None,
    ) -> None:
        """Count n more tokens with their columns."""
        x = x.double()
        if self.origin is None:
            self.origin = x.mean(0)
        shifted = x - self.origin
        squares = shifted.square().sum(1, keepdim=True)
        rows = torch.cat([torch.ones_like(squares), squares, shifted, columns], 1)
        if self.contexts is not None:
            contexts = self.contexts[self.n_tokens : self.n_tokens + len(x)]
        self.n_tokens += len(x)
        if contexts is not None and len(x):
            names, number = contexts.to(rows.device).unique_consecutive(return_inverse=True)
            rows = rows.new_zeros(len(names), rows.shape[1]).index_add_(0, number, rows)
            if self._open is not None and self._open[0] == int(names[0]):
                rows[0] += self._open[1]
                self._open = None
            self._close()
            rows, self._open = rows[:-1], (int(names[-1]), rows[-1])
        self._resampled.add(rows)

    def _close(self) -> None:
        """Count the last context."""
        if self._open is not None:
            self._resampled.add(self._open[1][None])
            self._open = None

    @property
    def resampled(self) -> ResampledSums:
        """Sums over all that was added, a row of which is a context, in however many chunks it came, or a token."""
        self._close()
        return self._resampled

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

    def estimate(self, replicates: Float64[Tensor, " replicates"]) -> Estimate:
        """As that of `ResampledSums`."""
        return self.resampled.estimate(replicates)
