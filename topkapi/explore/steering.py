"""Text that the language model writes with latents changed, beside what it writes without.

1. Tokens are drawn with Gumbel noise, token = argmax(logits / temperature + noise), from random numbers that are the
   sample's and the position's own (`topkapi.explore.drawing`). Both texts of a sample use the same: while their
   distributions are equal so are their tokens, and where they part it is the edit that did it.
2. `experiment` counts samples in which a pattern occurs: as the language model is, with the edits, and with the same
   edits of other latents that are as active. `topkapi.explore.proportions` gives rates and differences their intervals.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.evaluate.downstream import kl_divergence
from topkapi.explore.attribution import passes_at_once, vocabulary
from topkapi.explore.drawing import draw, sample_keys, splitmix
from topkapi.explore.edits import Edit
from topkapi.explore.prompts import continuation
from topkapi.explore.proportions import Difference, Rate, clustered_rate, difference, rate
from topkapi.explore.spliced import Spliced

OnToken = Callable[[int], object]

DRAWN_ELEMENTS = 2**24  # random numbers at a time, 128 MiB of float64; three or four times that while they are made
CONTEXT = 512  # tokens of a context, when batch_contexts says how many tokens have keys and values in memory


class Samples(NamedTuple):
    """Continuations of a prompt, a row a sample."""

    clean: Int64[np.ndarray, "n t"]
    """Tokens written by the language model as it is; after the end of the text the token that ended it, again."""
    steered: Int64[np.ndarray, "n t"]
    """Tokens written with the edits, from the same random numbers."""
    kl: Float64[np.ndarray, "n t"]
    """KL(steered || clean) of the distributions that each steered token was drawn from, before the temperature, in
    nats; 0 after the end of the text."""
    clean_lengths: Int64[np.ndarray, " n"]
    """Tokens of each clean text, the one that ended it counted."""
    steered_lengths: Int64[np.ndarray, " n"]

    @property
    def mean_kl(self) -> float:
        """Mean over all steered tokens."""
        return float(self.kl.sum() / self.steered_lengths.sum())

    def first_difference(self, i: int) -> int | None:
        """The first token in which the two texts of sample i differ; None if they are the same."""
        where = np.flatnonzero(self.clean[i] != self.steered[i])
        return int(where[0]) if len(where) else None


class Experiment(NamedTuple):
    """How often a pattern occurs in continuations, as counted."""

    clean: Rate
    """Of samples without any edit."""
    steered: Rate
    controls: Rate
    """Of all samples of all controls; its interval allows for controls that differ from each other."""
    each_control: list[Rate]
    control_latents: list[list[int]]
    """The latents that each control edits, in the order of the edits."""
    steered_less_controls: Difference
    steered_less_clean: Difference
    """As if the two were independent; as they share random numbers, the interval is wider than it need be."""


def sample(
    spliced: Spliced,
    prompt: Int[Tensor, "1 p"],
    edits: Sequence[Edit],
    n_samples: int,
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    on_token: OnToken = lambda _: None,
) -> Samples:
    """Continuations with and without edits, from the same random numbers.

    Sample i is the same for any `n_samples`, but for the rounding of batches of another size. Edits are in force at the
    prompt too. Cost: 2 n_samples n_tokens tokens written one by one, and 2 passes over the steered texts; `on_token`
    hears of tokens as they are written.

    Raises:
        TopkapiError: no such latent, a number out of range, more tokens than the language model can see, or edits so
            large that its logits are no numbers.
    """
    _check_sampling(spliced, prompt, n_samples, n_tokens, temperature, seed)
    spliced.check(edits)
    keys = sample_keys(seed, 0, n_samples, spliced.lm.device)
    clean, clean_lengths = write(spliced, prompt, (), keys, n_tokens, temperature, on_token)
    steered, steered_lengths = write(spliced, prompt, edits, keys, n_tokens, temperature, on_token)
    kl = _kl(spliced, prompt, edits, steered)
    kl[np.arange(n_tokens) >= steered_lengths[:, None]] = 0.0
    return Samples(clean, steered, kl, clean_lengths, steered_lengths)


def write(
    spliced: Spliced,
    prompt: Int[Tensor, "1 p"],
    edits: Sequence[Edit],
    keys: Int64[Tensor, " n"],
    n_tokens: int,
    temperature: float,
    on_token: OnToken = lambda _: None,
) -> tuple[Int64[np.ndarray, "n t"], Int64[np.ndarray, " n"]]:
    """A continuation for each key, and how many tokens it has up to the one that ended it.

    Texts that have ended are computed on, as asking whether all have would make the host wait for the device.
    """
    with spliced.editing(edits):
        found = [
            _write(spliced, prompt, some, n_tokens, temperature, on_token)
            for some in keys.split(texts_at_once(spliced, prompt.shape[1] + n_tokens))
        ]
    tokens = torch.cat(found).cpu().numpy()
    ended = np.isin(tokens, _ends(spliced))
    return tokens, np.where(ended.any(1), ended.argmax(1) + 1, n_tokens)


def texts_at_once(spliced: Spliced, length: int) -> int:
    """How many texts of this length in tokens are written together.

    As many as together have no more tokens than `batch_contexts` contexts of CONTEXT, and as their random numbers
    allow: a step of many texts takes a GPU about as long as one of few.
    """
    return max(1, min(spliced.lm.batch_contexts * CONTEXT // length, DRAWN_ELEMENTS // vocabulary(spliced)))


def _write(
    spliced: Spliced,
    prompt: Int[Tensor, "1 p"],
    keys: Int64[Tensor, " n"],
    n_tokens: int,
    temperature: float,
    on_token: OnToken,
) -> Int64[Tensor, "n t"]:
    ends = torch.tensor(_ends(spliced), device=keys.device)
    at = splitmix(keys[:, None], torch.arange(n_tokens, device=keys.device))
    new, cache, written = prompt.expand(len(keys), -1), None, []
    for t in range(n_tokens):
        logits, cache = spliced.lm.next_logits(new, cache)
        drawn = draw(logits, at[:, t], temperature)
        if written:  # a text that has ended stays so
            drawn = torch.where((written[-1][:, None] == ends).any(1), written[-1], drawn)
        written.append(drawn)
        new = drawn[:, None]
        on_token(len(keys))
    return torch.stack(written, 1)


def _ends(spliced: Spliced) -> list[int]:
    """The tokens that end a text."""
    settings = getattr(spliced.lm.model, "generation_config", None)
    named = (spliced.lm.tokenizer.eos_token_id, getattr(settings, "eos_token_id", None))
    return sorted({i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])})


@torch.no_grad()
def _kl(
    spliced: Spliced, prompt: Int[Tensor, "1 p"], edits: Sequence[Edit], steered: Int64[np.ndarray, "n t"]
) -> Float64[np.ndarray, "n t"]:
    """KL(steered || clean) at each steered token, from whole passes over the steered texts."""
    written = torch.from_numpy(steered)
    tokens = torch.cat([prompt.expand(len(written), -1), written], 1)[:, :-1]
    found = []
    for some in tokens.split(passes_at_once(spliced, tokens)):
        first = prompt.shape[1] - 1
        changed, clean = spliced.logits(some, edits)[:, first:], spliced.logits(some)[:, first:]
        for row, other in zip(changed, clean, strict=True):  # one context at a time: log-softmaxes in float64
            kl = kl_divergence(row.double().log_softmax(-1), other.double().log_softmax(-1))
            found.append(kl.clamp_min(0))
    together = torch.stack(found)
    if together.isnan().any():
        raise TopkapiError(
            f"with {', '.join(map(str, edits))} the language model's logits are no numbers: give smaller values."
        )
    return together.cpu().numpy()


def experiment(
    spliced: Spliced,
    prompt: Int[Tensor, "1 p"],
    edits: Sequence[Edit],
    controls: Sequence[Sequence[Edit]],
    pattern: re.Pattern[str],
    n_samples: int,
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    on_token: OnToken = lambda _: None,
) -> Experiment:
    """In how many of n_samples continuations a pattern occurs: clean, with the edits, and with each control's edits.

    `topkapi.explore.controls.matched_controls` makes controls from a study. The prompt is not searched. The clean and
    the steered samples are those of `sample`; every control has random numbers of its own, so that its samples are
    independent of all others. Cost: (2 + number of controls) n_samples n_tokens tokens written one by one.

    Raises:
        TopkapiError: fewer than 2 controls, or as `sample`.
    """
    _check_sampling(spliced, prompt, n_samples, n_tokens, temperature, seed)
    if len(controls) < 2:
        raise TopkapiError(f"an experiment needs 2 controls at least, to see how they differ; got {len(controls)}.")
    for of in (edits, *controls):
        spliced.check(of)

    def count(of: Sequence[Edit], stream: int) -> Rate:
        keys = sample_keys(seed, stream, n_samples, spliced.lm.device)
        tokens, lengths = write(spliced, prompt, of, keys, n_tokens, temperature, on_token)
        texts = [continuation(spliced.lm, row[:n]) for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return rate(sum(pattern.search(text) is not None for text in texts), n_samples)

    clean, steered = count((), 0), count(edits, 0)
    each = [count(of, 1 + i) for i, of in enumerate(controls)]
    together = clustered_rate([one.n for one in each], n_samples)
    return Experiment(
        clean=clean,
        steered=steered,
        controls=together,
        each_control=each,
        control_latents=[[edit.latent for edit in of] for of in controls],
        steered_less_controls=difference(steered, together),
        steered_less_clean=difference(steered, clean),
    )


def _check_sampling(
    spliced: Spliced, prompt: Int[Tensor, "1 p"], n_samples: int, n_tokens: int, temperature: float, seed: int
) -> None:
    if min(n_samples, n_tokens) < 1:
        raise TopkapiError(f"samples and new tokens must be 1 at least; got {n_samples} samples of {n_tokens} tokens.")
    if not 0 < temperature < float("inf"):
        raise TopkapiError(f"temperature must be more than 0 and finite; got {temperature}. For greedy text give 0.01.")
    if not 0 <= seed < 2**63:
        raise TopkapiError(f"seed must be 0 or more, and below 2^63; got {seed}.")
    most = spliced.lm.max_context
    if most is not None and prompt.shape[1] + n_tokens > most:
        raise TopkapiError(
            f"the prompt has {prompt.shape[1]} tokens and {n_tokens} are to follow; {spliced.lm.name} sees at most "
            f"{most}: shorten one."
        )
