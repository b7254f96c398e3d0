"""Which latents made the language model prefer one next token over another, as estimated and as measured.

The metric M is the mean logit of the positive tokens less that of the negative ones, at the last position.

1. `attribute`: one pass forward and back gives the gradient g of M with respect to the activations at the site. To
   first order, setting latent i to 0 at position t lowers M by z norm <g_t, W_dec[i]>: activation times gradient.
2. With `steps`, the gradient is averaged along the way from all latents at 0 to all as they are (integrated
   gradients), so that attributions add up to what M changes by in between.
3. `measure`: sets a latent to 0 at all positions and runs the language model again. What an attribution predicts is
   this number; `rank_correlation` says how well a list of them does.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from scipy import stats
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.evaluate.downstream import LOGIT_ELEMENTS
from topkapi.explore.spliced import Code, Spliced
from topkapi.ops import matmul_at_sparse_indices
from topkapi.statistics.intervals import Z

Numbers = Sequence[float] | Float[np.ndarray, " n"]

FEWEST_PAIRS = 4  # of which a rank correlation can have an interval


class Attribution(NamedTuple):
    """What every active latent contributed to a metric, to first order; rows are latents, by falling |total|."""

    metric: float
    """M with nothing changed."""
    latents: Int64[np.ndarray, " m"]
    total: Float64[np.ndarray, " m"]
    """The sum over positions: by how much M falls, as estimated, when the latent is set to 0 everywhere."""
    at: Float64[np.ndarray, "m c"]
    """The same of each position, 0 where the latent is not active or training would not use the token."""
    values: Float64[np.ndarray, "m c"]
    """The latent's value at each position, 0 where `at` is."""


class RankCorrelation(NamedTuple):
    """Spearman's, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Pairs that it is of."""


def metric(logits: Float[Tensor, "b vocab"], positive: Sequence[int], negative: Sequence[int]) -> Float[Tensor, " b"]:
    """Mean logit of the positive tokens less that of the negative ones, of each row."""
    return logits[:, list(positive)].mean(1) - logits[:, list(negative)].mean(1)


def attribute(
    spliced: Spliced,
    tokens: Int[Tensor, "1 c"],
    positive: Sequence[int],
    negative: Sequence[int],
    steps: int = 0,
    on_step: Callable[[int], object] = lambda _: None,
) -> Attribution:
    """The contribution of every latent that is active in a prompt to the difference of two sets of logits.

        at[i, t] = z_it norm_t <g_t, W_dec[i]>      g_t = dM / d raw_t

    With steps > 0 g is the mean of the gradients at `steps` points between the activations without any latent's part
    and those as they are (midpoint rule, whose error falls with the square of steps): then `total` sums to M less M
    without any latent. Cost: a pass up to the site, and 1 + `steps` passes forward and back; `on_step` hears of them.

    Raises:
        TopkapiError: a set is empty or has a token that the other has, a token is none, or steps < 0.

    Source: Gao et al. 2024, appendix E.2; Sundararajan et al. 2017.
    """
    _check_sets(spliced, positive, negative)
    if steps < 0:
        raise TopkapiError(f"steps must be 0, for the gradient as it is, or more; got {steps}.")
    code = spliced.code(tokens)
    value, gradient = spliced.lm.gradient(tokens, lambda logits: metric(logits, positive, negative))
    on_step(1)
    if steps:
        gradient = _mean_gradient(spliced, tokens, code, positive, negative, steps, on_step)
    values = torch.where(code.kept[..., None], code.values, 0)[0].double()
    rows, indices = spliced.ae.W_dec.detach(), code.indices[0]
    g = gradient[0].to(rows)
    is_dense = spliced.ae.activation == "relu"  # all latents, in order
    slopes = g @ rows.T if is_dense else matmul_at_sparse_indices(g, rows, indices)
    parts = (values * slopes.double() * code.norm[0, :, None]).cpu()
    return _by_latent(float(value), code.indices[0].cpu(), values.cpu(), parts)


def _by_latent(
    value: float, indices: Int[Tensor, "c k"], values: Float64[Tensor, "c k"], parts: Float64[Tensor, "c k"]
) -> Attribution:
    """A row a latent that is active somewhere, from entries by token."""
    position, entry = (values > 0).nonzero(as_tuple=True)
    latents, row = indices[position, entry].unique(return_inverse=True)
    at, of = (torch.zeros(len(latents), len(values), dtype=torch.float64) for _ in range(2))
    at[row, position], of[row, position] = parts[position, entry], values[position, entry]
    order = at.sum(1).abs().argsort(descending=True, stable=True)
    at, of, latents = at[order].numpy(), of[order].numpy(), latents[order].to(torch.int64).numpy()
    return Attribution(value, latents, at.sum(1), at, of)


def _mean_gradient(
    spliced: Spliced,
    tokens: Int[Tensor, "1 c"],
    code: Code,
    positive: Sequence[int],
    negative: Sequence[int],
    steps: int,
    on_step: Callable[[int], object],
) -> Float[Tensor, "1 c d_model"]:
    """The mean of dM / d raw at `steps` points from no latents to all."""
    whole = latents_part(spliced, code)
    shares, total = (torch.arange(steps) + 0.5) / steps, 0.0
    for some in shares.split(passes_at_once(spliced, tokens)):

        def replace(raw: Tensor, some: Tensor = some) -> Tensor:
            return raw - ((1 - some).to(whole)[:, None, None] * whole).to(raw.device)

        _, gradient = spliced.lm.gradient(
            tokens.expand(len(some), -1), lambda logits: metric(logits, positive, negative), replace
        )
        total = total + gradient.double().sum(0, keepdim=True)
        on_step(len(some))
    return total / steps


