"""Activation shrinkage, measured by refinement: how far the values are from the best ones for the same latents.

For each token the active latents (values > 0) and the decoder stay, and the values are optimised anew:

    minimise |x - pre_bias - sum_j v_j W_dec[j]|^2  over v >= 0

An L1 penalty pulls values down, so refined values of a ReLU autoencoder lie above the original ones; those of a TopK
autoencoder lie around them.

Source: Gao et al. 2024, section 5.1. They descend the gradient; here the problem is solved exactly, by block principal
pivoting (Kim and Park 2011) on the Gram matrices of the active decoder rows, in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from topkapi.evaluate.sampling import TokenSums, chunks
from topkapi.model import Autoencoder
from topkapi.statistics.intervals import Estimate

WORK_ELEMENTS = 2**23  # float64 of Gram matrices and decoder rows at once: 64 MiB, a few times
PROXIMAL = 1e-9  # of the largest squared row norm: makes the solution unique, costs this times |refined - values|^2
TOLERANCE = 1e-10  # of the largest |gradient at 0|: less than this below 0 counts as 0
PIVOTS = 500  # 32 active latents take about 5
BIN, N_BINS = 0.02, 201  # of the histogram of ratios; the last bin holds all from 4 on


@dataclass(frozen=True)
class Refinement:
    """What refinement changes, over all tokens.

    A ratio is refined value / value of one active latent of one token. `mean_ratio` is their mean, in which a value
    close to 0 counts as much as a large one; `total_ratio` is sum of refined / sum of values.
    """

    n_tokens: int
    n_active: int
    """(token, latent) pairs with a value > 0."""
    n_unsolved: int
    """Tokens that kept their values because the solver did not finish; 0 but for pathological decoders."""
    normalized_mse: Estimate
    """Before refinement."""
    normalized_mse_refined: Estimate
    """After it; never higher."""
    mean_ratio: Estimate
    total_ratio: Estimate
    histogram: Int64[Tensor, " bins"]
    """Pairs by ratio, in bins of 0.02 from 0; the last one holds all ratios of 4 and more."""
    reason: str
    """Why a figure is undefined; empty if none is."""


@torch.no_grad()
def refinement(
    ae: Autoencoder,
    x: Tensor | Iterable[Tensor],
    seed: int = 0,
    contexts: Int[Tensor, " tokens"] | None = None,
) -> Refinement:
    """Normalized MSE before and after refinement, and how the values change, for normalised activations.

    `x` is (n, d_model) or an iterable of such blocks; `seed` that of the bootstrap, which draws contexts where
    `contexts` says which one each token is of, and otherwise tokens. Cost a token with m active latents: encoding,
    2 m^2 d_model flops for the Gram matrix and some 5 m^3 / 3 for the solver.

    Raises:
        TopkapiError: x has another shape.
    """
    sums = TokenSums(ae, 6, seed, contexts)
    histogram = torch.zeros(N_BINS, dtype=torch.int64, device=ae.W_dec.device)
    n_unsolved = 0
    for chunk in chunks(ae, x):
        values, indices = _active(*ae.encode(chunk))
        m = values.shape[1]
        rows = max(1, WORK_ELEMENTS // max(1, m * (m + ae.d_model)))
        for part in zip(chunk.split(rows), values.split(rows), indices.split(rows), strict=True):
            before, after, refined, solved = refine(ae, *part)
            values_part = part[1].double()
            active = values_part > 0
            ratios = torch.where(active, refined / values_part, 0)
            columns = [before, after, active.sum(1), ratios.sum(1), refined.sum(1), values_part.sum(1)]
            sums.add(part[0], torch.stack([column.double() for column in columns], 1))
            bins = (ratios[active] / BIN).clamp(max=N_BINS - 1).long()
            histogram += torch.bincount(bins, minlength=N_BINS)
            n_unsolved += int((~solved).sum())
    before, after, n_active, ratio, refined, original = sums.columns.T
    mse, mse_refined = sums.estimate(before / sums.spread), sums.estimate(after / sums.spread)
    reasons = {
        "no token was given": not sums.n_tokens,
        "all tokens are the same, or the reconstruction is not finite": sums.n_tokens and mse.value is None,
        "no latent fires on any of the tokens": sums.n_tokens and not n_active[0],
    }
    return Refinement(
        n_tokens=sums.n_tokens,
        n_active=int(n_active[0]),
        n_unsolved=n_unsolved,
        normalized_mse=mse,
        normalized_mse_refined=mse_refined,
        mean_ratio=sums.estimate(ratio / n_active),
        total_ratio=sums.estimate(refined / original),
        histogram=histogram.cpu(),
        reason="; ".join(why for why, holds in reasons.items() if holds),
    )


def _active(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The code without columns that no token needs: m is the largest number of active latents of a token."""
    m = int((values > 0).sum(1).max())
    values, where = values.topk(m)
    return values, indices.gather(1, where)


