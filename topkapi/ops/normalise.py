"""Activations as the autoencoder sees them, in the dtype that a training step reads."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from topkapi.ops import reference
from topkapi.ops.dispatch import implementation


@torch.no_grad()
def normalise(raw: Float[Tensor, "n d_model"], dtype: torch.dtype) -> Float[Tensor, "n d_model"]:
    """Per row: subtract the mean over d_model, scale to unit norm; a row that is constant but for rounding becomes 0.

        x = (raw - mean) / |raw - mean|

    Computed in float32 (float64 for float64) and rounded once, to `dtype`: `Autoencoder.normalise` for activations
    that are stored in 16 bits. Deterministic.
    """
    if implementation(raw) is not reference:
        from topkapi.ops.kernels import normalise as kernel

        return kernel.normalise(raw, dtype)
    return normalised(raw if raw.dtype in (torch.float32, torch.float64) else raw.float())[0].to(dtype)


@torch.no_grad()
def centre(x: Float[Tensor, "n d_model"], pre_bias: Float[Tensor, " d_model"], dtype: torch.dtype) -> Tensor:
    """x - pre_bias, (n, d_model) of `dtype`, rounded once."""
    if implementation(x) is not reference:
        from topkapi.ops.kernels import normalise as kernel

        return kernel.centre(x, pre_bias, dtype)
    return torch.sub(x, pre_bias, out=torch.empty_like(x, dtype=dtype))


def normalised(
    raw: Float[Tensor, "... d_model"],
) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
    """Normalised rows, their means and their norms, in the dtype of `raw`; 16-bit rows are computed in float32."""
    if raw.dtype not in (torch.float32, torch.float64):
        return tuple(part.to(raw.dtype) for part in normalised(raw.float()))
    mean = raw.mean(-1, keepdim=True)
    centred = raw - mean
    norm = centred.norm(dim=-1, keepdim=True)
    is_constant = norm <= rounding(raw.dtype, raw.shape[-1]) * mean.abs()
    return torch.where(is_constant, 0, centred / norm.clamp_min(torch.finfo(raw.dtype).tiny)), mean, norm


def rounding(dtype: torch.dtype, d_model: int) -> float:
    """The norm of a centred constant row, relative to the constant, at most: sums round differently on each device."""
    return 4 * torch.finfo(dtype).eps * math.sqrt(d_model)
