"""The loss terms equal values computed by hand.

Seen to catch: AuxK normalised by the residual's second moment instead of its variance about the batch mean.
"""

import pytest
import torch

from topkapi import loss
from topkapi.loss import LossTerms

X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def test_mse_scale_makes_predicting_the_mean_cost_one() -> None:
    scale = loss.mse_scale(X)
    assert scale == pytest.approx(1 / 0.625)  # deviations 0.5, 0.5, 1, 1: mean square 0.625
    assert float(loss.mse(X, X.mean(0).expand_as(X), scale)) == pytest.approx(1.0)


def test_normalized_mse() -> None:
    assert float(loss.normalized_mse(X, X, X.mean(0))) == 0.0
    assert float(loss.normalized_mse(X, X.mean(0).expand_as(X), X.mean(0))) == 1.0
    assert float(loss.normalized_mse(X, torch.zeros_like(X), X.mean(0))) == pytest.approx(5 / 2.5)


def test_auxk_is_relative_to_the_residuals_variance() -> None:
    residual = torch.tensor([[3.0], [1.0]])  # mean 2, variance 1
    auxk_recon = torch.tensor([[3.0], [3.0]])
    assert float(loss.auxk(residual, auxk_recon, 0.5)) == pytest.approx(0.5 * 2.0)


def test_auxk_treats_the_residual_as_a_constant() -> None:
    residual = torch.tensor([[3.0], [1.0]], requires_grad=True)
    auxk_recon = torch.zeros(2, 1, requires_grad=True)
    loss.auxk(residual, auxk_recon, 1.0).backward()
    assert residual.grad is None
    assert auxk_recon.grad is not None


def test_l1_plain_and_weighted() -> None:
    latents = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert float(loss.l1(latents, 0.1)) == pytest.approx(0.3)
    assert float(loss.l1(latents, 0.1, torch.tensor([10.0, 1.0]))) == pytest.approx(0.1 * (12 + 3) / 2)


def test_terms_add_up_and_are_logged_under_their_names() -> None:
    terms = LossTerms(*torch.tensor([0.5, 0.25, 0.125]))
    assert float(terms.total()) == 0.875
    assert terms.detached() == {"normalized_mse": 0.5, "auxk": 0.25, "l1": 0.125}
