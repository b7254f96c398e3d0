"""Samples and counts where the answer is known.

Mutations seen caught: other random numbers for the steered text; one stream for all samples; the numbers of the first
position at all of them, or of the first batch in all; KL the other way round, of the clean text, or shifted by a token;
a text that goes on after its end; controls that share the steered samples' random numbers; the temperature left out.
"""

import re

import numpy as np
import pytest
import torch

from topkapi.errors import TopkapiError
from topkapi.explore import Edit, experiment, sample, steering
from topkapi.explore.drawing import exponential, sample_keys, splitmix
from topkapi.explore.prompts import continuation
from topkapi.explore.steering import texts_at_once

PROMPT = torch.tensor([[40, 47, 54, 61, 68, 75]])
PUSH = [Edit(5, "clamp", 12.0)]


def same(a, b):
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_the_same_seed_gives_the_same_samples(make, family, monkeypatch):
    spliced = make(family)
    found = sample(spliced, PROMPT, PUSH, 3, 5, seed=4)
    assert same(found, sample(spliced, PROMPT, PUSH, 3, 5, seed=4))
    assert not np.array_equal(found.clean, sample(spliced, PROMPT, PUSH, 3, 5, seed=5).clean)
    more = sample(spliced, PROMPT, PUSH, 5, 5, seed=4)
    assert np.array_equal(more.clean[:3], found.clean)
    assert np.array_equal(more.steered[:3], found.steered)
    assert len({tuple(row) for row in more.clean.tolist()}) == 5
    torch.manual_seed(1)
    for setting, value in (("CONTEXT", 11), ("DRAWN_ELEMENTS", 2 * 512)):
        with monkeypatch.context() as patch:
            patch.setattr(steering, setting, value)
            spliced.lm.batch_contexts = 2 if setting == "CONTEXT" else 32
            assert texts_at_once(spliced, 11) == 2
            apart = sample(spliced, PROMPT, PUSH, 5, 5, seed=4)
            assert same((apart.clean, apart.steered), (more.clean, more.steered))


def test_logits_that_are_no_numbers_are_told_and_not_a_kl_of_zero(make):
    huge = [Edit(1, "clamp", 1e6), *[Edit(1, "scale", 1e6)] * 60]  # beyond float64
    with pytest.raises(TopkapiError, match=r"clamp latent 1 1e.06, .* no numbers: give smaller values"):
        sample(make(), PROMPT, huge, 1, 2)


def test_an_edit_that_changes_nothing_gives_the_same_text(make):
    spliced = make()
    for edits in ([], [Edit(5, "scale", 1.0)], [Edit(5, "clamp", 9.0, where=(100,))]):
        found = sample(spliced, PROMPT, edits, 3, 8)
        assert np.array_equal(found.clean, found.steered)
        assert not found.kl.any()
        assert found.mean_kl == 0
        assert [found.first_difference(i) for i in range(3)] == [None] * 3


def test_texts_part_where_the_edit_changes_a_token(make):
    spliced = make()
    late = [Edit(5, "clamp", 60.0, where=(9,))]  # the fourth new token is at position 9
    found = sample(spliced, PROMPT, late, 6, 6, temperature=0.05)  # so that small changes show
    assert np.array_equal(found.clean[:, :4], found.steered[:, :4])
    assert not found.kl[:, :4].any()
    assert ((found.kl[:, 4] > 0) | (found.steered_lengths < 5)).all()
    first = [found.first_difference(i) for i in range(6)]
    assert 4 in first
    assert all(i is None or i >= 4 for i in first)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_those_of_uncached_sampling(make, temperature):
    spliced = make("gpt2")
    found = sample(spliced, PROMPT, PUSH, 2, 5, temperature, seed=3)
    for i in range(2):
        for edits, written in (((), found.clean[i]), (PUSH, found.steered[i])):
            tokens, key = PROMPT, sample_keys(3, 0, 2, torch.device("cpu"))[i : i + 1]
            for t, token in enumerate(written.tolist()):
                noise = -exponential(splitmix(key, torch.tensor([t])), 512)[0].log()
                logits = spliced.logits(tokens, edits)[0, -1] / temperature
                assert int((logits + noise).argmax()) == token
                tokens = torch.cat([tokens, torch.tensor([[token]])], 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_only_the_last_token_of_a_prompt_has_logits(make, family):
    lm, shapes = make(family).lm, []
    handle = lm.model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: shapes.append(out.shape[1]))
    lm.next_logits(PROMPT)
    handle.remove()
    assert shapes == [1]


