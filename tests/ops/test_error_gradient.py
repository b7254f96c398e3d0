"""Errors of reconstructions and their gradients, by kernel and by reference, equal float64's.

Seen to catch: the target added instead of subtracted; the square of the scaled error; the last column left out; the
gradient in the reconstruction's dtype; a factor that is not read.
"""

import pytest
import torch

from topkapi.errors import TopkapiError
from topkapi.ops import reference

pytest.importorskip("triton")

from topkapi.ops.kernels import error_gradient as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(0, 5), (1, 5), (3, 33), (2, 768)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def drawn(n: int, d_model: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(d_model)
    return [torch.randn(n, d_model, generator=generator).to(dtype).to(DEVICE) for dtype in dtypes]


def sums_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within an ulp or two: Triton's interpreter rounds to bf16 by cutting off."""
    torch.testing.assert_close(ours.double(), exact, rtol=max(2 * torch.finfo(ours.dtype).eps, 2e-6), atol=1e-7)


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_model"), SHAPES)
def test_recon_gradient(n: int, d_model: int, dtype: torch.dtype, module: object) -> None:
    recon, target = drawn(n, d_model, sums_of(dtype), dtype)
    given = recon.clone(), target.clone()
    squared, grad = module.recon_gradient(recon, target, 0.3)
    assert (squared.dtype, grad.dtype) == (sums_of(dtype), dtype)
    error = recon.double() - target.double()
    assert_near(squared, error.pow(2).sum(1))
    assert_near(grad, 0.3 * error)
    assert torch.equal(recon, given[0])
    assert torch.equal(target, given[1])


def test_recon_gradient_takes_any_strides() -> None:
    recon, target = (tensor.T for tensor in drawn(33, 4, torch.float32, torch.bfloat16))
    wanted = kernels.recon_gradient(recon.contiguous(), target.contiguous(), 0.3)
    for ours, same in zip(kernels.recon_gradient(recon, target, 0.3), wanted, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_model"), SHAPES)
def test_residual_gradient(n: int, d_model: int, dtype: torch.dtype) -> None:
    recon, grad_recon = drawn(n, d_model, dtype, dtype)
    factor = torch.tensor(0.3, dtype=sums_of(dtype), device=DEVICE)
    error = recon.double() + 1.7 * grad_recon.double()
    squared = kernels.residual_gradient_(recon, grad_recon, 1.7, factor)
    assert_near(squared, error.pow(2).sum(1))
    assert_near(recon, 0.3 * error)


def test_what_is_not_contiguous_is_refused() -> None:
    wide = torch.zeros(4, 128, dtype=torch.bfloat16, device=DEVICE)[:, ::2]
    with pytest.raises(TopkapiError, match="contiguous"):
        kernels.residual_gradient_(wide, wide, 1.0, torch.ones((), device=DEVICE))
