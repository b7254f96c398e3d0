"""The geometric median, where the pre-bias starts: the point with the smallest summed distance to a sample."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class GeometricMedian(NamedTuple):
    """A point, and whether it passed the optimality test."""

    point: Float[Tensor, " d_model"]
    converged: bool
    slope: float
    """How far from optimal: norm of the mean unit vector towards the points, less what a point at hand absorbs."""


@torch.no_grad()
def geometric_median(
    points: Float[Tensor, "n d_model"], tolerance: float = 1e-4, max_iterations: int = 500
) -> GeometricMedian:
    """The point minimising the mean Euclidean distance to `points`, by Weiszfeld's iteration from their mean.

    It is optimal where the mean of the unit vectors towards the points vanishes or, on a point of the sample, is
    no longer than that point's share of the sample; the iteration stops when this holds to `tolerance`.
    The steps are those of Vardi and Zhang, which do not stick at points of the sample.

    Source: Gao et al. 2024, appendix A.1 (initial pre_bias); Vardi and Zhang 2000 for the iteration.
    """
    median = points.mean(0)
    tiny = torch.finfo(points.dtype).eps * points.norm(dim=1).max().clamp_min(torch.finfo(points.dtype).tiny)
    slope = float("inf")
    for _ in range(max_iterations):
        offsets = points - median
        distances = offsets.norm(dim=1)
        away = distances > tiny
        here = 1 - away.double().mean()  # share of the sample that lies on the median
        weights = away / distances.clamp_min(tiny)
        pull = (weights @ offsets) / len(points)
        slope = float((pull.norm() - here).clamp_min(0))
        if slope <= tolerance:
            return GeometricMedian(median, True, slope)
        step = len(points) / weights.sum()
        median = median + pull * step * (1 - here / pull.norm()).to(points.dtype)
    return GeometricMedian(median, False, slope)
