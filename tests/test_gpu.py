"""The plain PyTorch operations and a training step on a CUDA device equal those on the CPU. Run: pytest -m gpu."""

import pytest
import torch

from topkapi import Autoencoder, ops
from topkapi.config import AuxKConfig, OptimConfig
from topkapi.gradients import topk_step
from topkapi.loss import mse_scale
from topkapi.model import PARAMETERS
from topkapi.optim import Optimizer

pytestmark = pytest.mark.gpu


def test_operations_equal_the_cpus() -> None:
    torch.manual_seed(0)
    x, W, b, p = (torch.randn(s, dtype=torch.float64) for s in ((300, 24), (5000, 24), (5000,), (24,)))
    values, indices = ops.encode_topk(x, W, b, p, 16)
    on_gpu = [t.cuda() for t in (x, W, b, p)]
    gpu_values, gpu_indices = ops.encode_topk(*on_gpu, 16)
    torch.testing.assert_close(gpu_values.sort().values.cpu(), values.sort().values)
    assert torch.equal(gpu_indices.sort().values.cpu(), indices.sort().values)
    torch.testing.assert_close(
        ops.dense_sparse_matmul(values.cuda(), indices.cuda(), on_gpu[1]).cpu(),
        ops.dense_sparse_matmul(values, indices, W),
    )
    torch.testing.assert_close(
        ops.matmul_at_sparse_indices(on_gpu[0], on_gpu[1], indices.cuda()).cpu(),
        ops.matmul_at_sparse_indices(x, W, indices),
    )


@pytest.mark.parametrize("n_dead", [0, 5, 400])
def test_training_steps_equal_the_cpus(n_dead: int) -> None:
    torch.manual_seed(0)
    found = []
    dead = torch.randperm(512) < n_dead
    raw = torch.randn(256, 16, dtype=torch.float64)
    for device in ("cpu", "cuda"):
        ae = Autoencoder(d_model=16, n_latents=512, k=8).double().to(device)
        x = ae.normalise(raw.to(device)).x
        ae.initialise_(x)
        optimizer = Optimizer(ae, OptimConfig(lr=1e-3, clip_norm=1.0))
        for _ in range(10):
            step = topk_step(ae, x, mse_scale(x), dead.to(device), AuxKConfig(auxk=8))
            optimizer.step_(ae, step.gradients, 1e-3)
        found.append([getattr(ae, name).detach().cpu() for name in PARAMETERS])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
