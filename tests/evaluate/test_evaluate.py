"""evaluate(): its keys, its choice of text, and what it says when a value is undefined."""

import json
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
)
from topkapi.config import DataConfig, EvalConfig
from topkapi.evaluate import evaluate, evaluate_all, spread_contexts
from topkapi.evaluate.downstream import downstream_losses

CONFIG = DataConfig(context=5, shuffle_tokens=5)
KEYS = [
    "normalized_mse",
    "l0",
    "dead_fraction",
    "ce_clean",
    "ce_spliced",
    "ce_zero_ablation",
    "ce_mean_ablation",
    "kl",
    "loss_recovered",
    "n_tokens",
]
DOWNSTREAM = KEYS[3:9]


def kept(tokens):
    windows = np.reshape(tokens, (-1, 5))
    return windows[:, 1:][windows[:, 1:] != SPECIAL]


def test_every_value_equals_its_definition():
    ae, lm, tokens = random_autoencoder(), random_model(), random_tokens(200)
    found = evaluate(ae, lm, token_file(tokens), CONFIG, EvalConfig(tokens=200, downstream_tokens=200))
    raw = lm.embedding[kept(tokens)].double()
    x, latents, recon, _ = reconstruct_by_hand(ae, raw.numpy())
    (downstream,) = downstream_losses([ae], lm, token_file(tokens), np.arange(40), CONFIG, raw.mean(0))
    wanted = {name: replicates[0] for name, replicates in downstream.replicates.items()} | {
        "normalized_mse": ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "l0": (latents > 0).sum(1).mean(),
        "dead_fraction": (~(latents > 0).any(0)).mean(),
        "n_tokens": len(raw),
    }
    assert list(found) == KEYS
    assert found == pytest.approx(wanted, rel=1e-5)


def test_autoencoders_evaluated_together_are_evaluated_as_alone(tmp_path):
    aes = [random_autoencoder(), random_autoencoder(n_latents=333, k=3), random_autoencoder(activation="relu")]
    rest = (random_model(), token_file(random_tokens(200)), CONFIG, EvalConfig(tokens=200, downstream_tokens=100))
    found = evaluate_all(aes, *rest)
    assert [it.metrics for it in found] == [evaluate(ae, *rest) for ae in aes]
    assert evaluate_all([], *rest) == []
    for ae, it in zip(aes, found, strict=True):
        it.write_latents(tmp_path)
        saved = np.load(tmp_path / "held_out.npz")
        raw = random_model().embedding[kept(random_tokens(200))].double().numpy()
        _, latents, _, _ = reconstruct_by_hand(ae, raw)
        assert saved["n_fired"].dtype == np.int64
        assert saved["n_fired"].tolist() == (latents > 0).sum(0).tolist()
        assert saved["sum_squares"] == pytest.approx((latents**2).sum(0), rel=1e-5, abs=1e-9)
        assert saved["n_tokens"] == len(raw) == it.metrics["n_tokens"]


def test_result_is_strict_json():
    file = token_file(random_tokens(100))
    found = evaluate(random_autoencoder(), random_model(), file, CONFIG, EvalConfig(tokens=50, downstream_tokens=50))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_no_downstream_tokens_skips_the_language_model_without_a_warning(capsys):
    lm, file = random_model(), token_file(random_tokens(100))
    found = evaluate(random_autoencoder(), lm, file, CONFIG, EvalConfig(tokens=100, downstream_tokens=0))
    assert list(found) == KEYS
    assert [name for name, value in found.items() if value is None] == DOWNSTREAM
    assert lm.shapes == []
    assert "warning" not in capsys.readouterr().err


def test_contexts_are_evenly_spaced_and_no_more_than_there_are():
    file = token_file(random_tokens(103))
    assert spread_contexts(file, 5, 20).tolist() == [0, 5, 10, 15]
    assert spread_contexts(file, 5, 21).tolist() == [0, 4, 8, 12, 16]
    assert spread_contexts(file, 5, 10**9).tolist() == list(range(20))
    assert spread_contexts(file, 104, 50).tolist() == []


@pytest.mark.parametrize("tokens", [[SPECIAL] * 50, [1, 2]], ids=["nothing kept", "less than a context"])
def test_without_kept_tokens_all_is_null_and_one_line_warns(tokens, capsys):
    found = evaluate(random_autoencoder(), random_model(), token_file(tokens), CONFIG, EvalConfig())
    assert found == dict.fromkeys(KEYS) | {"n_tokens": 0}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "no token of the held-out text is kept" in line


def test_zero_ablation_without_effect_leaves_loss_recovered_null(capsys):
    lm = RunningMeanModel(torch.randn(6, D_MODEL), torch.zeros(D_MODEL, 6))
    found = evaluate(random_autoencoder(), lm, token_file(random_tokens(50)), CONFIG, EvalConfig())
    assert found["loss_recovered"] is None
    assert found["ce_clean"] == pytest.approx(math.log(6))
    assert "loss_recovered undefined" in capsys.readouterr().err


def test_zero_ablation_that_helps_is_said(capsys):
    wrong = RunningMeanModel(torch.eye(4), -9 * torch.eye(4))  # says that a token never repeats
    found = evaluate(identity_autoencoder(), wrong, token_file([1] * 50), CONFIG, EvalConfig())
    assert found["ce_zero_ablation"] < found["ce_clean"]
    lines = capsys.readouterr().err
    assert "normalized_mse undefined" in lines  # all tokens are equal
    assert "zero ablation lowers the cross-entropy" in lines


def test_a_diverged_autoencoder_is_reported_not_hidden(capsys):
    ae = random_autoencoder()
    with torch.no_grad():
        ae.W_dec.fill_(torch.nan)
    file = token_file(random_tokens(50))
    found = evaluate(ae, random_model(), file, CONFIG, EvalConfig())
    assert [name for name, value in found.items() if value is None] == [
        "normalized_mse",
        "ce_spliced",
        "kl",
        "loss_recovered",
    ]
    assert "reconstruction not finite" in capsys.readouterr().err
