"""Seen to fail when: columns beyond d_model enter the mean; a constant row is divided by its norm of 0; the rows of the
last program run over."""

import pytest
import torch

from topkapi import Autoencoder
from topkapi.ops.dispatch import kernels_only
from topkapi.ops.normalise import centre, normalise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [1, 5, 33, 64, 100, 768])
@pytest.mark.parametrize("n", [0, 1, 67])
def test_the_kernel_equals_plain_pytorch(n, d_model, dtype):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    raw = (torch.randn(n, d_model, device=DEVICE) * 20 + 5).to(dtype)
    if n > 1:
        raw[0], raw[1] = 0, 3
        raw[2, 0] = 30_000
    exact = normalise(raw.double(), torch.float64)
    for out in (torch.float32, torch.bfloat16, torch.float64):
        with kernels_only():
            found = normalise(raw, out)
        plain = normalise(raw, out)
        assert (found.dtype, found.shape) == (out, raw.shape)
        error, plain_error = (found.double() - exact).abs(), (plain.double() - exact).abs()
        rounding = max(
            torch.finfo(out).eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        )
        assert torch.all(error <= 2 * plain_error + rounding), error.max()
        if n > 1 and d_model > 1:
            assert not found[:2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (67, 33), (5, 1000)])
def test_centred(shape, dtype):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    pre_bias = torch.randn(shape[1], device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    with kernels_only():
        found = centre(x, pre_bias, dtype)
    assert found.dtype == dtype
    # Triton's interpreter cuts bf16 off instead of rounding
    torch.testing.assert_close(found, (x - pre_bias).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_rows_of_any_layout():
    pytest.importorskip("triton")
    raw = torch.randn(40, 7, device=DEVICE).T
    plain = normalise(raw, torch.float32), centre(raw, raw[0], torch.float32)
    with kernels_only():
        torch.testing.assert_close((normalise(raw, torch.float32), centre(raw, raw[0], torch.float32)), plain)


def test_it_is_the_autoencoders():
    raw = torch.randn(50, 24).bfloat16()
    assert torch.equal(normalise(raw, torch.float32), Autoencoder.normalise(raw.float()).x)
    assert torch.equal(normalise(raw, torch.bfloat16), Autoencoder.normalise(raw.float()).x.bfloat16())
