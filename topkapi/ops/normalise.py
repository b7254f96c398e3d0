"""Activations as the autoencoder sees them, in the dtype that a training step reads."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkapi.ops import reference
from topkapi.ops.dispatch import implementation


@torch.no_grad()
def normalise(raw: Float[Tensor, "n d_model"], dtype: torch.dtype) -> Float[Tensor, "n d_model"]:
    """Per row: subtract the mean over d_model, scale to unit norm; a constant row becomes 0.

        x = (raw - mean) / |raw - mean|

    Computed in float32 (float64 for float64) and rounded once, to `dtype`: `Autoencoder.normalise` for activations
    that are stored in 16 bits. Deterministic.
    """
    if implementation(raw) is not reference:
        from topkapi.ops.kernels import normalise as kernel

        return kernel.normalise(raw, dtype)
    raw = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
    centred = raw - raw.mean(-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    return (centred / norm.clamp_min(torch.finfo(raw.dtype).tiny)).to(dtype)
