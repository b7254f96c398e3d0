"""Sparsity of effects with known answers, and ablations against loops over a language model with known logits.

Mutations seen caught: no median subtracted; the mean subtracted; the latent's part put in place of the
activation; the ablated latent's part not scaled back to raw; positions before the ablated one counted; a draw among
positions with fewer than T tokens left; undefined ablations counted as 0.
"""

import math

import numpy as np
import pytest
import torch

from tests.evaluate.stand_ins import (
    D_MODEL,
    SPECIAL,
    RunningMeanModel,
    random_autoencoder,
    random_model,
    random_tokens,
    reconstruct_by_hand,
    token_file,
    zero_autoencoder,
)
from topkapi.config import DataConfig
from topkapi.errors import TopkapiError
from topkapi.evaluate import ablation
from topkapi.evaluate.ablation import AblationSparsity, ablation_sparsity, effect_sparsity, in_float32
from topkapi.statistics.intervals import bootstrap_mean

CONTEXT, T = 7, 3
CONFIG = DataConfig(context=CONTEXT, shuffle_tokens=CONTEXT)


def of_effects(effects):
    """The sparsity of effects (m, T, V) on logits that are not 0."""
    clean = torch.randn(effects.shape[1:], dtype=effects.dtype, generator=torch.Generator().manual_seed(9))
    return effect_sparsity(clean, clean + effects)


@pytest.mark.parametrize(("n_positions", "vocabulary"), [(1, 3), (4, 10), (16, 101)])
def test_one_changed_logit_is_as_sparse_as_can_be(n_positions, vocabulary):
    effects = torch.zeros(2, n_positions, vocabulary, dtype=torch.float64)
    effects[0, -1, 1], effects[1, 0, -1] = 5.0, -0.1
    assert of_effects(effects).tolist() == pytest.approx([1 / (n_positions * vocabulary)] * 2, rel=1e-9)


def test_gaussian_effects_give_two_over_pi():
    effects = torch.randn(3, 16, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    effects[1] *= 1e-3
    effects[2] += 7  # the same for all words: no prediction changes
    assert of_effects(effects).tolist() == pytest.approx([2 / math.pi] * 3, abs=0.002)


def test_equal_effects_of_both_signs_give_one_around_an_untouched_median():
    effects = torch.ones(1, 4, 5, dtype=torch.float64)
    effects[..., :2], effects[..., 2] = -1, 0
    assert of_effects(effects).item() == pytest.approx(4 / 5)


def test_the_median_is_subtracted_at_each_position_apart():
    effects = torch.zeros(1, 3, 5, dtype=torch.float64)
    effects[0, 0, 0] = 1
    shifted = effects + torch.tensor([4.0, -2.0, 100.0])[:, None]
    assert of_effects(shifted).item() == pytest.approx(1 / 15)


def test_effects_that_change_no_prediction_are_undefined():
    effects = torch.zeros(2, 3, 5)
    effects[1] = 8
    assert effect_sparsity(torch.zeros(3, 5), effects).isnan().all()


def test_words_that_are_never_said_do_not_count():
    clean, effects = torch.zeros(2, 6), torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    wanted = effect_sparsity(clean, clean + effects)
    never = torch.full((2, 4), -torch.inf)
    found = effect_sparsity(torch.cat([never, clean], 1), torch.cat([never.expand(3, -1, -1), clean + effects], 2))
    assert torch.equal(found, wanted)


class BentModel(RunningMeanModel):
    """Logits that bend: else no scale of what is ablated could be seen, as sparsity has none."""

    @torch.no_grad()
    def logits(self, tokens, replace=None):
        at_site = self.embedding[tokens]
        at_site = replace(at_site) if replace else at_site
        self.shapes.append((*tokens.shape, self.unembedding.shape[1]))
        return (at_site.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]).tanh() @ self.unembedding


def by_hand(ae, lm, window, at):
    """{latent: sparsity} of the latents active at position `at`, by a loop over them in float64."""
    E, U = lm.embedding.double().numpy(), lm.unembedding.double().numpy()

    def logits(raw):
        return (np.tanh(np.cumsum(raw, 0) / np.arange(1, len(raw) + 1)[:, None]) @ U)[at : at + T]

    raw = E[window]
    _, latents, _, _ = reconstruct_by_hand(ae, raw[at : at + 1].copy())
    norm = np.linalg.norm(raw[at] - raw[at].mean())
    found = {}
    for i in latents[0].nonzero()[0]:
        without = raw.copy()
        without[at] -= norm * latents[0, i] * ae.W_dec[i].detach().double().numpy()
        effect = logits(without) - logits(raw)
        effect -= np.quantile(effect, 0.5, axis=1, method="lower", keepdims=True)
        found[i] = np.abs(effect).sum() ** 2 / (effect**2).sum() / effect.size
    return found


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("elements", [1, 2**26])
def test_ablations_equal_loops_over_latents_in_batches_of_any_size(activation, elements, monkeypatch):
    monkeypatch.setattr(ablation, "LOGIT_ELEMENTS", elements)
    ae, plain = random_autoencoder(k=3, activation=activation), random_model()
    lm, tokens = BentModel(plain.embedding, plain.unembedding), random_tokens(30 * CONTEXT)
    found = ablation_sparsity(ae, lm, token_file(tokens), np.arange(30), CONFIG, T)
    assert len(np.unique(found.tokens)) == 30 - found.n_skipped > 20
    for token in np.unique(found.tokens):
        here = found.tokens == token
        got = dict(zip(found.latents[here].tolist(), found.sparsity[here].tolist(), strict=True))
        window, at = divmod(int(token), CONTEXT)
        wanted = by_hand(ae, lm, tokens[window * CONTEXT :][:CONTEXT], at)
        assert got == pytest.approx(wanted, rel=1e-3)
    assert max(shape[0] for shape in lm.shapes) <= (2 if elements == 1 else 9)


