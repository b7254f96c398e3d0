"""On a CUDA device a step by kernels equals plain PyTorch on the CPU, does not wait for the device, and repeats itself.

Run: pytest -m gpu.
"""

import pytest
import torch

from topkapi import Autoencoder, ops
from topkapi.config import AuxKConfig, OptimConfig
from topkapi.dead import DeadCounter
from topkapi.gradients import DeadSubset
from topkapi.loss import mse_scale
from topkapi.model import PARAMETERS, Working
from topkapi.ops.dispatch import reference_only
from topkapi.optim import Optimizer
from topkapi.step import Step, topk_step

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
            step = topk_step(ae, x, mse_scale(x), DeadSubset.of(dead.to(device)), AuxKConfig(auxk=8))
            optimizer.step_(ae, step.gradients, 1e-3)
        found.append([getattr(ae, name).detach().cpu() for name in PARAMETERS])
    for ours, theirs in zip(*found, strict=True):
        # Adam divides by roots as small as 6e-10, so that sums in another order show at 5e-9 in an entry of 8 192.
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def parts(step: Step) -> dict[str, torch.Tensor]:
    found = step.gradients
    return {
        "normalized_mse": step.terms.normalized_mse,
        "auxk": step.terms.auxk,
        "W_enc": found.W_enc.all(),
        "W_dec": found.W_dec.all(),
        "latent_bias": found.latent_bias,
        "pre_bias": found.pre_bias,
    }


@pytest.mark.parametrize(("n_dead", "auxk"), [(0, 64), (50, 64), (3000, 64), (8000, 256)])
def test_bf16_gradients_are_as_exact_as_pytorchs(n_dead: int, auxk: int) -> None:
    torch.manual_seed(0)
    ae = Autoencoder(d_model=256, n_latents=8192, k=16).cuda()
    x = ae.normalise(torch.randn(4096, 256, device="cuda")).x
    ae.initialise_(x)
    x = x.bfloat16()
    mask = torch.zeros(8192, dtype=torch.bool, device="cuda")
    mask[torch.randperm(8192, device="cuda")[:n_dead]] = True
    dead, config, working = DeadSubset.of(mask), AuxKConfig(auxk=auxk), Working(ae, "bf16")
    exact_ae = Autoencoder(d_model=256, n_latents=8192, k=16).cuda().double()
    for name in PARAMETERS:
        source = getattr(working, name) if name.startswith("W") else getattr(ae, name)
        getattr(exact_ae, name).data = source.detach().double()
    with reference_only():
        exact = parts(topk_step(exact_ae, x.double(), 3.0, dead, config))
        plain = parts(topk_step(ae, x, 3.0, dead, config, working))
    ours = parts(topk_step(ae, x, 3.0, dead, config, working))
    for name, wanted in exact.items():
        error, allowed = (ours[name] - wanted).norm(), (plain[name] - wanted).norm()
        assert error <= 2 * allowed + 2**-9 * wanted.norm(), name


def trained(precision: str, auxk: int = 32) -> tuple[Autoencoder, DeadCounter]:
    """Twelve steps during which latents die; from the fourth on, waiting for the device is an error."""
    torch.manual_seed(0)
    n_tokens, config = 2048, AuxKConfig(auxk=auxk, dead_after=6000)
    ae = Autoencoder(d_model=128, n_latents=16_384, k=8).cuda()
    batches = [ae.normalise(torch.randn(n_tokens, 128, device="cuda")).x for _ in range(12)]
    ae.initialise_(batches[0])
    scale, working = mse_scale(batches[0]), Working(ae, precision)
    counter = DeadCounter(ae.n_latents, "cuda")
    optimizer = Optimizer(ae, OptimConfig(lr=1e-3), working)
    try:
        for step, x in enumerate(batches):
            if step == 4:
                torch.cuda.set_sync_debug_mode("error")
            dead = counter.subset(config.dead_after, n_tokens)
            found = topk_step(ae, x.to(working.W_enc.dtype), scale, dead, config, working)
            optimizer.step_(ae, found.gradients, 1e-3)
            counter.count_(found.fired, n_tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(found.terms.total())
    assert found.terms.auxk > 0
    return ae, counter


@pytest.mark.parametrize("precision", ["bf16", "fp8", "float32"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_do_not_wait_and_repeat_bit_for_bit(precision: str) -> None:
    (one, first), (other, second) = trained(precision), trained(precision)
    for name in PARAMETERS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(first.silent_for, second.silent_for)


def test_the_subset_is_the_dead_latents() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    counter, plain = DeadCounter(1000, "cuda"), torch.zeros(1000, dtype=torch.int64, device="cuda")
    for step in range(80):
        n_tokens = 10 if step < 40 else 25
        subset = counter.subset(100, n_tokens)
        assert torch.equal(subset.latents[subset.dead], (plain >= 100).nonzero().flatten())
        fired = torch.rand(1000, generator=generator, device="cuda") < 0.05
        counter.count_(fired, n_tokens)
        plain = torch.where(fired, 0, plain + n_tokens)
