"""Scaling laws of the loss, and fits of them with intervals.

    L(s)    = irreducible + coefficient s^exponent                      s: compute, latents or tokens
    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)

Both are a power law, linear in its parameters after a logarithm, plus an irreducible term of the same kind:
L = exp(A theta) + exp(B phi), with a row of A and B a measured loss. The fit minimises Huber's loss of
ln(predicted) - ln(measured), as Hoffmann et al. 2022 do (appendix D.3): logarithms, because losses at small and at
large sizes shall count alike, and Huber, because a run that diverged or stopped early shall not move the law. Residuals
below 1 % count squared, larger ones linearly; with their 0.001 nearly all of them would count linearly, which at noise
of 1 % makes least absolute deviations of it.

1. starts: the irreducible term at several shares of the lowest loss at its k; the rest by linear regression
2. from each of them least squares with that loss (trust region, analytic Jacobian); the best end is the fit
3. intervals: residuals are drawn with replacement, put on the fitted curve, and fitted again. Before that they are
   inflated, each for how far it pulled the fit towards itself, and all by Student's quantile over the normal one.
   Nominally 95 %, they held a parameter in 88 to 95 % of cases; 82 to 93 % when residuals were inflated for degrees of
   freedom alone (60 samples each of 15 points for 3 parameters and of 42 points for 6, noise of 1 %)

Source: Gao et al. 2024, sections 3.1 and 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float, Real
from scipy import stats
from scipy.optimize import least_squares

from topkapi.errors import TopkapiError
from topkapi.statistics.intervals import CONFIDENCE, Interval, checked_sample, percentile_interval

HUBER = 0.01
SHARES = (0.02, 0.2, 0.4, 0.6, 0.8, 0.95)  # of the lowest loss, where the irreducible term starts


@dataclass(frozen=True)
class PowerLaw:
    """L(s) = irreducible + coefficient s^exponent; an irreducible of 0 where the law has no such term."""

    coefficient: float
    exponent: float
    irreducible: float

    def loss(self, size: Real[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """L at each size."""
        return self.irreducible + self.coefficient * size**self.exponent


@dataclass(frozen=True)
class JointLaw:
    """L(n, k), of a dictionary of n latents of which k are active.

    Where the law has no irreducible term, zeta is -inf and eta is 0.
    """

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float

    def loss(self, n_latents: Real[np.ndarray, " n"], k: Real[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """L at each pair of n_latents and k."""
        log_n, log_k = np.log(n_latents), np.log(k)
        reducible = np.exp(self.alpha + self.beta_k * log_k + self.beta_n * log_n + self.gamma * log_k * log_n)
        return reducible + self.irreducible(k)

    def irreducible(self, k: Real[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """exp(zeta + eta ln k): the loss at each k that no number of latents goes below."""
        return np.exp(self.zeta + self.eta * np.log(k))

    def exponent(self, k: Real[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """beta_n + gamma ln k: that of n_latents in the reducible term, at each k."""
        return self.beta_n + self.gamma * np.log(k)


GPT4_COMPUTE = PowerLaw(coefficient=0.056, exponent=-0.084, irreducible=0.09)
"""Normalized MSE of autoencoders on GPT-4; compute as a fraction of its pre-training (Gao et al. 2024, 3.1.1)."""

GPT4 = JointLaw(alpha=-0.50, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085)
"""Normalized MSE of converged autoencoders on GPT-4, for k well below d_model (Gao et al. 2024, 3.1.3)."""


Law = TypeVar("Law", PowerLaw, JointLaw)


@dataclass(frozen=True)
class LawFit(Generic[Law]):
    """A fitted law, and how far it can be trusted."""

    law: Law
    intervals: dict[str, Interval]
    """For each parameter of the law: 95 % by bootstrap. A term that was left out has none."""
    residuals: Float[np.ndarray, " n"]
    """ln(predicted) - ln(measured), in the order of the measurements."""
    draws: tuple[Law, ...]
    """The laws of the bootstrap, for the interval of what follows from a law: a loss, an exponent."""

    @property
    def rms(self) -> float:
        """Root mean square of the residuals: 0.01 is one per cent of the loss."""
        return float(np.sqrt((self.residuals**2).mean()))


def fit_power_law(
    size: Real[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    *,
    irreducible: bool = True,
    n_bootstrap: int = 300,
    seed: int = 0,
) -> LawFit[PowerLaw]:
    """The `PowerLaw` through losses at sizes: compute, latents or tokens. Also tokens to convergence by latents.

    Without `irreducible` that term is 0. Where the losses show no such term, it comes out near 0.

    Raises:
        TopkapiError: a size or loss is not positive and finite; fewer points than parameters and two more; fewer
            distinct sizes than parameters.
    """
    size, loss = _positive(size, "size"), _positive(loss, "loss")
    ones = np.ones(len(size))
    reducible_terms = np.stack([ones, np.log(size)], 1)
    irreducible_terms = ones[:, None][:, : int(irreducible)]
    _require_distinct(size, "sizes", 2 + int(irreducible))

    def law(parameters: np.ndarray) -> PowerLaw:
        floor = float(np.exp(parameters[2])) if irreducible else 0.0
        return PowerLaw(float(np.exp(parameters[0])), float(parameters[1]), floor)

    names = ["coefficient", "exponent", *["irreducible"] * irreducible]
    return _fit(reducible_terms, irreducible_terms, loss, law, names, n_bootstrap, seed)


def fit_joint_law(
    n_latents: Real[np.ndarray, " n"],
    k: Real[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    *,
    irreducible: bool = True,
    n_bootstrap: int = 300,
    seed: int = 0,
) -> LawFit[JointLaw]:
    """The `JointLaw` through converged losses at pairs of n_latents and k, with or without the irreducible term.

    Raises:
        TopkapiError: a size or loss is not positive and finite; fewer points than parameters and two more; too few
            distinct n_latents (3, or 2 without the irreducible term) or k (2); k only ever varies with n_latents.
    """
    n_latents, k, loss = _positive(n_latents, "n_latents"), _positive(k, "k"), _positive(loss, "loss")
    log_n, log_k, ones = np.log(n_latents), np.log(k), np.ones(len(k))
    reducible_terms = np.stack([ones, log_k, log_n, log_k * log_n], 1)
    irreducible_terms = np.stack([ones, log_k], 1)[:, : 2 * int(irreducible)]
    _require_distinct(n_latents, "n_latents", 2 + int(irreducible))
    _require_distinct(k, "k", 2)

    def law(parameters: np.ndarray) -> JointLaw:
        return JointLaw(*map(float, parameters), *([] if irreducible else [-np.inf, 0.0]))

    names = ["alpha", "beta_k", "beta_n", "gamma", *["zeta", "eta"] * irreducible]
    return _fit(reducible_terms, irreducible_terms, loss, law, names, n_bootstrap, seed)


def _fit(
    reducible_terms: Float[np.ndarray, "n p"],
    irreducible_terms: Float[np.ndarray, "n q"],
    loss: Float[np.ndarray, " n"],
    law: Callable[[np.ndarray], Law],
    names: list[str],
    n_bootstrap: int,
    seed: int,
) -> LawFit[Law]:
    """The three steps of the module's docstring; `law` makes one from theta and phi, whose names are `names`."""
    n_points, n_parameters = len(loss), len(names)
    if n_points < n_parameters + 2:
        raise TopkapiError(f"{n_parameters} parameters need at least {n_parameters + 2} points; got {n_points}.")
    if n_bootstrap < 1:
        raise TopkapiError(f"n_bootstrap must be at least 1, for intervals; got {n_bootstrap}.")
    if np.linalg.matrix_rank(reducible_terms) < reducible_terms.shape[1]:
        raise TopkapiError("k and n_latents must vary independently: measure several n_latents at each k.")
    # Orthogonal columns of unit mean square: ln n between 8 and 17 is nearly the constant term.
    bases = [_orthogonal(terms) for terms in (reducible_terms, irreducible_terms)]
    (columns_a, back_a), (columns_b, back_b) = bases

    def original(found: np.ndarray) -> np.ndarray:
        split = columns_a.shape[1]
        return np.concatenate([back_a @ found[:split], back_b @ found[split:]])

    logs = np.log(loss)
    starts = _starts(columns_a, columns_b, loss, irreducible_terms)
    ends = [_descend(columns_a, columns_b, logs, start) for start in starts]
    best, _ = min(ends, key=lambda end: end[1])
    predicted, slopes = _predict(columns_a, columns_b, best)
    residuals = predicted - logs
    draws = []
    for drawn in np.random.default_rng(seed).choice(_inflated(residuals, slopes), (n_bootstrap, n_points)):
        again, _ = _descend(columns_a, columns_b, predicted - drawn, best)
        draws.append(law(original(again)))
    intervals = {name: percentile_interval(np.array([getattr(draw, name) for draw in draws])) for name in names}
    return LawFit(law(original(best)), intervals, residuals, tuple(draws))


