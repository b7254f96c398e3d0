"""Downstream losses against loops in float64 over a language model with known logits.

Mutations seen caught: splicing excluded positions too; targets not shifted; KL(spliced || clean); 0 x inf in KL;
batch means added up instead of sums.
"""

import math

import numpy as np
import pytest
import torch

from tests.evaluate.stand_ins import (
    D_MODEL,
    SPECIAL,
    RunningMeanModel,
    identity_autoencoder,
    random_autoencoder,
    random_model,
    random_tokens,
    reconstruct_by_hand,
    token_file,
    zero_autoencoder,
)
from topkapi.config import DataConfig
from topkapi.evaluate import downstream
from topkapi.evaluate.downstream import downstream_losses, loss_recovered, predicting, replaced_at

CONTEXT = 5
CONFIG = DataConfig(context=CONTEXT, shuffle_tokens=CONTEXT)
MEAN = torch.tensor([0.5, -1.0, 2.0, 0.25])


def losses(ae, lm, tokens, config=CONFIG):
    n = len(tokens) // config.context
    (found,) = downstream_losses([ae], lm, token_file(tokens), np.arange(n), config, MEAN)
    return values(found)


def values(found):
    return {name: replicates[0] for name, replicates in found.replicates.items()}


def by_hand(ae, lm, tokens):
    """Every measure by loops over contexts and positions."""
    E, U = lm.embedding.double().numpy(), lm.unembedding.double().numpy()

    def log_p(raw):
        logits = np.cumsum(raw, 0) / np.arange(1, len(raw) + 1)[:, None] @ U
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    names = ("ce_clean", "ce_spliced", "ce_zero_ablation", "ce_mean_ablation")
    total, n = dict.fromkeys((*names, "kl"), 0.0), 0
    for window in np.reshape(tokens, (-1, CONTEXT)):
        raw = {name: E[window].copy() for name in names}
        kept = [t for t in range(CONTEXT) if t > 0 and window[t] != SPECIAL]
        for t in kept:
            raw["ce_spliced"][t] = reconstruct_by_hand(ae, E[window][t : t + 1])[3][0]
            raw["ce_zero_ablation"][t] = 0
            raw["ce_mean_ablation"][t] = MEAN.numpy()
        p = {name: log_p(value) for name, value in raw.items()}
        for t in kept:
            if t + 1 < CONTEXT:
                n += 1
                for name in names:
                    total[name] -= p[name][t, window[t + 1]]
                clean, spliced = p["ce_clean"][t], p["ce_spliced"][t]
                total["kl"] += (np.exp(clean) * (clean - spliced)).sum()
    means = {name: value / n for name, value in total.items()}
    zero = means["ce_zero_ablation"]
    return means | {"loss_recovered": (zero - means["ce_spliced"]) / (zero - means["ce_clean"])}


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_hand_computed_values(seed):
    ae, lm, tokens = random_autoencoder(seed=seed), random_model(seed), random_tokens(20 * CONTEXT, seed)
    found, wanted = losses(ae, lm, tokens), by_hand(ae, lm, tokens)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_autoencoders_measured_together_are_measured_as_alone():
    aes, lm, tokens = [random_autoencoder(seed=seed) for seed in range(3)], random_model(), random_tokens(50)
    found = downstream_losses(aes, lm, token_file(tokens), np.arange(10), CONFIG, MEAN)
    assert sum(shape[0] for shape in lm.shapes) == (3 + 3) * 10
    assert [values(it) for it in found] == [losses(ae, lm, tokens) for ae in aes]


def test_uniform_language_model_costs_the_log_of_its_vocabulary():
    lm = RunningMeanModel(torch.randn(6, D_MODEL), torch.zeros(D_MODEL, 6))
    found = losses(random_autoencoder(), lm, random_tokens(50))
    assert [found[f"ce_{name}"] for name in ("clean", "spliced", "zero_ablation", "mean_ablation")] == pytest.approx(
        [math.log(6)] * 4, rel=1e-6
    )
    assert found["kl"] == pytest.approx(0, abs=1e-7)
    assert math.isnan(found["loss_recovered"])


def test_identity_autoencoder_costs_nothing():
    found = losses(identity_autoencoder(), random_model(), random_tokens(100))
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], abs=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(1, abs=1e-5)


