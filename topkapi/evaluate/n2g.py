"""Neuron-to-graph explanations: patterns of tokens that predict where a latent fires, and how well they do.

Of each of a latent's example firings, the tokens up to the firing one:

1. The shortest suffix whose last token still has `share` of the example's activation; all of the tokens where none has.
2. With a padding token put before it: where the activation then falls below `share` of the example's, the pattern is
   anchored and matches at the start of a context only.
3. Each token of the suffix in turn replaced by the padding token: where more than `share` of the suffix's activation
   survives, the token becomes a wildcard, which matches any token.

`Explanation` holds the patterns as a trie read from the end, and predicts activations. `score` compares them with the
latent's on text that the examples are not from, and `over_latents` averages. What the latent's activation is on
a changed text is asked of a function, such as `activation_of` makes from a language model and an autoencoder.

Source: Gao et al. 2024, section 4.3, after Foote et al. 2023.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from topkapi.config import DataConfig
from topkapi.data.activations import kept_positions
from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError
from topkapi.evaluate.sampling import CHUNK_ELEMENTS
from topkapi.model import Autoencoder
from topkapi.statistics.intervals import Estimate, bootstrap_mean

SHARE = 0.5  # of an activation that a shortened or padded text must keep
N_EXAMPLES = 16
WILDCARD, START = None, -1  # beside token ids, which are 0 or more

Activation = Callable[[list[list[int]]], Float[Tensor, " n"]]
"""A latent's activation at the last token of each of n texts, given as token ids of any lengths >= 1."""


class Pattern(NamedTuple):
    """Tokens that end at the firing one."""

    tokens: tuple[int | None, ...]
    """In the order of the text; None matches any token."""
    anchored: bool
    """Whether the first of them must be the first token of the context."""
    activation: float
    """The latent's at the last of them, predicted where the pattern matches; above 0."""


@dataclass
class _Node:
    following: dict[int | None, "_Node"] = field(default_factory=dict)
    activation: float | None = None


class Explanation:
    """A latent's patterns, and the activations that they predict.

    Patterns of the same tokens are one, with their mean activation, so that the order of examples does not matter.
    """

    def __init__(self, patterns: Iterable[Pattern], n_examples: int, n_dropped: int = 0) -> None:
        self.n_examples = n_examples
        """Firings that patterns were looked for in."""
        self.n_dropped = n_dropped
        """Those without a pattern: the activation function gives 0 on the very text of the example."""
        same: dict[tuple[tuple[int | None, ...], bool], list[float]] = {}
        for tokens, anchored, activation in patterns:
            same.setdefault((tokens, anchored), []).append(activation)
        self.patterns = tuple(Pattern(*key, sum(values) / len(values)) for key, values in same.items())
        self._root = _Node()
        for tokens, anchored, activation in self.patterns:
            node = self._root
            for token in (*reversed(tokens), *([START] if anchored else [])):
                node = node.following.setdefault(token, _Node())
            node.activation = activation

    def predict(self, tokens: Int[Tensor, "b context"]) -> Float32[Tensor, "b context"]:
        """The activation predicted at each token of each context; 0 where no pattern matches.

        From a token backwards, at each step the branch of this very token, or else that of the wildcard; the first
        pattern that is complete gives its activation. So a shorter pattern hides the longer ones that end in it, and
        a branch once taken is not left again: a text that fits a pattern with a wildcard is not found where an exact
        token leads away from it. Source: the released code of Gao et al. 2024, which notes the same.

        Cost: a look-up a token; a Python loop over the tokens that a pattern ends with, at most its length each.
        """
        out = torch.zeros(tokens.shape)
        last = self._root.following
        if WILDCARD in last:
            candidates = torch.ones_like(tokens, dtype=torch.bool)
        else:
            candidates = torch.isin(tokens, torch.tensor(list(last), dtype=tokens.dtype, device=tokens.device))
        contexts = tokens.tolist()
        for row, position in candidates.nonzero().tolist():
            out[row, position] = self._at(contexts[row], position)
        return out

    def _at(self, context: list[int], position: int) -> float:
        node = self._root
        for token in (*context[position::-1], START):
            following = node.following.get(token)
            if following is None and token != START:
                following = node.following.get(WILDCARD)
            if following is None:
                return 0.0
            if following.activation is not None:
                return following.activation
            node = following
        return 0.0