def test_kl_is_of_the_steered_text(make):
    spliced = make()
    found = sample(spliced, PROMPT, PUSH, 2, 6, temperature=0.05)
    assert found.first_difference(0) is not None
    for i in range(2):
        tokens = torch.cat([PROMPT, torch.from_numpy(found.steered[i : i + 1])], 1)
        p, q = (spliced.logits(tokens, edits)[0, 5:-1].softmax(-1) for edits in (PUSH, ()))
        np.testing.assert_allclose(found.kl[i], (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-9)
    assert found.mean_kl == pytest.approx(found.kl.mean())


def test_a_text_that_has_ended_stays_so(make):
    spliced = make()
    end = spliced.lm.tokenizer.eos_token_id
    head = spliced.lm.model.lm_head
    bias = torch.nn.Parameter(torch.full((512,), -1.0, dtype=torch.float64), requires_grad=False)
    bias[end] = 3.0
    head.bias = bias
    try:
        found = sample(spliced, PROMPT, PUSH, 6, 12)
    finally:
        head.bias = None
    ended = 0
    for row, length in zip(found.steered, found.steered_lengths, strict=True):
        assert end not in row[: length - 1]
        assert (row[length:] == end).all()
        ended += length < 12
    assert ended
    assert not found.kl[np.arange(12) >= found.steered_lengths[:, None]].any()
    assert end not in [spliced.lm.tokenizer(continuation(spliced.lm, row.tolist()))["input_ids"] for row in found.clean]


def test_an_experiment_counts_what_is_there(make):
    spliced = make()
    controls = [[Edit(i, "clamp", 12.0)] for i in (20, 21, 22)]
    found = sample(spliced, PROMPT, PUSH, 8, 6, seed=2)
    lengths = {"clean": found.clean_lengths, "steered": found.steered_lengths}
    texts = {
        name: [continuation(spliced.lm, row[:n]) for row, n in zip(getattr(found, name).tolist(), of, strict=True)]
        for name, of in lengths.items()
    }
    pattern = re.compile("[a-e]n|s")
    ran = experiment(spliced, PROMPT, PUSH, controls, pattern, 8, 6, seed=2)
    for name in ("clean", "steered"):
        rate = getattr(ran, name)
        assert (rate.n, rate.of) == (sum(bool(pattern.search(text)) for text in texts[name]), 8)
    assert ran.control_latents == [[20], [21], [22]]
    assert ran.controls.n == sum(rate.n for rate in ran.each_control)
    assert ran.controls.of == 24
    assert ran.steered_less_controls.value == pytest.approx(ran.steered.value - ran.controls.value)
    assert ran.steered_less_clean.value == pytest.approx(ran.steered.value - ran.clean.value)


def test_an_experiment_sees_an_effect_that_is_there_and_none_where_there_is_none(make):
    spliced = make(site="resid_post.1")
    word = 300
    unembedding = spliced.lm.model.lm_head.weight
    spliced.ae.W_dec.detach()[5] = unembedding[word] / unembedding[word].norm()  # latent 5 speaks for one word
    unembedding.detach().mul_(30)
    idle = [[Edit(i, "scale", 1.0)] for i in range(20, 22)]
    pattern = re.compile(re.escape(continuation(spliced.lm, [word])))
    try:
        steered = experiment(spliced, PROMPT, [Edit(5, "clamp", 1e3)], idle, pattern, 12, 4)
        nothing = experiment(spliced, PROMPT, [Edit(6, "scale", 1.0)], idle, pattern, 12, 4)
    finally:
        unembedding.detach().div_(30)
    assert steered.steered_less_controls.excludes_zero
    assert steered.steered_less_controls.low > 0.2
    assert not nothing.steered_less_controls.excludes_zero
    never = experiment(spliced, PROMPT, PUSH, idle, re.compile("\x00"), 4, 2)
    assert never.steered_less_controls.value == 0
    assert never.steered.high < 0.6


def test_controls_have_random_numbers_of_their_own(make, monkeypatch):
    seen = []
    monkeypatch.setattr(steering, "continuation", lambda _lm, ids: seen.append(tuple(ids)) or "")
    idle = [[Edit(i, "scale", 1.0)] for i in (19, 20, 21)]
    experiment(make(), PROMPT, idle[0], idle[1:], re.compile("a"), 3, 6)
    clean, steered, first, second = (seen[i : i + 3] for i in range(0, 12, 3))
    assert clean == steered
    assert not {*clean} & {*first}
    assert not {*first} & {*second}


def test_mistakes_are_named(make):
    spliced = make()
    for wrong, match in [
        ((0, 4), "1 at least; got 0 samples"),
        ((2, 0), "2 samples of 0 tokens"),
        ((2, 4, 0.0), "temperature must be more than 0"),
        ((2, 4, float("inf")), "temperature"),
        ((2, 4, 1.0, -1), "seed must be 0 or more"),
        ((2, 4, 1.0, 2**63), "below 2\\^63; got 9223372036854775808"),
        ((2, 123), "has 6 tokens and 123 are to follow"),
    ]:
        with pytest.raises(TopkapiError, match=match):
            sample(spliced, PROMPT, PUSH, *wrong)
    with pytest.raises(TopkapiError, match="no latent 96"):
        sample(spliced, PROMPT, [Edit(96, "ablate")], 2, 4)
    with pytest.raises(TopkapiError, match="2 controls at least"):
        experiment(spliced, PROMPT, PUSH, [PUSH], re.compile("a"), 2, 4)
