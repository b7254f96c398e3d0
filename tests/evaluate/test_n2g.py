"""Explanations of latents whose rule is known, prediction against a search of all patterns, scores by hand.

Mutations seen caught: the longest suffix with the activation; anchors ignored; a wildcard before an exact token;
back-tracking; the longest pattern first; a wildcard before the start of the context; leaves overwritten; the filler's
activation read; excluded positions explained or scored; answers out of order.
"""

import math

import numpy as np
import pytest
import torch

from tests.evaluate.stand_ins import SPECIAL, RunningMeanModel, random_autoencoder, random_model, random_tokens
from topkapi.config import DataConfig
from topkapi.data.activations import kept_positions
from topkapi.errors import TopkapiError
from topkapi.evaluate.n2g import (
    Explanation,
    Pattern,
    Score,
    activation_of,
    explain,
    explain_latents,
    find_patterns,
    latent_activations,
    over_latents,
    padding_token_of,
    score,
)

PAD, ANY = 99, None


def rule(function):
    """An `Activation` from a rule for one text, which counts the texts it was asked about."""

    def activation(texts):
        activation.n_texts += len(texts)
        return torch.tensor([float(function(text)) for text in texts])

    activation.n_texts = 0
    return activation


def predicted(patterns, context):
    explanation = Explanation(patterns, len(patterns))
    return explanation.predict(torch.tensor([context]))[0].tolist()


def pattern(*tokens, anchored=False, activation=1.0):
    return Pattern(tokens, anchored, activation)


def test_the_shortest_suffix_with_the_activation_is_kept():
    fires = rule(lambda text: 2.0 * (text[-2:] == [3, 5]))
    found = find_patterns([[8, 1, 3, 5], [3, 5], [7] * 40 + [3, 5]], [2.0] * 3, fires, PAD)
    assert found.patterns == (Pattern((3, 5), False, 2.0),)
    assert (found.n_examples, found.n_dropped) == (3, 0)


def test_half_the_activation_is_enough_by_default_and_the_share_decides():
    def by_length(text):
        return min(len(text), 4) / 4 if text[-1] == 5 else 0

    tokens = {
        share: find_patterns([[1, 2, 3, 4, 5]], [1.0], rule(by_length), PAD, share).patterns[0].tokens
        for share in (0.25, 0.5, 0.75, 1.0)
    }
    assert [len(t) for t in tokens.values()] == [1, 2, 3, 4]
    assert find_patterns([[1, 2, 3, 4, 5]], [1.0], rule(by_length), PAD).patterns[0].activation == 0.5


@pytest.mark.parametrize("gap", [1, 2, 10])
def test_tokens_without_which_it_fires_as_well_become_wildcards(gap):
    fires = rule(lambda text: len(text) > gap + 1 and text[-gap - 2] == 7 and text[-1] == 5)
    found = find_patterns([[1, 2, 7, *range(20, 20 + gap), 5]], [1.0], fires, PAD)
    assert found.patterns == (Pattern((7, *[ANY] * gap, 5), False, 1.0),)
    assert predicted(found.patterns, [7, *range(50, 50 + gap), 5])[-1] == 1
    assert predicted(found.patterns, [7, *range(50, 50 + gap + 1), 5])[-1] == 0


def test_a_firing_that_padding_ends_is_anchored_at_the_start_of_the_context():
    found = find_patterns([[2, 4]], [1.0], rule(lambda text: text == [2, 4]), PAD)
    assert found.patterns == (Pattern((2, 4), True, 1.0),)
    assert predicted(found.patterns, [2, 4, 2, 4]) == [0, 1, 0, 0]
    floating = find_patterns([[2, 4]], [1.0], rule(lambda text: text[-2:] == [2, 4]), PAD)
    assert predicted(floating.patterns, [2, 4, 2, 4]) == [0, 1, 0, 1]


def test_where_no_suffix_keeps_the_activation_the_whole_text_stays():
    found = find_patterns([[1, 2, 3]], [1.0], rule(lambda text: 0.2 * (text[-1] != PAD)), PAD)
    assert found.patterns == (Pattern((ANY, ANY, 3), True, pytest.approx(0.2)),)


