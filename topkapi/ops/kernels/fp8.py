"""Copies of weights and activations as fp8 e4m3, scaled by powers of two, for screening in `encode_topk`.

e4m3 has a range of 2^18 between its largest and its smallest number, so one scale for the weight and one a row for the
activations suffice; powers of two make the scaling itself exact.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkapi.errors import TopkapiError


@lru_cache
def require_fp8(device: torch.device) -> None:
    """Raise TopkapiError for a GPU without fp8 e4m3."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise TopkapiError(f"{torch.cuda.get_device_name(device)} has no fp8: take --precision bf16.")


def quantised(W: Tensor) -> tuple[Tensor, Tensor]:
    """W times a power of two as fp8 e4m3, and that power of two.

    The scale comes from every 16th row, whose largest entry it brings below 64: others may be seven times larger
    before they are clipped to 448, which does no more than lower a candidate's screened value.
    """
    low, high = W[::16].aminmax()
    largest = torch.maximum(-low, high).float().clamp(1e-18, 1e18)
    scale = torch.exp2(torch.floor(torch.log2(64 / largest)))
    out = torch.empty(W.shape, dtype=torch.float8_e4m3fn, device=W.device)
    BLOCK = 4096
    _to_fp8[(triton.cdiv(W.numel(), BLOCK),)](W, out, scale, W.numel(), BLOCK=BLOCK)
    return out, scale


def quantised_rows(x: Tensor, W_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Each row times a power of two of its own as fp8 e4m3, and those powers times `W_scale`."""
    n, d_model = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(n, dtype=torch.float32, device=x.device)
    _rows_to_fp8[(n,)](x, out, W_scale, scales, d_model, BD=triton.next_power_of_2(d_model))
    return out, scales


@triton.jit
def _to_fp8(x_ptr, out_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + i, tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv), mask=i < size)


@triton.jit
def _rows_to_fp8(x_ptr, out_ptr, W_scale_ptr, scales_ptr, d_model, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    x = tl.load(x_ptr + row * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
    largest = tl.minimum(tl.maximum(tl.max(tl.abs(x), 0), 1e-30), 1e30)
    scale = tl.exp2(tl.floor(tl.log2(256.0 / largest)))
    tl.store(out_ptr + row * d_model + d, tl.clamp(x * scale, -448.0, 448.0).to(tl.float8e4nv), mask=d < d_model)
    tl.store(scales_ptr + row, scale * tl.load(W_scale_ptr))
