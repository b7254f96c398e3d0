"""How few of the next words' logits a latent changes: the sparsity of its ablation effects.

1. One position of each context is drawn, uniformly among the kept ones with T - 1 later ones in the context.
2. Each latent active there is set to 0, alone. Its part z_i W_dec[i], scaled back to raw, is taken from the language
   model's own activation: what the autoencoder does not explain stays, and so do the other latents and positions.
3. The effect is the change of all logits at this position and the T - 1 later ones, less its median at each position.
4. `effect_sparsity` says which share of the V T logits that amounts to.

The same of the channels of the activation, one coordinate of x set to 0 at a time, is what it compares with: see
`topkapi.evaluate.control`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

from topkapi.config import DataConfig
from topkapi.console import progress
from topkapi.data.activations import kept_positions
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.errors import TopkapiError
from topkapi.evaluate.downstream import LOGIT_ELEMENTS
from topkapi.model import Autoencoder
from topkapi.statistics.intervals import Estimate, bootstrap_mean

N_POSITIONS = 16  # T of Gao et al. 2024


@dataclass(frozen=True)
class AblationSparsity:
    """The sparsity of each ablation, one row an active latent at a drawn token."""

    tokens: Int64[np.ndarray, " n"]
    """Positions of the ablated tokens in the token file, ascending; those of one token are neighbours."""
    latents: Int64[np.ndarray, " n"]
    sparsity: Float64[np.ndarray, " n"]
    """NaN where an ablation changes all logits of a position alike, and so no prediction."""
    n_skipped: int
    """Contexts without a kept position that has T - 1 later ones, or with no latent active at the drawn one."""

    def over_tokens(self, seed: int = 0) -> Estimate:
        """Mean over drawn tokens of the mean over the latents active there, the number to compare with the paper's.

        Of the tokens where one ablation at least is defined.
        """
        means, _ = self._of_tokens(np.ones(len(self.tokens)))
        return bootstrap_mean(means, seed)

    def over_latents(self, seed: int = 0) -> Estimate:
        """Mean over latents of the mean over the drawn tokens at which each is active: each counts once.

        The interval, and n, are of tokens: effects at one token resemble each other, and resampling latents as if
        they did not gave a fifth of the width that resampling tokens gives (12 tokens and 359 latents of SmolLM2's
        layer 10, k=32).
        """
        _, latent = np.unique(self.latents, return_inverse=True)
        n_defined = np.bincount(latent, ~np.isnan(self.sparsity))[latent]
        means, weights = self._of_tokens(1 / np.maximum(n_defined, 1))
        return bootstrap_mean(means, seed, weights)

    def _of_tokens(self, weights: Float64[np.ndarray, " n"]) -> tuple[list[float], list[float]]:
        """For each drawn token the weighted mean of its defined values, NaN where it has none, and their weight."""
        names, token = np.unique(self.tokens, return_inverse=True)
        defined = ~np.isnan(self.sparsity)
        value, weight, token = self.sparsity[defined], weights[defined], token[defined]
        total = np.bincount(token, weight * value, minlength=len(names))
        weight = np.bincount(token, weight, minlength=len(names))
        means = np.divide(total, weight, out=np.full(len(names), np.nan), where=weight > 0)
        return means.tolist(), weight.astype(np.float64).tolist()  # bincount of nothing is of integers


def effect_sparsity(clean: Float[Tensor, "T V"], ablated: Float[Tensor, "m T V"]) -> Float64[Tensor, " m"]:
    """The share of logits that each of m ablations changes, in (0, 1].

        effect[t, v] = ablated[t, v] - clean[t, v] - median over v of the same
        sparsity     = (sum |effect| / sqrt(sum effect^2))^2 / (V T)

    1 / (V T) where one logit changes, 2/pi for Gaussian effects, 1 where all change by the same amount, up or down. The
    median is the lower of the two in the middle where V is even. NaN where no effect is left. Words that the language
    model never says (a logit that is not finite at any of the T positions of `clean`) do not count towards V.
    Accumulates in float64; memory beyond the arguments: a few times m V. Rounding of the logits counts as
    effect: an ablation that changes them by less than that looks dense.

    Source: Gao et al. 2024, section 4.5.
    """
    words = clean.isfinite().all(0)
    n_logits = len(clean) * int(words.sum())
    absolute = torch.zeros(len(ablated), dtype=torch.float64, device=ablated.device)
    squared = torch.zeros_like(absolute)
    for before, after in zip(clean, ablated.unbind(1), strict=True):
        effect = (after - before)[:, words]
        effect = (effect - effect.median(1, keepdim=True).values).double()
        absolute += effect.abs().sum(1)
        squared += effect.square().sum(1)
    return absolute.square() / squared / n_logits  # 0 / 0 is NaN


def ablation_sparsity(
    ae: Autoencoder,
    lm: LanguageModel,
    token_file: TokenFile,
    context_ids: Int[np.ndarray, " contexts"],
    config: DataConfig,
    n_positions: int = N_POSITIONS,
    seed: int = 0,
    most: int = 0,
) -> AblationSparsity:
    """The sparsity of the effects of every latent active at one drawn token of each context, or of `most` drawn ones.

    Which token is drawn depends on the seed and the context's number alone. Cost: for each context one pass up
    to the site, and 1 + the number of active latents whole passes over the context up to `n_positions` - 1 tokens
    after the drawn one, in batches of at most `LOGIT_ELEMENTS` logits.

    Raises:
        TopkapiError: n_positions is not in 1..context, or the language model does not compute in float32.

    Source: Gao et al. 2024, section 4.5, with T = 16. Where in the context the ablated token lies changes the result;
    the paper does not say where it was. Here all positions with T tokens left are equally likely.
    """
    if not 1 <= n_positions <= config.context:
        raise TopkapiError(
            f"An ablation is followed over 1 to context={config.context} positions; got n_positions={n_positions}."
        )
    found: list[tuple[int, Tensor, Tensor]] = []
    with progress("ablation", len(context_ids), unit="contexts") as meter:
        for context_id in context_ids.tolist():
            tokens = token_file.context_tokens(np.array([context_id]), config.context)
            kept = kept_positions(tokens, config, lm.special_ids)[0, : config.context - n_positions + 1]
            if kept.any():
                rng = np.random.default_rng((seed, context_id))
                at = int(rng.choice(kept.nonzero()[:, 0].numpy()))
                latents, sparsity = _ablate_all(ae, lm, tokens[:, : at + n_positions], at, most, rng)
                if len(latents):
                    found.append((context_id * config.context + at, latents, sparsity))
            meter.advance(1)
    found.sort(key=lambda of_token: of_token[0])
    return AblationSparsity(
        tokens=np.repeat([at for at, _, _ in found], [len(latents) for _, latents, _ in found]).astype(np.int64),
        latents=np.concatenate([np.zeros(0, np.int64), *(latents.cpu().numpy() for _, latents, _ in found)]),
        sparsity=np.concatenate([np.zeros(0), *(sparsity.cpu().numpy() for _, _, sparsity in found)]),
        n_skipped=len(context_ids) - len(found),
    )


@contextmanager
def in_float32(lm: LanguageModel) -> Iterator[None]:
    """Within the block the language model computes in float32, in which ablation effects are measured."""
    parameters = [(parameter, parameter.data) for parameter in lm.model.parameters()]
    try:
        for parameter, own in parameters:
            parameter.data = own.float()
        yield
    finally:
        for parameter, own in parameters:
            parameter.data = own


@torch.no_grad()
def _ablate_all(
    ae: Autoencoder, lm: LanguageModel, tokens: Int[Tensor, "1 length"], at: int, most: int, rng: np.random.Generator
) -> tuple[Int64[Tensor, " m"], Float64[Tensor, " m"]]:
    """The latents active at position `at`, or `most` drawn ones of them, and the sparsity of ablating each."""
    raw = lm.activations(tokens)[0, at]
    if raw.dtype != torch.float32:
        raise TopkapiError(
            f"Ablation effects are small differences of logits, which {raw.dtype} rounds away: convert the language "
            "model first, lm.model.float()."
        )
    x, _, norm = ae.normalise(raw[None].to(ae.W_dec.device))
    values, indices = ae.encode(x)
    active = (values[0] > 0).nonzero()[:, 0]
    if 0 < most < len(active):
        active = active[torch.from_numpy(np.sort(rng.permutation(len(active))[:most])).to(active.device)]
    latents = indices[0][active]
    parts = norm * values[0][active][:, None] * ae.W_dec[latents]
    size, done = 1, [torch.zeros(0, dtype=torch.float64)]
    start = 0
    while start < len(latents):
        clean, ablated = _logits(lm, tokens, at, parts[start : start + size])
        done.append(effect_sparsity(clean, ablated).cpu())
        start += size
        fitting = LOGIT_ELEMENTS // (tokens.shape[1] * clean.shape[-1]) - 1  # one is the clean context
        size = max(1, min(lm.batch_contexts - 1, fitting))
    return latents.to(torch.int64), torch.cat(done)


def _logits(
    lm: LanguageModel, tokens: Int[Tensor, "1 length"], at: int, parts: Float32[Tensor, "m d_model"]
) -> tuple[Float32[Tensor, "T V"], Float32[Tensor, "m T V"]]:
    """Logits from position `at` on: clean, and without each of the parts of its activation.

    All in one pass, because passes over other numbers of contexts round differently.
    """

    def replace(activations: Tensor) -> Tensor:
        out = activations.clone()
        out[1:, at] -= parts.to(out.device, out.dtype)
        return out

    logits = lm.logits(tokens.expand(1 + len(parts), -1), replace)[:, at:]
    return logits[0], logits[1:]