def test_examples_on_which_the_function_gives_nothing_are_counted():
    found = find_patterns([[1, 2], [3]], [1.0, 1.0], rule(lambda text: text == [3]), PAD)
    assert (found.n_examples, found.n_dropped, len(found.patterns)) == (2, 1, 1)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 30, 64])
def test_the_texts_asked_about_are_as_few_as_stated(m):
    context = list(range(64))
    fires = rule(lambda text: len(text) >= m)
    assert len(find_patterns([context], [1.0], fires, PAD).patterns[0].tokens) == m
    assert fires.n_texts <= min(64, 2 * m) + 1 + m


def test_an_exact_token_goes_before_a_wildcard():
    patterns = [pattern(ANY, 5, activation=1.0), pattern(3, 5, activation=2.0)]
    assert predicted(patterns, [3, 5, 4, 5]) == [0, 2, 0, 1]


def test_a_branch_once_taken_is_not_left_again():
    """[7, ANY, 5] fits 7 3 5, but 3 leads to [8, 3, 5]."""
    patterns = [pattern(7, ANY, 5), pattern(8, 3, 5, activation=2.0)]
    assert predicted(patterns, [7, 3, 5])[-1] == 0
    assert predicted(patterns, [8, 3, 5])[-1] == 2
    assert predicted(patterns, [7, 4, 5])[-1] == 1
    assert predicted(patterns, [8, 4, 5])[-1] == 0


def test_the_shorter_pattern_hides_those_that_end_in_it():
    patterns = [pattern(1, 2, 3, activation=9.0), pattern(2, 3, activation=4.0)]
    assert predicted(patterns, [1, 2, 3])[-1] == 4
    assert predicted(patterns[::-1], [1, 2, 3])[-1] == 4


def test_matching_ends_at_the_token_and_not_before_it():
    assert predicted([pattern(1, 2)], [1, 2, 3, 1, 3, 2]) == [0, 1, 0, 0, 0, 0]


def test_a_wildcard_needs_a_token():
    assert predicted([pattern(ANY, 5)], [5, 5]) == [0, 1]
    assert predicted([pattern(ANY)], [5, 6]) == [1, 1]
    assert predicted([pattern(ANY, 5, anchored=True)], [5, 5, 5]) == [0, 1, 0]
    assert predicted([pattern(5, anchored=True, activation=2.0), pattern(ANY, 5)], [5, 5]) == [2, 1]


def test_equal_patterns_are_one_with_their_mean_activation():
    patterns = [pattern(1, activation=2.0), pattern(1, activation=4.0), pattern(1, anchored=True, activation=8.0)]
    explanation = Explanation(patterns, 3)
    assert explanation.patterns == (pattern(1, activation=3.0), pattern(1, anchored=True, activation=8.0))


@pytest.mark.parametrize("seed", range(20))
def test_without_wildcards_prediction_is_the_shortest_pattern_that_fits(seed):
    rng = np.random.default_rng(seed)
    patterns = [
        pattern(*rng.integers(0, 3, rng.integers(1, 5)).tolist(), anchored=bool(rng.random() < 0.3), activation=i + 1.0)
        for i in range(6)
    ]
    patterns = list({(p.tokens, p.anchored): p for p in patterns}.values())
    contexts = torch.from_numpy(rng.integers(0, 3, (5, 8)))

    def search(context, position):
        fits = []
        for p in patterns:
            start = position + 1 - len(p.tokens)
            if start >= 0 and tuple(context[start : position + 1]) == p.tokens and (start == 0 or not p.anchored):
                fits.append((len(p.tokens) + p.anchored, p.activation))
        return min(fits, default=(0, 0.0))[1]

    wanted = [[search(context, i) for i in range(8)] for context in contexts.tolist()]
    assert Explanation(patterns, 6).predict(contexts).tolist() == wanted


