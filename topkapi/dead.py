"""Which latents are dead: silent for so many tokens."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class DeadCounter:
    """Tokens since each latent last fired (had a value > 0), counted in tokens whatever the batch size."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.silent_for: Int[Tensor, " n_latents"] = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def dead(self, dead_after: int) -> Bool[Tensor, " n_latents"]:
        """Latents silent for at least `dead_after` tokens."""
        return self.silent_for >= dead_after

    def count_(self, fired: Bool[Tensor, " n_latents"], n_tokens: int) -> None:
        """Add a batch of `n_tokens`, in which the latents `fired` fired."""
        self.silent_for += n_tokens
        self.silent_for[fired] = 0
