"""Measures of a trained autoencoder on held-out text.

1. `reconstruction`: how close and how sparse the reconstruction is, from activations alone.
2. `downstream`: what the language model loses when it continues from the reconstruction.

`evaluate` measures these two. Of the rest `measures` makes the sections of `topkapi eval --all`, and `table` its rows:

3. `contexts`: where a latent fires most strongly.
4. `probes`: whether single latents tell known concepts; `labelled` has the texts of `tasks` read for them.
5. `refinement`: how far the values of active latents are from the best ones.
6. `progressive`: normalized MSE over the number of latents, chosen per token or by a threshold.
7. `n2g`: patterns of tokens that explain where a latent fires, with their precision and recall.
8. `ablation`: the share of the next words' logits that a latent changes.
9. `compute_equivalent`: the training compute that a spliced language model's loss is worth.
10. `control`: the channels of the activation as an autoencoder, which 4 and 8 compare with.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from topkapi.config import DataConfig, EvalConfig
from topkapi.console import progress, say
from topkapi.data.activations import Block, harvest
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.evaluate.downstream import Losses, downstream_losses
from topkapi.evaluate.reconstruction import ReconstructionMetrics
from topkapi.files import write_arrays
from topkapi.model import Autoencoder
from topkapi.results import HELD_OUT

HARVEST_TOKENS = 8_192  # of text, harvested at once: bounds memory
METRICS = (
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
)
DOWNSTREAM = METRICS[3:9]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_all` finds of one autoencoder."""

    metrics: dict[str, float | int | None]
    """As `evaluate` gives them."""
    intervals: dict[str, tuple[float, float]]
    """Of the metrics that have one: where each lies with 95 % probability, of drawing the contexts anew."""
    gaps: dict[str, str]
    """Why, for each metric that is None though it was asked for."""
    losses: Losses | None
    """Resampled; None without `downstream_tokens`."""
    n_fired: Int64[np.ndarray, " n_latents"]
    """Of the n_tokens tokens, those on which the latent has a value > 0."""
    sum_squares: Float64[np.ndarray, " n_latents"]
    """Sum of the squares of the latent's values over the n_tokens; divided by them it is the importance."""

    def write_latents(self, run: Path) -> None:
        """Write RUN/held_out.npz: the arrays n_fired, sum_squares and n_tokens (a single number)."""
        arrays = {"n_fired": self.n_fired, "sum_squares": self.sum_squares, "n_tokens": self.metrics["n_tokens"]}
        write_arrays(run / HELD_OUT, arrays)


def evaluate(
    ae: Autoencoder,
    lm: LanguageModel,
    token_file: TokenFile,
    data_config: DataConfig,
    eval_config: EvalConfig,
) -> dict[str, float | int | None]:
    """The autoencoder's quality on held-out text, a dict with exactly these keys for eval.json.

    Tokens evaluated: contexts evenly spaced over `token_file` (see `spread_contexts`) that hold
    `eval_config.tokens` tokens of text, less those that training leaves out too (first positions,
    special tokens, outlier norms).

        n_tokens          tokens evaluated: the n of the next three lines
        normalized_mse    sum |x - recon|^2 / sum |x - mean|^2, with x as the autoencoder trains on it
                          (per-token mean removed, unit norm) and mean over these very tokens. 0 is
                          perfect, 1 as good as always answering the mean: 1 - explained variance
        l0                mean number of latents with a value > 0, per token
        dead_fraction     share of the latents with a value > 0 on none of the n_tokens. It falls as
                          n_tokens grows: compare it at equal n_tokens only, and not with `dead_after`

    Predictions evaluated: contexts chosen likewise, holding `eval_config.downstream_tokens` tokens.
    At each kept position (`topkapi.data.activations.kept_positions`: no first position, no special
    token) with a next token inside its context, the language model predicts that token. Means over
    these predictions, in nats:

        ce_clean          cross-entropy of the untouched language model
        ce_spliced        the same with the activations at the kept positions replaced by their
                          reconstructions, scaled back to raw; other positions stay as they are
        ce_zero_ablation  kept positions set to 0 instead
        ce_mean_ablation  kept positions set to the mean raw activation of the n_tokens above
        kl                KL(clean || spliced) between the two next-token distributions
        loss_recovered    (ce_zero_ablation - ce_spliced) / (ce_zero_ablation - ce_clean)

    A value that is undefined (no token kept, zero ablation without effect, a non-finite
    reconstruction) is None, and one line on stderr says which and why; with `downstream_tokens` 0
    the last six are None without a warning. Cost: one pass up to the site over `tokens`, four whole
    passes over `downstream_tokens`.
    """
    (found,) = evaluate_all([ae], lm, token_file, data_config, eval_config)
    return found.metrics


