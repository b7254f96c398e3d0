"""Curves over k' and thresholds against loops in float64, and on codes whose curve is known.

Mutations seen caught: latents in rising order; a threshold at its pre-activation instead of below it; pre_bias left
out; small pre-activations dropped before enough are kept.
"""

import numpy as np
import pytest
import torch

from tests.evaluate.stand_ins import D_MODEL, identity_autoencoder, random_autoencoder
from topkapi.errors import TopkapiError
from topkapi.evaluate import progressive as module
from topkapi.evaluate import sampling
from topkapi.evaluate.progressive import calibrate_thresholds, jump_relu_recovery, progressive_recovery
from topkapi.evaluate.reconstruction import ReconstructionMetrics
from topkapi.model import Autoencoder


def normalised(n: int, d_model: int = D_MODEL, seed: int = 0) -> torch.Tensor:
    return Autoencoder.normalise(torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))).x


def by_hand(ae: Autoencoder, x: torch.Tensor, chosen) -> tuple[float, float]:
    """Normalized MSE and L0 with the latents that `chosen(pre_acts of a token)` says, in float64 loops."""
    W_enc, W_dec, latent_bias, pre_bias = (
        p.detach().double().numpy() for p in (ae.W_enc, ae.W_dec, ae.latent_bias, ae.pre_bias)
    )
    x, error, n_active = x.double().numpy(), 0.0, 0
    for token in x:
        pre_acts = W_enc @ (token - pre_bias) + latent_bias
        latents = np.where(chosen(pre_acts), pre_acts, 0).clip(min=0)
        error += ((token - latents @ W_dec - pre_bias) ** 2).sum()
        n_active += (latents > 0).sum()
    return error / ((x - x.mean(0)) ** 2).sum(), n_active / len(x)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_curve_over_k_equals_loops(activation):
    ae, x = random_autoencoder(12, 3, activation), normalised(50)
    found = progressive_recovery(ae, x, 12)
    assert (found.settings, found.n_tokens, found.reason) == (tuple(range(1, 13)), 50, "")
    for k, l0, mse in zip(found.settings, found.l0, found.normalized_mse, strict=True):
        wanted = by_hand(ae, x, lambda pre_acts, k=k: pre_acts >= np.sort(pre_acts)[-k])
        assert (mse.value, l0) == pytest.approx(wanted, rel=1e-5)
        assert mse.low < mse.value < mse.high


def test_at_the_trained_k_it_is_the_figure_of_evaluation():
    ae, raw = random_autoencoder(), 3 * normalised(60)
    metrics = ReconstructionMetrics(ae)
    metrics.update(raw)
    wanted, found = metrics.compute(), progressive_recovery(ae, ae.normalise(raw).x, 4)
    assert (found.normalized_mse[ae.k - 1].value, found.l0[ae.k - 1]) == pytest.approx(
        (wanted["normalized_mse"], wanted["l0"]), rel=1e-6
    )


def test_an_orthonormal_code_recovers_each_coordinate_in_turn():
    """Latents x and -x: what is left after k' is the sum of squares of the smaller coordinates."""
    ae, x = identity_autoencoder(), normalised(40)
    squares = x.double().square().sort(1, descending=True).values
    found = progressive_recovery(ae, x, D_MODEL)
    left = squares.sum() - squares.sum(0).cumsum(0)
    spread = (x.double() - x.double().mean(0)).square().sum()
    assert [mse.value for mse in found.normalized_mse] == pytest.approx((left / spread).tolist(), abs=1e-9)
    assert found.l0 == pytest.approx(range(1, D_MODEL + 1))


def test_a_curve_over_thresholds_equals_loops():
    ae, x = random_autoencoder(12, 3), normalised(50)
    thresholds = (0.0, 0.2, 0.5, 1.0)
    found = jump_relu_recovery(ae, x, thresholds)
    assert found.settings == thresholds
    for threshold, l0, mse in zip(thresholds, found.l0, found.normalized_mse, strict=True):
        wanted = by_hand(ae, x, lambda pre_acts, at=threshold: pre_acts > at)
        assert (mse.value, l0) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("target", [1 / 80, 0.5, 1, 2.3, 4])
