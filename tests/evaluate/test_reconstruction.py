"""Reconstruction metrics against loops in float64.

Mutations seen caught: deviations summed in float32; merging without the shift term; raw instead of normalised error;
l0 counting k instead of values > 0.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.stand_ins import D_MODEL, identity_autoencoder, random_autoencoder, reconstruct_by_hand
from topkapi.evaluate import reconstruction
from topkapi.evaluate.reconstruction import ReconstructionMetrics


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def measure(ae, *batches):
    metrics = ReconstructionMetrics(ae)
    for raw in batches:
        metrics.update(raw)
    return metrics


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_metrics_equal_hand_computed_values(activation):
    ae, raw = random_autoencoder(activation=activation), 5 * rows(40) + 2
    x, latents, recon, _ = reconstruct_by_hand(ae, raw.double().numpy())
    found = measure(ae, raw).compute()
    assert found["normalized_mse"] == pytest.approx(((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-6)
    assert found["l0"] == pytest.approx((latents > 0).sum(1).mean())
    assert found["dead_fraction"] == pytest.approx((~(latents > 0).any(0)).mean())
    assert found["n_tokens"] == 40


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4))
def test_results_do_not_depend_on_how_tokens_are_cut(cuts):
    ae, raw = random_autoencoder(), rows(30)
    whole = measure(ae, raw)
    parts = measure(ae, *raw.tensor_split(sorted(cuts)))
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)
    assert torch.allclose(parts.mean_activation, raw.double().mean(0))


def test_chunks_change_nothing(monkeypatch):
    ae, raw = random_autoencoder(), rows(30)
    whole = measure(ae, raw).compute()
    monkeypatch.setattr(reconstruction, "CHUNK_ELEMENTS", 7 * ae.n_latents)
    assert measure(ae, raw).compute() == pytest.approx(whole, rel=1e-6)


def test_identity_autoencoder_has_no_error():
    assert measure(identity_autoencoder(), rows(30)).compute()["normalized_mse"] < 1e-12


def test_answering_the_mean_scores_one():
    ae, raw = random_autoencoder(), rows(50)
    with torch.no_grad():
        ae.W_dec.zero_()
        ae.pre_bias.copy_(ae.normalise(raw).x.mean(0))
    assert measure(ae, raw).compute()["normalized_mse"] == pytest.approx(1, rel=1e-6)


def test_variance_of_tokens_that_lie_close_together():
    """Spread 1e-3 of the norm about a mean of length 1: float32 sums of squares keep two digits of it."""
    ae, raw = random_autoencoder(), torch.tensor([3.0, -1, 2, -4]) + 1e-3 * rows(4000)
    x = ae.normalise(raw).x.double().numpy()
    found = measure(ae, *raw.split(500))
    assert found.sums.spread[0].item() == pytest.approx(((x - x.mean(0)) ** 2).sum(), rel=1e-9)


def test_bfloat16_rows_are_computed_in_float32():
    ae, raw = random_autoencoder(), rows(30).bfloat16()
    assert measure(ae, raw).compute() == measure(ae, raw.float()).compute()


def test_dead_fraction_counts_latents_silent_on_these_tokens():
    ae = identity_autoencoder()
    raw = torch.tensor([[1.0, 0, 0, -1], [2, 0, 0, -2]])  # x = (r, 0, 0, -r): latents 0 and 7 of 8 fire
    found = measure(ae, raw).compute()
    assert (found["l0"], found["dead_fraction"]) == (2, 6 / 8)


def test_undefined_without_tokens_and_without_variance():
    empty = measure(random_autoencoder(), rows(0)).compute()
    assert empty.pop("n_tokens") == 0
    assert all(math.isnan(value) for value in empty.values())
    same = measure(random_autoencoder(), torch.tensor([[1.0, 0, 0, -1]])).compute()
    assert math.isnan(same["normalized_mse"])
    assert np.isfinite(same["l0"])