def evaluate_all(
    aes: Sequence[Autoencoder],
    lm: LanguageModel,
    token_file: TokenFile,
    data_config: DataConfig,
    eval_config: EvalConfig,
) -> list[Evaluation]:
    """What `evaluate` gives of each of several autoencoders of one site, and how often and how strongly latents fire.

    The text is harvested once, and the passes of the language model that no autoencoder has a part in are shared: the
    results are those of evaluating each alone.
    """
    reconstructions = _reconstruct(aes, lm, token_file, data_config, eval_config.tokens)
    losses: Sequence[Losses | None] = [None] * len(aes)
    if eval_config.downstream_tokens and len(aes):
        context_ids = spread_contexts(token_file, data_config.context, eval_config.downstream_tokens)
        mean = reconstructions[0].mean_activation
        losses = downstream_losses(aes, lm, token_file, context_ids, data_config, mean)
    return [_evaluation(*found) for found in zip(reconstructions, losses, strict=True)]


def _evaluation(reconstruction: ReconstructionMetrics, losses: Losses | None) -> Evaluation:
    estimates = reconstruction.estimates() | (losses.estimates() if losses else {})
    found = dict.fromkeys(METRICS) | reconstruction.compute() | {name: it.value for name, it in estimates.items()}
    found = {name: None if value is None or math.isnan(value) else value for name, value in found.items()}
    asked = [name for name in METRICS if losses or name not in DOWNSTREAM]
    return Evaluation(
        metrics=found,
        intervals={name: (it.low, it.high) for name, it in estimates.items() if it.low is not None},
        gaps=_gaps(found, [name for name in asked if found[name] is None]),
        n_fired=reconstruction.n_fired.cpu().numpy(),
        sum_squares=reconstruction.sum_squares.cpu().numpy(),
        losses=losses,
    )


def spread_contexts(token_file: TokenFile, context: int, tokens: int) -> Int64[np.ndarray, " contexts"]:
    """Numbers of the contexts, evenly spaced over the file, that hold `tokens` tokens.

    Rounded up to whole contexts; all contexts where the file has fewer. Evenly spaced, because a
    token file holds its corpora one after another.
    """
    available = token_file.n_contexts(context)
    wanted = min(available, math.ceil(tokens / context))
    return np.arange(wanted) * available // max(wanted, 1)


def _reconstruct(
    aes: Sequence[Autoencoder], lm: LanguageModel, token_file: TokenFile, config: DataConfig, tokens: int
) -> list[ReconstructionMetrics]:
    """Each autoencoder's metrics of `tokens` tokens of the file, harvested and dropped as in training."""
    metrics = [ReconstructionMetrics(ae) for ae in aes]
    context_ids = spread_contexts(token_file, config.context, tokens)
    for block in harvested("reconstruction", lm, token_file, context_ids, config):
        for found in metrics:
            found.update(block.x, block.positions // config.context)
    return metrics


def harvested(
    what: str, lm: LanguageModel, token_file: TokenFile, context_ids: Int64[np.ndarray, " contexts"], config: DataConfig
) -> Iterator[Block]:
    """Activations of some contexts as training harvests them, HARVEST_TOKENS of text at a time, under a meter."""
    step = max(1, HARVEST_TOKENS // config.context)
    with progress(what, len(context_ids) * config.context) as meter:
        for start in range(0, len(context_ids), step):
            yield harvest(lm, token_file, context_ids[start : start + step], config, meter.advance)[0]


def _gaps(found: dict[str, float | int | None], undefined: list[str]) -> dict[str, str]:
    """Why the undefined metrics are None (JSON has neither NaN nor infinity), after one warning line."""
    why = ""
    if undefined:
        if not found["n_tokens"]:
            why = "no token of the held-out text is kept"
        elif undefined == ["loss_recovered"]:
            why = "zero ablation changes the cross-entropy by less than 1e-6 nats"
        else:
            why = "no prediction kept, all activations equal, or reconstruction not finite"
        say(f"warning: {', '.join(undefined)} undefined and written as null: {why}.")
    if found["loss_recovered"] is not None and found["ce_zero_ablation"] < found["ce_clean"]:
        say("warning: zero ablation lowers the cross-entropy, so loss_recovered means nothing.")
    return dict.fromkeys(undefined, why)