def test_calibrated_thresholds_give_the_wanted_l0(target, monkeypatch):
    ae, x = random_autoencoder(16, 3), normalised(80)
    whole = calibrate_thresholds(ae, x, [target, 1])
    assert jump_relu_recovery(ae, x, whole).l0 == pytest.approx([round(80 * target) / 80, 1])
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 7 * ae.n_latents)
    assert calibrate_thresholds(ae, x, [target, 1]) == pytest.approx(whole, rel=1e-6)


def test_a_target_may_take_every_pre_activation_above_zero(monkeypatch):
    ae, x = random_autoencoder(16, 3), normalised(80)
    everything = jump_relu_recovery(ae, x, [0]).l0[0]
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 7 * ae.n_latents)
    assert jump_relu_recovery(ae, x, calibrate_thresholds(ae, x, [1, everything])).l0 == pytest.approx([1, everything])


def test_thresholds_carry_over_to_other_tokens_of_the_same_kind():
    ae = random_autoencoder(16, 3)
    found = jump_relu_recovery(ae, normalised(3000, seed=2), calibrate_thresholds(ae, normalised(3000), [2]))
    assert found.l0[0] == pytest.approx(2, rel=0.05)


def test_results_do_not_depend_on_how_tokens_are_cut(monkeypatch):
    ae, x = random_autoencoder(), normalised(60)
    whole = progressive_recovery(ae, x, 6), jump_relu_recovery(ae, x, [0.1, 0.4])
    monkeypatch.setattr(module, "ROWS_ELEMENTS", 40)
    parts = [7, 0, 33, 20]
    cut = progressive_recovery(ae, iter(x.split(parts)), 6), jump_relu_recovery(ae, iter(x.split(parts)), [0.1, 0.4])
    for one, other in zip(whole, cut, strict=True):
        assert other.l0 == pytest.approx(one.l0)
        assert [m.value for m in other.normalized_mse] == pytest.approx([m.value for m in one.normalized_mse], rel=1e-6)


def test_a_dead_autoencoder_has_no_curve_and_says_why():
    ae = random_autoencoder()
    with torch.no_grad():
        ae.latent_bias.fill_(-100)
    for found in (progressive_recovery(ae, normalised(20), 3), jump_relu_recovery(ae, normalised(20), [0.0])):
        assert (found.l0, found.normalized_mse, found.n_tokens) == (None, None, 20)
        assert found.reason == "no latent takes part on any of the tokens"
    with pytest.raises(TopkapiError, match="out of reach: only 0 pre-activations per token"):
        calibrate_thresholds(ae, normalised(20), [1])


def test_without_tokens_or_spread_there_is_no_curve():
    ae = random_autoencoder()
    assert progressive_recovery(ae, [], 3).reason == "no token was given"
    assert "all tokens are the same" in progressive_recovery(ae, normalised(1).expand(4, -1), 3).reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ae: progressive_recovery(ae, normalised(3), 0), r"k_max must be between 1 and n_latents=8; got 0"),
        (lambda ae: progressive_recovery(ae, normalised(3), 9), r"n_latents=8; got 9"),
        (lambda ae: progressive_recovery(ae, normalised(3, 5), 2), r"x must be \(n, d_model=4\).*got \(3, 5\)"),
        (lambda ae: jump_relu_recovery(ae, normalised(3), []), "at least one"),
        (lambda ae: jump_relu_recovery(ae, normalised(3), [-0.1]), "none below 0"),
        (lambda ae: jump_relu_recovery(ae, normalised(3), [float("nan")]), "none below 0"),
        (lambda ae: calibrate_thresholds(ae, normalised(3), [0.1]), "at least one latent on the 3 tokens"),
        (lambda ae: calibrate_thresholds(ae, normalised(3), [9]), "out of reach"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(TopkapiError, match=message):
        call(random_autoencoder())
