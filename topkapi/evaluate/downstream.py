"""What the language model loses when it continues from reconstructed activations.

Per small batch of contexts, forward passes that differ in the activations at the kept positions of the site: clean
(its own), zero (0), mean (one mean activation), and spliced (an autoencoder's reconstruction, scaled back) once for
each splice. Other positions (the first of a context, special tokens) keep their own activations in all of them.
Logits live for one batch and one pass, the clean ones for all; log-softmaxes for one context at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from topkapi.config import DataConfig
from topkapi.console import progress
from topkapi.data.activations import kept_positions
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.evaluate.sampling import ResampledSums
from topkapi.statistics.intervals import Estimate, estimate

LOGIT_ELEMENTS = 2**26  # of one batch, 256 MiB of float32: 4 contexts of 64 tokens at 262,144 words
GAP = 1e-6  # nats; two float32 cross-entropies that differ by less do not differ

Substitute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    """Each loss of one splice: its value, and 200 of contexts drawn anew."""

    replicates: dict[str, Float64[np.ndarray, " replicates"]]
    n_contexts: int

    def estimates(self) -> dict[str, Estimate]:
        """Values with intervals; undefined where not finite."""
        return {name: estimate(replicates, self.n_contexts) for name, replicates in self.replicates.items()}


def downstream_losses(
    splices: Sequence[Substitute],
    lm: LanguageModel,
    token_file: TokenFile,
    context_ids: Int[np.ndarray, " contexts"],
    config: DataConfig,
    mean_activation: Float[Tensor, " d_model"],
) -> list[Losses]:
    """The cross-entropies, kl and loss_recovered of each splice, as `topkapi.evaluate` defines them.

    A splice, an autoencoder say, maps raw activations at kept positions, batch after batch, to what goes on instead.
    All are means over the predictions that `predicting` selects, resampled by context. NaN are all of them when there
    is no such prediction, and loss_recovered also when zero ablation changes the loss by less than 1e-6 nats. Cost:
    three passes of the whole language model over the contexts, and one more a splice.
    """
    sums = ResampledSums(4 + 2 * len(splices))
    with progress("downstream loss", len(context_ids) * config.context) as meter:
        start, size = 0, 1  # one context first: its logits tell how many fit
        while start < len(context_ids):
            tokens = token_file.context_tokens(context_ids[start : start + size], config.context)
            keep = kept_positions(tokens, config, lm.special_ids)
            of_contexts, n_vocabulary = _batch_sums(splices, lm, tokens, keep, mean_activation)
            sums.add(of_contexts)
            start += len(tokens)
            size = min(lm.batch_contexts, max(1, LOGIT_ELEMENTS // (config.context * n_vocabulary)))
            meter.advance(tokens.numel())
    n_predictions, *totals = sums.sums.T
    clean, zero, mean, *rest = (total / n_predictions for total in totals)
    shared = {"ce_clean": clean, "ce_zero_ablation": zero, "ce_mean_ablation": mean}
    found = []
    for spliced, kl in zip(rest[::2], rest[1::2], strict=True):
        of_one = shared | {"ce_spliced": spliced, "kl": kl, "loss_recovered": loss_recovered(clean, spliced, zero)}
        found.append(Losses({name: replicates.numpy() for name, replicates in of_one.items()}, sums.n))
    return found


def predicting(keep: Bool[Tensor, "b context"]) -> Bool[Tensor, "b context-1"]:
    """The positions whose prediction counts: kept, and with a next token inside the context.

    A kept position predicts whatever token follows, special tokens included.
    """
    return keep[:, :-1]


def loss_recovered(
    clean: Float64[Tensor, " n"], spliced: Float64[Tensor, " n"], zero: Float64[Tensor, " n"]
) -> Float64[Tensor, " n"]:
    """(zero - spliced) / (zero - clean), of cross-entropies, zero that of zero ablation.

    NaN when the denominator is below 1e-6 nats. 1: splicing costs nothing. 0: as bad as zeroing the
    site. Not a share, and above 1 or below 0, when splicing is better than clean or worse than
    zeroing; without meaning when zeroing helps the language model (`evaluate` warns).
    """
    gap = zero - clean
    return torch.where(gap.abs() >= GAP, (zero - spliced) / gap, math.nan)


def replaced_at(keep: Bool[Tensor, "b context"], substitute: Substitute) -> Substitute:
    """The `replace` argument of `LanguageModel.logits` that changes the kept positions only.

    `substitute` gets float32 rows (n, d_model), one a kept position, and returns what to put there.
    """

    def replace(activations: Tensor) -> Tensor:
        where = keep.to(activations.device)
        out = activations.clone()
        if where.any():
            out[where] = substitute(activations[where].float()).to(out.device, out.dtype)
        return out

    return replace


def kl_divergence(log_p: Float[Tensor, "n vocabulary"], log_q: Float[Tensor, "n vocabulary"]) -> Float64[Tensor, " n"]:
    """KL(p || q) of each row, in nats: sum p (log p - log q), which rounding can make a little less than 0."""
    p = log_p.exp()
    # words masked with -inf logits have p = 0 and would give 0 x nan; where p itself is nan the sum shall be
    return torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1, dtype=torch.float64)


@torch.no_grad()
def _batch_sums(
    splices: Sequence[Substitute],
    lm: LanguageModel,
    tokens: Int[Tensor, "b context"],
    keep: Bool[Tensor, "b context"],
    mean_activation: Float[Tensor, " d_model"],
) -> tuple[Float64[Tensor, "b sums"], int]:
    """Each context's predictions, and sums over them: clean, zero, mean; spliced and KL of each splice.

    And the vocabulary's size.
    """

    def mean(raw: Tensor) -> Tensor:
        return mean_activation.to(raw.device).expand_as(raw)

    mask = predicting(keep)
    clean = lm.logits(tokens)
    sums = [mask.sum(1).tolist(), _cross_entropy(clean, tokens, mask)]
    sums += [
        _cross_entropy(lm.logits(tokens, replaced_at(keep, substitute)), tokens, mask)
        for substitute in (torch.zeros_like, mean)
    ]
    for splice in splices:
        logits = lm.logits(tokens, replaced_at(keep, splice))
        sums += [_cross_entropy(logits, tokens, mask), _kl(clean, logits, mask)]
        del logits  # before the next ones are made
    return torch.tensor(sums, dtype=torch.float64).T.contiguous(), clean.shape[-1]


def _cross_entropy(
    logits: Float[Tensor, "b context vocabulary"],
    tokens: Int[Tensor, "b context"],
    mask: Bool[Tensor, "b context-1"],
) -> list[float]:
    """Each context's sum of -log p(next token) over the masked positions, in nats."""
    sums = []
    for row, ids, where in zip(logits, tokens.to(logits.device), mask.to(logits.device), strict=True):
        log_p = row[:-1][where].float().log_softmax(-1)
        sums.append(-log_p.gather(1, ids[1:][where][:, None]).sum(dtype=torch.float64))
    return torch.stack(sums).tolist()


def _kl(
    clean: Float[Tensor, "b context vocabulary"],
    other: Float[Tensor, "b context vocabulary"],
    mask: Bool[Tensor, "b context-1"],
) -> list[float]:
    """Each context's sum of KL(clean || other) over the masked positions, in nats."""
    sums = []
    for row, other_row, where in zip(clean, other, mask.to(clean.device), strict=True):
        log_p, log_q = (logits[:-1][where].float().log_softmax(-1) for logits in (row, other_row))
        sums.append(kl_divergence(log_p, log_q).sum())
    return torch.stack(sums).tolist()