def refine(
    ae: Autoencoder, x: Float[Tensor, "n d_model"], values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"], Float64[Tensor, "n k"], Bool[Tensor, " n"]]:
    """Squared error before and after, the refined values (0 where a value is 0), and where the solver finished.

    Where it did not, and where rounding leaves the error higher, the values stay: the error never rises.
    """
    values, weight = values.double(), ae.W_dec[indices].double()  # (n, k, d_model)
    target = x.double() - ae.pre_bias.double()

    def error(of: Tensor) -> Tensor:
        return (target - torch.einsum("nk,nkd->nd", of, weight)).square().sum(1)

    gram = weight @ weight.mT
    solution, solved = nonnegative_least_squares(gram, torch.einsum("nkd,nd->nk", weight, target), values)
    before, after = error(values), error(solution)
    keep = ~solved | ~(after <= before)
    return before, torch.where(keep, before, after), torch.where(keep[:, None], values, solution), solved


def nonnegative_least_squares(
    gram: Float64[Tensor, "n k k"], correlation: Float64[Tensor, "n k"], start: Float64[Tensor, "n k"]
) -> tuple[Float64[Tensor, "n k"], Bool[Tensor, " n"]]:
    """For each of n problems the v >= 0 that minimises the following, and whether it was found.

        v gram v - 2 v correlation + eps |v - start|^2,   eps = PROXIMAL max diag(gram)

    Entries with start <= 0 stay 0. The last term makes the answer unique where rows of the dictionary depend on each
    other, and as `start` is allowed, the first two are never higher than at `start`.

    Block principal pivoting: entries are either free, and solve the normal equations, or 0. All that break v >= 0 or
    gradient >= 0 change sides together; after three exchanges that leave no fewer of them, only the last one does,
    which ends after finitely many (Kim and Park 2011, section 3).
    """
    n, k = start.shape
    eps = PROXIMAL * gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-30) if k else gram.new_ones(n)
    gram = gram + torch.diag_embed(eps[:, None].expand(n, k))
    correlation = correlation + eps[:, None] * start
    solution, solved = torch.zeros_like(start), torch.zeros(n, dtype=torch.bool, device=start.device)
    if n == 0 or k == 0:
        return solution, ~solved
    slack = TOLERANCE * correlation.abs().amax(1)
    allowed = start > 0
    free = allowed.clone()
    fewest, tries = torch.full((n,), k + 1, device=start.device), torch.full((n,), 3, device=start.device)
    todo = torch.arange(n, device=start.device)  # problems not yet solved
    for _ in range(PIVOTS):
        g, c, f, tolerance = gram[todo], correlation[todo], free[todo], slack[todo, None]
        both = f[:, :, None] & f[:, None, :]
        factor, _ = torch.linalg.cholesky_ex(torch.where(both, g, 0) + torch.diag_embed((~f).double()))
        v = torch.cholesky_solve((c * f)[:, :, None], factor)[:, :, 0]
        gradient = torch.einsum("nij,nj->ni", g, v) - c
        wrong = torch.where(f, v < -tolerance / g.diagonal(dim1=1, dim2=2), allowed[todo] & (gradient < -tolerance))
        n_wrong = wrong.sum(1)
        solution[todo] = v.clamp(min=0)
        solved[todo] = n_wrong == 0
        fewer = n_wrong < fewest[todo]
        tries[todo] = torch.where(fewer, 3, tries[todo] - 1)
        fewest[todo] = torch.minimum(fewest[todo], n_wrong)
        last = torch.arange(k, device=todo.device) == (k - 1 - wrong.flip(1).int().argmax(1))[:, None]
        free[todo] = f ^ torch.where((fewer | (tries[todo] >= 0))[:, None], wrong, wrong & last)
        todo = todo[n_wrong > 0]
        if not len(todo):
            break
    return solution, solved
