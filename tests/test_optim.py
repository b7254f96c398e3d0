"""The optimiser: torch's Adam on projected gradients, in blocks, then unit norm, then the average.

Seen to catch: projection after Adam; the average taken before unit norm; clipping by a norm that misses the biases;
bias correction with the step after instead of this one.
"""

import math

import pytest
import torch

from topkapi import optim
from topkapi.config import OptimConfig
from topkapi.gradients import Gradients, WeightGradient
from topkapi.model import PARAMETERS, Autoencoder
from topkapi.optim import Optimizer, learning_rate

D_MODEL, N_LATENTS = 6, 37


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "BLOCK_ROWS", 10)


def made() -> Autoencoder:
    ae = Autoencoder(d_model=D_MODEL, n_latents=N_LATENTS, k=2).double()
    optim.unit_norm_(ae.W_dec.data)  # to double precision
    return ae


def random_gradients(seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [WeightGradient(N_LATENTS, dense=draw(N_LATENTS, D_MODEL)) for _ in range(2)]
    return Gradients(*weights, latent_bias=draw(N_LATENTS), pre_bias=draw(D_MODEL))


def tensors(gradients: Gradients) -> list[torch.Tensor]:
    return [gradients.W_enc.all(), gradients.W_dec.all(), gradients.latent_bias, gradients.pre_bias]


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_equals_torch_adam_step_by_step(clip_norm: float, unit_norm: bool) -> None:
    config = OptimConfig(lr=0.01, clip_norm=clip_norm, unit_norm_decoder=unit_norm, ema_decay=0.9)
    ae, plain = made(), made()
    optimizer = Optimizer(ae, config)
    scale = math.sqrt(D_MODEL - 1)
    groups = [
        {"params": [plain.W_enc, plain.W_dec], "lr": 0.01, "eps": config.eps},
        {"params": [plain.latent_bias, plain.pre_bias], "lr": 0.01, "eps": config.eps * scale},
    ]
    adam = torch.optim.Adam(groups)
    average = {name: torch.zeros_like(getattr(plain, name)) for name in PARAMETERS}
    for step in range(6):
        gradients = random_gradients(step)
        norm = optimizer.step_(ae, gradients, lr=0.01)
        for name, gradient in zip(PARAMETERS, tensors(gradients), strict=True):
            getattr(plain, name).grad = gradient.clone()
        if unit_norm:
            rows, grad = plain.W_dec.data, plain.W_dec.grad
            plain.W_dec.grad = grad - (grad * rows).sum(1, keepdim=True) * rows
        if clip_norm:
            parameters = [getattr(plain, name) for name in PARAMETERS]
            assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm)), rel=1e-6)
        adam.step()
        if unit_norm:
            plain.W_dec.data /= plain.W_dec.data.norm(dim=1, keepdim=True)
        for name in PARAMETERS:
            torch.testing.assert_close(getattr(ae, name).data, getattr(plain, name).data, rtol=1e-6, atol=1e-9)
            average[name] = 0.9 * average[name] + 0.1 * getattr(plain, name).data
    averaged = optimizer.averaged(ae)
    for name in PARAMETERS:
        wanted = average[name] / (1 - 0.9**6)
        if name == "W_dec" and unit_norm:
            wanted = wanted / wanted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(averaged[name], wanted, rtol=1e-6, atol=1e-9)


def test_projected_gradient_is_orthogonal_to_its_row() -> None:
    ae = made()
    optimizer = Optimizer(ae, OptimConfig(lr=0.01))
    block = optimizer._block(ae, "W_dec", random_gradients(0).W_dec, 5, 20)
    assert (block * ae.W_dec[5:20]).sum(1).abs().max() < 1e-12


def test_decoder_rows_have_unit_norm_live_and_averaged() -> None:
    ae = made().float()
    optimizer = Optimizer(ae, OptimConfig(lr=0.1, ema_decay=0.99))
    for step in range(5):
        gradients = random_gradients(step)
        single = Gradients(
            *(WeightGradient(N_LATENTS, dense=w.dense.float()) for w in (gradients.W_enc, gradients.W_dec)),
            latent_bias=gradients.latent_bias.float(),
            pre_bias=gradients.pre_bias.float(),
        )
        optimizer.step_(ae, single, lr=0.1)
    for rows in (ae.W_dec, optimizer.averaged(ae)["W_dec"]):
        assert (rows.norm(dim=1) - 1).abs().max() < 1e-6


def test_without_average_the_last_weights_are_published() -> None:
    ae = made()
    optimizer = Optimizer(ae, OptimConfig(lr=0.1, ema_decay=0.0))
    optimizer.step_(ae, random_gradients(0), lr=0.1)
    for name, weight in optimizer.averaged(ae).items():
        assert torch.equal(weight, getattr(ae, name))


def test_learning_rate_rises_holds_and_falls() -> None:
    config = OptimConfig(lr=2.0, lr_warmup=0.1, lr_decay=0.2)
    steps = (0, 4, 9, 50, 80, 90, 99)
    assert [learning_rate(config, step, 100) for step in steps] == pytest.approx([0.2, 1, 2, 2, 2, 1, 0.1])
    assert learning_rate(OptimConfig(lr=2.0), 99, 100) == 2.0