def test_zero_autoencoder_equals_zero_ablation_where_tokens_have_mean_zero():
    found = losses(zero_autoencoder(), random_model(zero_mean=True), random_tokens(100))
    assert found["ce_spliced"] == pytest.approx(found["ce_zero_ablation"], abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("elements", [1, 2 * CONTEXT * 6, 2**26])
def test_batches_change_nothing_and_bound_the_logits(elements, monkeypatch):
    ae, tokens = random_autoencoder(), random_tokens(40 * CONTEXT)
    wanted = by_hand(ae, random_model(), tokens)
    monkeypatch.setattr(downstream, "LOGIT_ELEMENTS", elements)
    lm = random_model()
    assert losses(ae, lm, tokens) == pytest.approx(wanted, rel=1e-4)
    assert max(shape[0] for shape in lm.shapes) == {1: 1, 60: 2, 2**26: 32}[elements]
    assert sum(shape[0] for shape in lm.shapes) == 4 * 40


def test_keeping_every_position_splices_the_first_and_special_tokens_too():
    keep_all = DataConfig(context=2, shuffle_tokens=2, drop_first_position=False, drop_special_tokens=False)
    lm = random_model()
    found = losses(zero_autoencoder(), lm, [SPECIAL, 1], keep_all)
    assert found["ce_zero_ablation"] == pytest.approx(math.log(6), rel=1e-6)
    logits = (MEAN @ lm.unembedding).double()
    assert found["ce_mean_ablation"] == pytest.approx((logits.logsumexp(0) - logits[1]).item(), abs=1e-6)


def test_only_kept_positions_are_replaced():
    raw, keep = torch.randn(2, 3, D_MODEL), torch.tensor([[False, True, False], [False, False, True]])
    out = replaced_at(keep, lambda rows: rows + 1)(raw)
    assert torch.equal(out[keep], raw[keep] + 1)
    assert torch.equal(out[~keep], raw[~keep])
    assert replaced_at(keep, torch.zeros_like)(raw.bfloat16()).dtype == torch.bfloat16


def test_the_last_position_predicts_nothing():
    keep = torch.tensor([[False, True, True], [True, False, True]])
    assert predicting(keep).tolist() == [[False, True], [True, False]]


def test_words_masked_out_of_the_vocabulary_do_not_spoil_kl():
    class Masked(RunningMeanModel):
        def logits(self, tokens, replace=None):
            out = super().logits(tokens, replace)
            return torch.cat([out, torch.full_like(out[..., :1], -torch.inf)], -1)

    plain = random_model()
    tokens, ae = random_tokens(50), random_autoencoder()
    masked = losses(ae, Masked(plain.embedding, plain.unembedding), tokens)
    assert masked == pytest.approx(losses(ae, plain, tokens), rel=1e-6)


def test_without_predictions_everything_is_undefined():
    found = losses(random_autoencoder(), random_model(), [SPECIAL] * 10)
    assert all(math.isnan(value) for value in found.values())


def test_loss_recovered_is_undefined_where_zero_ablation_changes_nothing():
    clean, spliced, zero = (torch.tensor(loss, dtype=torch.float64) for loss in ([2.0] * 2, [2.5] * 2, [2 + 1e-8, 4.0]))
    found = loss_recovered(clean, spliced, zero).tolist()
    assert math.isnan(found[0])
    assert found[1] == 0.75


def test_intervals_are_those_of_contexts_drawn_anew():
    """Against the normal approximation for the mean of a language model's loss over 200 contexts."""
    lm, tokens = random_model(), random_tokens(200 * CONTEXT)
    (found,) = downstream_losses([random_autoencoder()], lm, token_file(tokens), np.arange(200), CONFIG, MEAN)
    sums = []
    for window in np.reshape(tokens, (-1, CONTEXT)):
        keep = (window[:-1] != SPECIAL) & (np.arange(CONTEXT - 1) > 0)
        log_p = lm.logits(torch.tensor(window[None]))[0].double().log_softmax(-1).numpy()
        sums.append((keep.sum(), -(log_p[np.arange(CONTEXT - 1), window[1:]] * keep).sum()))
    n, total = np.array(sums).T
    mean = total.sum() / n.sum()
    error = np.sqrt(((total - mean * n) ** 2).sum()) / n.sum()
    ce = found.estimates()["ce_clean"]
    assert (ce.value, ce.n) == (pytest.approx(mean, rel=1e-6), 200)
    assert (ce.high - ce.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.2)


def test_training_goes_on_after_an_evaluation():
    """Memory that ops keep between calls must not be made in the language model's inference mode."""
    ae = random_autoencoder(n_latents=333, k=3)
    losses(ae, random_model(), random_tokens(50))
    ae(torch.randn(2, D_MODEL)).sum().backward()
    assert ae.W_dec.grad.isfinite().all()
