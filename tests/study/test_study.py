"""Every number of a study against a dense matrix of all values, and every example against the tokens themselves.

Mutations seen caught: entries of value 0 kept; rows of a chunk not offset by those before; a range's entries counted
from the start of the file; windows that reach into the next document; importance over firings instead of tokens.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.study.conftest import TOKENS, dense, finished
from topkapi.config import LossConfig, ModelConfig
from topkapi.study import invert


@pytest.fixture
def busy(wanted):
    """The latents that fire most and least often, of those that fire at all."""
    order = np.argsort((wanted.values > 0).sum(0))
    fired = [int(i) for i in order if (wanted.values[:, i] > 0).any()]
    return [fired[0], fired[len(fired) // 2], *fired[-3:]]


def test_the_code_by_token_is_the_whole_code(study, wanted):
    assert study.n_tokens == len(wanted.values)
    assert len(study.arrays["tokens"]) >= TOKENS
    for row, values in enumerate(wanted.values):
        code = study.code(row)
        assert code.indices.tolist() == np.flatnonzero(values).tolist()
        assert np.array_equal(code.values, values[values > 0])


def test_the_code_by_latent_is_the_whole_code(study, wanted):
    for i, column in enumerate(wanted.values.T):
        latent = study.latent(i)
        assert latent.rows.tolist() == np.flatnonzero(column).tolist()
        assert np.array_equal(latent.values, column[column > 0])
        assert not latent.is_sample


def test_statistics_of_all_latents(study, wanted):
    exact = wanted.values.astype(np.float64)
    assert np.array_equal(study.density, (exact > 0).mean(0))
    np.testing.assert_allclose(study.importance, (exact**2).mean(0), rtol=1e-12)
    assert np.array_equal(study.n_fired, (exact > 0).sum(0))
    position = wanted.positions % study.context
    assert study.context_positions.tolist() == np.bincount(position, minlength=study.context).tolist()
    assert study.context_positions[0] == 0, "the first position is not encoded"


def test_statistics_of_a_latent(study, wanted, busy):
    for i in busy:
        latent, column = study.latent(i), wanted.values[:, i].astype(np.float64)
        fired = column[column > 0]
        assert latent.density == (column > 0).mean()
        assert latent.mean == pytest.approx(fired.mean(), rel=1e-12)
        assert latent.importance == pytest.approx((column**2).mean(), rel=1e-12)
        assert latent.maximum == fired.max()
        assert latent.quantiles([0.0, 0.3, 1.0]) == pytest.approx(np.quantile(fired, [0.0, 0.3, 1.0]).tolist())
        found = latent.histogram(7)
        counts, edges = np.histogram(fired, 7, (0, fired.max()))
        assert found.counts.tolist() == counts.tolist()
        assert found.counts.sum() == latent.n_fired
        assert found.edges.tolist() == edges.tolist()
        where = wanted.positions[column > 0] % study.context
        assert latent.positions().tolist() == np.bincount(where, minlength=study.context).tolist()


def test_coactive_latents(study, wanted, busy):
    fires = wanted.values > 0
    for i in busy:
        both = (fires & fires[:, [i]]).sum(0)
        both[i] = 0
        order = [int(j) for j in np.argsort(-both, kind="stable")[:6] if both[j]]
        found = study.latent(i).coactive(6)
        assert [(it.latent, it.n_both) for it in found] == [(j, both[j]) for j in order]
        for it in found:
            assert it.given_this == it.n_both / fires[:, i].sum()
            assert it.given_other == it.n_both / fires[:, it.latent].sum()


def check_example(example, trained, wanted, i, study):
    """An example's number, place and text, from the token file."""
    text, context = trained.text, study.context
    place = int(wanted.positions[example.row])
    assert example.value == wanted.values[example.row, i]
    assert example.position == place % context
    documents = np.searchsorted(text.offsets, np.arange(text.n_tokens), side="right") - 1
    assert example.document == documents[place]
    around = [
        p
        for p in range(place - 24, place + 13)
        if 0 <= p < text.n_tokens and p // context == place // context and documents[p] == example.document
    ]
    assert example.tokens == text.tokens[around].tolist()
    assert around[example.at] == place
    rows = {int(p): row for row, p in enumerate(wanted.positions)}
    assert example.values == [float(wanted.values[rows[p], i]) if p in rows else None for p in around]


def test_examples_hold_the_text_of_their_document(study, trained, wanted, busy):
    for i in busy:
        latent = study.latent(i)
        shares = [example for share in latent.by_quantile(3, 4) for example in share]
        for example in [*latent.top(), *latent.random(), *shares, *latent.near_misses()]:
            check_example(example, trained, wanted, i, study)


def test_top_examples_are_the_strongest_one_a_context(study, wanted, busy):
    for i in busy:
        column, contexts, texts, found = wanted.values[:, i], set(), set(), []
        for row in sorted(np.flatnonzero(column), key=lambda row: (-column[row], row)):
            example = study.latent(i).example(int((np.flatnonzero(column) == row).argmax()))
            context, text = wanted.positions[row] // study.context, (example.at, *example.tokens)
            if context not in contexts and text not in texts:
                contexts.add(context)
                texts.add(text)
                found.append(row)
        assert [example.row for example in study.latent(i).top(5)] == found[:5]


