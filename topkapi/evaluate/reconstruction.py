"""How well and how sparsely an autoencoder reconstructs activations, in one pass.

Per chunk of rows: normalise as in training, encode, decode, then add to float64 sums, resampled for intervals
(`topkapi.evaluate.sampling`).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.evaluate.sampling import CHUNK_ELEMENTS, TokenSums
from topkapi.model import Autoencoder
from topkapi.statistics.intervals import Estimate


class ReconstructionMetrics:
    """Sums over the tokens seen so far, from which the reconstruction metrics follow.

    Give it batches of raw activations with `update`; the results do not depend on how tokens are cut into batches.
    Memory: 2 n_latents + 200 d_model numbers of 8 bytes, and one chunk of encoder output.
    """

    def __init__(self, ae: Autoencoder) -> None:
        device = ae.W_dec.device
        self.ae = ae
        self.sums = TokenSums(ae, 2)  # squared error, active latents
        self.raw_sum = torch.zeros(ae.d_model, dtype=torch.float64, device=device)
        self.n_fired = torch.zeros(ae.n_latents, dtype=torch.int64, device=device)
        self.sum_squares = torch.zeros(ae.n_latents, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, raw: Float[Tensor, "n d_model"], contexts: Int[Tensor, " n"] | None = None) -> None:
        """Count n more tokens, given their raw activations, in chunks of bounded memory.

        `contexts` says which context each is of, for intervals that know that such tokens resemble each other.
        """
        self.raw_sum += raw.to(self.raw_sum.device).sum(0, dtype=torch.float64)  # the same bits for any autoencoder
        rows = max(1, CHUNK_ELEMENTS // self.ae.n_latents)
        groups = [None] * -(-len(raw) // rows) if contexts is None else contexts.split(rows)
        for chunk, of in zip(raw.split(rows), groups, strict=False):
            self._add(chunk.to(self.raw_sum.device, torch.float32), of)

    def _add(self, raw: Float[Tensor, "n d_model"], contexts: Int[Tensor, " n"] | None) -> None:
        x, _, _ = self.ae.normalise(raw)
        values, indices = self.ae.encode(x)
        recon = self.ae.decode(values, indices).double()
        active = values > 0
        self.n_fired += torch.bincount(indices[active], minlength=self.ae.n_latents)
        self.sum_squares.index_add_(0, indices[active], values[active].double().square())
        errors = (x.double() - recon).square().sum(1)
        self.sums.add(x, torch.stack([errors, active.sum(1).double()], 1), contexts)

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return self.sums.n_tokens

    @property
    def mean_activation(self) -> Float[Tensor, " d_model"]:
        """Mean raw activation of the tokens seen, float64; NaN without tokens."""
        return self.raw_sum / self.n_tokens

    def estimates(self) -> dict[str, Estimate]:
        """normalized_mse and l0 with their intervals; undefined as `compute` says."""
        error, active = self.sums.columns.T
        return {
            "normalized_mse": self.sums.estimate(error / self.sums.spread),
            "l0": self.sums.estimate(active / self.sums.count),
        }

    def compute(self) -> dict[str, float | int]:
        """normalized_mse, l0, dead_fraction and n_tokens as `topkapi.evaluate` defines them.

        NaN where undefined: all three without tokens, normalized_mse also when every token is the same.
        """
        values = {name: math.nan if it.value is None else it.value for name, it in self.estimates().items()}
        dead = (self.n_fired == 0).double().mean().item() if self.n_tokens else math.nan
        return values | {"dead_fraction": dead, "n_tokens": self.n_tokens}