def find_patterns(
    prefixes: Sequence[Sequence[int]],
    activations: Sequence[float],
    activation: Activation,
    padding_token: int,
    share: float = SHARE,
) -> Explanation:
    """The explanation that examples of a latent's firing give (see the module).

    `prefixes` are token ids from the start of a context to the firing token, `activations` the latent's there.
    `activation` is asked a few times, about all examples at once: in all, for an example with a suffix of m of its n
    tokens, for at most min(n, 2m) suffixes and 1 + m changed texts.

    An anchored pattern that was found after the start of a context does not match its own example; that is the
    method's.

    Raises:
        TopkapiError: an example is empty or has no activation above 0, there are not as many activations as
            prefixes, share is not in (0, 1], or `activation` answers other than a finite number a text.
    """
    _check(prefixes, activations, padding_token, share)
    texts = [list(prefix) for prefix in prefixes]
    suffixes = _shortest_suffixes(texts, [share * value for value in activations], activation)
    found = [i for i, (_, value) in enumerate(suffixes) if value > 0]
    changed: list[list[int]] = []
    for i in found:
        suffix, _ = suffixes[i]
        changed.append([padding_token, *suffix])
        changed += [[*suffix[:j], padding_token, *suffix[j + 1 :]] for j in range(len(suffix))]
    answers = iter(_ask(activation, changed))
    patterns = []
    for i in found:
        suffix, value = suffixes[i]
        anchored = next(answers) < share * activations[i]
        tokens = tuple(WILDCARD if next(answers) > share * value else token for token in suffix)
        patterns.append(Pattern(tokens, anchored, value))
    return Explanation(patterns, len(texts), len(texts) - len(found))


def _check(prefixes: Sequence[Sequence[int]], activations: Sequence[float], padding_token: int, share: float) -> None:
    if len(prefixes) != len(activations):
        raise TopkapiError(f"Each example needs one activation; got {len(prefixes)} and {len(activations)}.")
    if not 0 < share <= 1:
        raise TopkapiError(f"share, the part of an activation to keep, lies in (0, 1]; got {share}.")
    for prefix, value in zip(prefixes, activations, strict=True):
        if not len(prefix) or not 0 < value < float("inf"):
            raise TopkapiError(
                f"An example is one token or more, with an activation above 0; got {len(prefix)} tokens with {value}."
            )
    if min([padding_token, *(min(prefix) for prefix in prefixes)]) < 0:
        raise TopkapiError("Token ids are 0 or more; an example or the padding token has a negative one.")


def _shortest_suffixes(
    texts: list[list[int]], needed: list[float], activation: Activation
) -> list[tuple[list[int], float]]:
    """For each text the shortest suffix with the activation needed, or all of it, and the activation there.

    Lengths are tried from 1 on, twice as many in each round: most suffixes are short, and rounds few.
    """
    found: dict[int, tuple[list[int], float]] = {}
    shortest, longest = 1, 2
    while len(found) < len(texts):
        trials = [
            (i, texts[i][-length:])
            for i in range(len(texts))
            if i not in found
            for length in range(shortest, min(longest, len(texts[i])) + 1)
        ]
        answers = _ask(activation, [suffix for _, suffix in trials])
        for (i, suffix), value in zip(trials, answers, strict=True):
            if i not in found and (value >= needed[i] or len(suffix) == len(texts[i])):
                found[i] = suffix, value
        shortest, longest = longest + 1, 2 * longest + 1
    return [found[i] for i in range(len(texts))]


def _ask(activation: Activation, texts: list[list[int]]) -> list[float]:
    if not texts:
        return []
    answer = activation(texts).double()
    if answer.shape != (len(texts),) or not answer.isfinite().all():
        raise TopkapiError(
            f"The activation function must give a finite number for each of {len(texts)} texts; it gave "
            f"{tuple(answer.shape)}, {int(answer.isfinite().sum())} of them finite."
        )
    return answer.tolist()


