"""Attributions where they are exact, integrated gradients that add up, ablations against edits.

Mutations seen caught: the norm left out; the gradient of the wrong position's logits; dropped positions counted; the
negative tokens' sign turned; integration of the prompt's own gradient only; measured falls of the other sign.
"""

import math

import numpy as np
import pytest
import torch

from tests.explore.linear import linear_spliced
from topkapi.errors import TopkapiError
from topkapi.explore import Edit, attribute, measure, rank_correlation
from topkapi.explore.attribution import latents_part

TOKENS = torch.arange(3, 15)[None] * 3 % 50
UP, DOWN = [7, 11], [2, 30, 31]


def metric_of(logits):
    return float(logits[0, -1, UP].mean() - logits[0, -1, DOWN].mean())


def test_attribution_is_exact_where_the_model_is_linear_after_the_site():
    spliced = linear_spliced()
    found = attribute(spliced, TOKENS, UP, DOWN)
    clean = metric_of(spliced.lm.logits(TOKENS))
    assert found.metric == pytest.approx(clean, rel=1e-12)
    falls = [clean - metric_of(spliced.logits(TOKENS, [Edit(int(i), "ablate")])) for i in found.latents]
    np.testing.assert_allclose(found.total, falls, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(measure(spliced, TOKENS, found.latents.tolist(), UP, DOWN), falls, rtol=1e-9, atol=1e-12)
    for row, latent in enumerate(found.latents[:2].tolist()):
        for t in range(TOKENS.shape[1]):
            alone = clean - metric_of(spliced.logits(TOKENS, [Edit(latent, "ablate", where=(t,))]))
            assert found.at[row, t] == pytest.approx(alone if t else 0.0, abs=1e-12)
    correlation = rank_correlation(found.total, falls)
    assert correlation.value == pytest.approx(1.0)


def test_rows_are_all_active_latents_by_falling_size(make):
    spliced = make()
    found, code = attribute(spliced, TOKENS, UP, DOWN), spliced.code(TOKENS)
    active = code.indices[code.kept[..., None] & (code.values > 0)].unique()
    assert sorted(found.latents.tolist()) == active.tolist()
    assert (np.diff(np.abs(found.total)) <= 0).all()
    np.testing.assert_allclose(found.at.sum(1), found.total)
    for row, latent in enumerate(found.latents[:8].tolist()):
        z = torch.where((code.indices[0] == latent) & code.kept[0][:, None], code.values[0], 0).sum(1)
        np.testing.assert_allclose(found.values[row], z.numpy())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attribution_is_the_slope_of_the_metric(make, family):
    spliced = make(family)
    found, h = attribute(spliced, TOKENS, UP, DOWN), 1e-5
    for latent, total in zip(found.latents[:6].tolist(), found.total, strict=False):
        above, below = (metric_of(spliced.logits(TOKENS, [Edit(latent, "scale", 1 + d)])) for d in (h, -h))
        assert (above - below) / (2 * h) == pytest.approx(total, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_integrated_gradients_add_up_to_the_change(make, family, activation):
    spliced = make(family, activation=activation)
    part = latents_part(spliced, spliced.code(TOKENS))
    change = metric_of(spliced.lm.logits(TOKENS)) - metric_of(spliced.lm.logits(TOKENS, lambda raw: raw - part))
    gaps = [abs(attribute(spliced, TOKENS, UP, DOWN, steps=n).total.sum() - change) for n in (4, 16, 64)]
    assert gaps[2] < 0.03 * abs(change)
    assert gaps[2] < gaps[0] / 8, "the midpoint rule's error falls with the square of the steps"
    assert abs(attribute(spliced, TOKENS, UP, DOWN).total.sum() - change) > 2 * gaps[2]


def test_a_latent_for_each_of_k_is_still_in_the_order_of_values(make):
    spliced = make(n_latents=24, k=24)
    found, h = attribute(spliced, TOKENS, UP, DOWN), 1e-5
    for latent, total in zip(found.latents[:6].tolist(), found.total, strict=False):
        above, below = (metric_of(spliced.logits(TOKENS, [Edit(latent, "scale", 1 + d)])) for d in (h, -h))
        assert (above - below) / (2 * h) == pytest.approx(total, rel=1e-5, abs=1e-8)


def test_measured_ablations_equal_edits(make):
    spliced = make("gpt2", "mlp_out.0")
    spliced.lm.batch_contexts = 4  # several batches, the last one short
    found, done = attribute(spliced, TOKENS, UP, DOWN), []
    latents = [*found.latents[:7].tolist(), next(i for i in range(96) if i not in found.latents)]
    clean = metric_of(spliced.lm.logits(TOKENS))
    wanted = [clean - metric_of(spliced.logits(TOKENS, [Edit(i, "ablate")])) for i in latents]
    measured = measure(spliced, TOKENS, latents, UP, DOWN, done.append)
    np.testing.assert_allclose(measured, wanted, rtol=1e-9, atol=1e-12)
    assert measured[-1] == 0
    assert done == [3, 3, 2]
    assert measure(spliced, TOKENS, [], UP, DOWN).shape == (0,)


def test_rank_correlation_and_its_interval():
    from scipy import stats

    rng = np.random.default_rng(0)
    x = rng.standard_normal(12)
    y = x + rng.standard_normal(12)
    found = rank_correlation(x, y)
    r = stats.spearmanr(x, y).statistic
    half = 1.959964 * math.sqrt((1 + r * r / 2) / 9)
    assert found == pytest.approx((r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), 12))
    for sign in (1, -1):
        perfect = rank_correlation(x, sign * x)
        assert perfect.value == pytest.approx(sign)
        assert perfect.low <= perfect.value <= perfect.high
        assert perfect.high - perfect.low > 0.02, "twelve pairs are no certainty"
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]) is None
    covered = 0
    for _ in range(400):  # true rank correlation of this pair: 6/pi asin(0.8 / 2)
        a = rng.standard_normal(30)
        _, low, high, _ = rank_correlation(a, 0.8 * a + 0.6 * rng.standard_normal(30))
        covered += low <= 6 / math.pi * math.asin(0.4) <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_mistakes_are_named(make):
    spliced = make()
    with pytest.raises(TopkapiError, match="a positive and a negative token"):
        attribute(spliced, TOKENS, [], DOWN)
    with pytest.raises(TopkapiError, match=r"\[7\] are both"):
        measure(spliced, TOKENS, [3], [7, 8], [7])
    with pytest.raises(TopkapiError, match="no token 512: the language model has tokens 0 to 511"):
        attribute(spliced, TOKENS, [512], DOWN)
    with pytest.raises(TopkapiError, match="no latent -1"):
        measure(spliced, TOKENS, [-1], UP, DOWN)
    with pytest.raises(TopkapiError, match="steps must be 0"):
        attribute(spliced, TOKENS, UP, DOWN, steps=-1)


def test_sixteen_bits_are_refused(folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.explore.conftest import random_autoencoder
    from topkapi.data.language_model import LanguageModel
    from topkapi.explore import Spliced, ablation_effects

    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    lm = LanguageModel.wrap(model, AutoTokenizer.from_pretrained(folders["llama"]), site="resid_post.0")
    spliced = Spliced(lm, random_autoencoder().float())
    with pytest.raises(TopkapiError, match=r"lm\.model\.float\(\)"):
        measure(spliced, TOKENS, [3], UP, DOWN)
    with pytest.raises(TopkapiError, match=r"lm\.model\.float\(\)"):
        ablation_effects(spliced, TOKENS, 3, 3)
