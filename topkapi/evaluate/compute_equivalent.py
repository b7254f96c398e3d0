"""The training compute that a spliced language model's loss is worth."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from topkapi.errors import TopkapiError
from topkapi.statistics.intervals import Estimate, estimate


def compute_equivalent(curve: Sequence[tuple[float, float]], ce_spliced: float, ce_clean: float) -> float:
    """The compute whose training reaches `ce_spliced`, as a share of that which reaches `ce_clean`.

        share = C(ce_spliced) / C(ce_clean)

    `curve` holds two or more (compute, cross-entropy in nats per token) points of language models of one family, or
    checkpoints of one model, measured on the text and the predictions of the two losses, in any order. C goes through
    all points; between neighbours log C is linear in the loss. The unit of compute cancels. 1: splicing costs nothing.
    0.1: as good as a language model trained with a tenth of the compute. Above 1 where splicing lowers the loss. Not to
    be mistaken for loss_recovered, which is near 1 for losses that are worth little compute.

    Raises:
        TopkapiError: fewer than two points, a number that is not finite, a compute that is not positive, a loss that
            does not fall as compute grows, or a loss outside the curve's (nothing is extrapolated).

    Source: Gao et al. 2024, section 4.1. The paper does not say how it went from loss to compute; interpolation is
    the choice made here, as it assumes no law beyond the points.
    """
    points = sorted(curve)
    _check(points)
    log_compute = [math.log(compute) for compute, _ in points]
    losses = [loss for _, loss in points]
    for name, loss in (("ce_spliced", ce_spliced), ("ce_clean", ce_clean)):
        if not losses[-1] <= loss <= losses[0]:
            raise TopkapiError(
                f"{name} = {loss:g} lies outside the reference curve, {losses[-1]:g} to {losses[0]:g} nats: add "
                "language models trained with less or more compute."
            )
    spliced, clean = np.interp([ce_spliced, ce_clean], losses[::-1], log_compute[::-1])
    return math.exp(spliced - clean)


def resampled(
    curve: Sequence[tuple[float, float]], ce_spliced: Sequence[float], ce_clean: Sequence[float], n: int
) -> Estimate:
    """`compute_equivalent` of the first of each, with the interval that the others, their bootstrap draws, give.

    The curve is taken as exact. No interval where more than one draw in twenty lies outside of it. n: contexts drawn.

    Raises:
        TopkapiError: as `compute_equivalent`.
    """
    draws = [compute_equivalent(curve, ce_spliced[0], ce_clean[0])]
    for pair in zip(ce_spliced[1:], ce_clean[1:], strict=True):
        try:
            draws.append(compute_equivalent(curve, *pair))
        except TopkapiError:
            draws.append(math.nan)
    found = estimate(np.array(draws), n)
    if np.isnan(draws).mean() > 1 / 20:
        why = "more than one draw in twenty lies outside the reference curve"
        return found._replace(low=None, high=None, reason=why)
    return found


def read_curve(path: Path) -> list[tuple[float, float]]:
    """The points of a reference curve: lines of compute and loss, divided by a comma or white space.

    A line of names may come first; empty lines and what follows a # are left out.

    Raises:
        TopkapiError: the file cannot be read, or its points are no curve.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopkapiError(f"The reference curve {path} cannot be read: {error}.") from None
    points = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.partition("#")[0].replace(",", " ").split()
        try:
            compute, loss = map(float, cells)
        except ValueError:
            if not cells or (not points and not any(map(_is_number, cells))):
                continue
            raise TopkapiError(
                f"{path}, line {number}: wanted two numbers, compute and loss in nats; got {line!r}."
            ) from None
        points.append((compute, loss))
    try:
        _check(sorted(points))
    except TopkapiError as error:
        raise TopkapiError(f"{path}: {error}") from None
    return points


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check(points: list[tuple[float, float]]) -> None:
    """That the points, by rising compute, are a curve which has one compute for each loss."""
    if len(points) < 2:
        raise TopkapiError(f"A reference curve needs two points (compute, loss) or more; got {len(points)}.")
    for compute, loss in points:
        if not (math.isfinite(compute) and compute > 0 and math.isfinite(loss)):
            raise TopkapiError(f"A point of a reference curve is (compute > 0, finite loss); got ({compute}, {loss}).")
    for (less, higher), (more, lower) in pairwise(points):
        if not (less < more and higher > lower):
            raise TopkapiError(
                f"The loss of a reference curve must fall as compute grows; it goes from {higher:g} at {less:g} to "
                f"{lower:g} at {more:g}. Leave one of the two points out."
            )