def explain(
    tokens: Int[Tensor, "b context"],
    activations: Float[Tensor, "b context"],
    activation: Activation,
    padding_token: int,
    n_examples: int = N_EXAMPLES,
    seed: int = 0,
) -> Explanation:
    """The explanation from `n_examples` firings drawn uniformly, or from all where there are no more.

    `activations` are the latent's, 0 where it is silent and where a firing is not to be used. One without firings
    gives an explanation without patterns.
    """
    firings = (activations > 0).nonzero().cpu()
    order = torch.randperm(len(firings), generator=torch.Generator().manual_seed(seed))
    chosen = firings[order[:n_examples]].tolist()
    prefixes = [tokens[row, : position + 1].tolist() for row, position in chosen]
    values = [activations[row, position].item() for row, position in chosen]
    return find_patterns(prefixes, values, activation, padding_token)


@dataclass(frozen=True)
class Score:
    """How well an explanation tells where a latent fires; None where undefined."""

    precision: float | None
    """Tokens where it fires and is predicted to, of those where it is predicted to."""
    recall: float | None
    """The same, of those where it fires."""
    f1: float | None
    """Their harmonic mean: twice the same, of the sum of both."""
    n_predicted: int
    n_active: int
    n_tokens: int
    undefined: dict[str, str]
    """Why, for each name above that is None."""


def score(
    explanation: Explanation,
    tokens: Int[Tensor, "b context"],
    activations: Float[Tensor, "b context"],
    keep: Bool[Tensor, "b context"],
) -> Score:
    """Precision, recall and F1 of "fires", activation > 0, over the kept tokens.

    The contexts must be held out, and drawn without regard to where the latent fires: among contexts chosen because
    it fires, precision is too high. Undefined: all three for an explanation without patterns, precision where it
    predicts no firing, recall where there is none, F1 where neither is.
    """
    predicted = (explanation.predict(tokens) > 0).to(keep.device) & keep
    active = (activations > 0).to(keep.device) & keep
    n_both, n_predicted, n_active = (int(mask.sum()) for mask in (predicted & active, predicted, active))
    undefined = {}
    if not n_predicted:
        undefined["precision"] = f"no pattern matches any of the {int(keep.sum())} tokens"
    if not n_active:
        undefined["recall"] = f"the latent fires on none of the {int(keep.sum())} tokens"
    if not n_predicted and not n_active:
        undefined["f1"] = "the latent neither fires nor is predicted to"
    if not explanation.patterns:
        n, dropped = explanation.n_examples, explanation.n_dropped
        why = f"{dropped} of {n} example firings gave no pattern" if n else "there was no example firing to explain"
        undefined = dict.fromkeys(("precision", "recall", "f1"), why)

    def ratio(name: str, part: int, whole: int) -> float | None:
        return None if name in undefined else part / whole

    return Score(
        precision=ratio("precision", n_both, n_predicted),
        recall=ratio("recall", n_both, n_active),
        f1=ratio("f1", 2 * n_both, n_predicted + n_active),
        n_predicted=n_predicted,
        n_active=n_active,
        n_tokens=int(keep.sum()),
        undefined=undefined,
    )


def over_latents(scores: Sequence[Score], seed: int = 0) -> dict[str, Estimate]:
    """Mean precision, recall and f1 over the latents for which each is defined, with bootstrap intervals.

    A latent that never fires in the held-out text has no recall: compare means at equal amounts of text, and see how
    many values are undefined.
    """
    return {name: bootstrap_mean([getattr(s, name) for s in scores], seed) for name in ("precision", "recall", "f1")}


@torch.no_grad()
def latent_activations(
    ae: Autoencoder, lm: LanguageModel, tokens: Int[Tensor, "b context"], latents: Sequence[int]
) -> Float32[Tensor, "b context latents"]:
    """Activations of some latents on whole contexts, on the autoencoder's device.

    Cost: a pass up to the site in batches of `lm.batch_contexts`, and encoding every token.

    Raises:
        TopkapiError: there is no such latent.
    """
    parts = [
        _values(ae, lm.activations(batch).flatten(0, 1), latents).unflatten(0, batch.shape)
        for batch in tokens.split(lm.batch_contexts)
    ]
    return torch.cat(parts)


