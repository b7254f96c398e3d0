"""What a training step hands to the optimiser: gradients, of which nothing of the weights' size need exist.

Called by `topkapi.step`, which makes them, and `topkapi.optim`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi.ops import SparseRows
from topkapi.parallel import ALONE, Mesh

PADDING = 64  # dead latents a multiple of this on a GPU: rows of 128 bytes in bf16, as fast products want them


@dataclass(frozen=True)
class DeadSubset:
    """The latents that AuxK trains in one step. Its length, equal on all shards, is known without asking the device."""

    latents: Int[Tensor, " m"]
    """Ascending, then n_latents as padding."""
    dead: Bool[Tensor, " m"]
    """False for padding, and for latents that have fired since the list was made: they take no part."""

    @classmethod
    def of(cls, dead: Bool[Tensor, " n_latents"], padding: int | None = None, mesh: Mesh = ALONE) -> "DeadSubset":
        """Exactly the latents of a mask, as many on each shard. Waits for the device to count them."""
        multiple = padding or (PADDING if dead.is_cuda else 1)
        count = int(mesh.max_(dead.sum(), "shards"))
        size = -(-count // multiple) * multiple
        latents = torch.nonzero_static(dead, size=size, fill_value=len(dead)).flatten()
        return cls(latents, latents < len(dead))

    def __len__(self) -> int:
        return len(self.latents)


@dataclass
class WeightGradient:
    """The gradient of W_enc or W_dec as a sum of parts, handed out a block of rows at a time."""

    n_latents: int
    sparse: SparseRows | None = None
    dense: Float[Tensor, "n_latents d_model"] | None = None
    subset_rows: Float[Tensor, "m d_model"] | None = None
    """Gradients of some latents (the dead ones), to be added."""
    position: Int[Tensor, " n_latents"] | None = None
    """A latent's row of `subset_rows`, -1 for none; int32."""

    def block(self, start: int, stop: int) -> Float[Tensor, "stop_minus_start d_model"]:
        """Rows start..stop, as a tensor that the caller may overwrite."""
        rows = self.dense[start:stop].clone() if self.sparse is None else self.sparse.block(start, stop)
        if self.subset_rows is not None:
            add_subset_(rows, self.subset_rows, self.position[start:stop])
        return rows

    def all(self) -> Float[Tensor, "n_latents d_model"]:
        """The whole gradient."""
        return self.block(0, self.n_latents)


@dataclass
class Gradients:
    """Gradients of a step's loss with respect to the four parameters, those of the latents that this process owns."""

    W_enc: WeightGradient
    W_dec: WeightGradient
    latent_bias: Float[Tensor, " n_latents"]
    pre_bias: Float[Tensor, " d_model"]


def add_subset_(
    rows: Float[Tensor, "n d_model"], subset_rows: Float[Tensor, "m d_model"], position: Int[Tensor, " n"]
) -> None:
    """Add to each row that of `subset_rows` at its position, where that is not -1. Waits for the device."""
    chosen = (position >= 0).nonzero().flatten()
    rows.index_add_(0, chosen, subset_rows[position[chosen]].to(rows.dtype))