@torch.no_grad()
def latents_part(spliced: Spliced, code: Code) -> Float[Tensor, "1 c d_model"]:
    """What all active latents add to the raw activations: norm z W_dec, 0 at tokens that training would not use."""
    ae = spliced.ae
    part = ae.decode(code.values.flatten(0, 1), code.indices.flatten(0, 1)) - ae.pre_bias
    return torch.where(code.kept[..., None], code.norm[..., None] * part.unflatten(0, code.norm.shape), 0)


def passes_at_once(spliced: Spliced, tokens: Int[Tensor, "b c"]) -> int:
    """How many contexts of this length go through the language model together, so that their logits fit."""
    return max(1, min(spliced.lm.batch_contexts, LOGIT_ELEMENTS // (tokens.shape[1] * vocabulary(spliced))))


def vocabulary(spliced: Spliced) -> int:
    """How many tokens the language model can predict."""
    return spliced.lm.model.config.get_text_config().vocab_size


def measure(
    spliced: Spliced,
    tokens: Int[Tensor, "1 c"],
    latents: Sequence[int],
    positive: Sequence[int],
    negative: Sequence[int],
    on_done: Callable[[int], object] = lambda _: None,
) -> Float64[np.ndarray, " m"]:
    """By how much M falls when each of the latents alone is set to 0 at every token that training would use.

        M_clean - M_ablated

    What `Attribution.total` estimates. 0 for a latent that is active nowhere. Cost: a pass for each latent, and a clean
    one for each batch of them, as passes over other numbers of contexts round differently. `on_done` hears of latents
    as they are done.

    Raises:
        TopkapiError: no such latent, sets as in `attribute`, or the language model does not compute in float32.
    """
    _check_sets(spliced, positive, negative)
    for latent in latents:
        spliced.check_latent(latent)
    require_precise(spliced)
    code, size = spliced.code(tokens), max(1, passes_at_once(spliced, tokens) - 1)
    falls = [np.zeros(0)]
    for start in range(0, len(latents), size):
        some = list(latents[start : start + size])
        parts = torch.cat([ablated_part(spliced, code, latent) for latent in some])
        logits = spliced.lm.logits(tokens.expand(1 + len(some), -1), without(parts), tokens.shape[1] - 1)
        metrics = metric(logits[:, 0].double(), positive, negative)
        falls.append((metrics[0] - metrics[1:]).cpu().numpy())
        on_done(len(some))
    return np.concatenate(falls)


@torch.no_grad()
def ablated_part(spliced: Spliced, code: Code, latent: int) -> Float[Tensor, "1 c d_model"]:
    """What one latent adds to the raw activations: norm z W_dec[latent], 0 at tokens that training would not use."""
    z = torch.where((code.indices == latent) & code.kept[..., None], code.values, 0).sum(-1)
    return (code.norm * z)[..., None] * spliced.ae.W_dec[latent]


def without(parts: Float[Tensor, "m c d_model"]) -> Callable[[Tensor], Tensor]:
    """The `replace` argument that leaves the first context alone and takes a part from each of the others."""

    def replace(raw: Tensor) -> Tensor:
        return torch.cat([raw[:1], raw[1:] - parts.to(raw.device)])

    return replace


def require_precise(spliced: Spliced) -> None:
    """Raise TopkapiError if the language model computes in 16 bits."""
    dtype = spliced.lm.model.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TopkapiError(
            f"effects of latents are small differences of logits, which {dtype} rounds away: convert the language "
            "model first, lm.model.float()."
        )


def rank_correlation(predicted: Numbers, measured: Numbers) -> RankCorrelation | None:
    """Spearman's rank correlation and its interval; None for fewer than 4 pairs, or where one side is constant.

        tanh(atanh(r) -+ Z sqrt((1 + r^2 / 2) / (n - 3)))

    At r = +-1, where atanh has no value, the other end of the interval is that of the nearest r that n ranks without
    ties can have. The pairs must be of different latents; that they were chosen for large predictions is not accounted
    for.

    Source: Bonett and Wright 2000.
    """
    x, y = (np.asarray(side, dtype=np.float64) for side in (predicted, measured))
    n = len(x)
    if n < FEWEST_PAIRS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    value = float(stats.spearmanr(x, y).statistic)
    nearest = 1 - 12 / (n * (n * n - 1))  # two neighbours swapped
    r = math.copysign(min(abs(value), nearest), value)
    half = Z * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(r) + side * half) for side in (-1, 1))
    return RankCorrelation(value, min(low, value), max(high, value), n)


def _check_sets(spliced: Spliced, positive: Sequence[int], negative: Sequence[int]) -> None:
    if not positive or not negative:
        raise TopkapiError("a difference of logits needs a positive and a negative token at least.")
    if both := set(positive) & set(negative):
        raise TopkapiError(f"tokens {sorted(both)} are both positive and negative: leave them out of one.")
    n_words = vocabulary(spliced)
    for token in (*positive, *negative):
        if not 0 <= token < n_words:
            raise TopkapiError(f"no token {token}: the language model has tokens 0 to {n_words - 1}.")
