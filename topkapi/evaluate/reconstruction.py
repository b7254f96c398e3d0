"""How well and how sparsely an autoencoder reconstructs activations, in one pass.

Per chunk of rows: normalise as in training, encode, decode, then add to float64 sums. The variance
about the mean is merged chunk by chunk (Chan, Golub and LeVeque 1979), because sum |x|^2 - n
|mean|^2 cancels when the tokens lie close together.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from topkapi.model import Autoencoder

CHUNK_ELEMENTS = 2**25  # rows x n_latents encoded at once: 128 MiB of float32 pre-activations


class ReconstructionMetrics:
    """Sums over the tokens seen so far, from which the reconstruction metrics follow.

    Give it batches of raw activations with `update`; the results do not depend on how tokens are
    cut into batches. Memory: 2 (n_latents + d_model) numbers of 8 bytes, and one chunk of encoder output.
    """

    def __init__(self, ae: Autoencoder) -> None:
        device = ae.W_dec.device
        self.ae = ae
        self.n_tokens = 0
        self.squared_error = torch.zeros((), dtype=torch.float64, device=device)
        self.squared_deviation = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(ae.d_model, dtype=torch.float64, device=device)
        self.raw_sum = torch.zeros(ae.d_model, dtype=torch.float64, device=device)
        self.n_active = torch.zeros((), dtype=torch.int64, device=device)
        self.n_fired = torch.zeros(ae.n_latents, dtype=torch.int64, device=device)
        self.sum_squares = torch.zeros(ae.n_latents, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, raw: Float[Tensor, "n d_model"]) -> None:
        """Count n more tokens, given their raw activations, in chunks of bounded memory."""
        self.raw_sum += raw.to(self.raw_sum.device).sum(0, dtype=torch.float64)  # the same bits for any autoencoder
        for chunk in raw.split(max(1, CHUNK_ELEMENTS // self.ae.n_latents)):
            if len(chunk):
                self._add(chunk.to(self.raw_sum.device, torch.float32))

    def _add(self, raw: Float[Tensor, "n d_model"]) -> None:
        x, _, _ = self.ae.normalise(raw)
        values, indices = self.ae.encode(x)
        recon = self.ae.decode(values, indices).double()
        active = values > 0
        self.n_fired += torch.bincount(indices[active], minlength=self.ae.n_latents)
        self.sum_squares.index_add_(0, indices[active], values[active].double().square())
        self.n_active += active.sum()
        x = x.double()
        self.squared_error += (x - recon).square().sum()
        self._add_deviation(x)
        self.n_tokens += len(x)

    def _add_deviation(self, x: Float[Tensor, "n d_model"]) -> None:
        """Merge n tokens into the sum of squared distances from the mean of all tokens.

        S_ab = S_a + S_b + |mean_b - mean_a|^2 n_a n_b / (n_a + n_b)
        mean_ab = mean_a + (mean_b - mean_a) n_b / (n_a + n_b)
        """
        n_before, n, total = self.n_tokens, len(x), self.n_tokens + len(x)
        mean = x.mean(0)
        shift = mean - self.mean
        self.squared_deviation += (x - mean).square().sum()
        self.squared_deviation += shift.square().sum() * (n_before * n / total)
        self.mean += shift * (n / total)

    @property
    def mean_activation(self) -> Float[Tensor, " d_model"]:
        """Mean raw activation of the tokens seen, float64; NaN without tokens."""
        return self.raw_sum / self.n_tokens

    def compute(self) -> dict[str, float | int]:
        """normalized_mse, l0, dead_fraction and n_tokens as `topkapi.evaluate` defines them.

        NaN where undefined: all three without tokens, normalized_mse also when every token is the
        same.
        """
        n, variance = self.n_tokens, self.squared_deviation.item()
        return {
            "normalized_mse": self.squared_error.item() / variance if variance > 0 else math.nan,
            "l0": self.n_active.item() / n if n else math.nan,
            "dead_fraction": (self.n_fired == 0).double().mean().item() if n else math.nan,
            "n_tokens": n,
        }