def test_tokens_are_drawn_uniformly_among_kept_ones_with_enough_tokens_left():
    n = 400
    tokens = np.tile([1, 2, SPECIAL, 3, 4, 5, 1], n)
    found = ablation_sparsity(random_autoencoder(), random_model(), token_file(tokens), np.arange(n), CONFIG, T)
    places, counts = np.unique(np.unique(found.tokens) % CONTEXT, return_counts=True)
    assert places.tolist() == [1, 3, 4]  # not the first, not special, and two more tokens after it
    assert counts.min() > 133 - 3 * math.sqrt(400 * 2 / 9)


def test_draws_depend_on_the_seed_and_the_context_alone():
    ae, lm, file = random_autoencoder(), random_model(), token_file(random_tokens(20 * CONTEXT))

    def tokens(ids, seed=0):
        return np.unique(ablation_sparsity(ae, lm, file, np.array(ids), CONFIG, T, seed).tokens).tolist()

    assert tokens([3, 11]) == sorted(tokens([11]) + tokens([3])) == tokens([11, 3])
    assert tokens(range(20)) != tokens(range(20), seed=1)


def test_means_over_tokens_and_over_latents_weigh_as_they_say():
    found = AblationSparsity(
        tokens=np.array([4, 4, 4, 9, 20, 20]),
        latents=np.array([0, 1, 2, 0, 3, 0]),
        sparsity=np.array([0.1, 0.3, np.nan, 0.7, np.nan, np.nan]),
        n_skipped=0,
    )
    tokens, latents = found.over_tokens(), found.over_latents()
    assert (tokens.value, tokens.n) == (pytest.approx((0.2 + 0.7) / 2), 2)
    assert (latents.value, latents.n) == (pytest.approx((0.4 + 0.3) / 2), 2)
    assert tokens.low <= tokens.value <= tokens.high


def test_intervals_are_of_tokens_as_effects_at_one_token_resemble_each_other():
    per_token = np.random.default_rng(0).random(50)
    found = AblationSparsity(
        tokens=np.repeat(np.arange(50), 8), latents=np.arange(400), sparsity=np.repeat(per_token, 8), n_skipped=0
    )
    assert found.over_latents()[:4] == pytest.approx(bootstrap_mean(per_token.tolist())[:4])
    assert found.over_tokens()[:4] == pytest.approx(bootstrap_mean(per_token.tolist())[:4])


def test_an_ablation_without_effect_is_undefined_and_never_zero():
    file = token_file(random_tokens(4 * CONTEXT))
    found = ablation_sparsity(zero_autoencoder(), random_model(), file, np.arange(4), CONFIG, T)
    assert len(found.sparsity) > 0
    assert np.isnan(found.sparsity).all()
    estimate = found.over_tokens()
    assert estimate.value is None
    assert "none of the" in estimate.reason


def test_contexts_without_anything_to_ablate_are_counted():
    dead = random_autoencoder()
    with torch.no_grad():
        dead.latent_bias.fill_(-100)
    file = token_file(random_tokens(4 * CONTEXT))
    found = ablation_sparsity(dead, random_model(), file, np.arange(4), CONFIG, T)
    assert (len(found.sparsity), found.n_skipped, found.over_latents().value) == (0, 4, None)
    special = token_file([SPECIAL] * CONTEXT)
    assert ablation_sparsity(random_autoencoder(), random_model(), special, np.arange(1), CONFIG, T).n_skipped == 1


@pytest.mark.parametrize("n_positions", [0, CONTEXT + 1])
def test_positions_beyond_the_context_are_an_error_of_one_line(n_positions):
    with pytest.raises(TopkapiError, match=f"got n_positions={n_positions}"):
        ablation_sparsity(random_autoencoder(), random_model(), token_file(range(6)), np.arange(0), CONFIG, n_positions)


def test_a_language_model_in_bf16_is_refused():
    lm = RunningMeanModel(torch.randn(6, D_MODEL).bfloat16(), torch.randn(D_MODEL, 6).bfloat16())
    with pytest.raises(TopkapiError, match=r"lm\.model\.float"):
        ablation_sparsity(random_autoencoder(), lm, token_file(random_tokens(CONTEXT)), np.arange(1), CONFIG, T)


def test_some_of_the_latents_are_a_sample_of_all():
    ae, lm = random_autoencoder(n_latents=20, k=6), random_model()
    file, rest = token_file(random_tokens(20 * CONTEXT)), (np.arange(20), CONFIG, T)
    whole, some = ablation_sparsity(ae, lm, file, *rest), ablation_sparsity(ae, lm, file, *rest, most=2)
    assert np.array_equal(np.unique(whole.tokens), np.unique(some.tokens))
    assert np.unique(some.tokens, return_counts=True)[1].max() == 2
    of_all = {(t, i): s for t, i, s in zip(whole.tokens, whole.latents, whole.sparsity, strict=True)}
    found = {(t, i): s for t, i, s in zip(some.tokens, some.latents, some.sparsity, strict=True)}
    assert found == pytest.approx({key: of_all[key] for key in found}, nan_ok=True)
    assert len(np.unique(some.latents)) > 3


def test_a_language_model_is_float32_for_a_while_and_then_itself():
    lm = random_model()
    lm.model = torch.nn.Linear(3, 2).bfloat16()
    before = {name: it.clone() for name, it in lm.model.state_dict().items()}
    with in_float32(lm):
        assert lm.model(torch.ones(1, 3)).dtype == torch.float32
    for name, it in lm.model.state_dict().items():
        assert it.dtype == torch.bfloat16
        assert torch.equal(it, before[name])