def _inflated(residuals: Float[np.ndarray, " n"], slopes: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """Residuals as they would be of points that were not fitted, of mean zero: over sqrt(1 - leverage), times t / z."""
    leverage = (np.linalg.qr(slopes)[0] ** 2).sum(1)
    free = len(residuals) - slopes.shape[1]
    tail = (1 + CONFIDENCE) / 2
    outside = residuals / np.sqrt(np.maximum(1 - leverage, 1 / len(residuals)))  # 0 / 0 where a point is met exactly
    return (outside - outside.mean()) * stats.t.ppf(tail, free) / stats.norm.ppf(tail)


def _predict(columns_a: np.ndarray, columns_b: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln L of every point, and its derivatives by the parameters `at`, (n, p + q)."""
    split = columns_a.shape[1]
    reducible = columns_a @ at[:split]
    irreducible = columns_b @ at[split:] if columns_b.shape[1] else np.full(len(reducible), -np.inf)
    logs = np.logaddexp(reducible, irreducible)
    share = np.exp(reducible - logs)[:, None]
    return logs, np.concatenate([share * columns_a, (1 - share) * columns_b], 1)


def _descend(
    columns_a: np.ndarray, columns_b: np.ndarray, logs: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, float]:
    """Where Huber's loss of the residuals is least near `start`, and that loss."""
    found = least_squares(
        lambda at: _predict(columns_a, columns_b, at)[0] - logs,
        start,
        jac=lambda at: _predict(columns_a, columns_b, at)[1],
        loss="huber",
        f_scale=HUBER,
        xtol=1e-8,
        ftol=1e-8,
        gtol=1e-12,
        max_nfev=200,
    )
    return found.x, float(found.cost)


def _starts(
    columns_a: np.ndarray, columns_b: np.ndarray, loss: np.ndarray, irreducible_terms: np.ndarray
) -> list[np.ndarray]:
    """Where to start from: the irreducible term at `SHARES` of the lowest loss at the same k, the rest regressed."""
    if not columns_b.shape[1]:
        return [_regress(columns_a, np.log(loss))]
    _, group = np.unique(irreducible_terms, axis=0, return_inverse=True)
    lowest = np.full(len(loss), np.inf)
    np.minimum.at(lowest, group.ravel(), loss)
    starts = []
    for share in SHARES:
        phi = _regress(columns_b, np.log(share * lowest[group.ravel()]))
        # The line through the lowest may pass above some, where nothing would be left to take a logarithm of.
        rest = np.maximum(loss - np.exp(columns_b @ phi), 0.01 * loss)
        starts.append(np.concatenate([_regress(columns_a, np.log(rest)), phi]))
    return starts


def _regress(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares for orthogonal columns of unit mean square."""
    return columns.T @ values / len(values)


def _orthogonal(terms: Float[np.ndarray, "n p"]) -> tuple[Float[np.ndarray, "n p"], Float[np.ndarray, "p p"]]:
    """Orthogonal columns of unit mean square that span `terms`, and the matrix from coefficients of those to these."""
    q, r = np.linalg.qr(terms)
    root = np.sqrt(len(terms))
    return q * root, np.linalg.inv(r) * root


def _positive(values: np.ndarray, what: str) -> Float[np.ndarray, " n"]:
    values = checked_sample(values, what, 1)
    if values.min() <= 0:
        raise TopkapiError(f"{what} must be positive; the smallest is {values.min()}.")
    return values


def _require_distinct(values: np.ndarray, what: str, at_least: int) -> None:
    distinct = len(np.unique(values))
    if distinct < at_least:
        raise TopkapiError(f"The law needs at least {at_least} distinct {what}; got {distinct}.")