def explain_latents(
    ae: Autoencoder,
    lm: LanguageModel,
    latents: Sequence[int],
    sample: Int[Tensor, "b context"],
    held_out: Int[Tensor, "h context"],
    config: DataConfig,
    padding_token: int,
    seed: int = 0,
) -> list[tuple[Explanation, Score]]:
    """Each latent's explanation from its firings in `sample`, and its score on `held_out`.

    The positions that the config leaves out in training are left out here too. Cost: a pass up to the site over both,
    whose activations of these latents stay in memory, and the texts of `find_patterns`.
    """
    keep_sample, keep = (kept_positions(tokens, config, lm.special_ids) for tokens in (sample, held_out))
    examples, wanted = (latent_activations(ae, lm, tokens, latents).cpu() for tokens in (sample, held_out))
    results = []
    for i, latent in enumerate(latents):
        active = torch.where(keep_sample, examples[..., i], 0)
        explanation = explain(sample, active, activation_of(ae, lm, latent), padding_token, seed=seed)
        results.append((explanation, score(explanation, held_out, wanted[..., i], keep)))
    return results


def padding_token_of(lm: LanguageModel) -> int:
    """The token " _", or else "_", which say little of what comes after them.

    Raises:
        TopkapiError: the language model's tokenizer has no such token.

    Source: the released code of Gao et al. 2024, where it is token 4808 of GPT-2.
    """
    for text in (" _", "_"):
        ids = lm.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            return ids[0]
    raise TopkapiError(f"The tokenizer of {lm.name} splits '_' into {len(ids)} tokens; give a padding token's id.")


def activation_of(ae: Autoencoder, lm: LanguageModel, latent: int, filler: int = 0) -> Activation:
    """The function that `find_patterns` asks: runs the language model and the autoencoder on texts.

    Texts are sorted by length and filled up on the right with the token `filler` to that of the longest in their
    batch of `lm.batch_contexts`; a causal language model does not see what comes later. Cost: passes up to the site
    over all texts, and encoding one token of each. Lengths vary, so a compiled language model would be compiled again
    and again.

    Raises:
        TopkapiError: there is no such latent, or (when called) a text is longer than the language model's contexts.
    """
    _check_latents(ae, [latent])

    @torch.no_grad()
    def activation(texts: list[list[int]]) -> Float32[Tensor, " n"]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.zeros(len(texts))
        for start in range(0, len(order), lm.batch_contexts):
            batch = order[start : start + lm.batch_contexts]
            longest = len(texts[batch[-1]])
            tokens = torch.tensor([texts[i] + [filler] * (longest - len(texts[i])) for i in batch])
            last = torch.tensor([len(texts[i]) - 1 for i in batch])
            reached = lm.activations(tokens)
            rows = reached[torch.arange(len(batch), device=reached.device), last.to(reached.device)]
            out[batch] = _values(ae, rows, [latent])[:, 0].cpu()
        return out

    return activation


def _values(ae: Autoencoder, raw: Float[Tensor, "n d_model"], latents: Sequence[int]) -> Float32[Tensor, "n latents"]:
    """The values of some latents of raw activations, 0 where they are not among the active ones."""
    _check_latents(ae, latents)
    device = ae.W_dec.device
    chosen = torch.tensor(list(latents), dtype=torch.int64, device=device)
    parts = [torch.zeros(0, len(chosen), device=device)]
    for chunk in raw.split(max(1, CHUNK_ELEMENTS // ae.n_latents)):
        values, indices = ae.encode(ae.normalise(chunk.to(device, torch.float32)).x)
        dense = values.new_zeros(len(chunk), ae.n_latents).scatter_(1, indices, values)
        parts.append(dense[:, chosen].float())
    return torch.cat(parts)


def _check_latents(ae: Autoencoder, latents: Sequence[int]) -> None:
    if outside := [latent for latent in latents if not 0 <= latent < ae.n_latents]:
        raise TopkapiError(f"The autoencoder has latents 0..{ae.n_latents - 1}; there is no latent {outside[0]}.")