def test_near_misses_are_the_weakest(study, wanted, busy):
    for i in busy:
        fired = np.sort(wanted.values[:, i][wanted.values[:, i] > 0])
        assert [example.value for example in study.latent(i).near_misses(4)] == fired[:4].tolist()


def test_shares_of_quantiles_hold_their_values(study, wanted, busy):
    for i in busy:
        falling = -np.sort(-wanted.values[:, i][wanted.values[:, i] > 0])
        shares = np.array_split(falling, 3)
        for share, group in zip(shares, study.latent(i).by_quantile(3, 4), strict=True):
            assert len(group) == min(4, len(share))
            assert all(share[-1] <= example.value <= share[0] for example in group)


def test_random_examples_are_seeded_and_unbiased(study, busy):
    latent = study.latent(busy[-1])
    assert latent.random(5, seed=3) == latent.random(5, seed=3)
    assert latent.random(5, seed=3) != latent.random(5, seed=4)
    n, draws = len(latent.rows), 400
    drawn = np.bincount([e for s in range(draws) for e in latent._draw(np.arange(n), 5, s)], minlength=n)
    spread = np.sqrt(draws * 5 / n * (1 - 5 / n))
    assert abs(drawn - draws * 5 / n).max() < 5 * spread
    assert len({example.row for example in latent.random(10**6)}) == n


def test_nearest_latents(study, trained):
    for by, weight in (("decoder", trained.ae.W_dec), ("encoder", trained.ae.W_enc)):
        unit = weight.detach().double() / weight.detach().double().norm(dim=1, keepdim=True)
        cosines = unit @ unit[7]
        cosines[7] = -9
        found = study.nearest(7, 5, by)
        assert [it.latent for it in found] == cosines.argsort(descending=True)[:5].tolist()
        assert [it.cosine for it in found] == pytest.approx(cosines.sort(descending=True).values[:5].tolist(), abs=1e-6)


def test_votes_are_the_decoder_row_through_the_unembedding(study, trained):
    logits = trained.lm.model.lm_head.weight.detach() @ trained.ae.W_dec[7].detach()
    logits -= logits.mean()
    found = study.votes(7, trained.lm, 4)
    assert [it.token for it in found.up] == logits.argsort(descending=True)[:4].tolist()
    assert [it.token for it in found.down] == logits.argsort()[:4].tolist()
    assert [it.logit for it in found.up] == pytest.approx(logits[[it.token for it in found.up]].tolist(), abs=1e-6)


def test_a_dead_autoencoder_gives_gaps(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trained.ae, "encode", lambda x: (torch.zeros(len(x), 4), torch.arange(4).expand(len(x), 4)))
    latent = trained.study(tmp_path / "dead").latent(2)
    assert latent.n_fired == 0
    assert latent.density == 0
    assert latent.mean is latent.maximum is latent.quantiles() is latent.histogram() is latent.positions() is None
    assert latent.top() == latent.random() == latent.near_misses() == latent.coactive() == []
    assert latent.by_quantile(2) == [[], []]


def test_relu_autoencoders_have_any_number_of_active_latents(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(invert, "ENTRIES_AT_ONCE", 20_000)
    monkeypatch.setattr(invert, "CHUNK_ENTRIES", 7_000)
    relu = replace(
        small_config,
        model=ModelConfig(n_latents=128, k=4, activation="relu"),
        loss=LossConfig(sparsity="l1", l1_coefficient=0.01),
    )
    trained = finished(relu, tmp_path / "run")
    study, wanted = trained.study(tmp_path / "study"), dense(trained)
    assert len({len(study.code(row).indices) for row in range(40)}) > 1
    for i in range(0, 128, 9):
        column = wanted.values[:, i]
        assert study.latent(i).rows.tolist() == np.flatnonzero(column).tolist()
        assert np.array_equal(study.latent(i).values, column[column > 0])


@pytest.mark.parametrize("reservoir", [1, 3, 20])
def test_a_reservoir_keeps_a_sample_and_exact_moments(trained, wanted, tmp_path, reservoir):
    study = trained.study(tmp_path / "some", reservoir=reservoir)
    exact = wanted.values.astype(np.float64)
    assert np.array_equal(study.density, (exact > 0).mean(0))
    np.testing.assert_allclose(study.importance, (exact**2).mean(0), rtol=1e-12)
    for i, column in enumerate(wanted.values.T):
        latent = study.latent(i)
        assert len(latent.rows) == min(reservoir, (column > 0).sum())
        assert np.array_equal(latent.values, column[latent.rows])
        assert (np.diff(latent.rows.astype(int)) > 0).all()
        assert latent.is_sample == (len(latent.rows) < (column > 0).sum())
        assert latent.maximum == (column.max() if column.any() else None)
    busiest = int(study.n_fired.argmax())
    example = study.latent(busiest).top(1)[0]
    assert 0.0 not in example.values, "where a sample says nothing is not 0"
