"""The L1 baselines: plain L1 is gamed without unit norm, and not with it; the weighted penalty is not gamed.

Seen to catch: `unit_norm_decoder` ignored by the optimiser; the weighted penalty computed without its norms.
"""

import pytest
import torch

from topkapi import Autoencoder
from topkapi.config import AuxKConfig, LossConfig, OptimConfig
from topkapi.gradients import DeadSubset
from topkapi.loss import mse_scale
from topkapi.optim import Optimizer
from topkapi.step import relu_step, topk_step

D_MODEL, N_LATENTS, BATCH, STEPS = 24, 64, 256, 400


def batches() -> list[torch.Tensor]:
    """Normalised sums of 3 out of 48 directions, with exponential weights."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(48, D_MODEL, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    made = []
    for _ in range(STEPS):
        chosen = torch.rand(BATCH, 48, generator=generator).topk(3).indices
        weights = torch.empty(BATCH, 3).exponential_(generator=generator) + 0.5
        made.append(Autoencoder.normalise((directions[chosen] * weights[..., None]).sum(1)).x)
    return made


DATA = batches()


def trained(activation: str, sparsity: str, unit_norm: bool, coefficient: float = 0.03) -> dict[str, float]:
    """Mean decoder norm, and the last steps' L1 sum, L0 and normalized MSE."""
    ae = Autoencoder(d_model=D_MODEL, n_latents=N_LATENTS, k=3, activation=activation)
    ae.initialise_(DATA[0])
    optimizer = Optimizer(ae, OptimConfig(lr=3e-3, ema_decay=0.0, unit_norm_decoder=unit_norm))
    scale, dead = mse_scale(DATA[0]), torch.zeros(N_LATENTS, dtype=torch.bool)
    found = []
    for x in DATA:
        if activation == "topk":
            step = topk_step(ae, x, scale, DeadSubset.of(dead), AuxKConfig(auxk=8))
        else:
            step = relu_step(ae, x, scale, LossConfig(sparsity=sparsity, l1_coefficient=coefficient))
        optimizer.step_(ae, step.gradients, 3e-3)
        found.append((float(step.terms.l1) / coefficient, float(step.l0), float(step.terms.normalized_mse)))
    l1, l0, mse = torch.tensor(found[-20:]).mean(0).tolist()
    return {"norm": float(ae.W_dec.detach().norm(dim=1).mean()), "l1": l1, "l0": l0, "mse": mse}


def test_plain_l1_is_gamed_by_free_norms_alone() -> None:
    held, free = trained("relu", "l1", unit_norm=True), trained("relu", "l1", unit_norm=False)
    assert held["norm"] == pytest.approx(1.0, abs=1e-5)
    assert free["norm"] > 1.5  # norms grow
    assert free["l1"] < 0.8 * held["l1"]  # the penalty falls
    assert free["l0"] > held["l0"]  # and buys no sparsity


def test_weighted_l1_is_not_gamed() -> None:
    weighted, free = trained("relu", "l1_decoder_norm", unit_norm=False), trained("relu", "l1", unit_norm=False)
    held = trained("relu", "l1", unit_norm=True)
    assert weighted["norm"] < 1 + 0.5 * (free["norm"] - 1)
    assert weighted["l1"] == pytest.approx(held["l1"], rel=0.15)  # weighted by norms: comparable to unit norm


def test_topk_beats_l1_with_fewer_latents() -> None:
    topk, l1 = trained("topk", "none", unit_norm=True), trained("relu", "l1", unit_norm=True, coefficient=0.5)
    assert topk["l0"] <= 3 < l1["l0"] < 6
    assert topk["mse"] < 0.5 * l1["mse"]
