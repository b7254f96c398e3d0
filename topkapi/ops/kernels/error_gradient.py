"""The error of a reconstruction: its square, summed over a row, and its gradient, in one pass.

One program a row. Of a float32 reconstruction and a bf16 target 4 and 2 bytes a number are read and 2 written; of
AuxK's reconstruction of the residual, which is changed in place, 2 and 2 read and 2 written.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from topkapi.ops import reference
from topkapi.ops.kernels.auxk import require_contiguous

ROW_WARPS = 4


@torch.no_grad()
def recon_gradient(
    recon: Float[Tensor, "n d_model"], target: Float[Tensor, "n d_model"], scale: float, *, num_warps: int = ROW_WARPS
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d_model"]]:
    """See `topkapi.ops.reference.recon_gradient`."""
    if torch.float64 in (recon.dtype, target.dtype):  # a number would reach the kernel as float32
        return reference.recon_gradient(recon, target, scale)
    grad = torch.empty_like(target, memory_format=torch.contiguous_format)
    return _launch(recon.contiguous(), target, -1.0, None, scale, grad, num_warps), grad


@torch.no_grad()
def residual_gradient_(
    auxk_recon: Float[Tensor, "n d_model"],
    grad_recon: Float[Tensor, "n d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
    *,
    num_warps: int = ROW_WARPS,
) -> Float[Tensor, " n"]:
    """See `topkapi.ops.reference.residual_gradient_`."""
    require_contiguous(auxk_recon, "auxk_recon")
    if auxk_recon.dtype == torch.float64:
        return reference.residual_gradient_(auxk_recon, grad_recon, inverse_scale, factor)
    return _launch(auxk_recon, grad_recon, inverse_scale, factor.float(), 1.0, auxk_recon, num_warps)


def _launch(
    recon: Tensor, other: Tensor, times: float, factor: Tensor | None, scale: float, out: Tensor, num_warps: int
) -> Float[Tensor, " n"]:
    """out = scale factor error with error = recon + times other; returns the sums of its squares."""
    n, d_model = recon.shape
    squared = torch.empty(n, dtype=torch.float32, device=recon.device)
    if n:
        _error_gradient[(n,)](
            recon, other.contiguous(), out, squared, factor, float(times), float(scale), d_model,
            BLOCK_D=triton.next_power_of_2(d_model), num_warps=num_warps,
        )  # fmt: skip
    return squared


@triton.jit
def _error_gradient(
    recon_ptr, other_ptr, out_ptr, squared_ptr, factor_ptr, times, scale, d_model, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < d_model
    recon = tl.load(recon_ptr + row * d_model + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + row * d_model + d, mask=inside, other=0.0).to(tl.float32)
    error = recon + other * times
    tl.store(squared_ptr + row, tl.sum(error * error, 0))
    if factor_ptr is not None:  # a number that the host does not know
        scale *= tl.load(factor_ptr)
    tl.store(out_ptr + row * d_model + d, error * scale, mask=inside)