def test_examples_are_drawn_by_the_seed_from_all_firings():
    tokens = torch.arange(200).view(20, 10)
    activations = (tokens % 3 == 0).float()
    drawn = [explain(tokens, activations, rule(lambda t: t[-1] % 3 == 0), 1, 5, seed).patterns for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(p.tokens[-1] % 3 == 0 for p in drawn[0])
    assert [explain(tokens, activations, rule(lambda _: 1.0), PAD, n).n_examples for n in (5, 100)] == [5, 67]


def test_scores_are_ratios_of_counts_over_kept_tokens():
    tokens = torch.tensor([[1, 2, 1, 1, 3]])
    activations = torch.tensor([[9.0, 0.5, 0.5, 0, 0]])
    keep = torch.tensor([[False, True, True, True, True]])
    found = score(Explanation([pattern(1)], 1), tokens, activations, keep)
    assert (found.precision, found.recall, found.f1) == (1 / 2, 1 / 2, 1 / 2)
    assert (found.n_predicted, found.n_active, found.n_tokens, found.undefined) == (2, 2, 4, {})


def test_what_is_undefined_is_none_with_a_reason():
    tokens, keep = torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    fires, silent = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    misses = score(Explanation([pattern(7)], 1), tokens, fires, keep)
    assert (misses.precision, misses.recall, misses.f1) == (None, 0, 0)
    assert misses.undefined == {"precision": "no pattern matches any of the 2 tokens"}
    never = score(Explanation([pattern(1)], 1), tokens, silent, keep)
    assert (never.precision, never.recall, never.f1) == (0, None, 0)
    assert never.undefined == {"recall": "the latent fires on none of the 2 tokens"}
    neither = score(Explanation([pattern(7)], 1), tokens, silent, keep)
    assert set(neither.undefined) == {"precision", "recall", "f1"}
    for explanation, why in (
        (Explanation([], 0), "there was no example firing to explain"),
        (Explanation([], 3, 3), "3 of 3 example firings gave no pattern"),
    ):
        found = score(explanation, tokens, fires, keep)
        assert (found.precision, found.recall, found.f1) == (None, None, None)
        assert set(found.undefined.values()) == {why}


def test_means_over_latents_leave_undefined_values_out():
    def of(precision, recall):
        return Score(precision, recall, None, 1, 1, 1, {})

    found = over_latents([of(0.5, None), of(1.0, 0.25), of(None, 0.75)])
    assert (found["precision"].value, found["precision"].n) == (0.75, 2)
    assert (found["recall"].value, found["recall"].n) == (0.5, 2)
    assert found["f1"].value is None
    assert found["recall"].low <= 0.5 <= found["recall"].high


class CausalModel(RunningMeanModel):
    """Activation = a decaying sum of the embeddings so far."""

    @torch.no_grad()
    def activations(self, tokens):
        self.shapes.append(tuple(tokens.shape))
        state, out = 0, []
        for column in self.embedding[tokens].unbind(1):
            state = column + 0.5 * state
            out.append(state)
        return torch.stack(out, 1)


def causal_model(batch_contexts=32):
    plain = random_model(vocabulary=12)
    lm = CausalModel(plain.embedding, plain.unembedding)
    lm.batch_contexts = batch_contexts
    return lm


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("batch_contexts", [1, 3, 32])
def test_the_language_model_answers_for_texts_of_any_length_as_for_whole_contexts(batch_contexts, kind):
    ae, lm = random_autoencoder(activation=kind), causal_model(batch_contexts)
    tokens = torch.from_numpy(random_tokens(4 * 9, vocabulary=12)).view(4, 9)
    whole = latent_activations(ae, lm, tokens, [2, 5])
    values, indices = ae.encode(ae.normalise(causal_model().activations(tokens).flatten(0, 1)).x)
    for i, latent in enumerate((2, 5)):
        wanted = torch.where(indices == latent, values, 0).sum(1).view(4, 9)
        torch.testing.assert_close(whole[..., i], wanted)
        texts = [tokens[row, : n + 1].tolist() for row in range(4) for n in (8, 0, 3, 5)]
        answer = activation_of(ae, lm, latent, filler=7)(texts)
        torch.testing.assert_close(answer, torch.stack([wanted[row, n] for row in range(4) for n in (8, 0, 3, 5)]))
    assert (whole > 0).any()
    assert max(shape[0] for shape in lm.shapes) <= batch_contexts


def test_latents_of_single_tokens_are_explained_completely():
    """The stand-in's activation depends on the token alone, so each latent is a set of tokens."""
    ae, lm = random_autoencoder(n_latents=20, k=3), random_model(vocabulary=30)
    config = DataConfig(context=8, shuffle_tokens=8)
    sample, held_out = torch.from_numpy(random_tokens(800 * 8, vocabulary=30)).view(2, 400, 8)
    silent = latent_activations(ae, lm, torch.tensor([[0, 17]]), range(20))[0, 1] == 0  # on the padding token
    few = [i for i in range(20) if silent[i]]
    results = explain_latents(ae, lm, few, sample, held_out, config, padding_token=17)
    found = [s for _, s in results if s.n_active]
    assert len(found) > 5
    assert all(s.precision == 1 for s in found)
    assert over_latents(found)["recall"].value > 0.9  # 16 examples may miss one of a latent's tokens
    assert found[0].n_tokens == int(kept_positions(held_out, config, lm.special_ids).sum())


def test_positions_that_training_leaves_out_are_no_examples():
    ae, lm = random_autoencoder(), random_model()
    sample = torch.full((3, 8), SPECIAL)
    latent = int(latent_activations(ae, lm, sample, range(8))[0, 0].argmax())
    config = DataConfig(context=8, shuffle_tokens=8)
    ((explanation, _),) = explain_latents(ae, lm, [latent], sample, sample, config, 1)
    assert explanation.n_examples == 0
    kept = DataConfig(context=8, shuffle_tokens=8, drop_first_position=False, drop_special_tokens=False)
    ((explanation, _),) = explain_latents(ae, lm, [latent], sample, sample, kept, 1)
    assert explanation.n_examples == 16


def test_a_silent_latent_is_undefined():
    ae, lm = random_autoencoder(), causal_model()
    with torch.no_grad():
        ae.latent_bias[3] = -100
    tokens = torch.from_numpy(random_tokens(40, vocabulary=12)).view(5, 8)
    config = DataConfig(context=8, shuffle_tokens=8)
    ((explanation, found),) = explain_latents(ae, lm, [3], tokens, tokens, config, PAD)
    assert (explanation.n_examples, explanation.patterns, found.f1) == (0, (), None)


def test_the_padding_token_is_one_token_or_an_error():
    class Tokenizer:
        def __init__(self, *ids):
            self.ids = dict(zip([" _", "_"], ids, strict=True))

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return self.ids[text]

    lm = random_model()
    lm.name, lm.tokenizer = "some", Tokenizer([4808], [7])
    assert padding_token_of(lm) == 4808
    lm.tokenizer = Tokenizer([1, 7], [7])
    assert padding_token_of(lm) == 7
    lm.tokenizer = Tokenizer([1, 2, 3], [1, 2])
    with pytest.raises(TopkapiError, match="splits '_' into 2 tokens"):
        padding_token_of(lm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": [1.0, 2.0]}, "got 1 and 2"),
        ({"prefixes": [[]]}, "got 0 tokens"),
        ({"activations": [0.0]}, "2 tokens with 0.0"),
        ({"activations": [math.nan]}, "2 tokens with nan"),
        ({"prefixes": [[1, -1]]}, "negative"),
        ({"padding_token": -1}, "negative"),
        ({"share": 0.0}, "got 0.0"),
        ({"share": 1.5}, "got 1.5"),
        ({"activation": lambda texts: torch.zeros(len(texts) + 1)}, r"it gave \(3,\)"),
        ({"activation": lambda texts: torch.full((len(texts),), math.nan)}, "0 of them finite"),
    ],
)
def test_what_cannot_be_explained_is_an_error_of_one_line(change, message):
    given = {"prefixes": [[1, 2]], "activations": [1.0], "activation": rule(lambda _: 1.0), "padding_token": PAD}
    with pytest.raises(TopkapiError, match=message) as error:
        find_patterns(**(given | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("latent", [-1, 8])
def test_a_latent_that_is_not_there_is_an_error_of_one_line(latent):
    with pytest.raises(TopkapiError, match=rf"latents 0\.\.7; there is no latent {latent}"):
        activation_of(random_autoencoder(), causal_model(), latent)
