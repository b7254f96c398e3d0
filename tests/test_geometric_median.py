"""The geometric median is optimal, and says when it is not.

Seen to catch: plain Weiszfeld weights, with a point at hand counted at the smallest distance (sticks there).
"""

import pytest
import torch

from topkapi.geometric_median import geometric_median


def cost(points: torch.Tensor, centre: torch.Tensor) -> float:
    return float((points - centre).norm(dim=1).mean())


@pytest.mark.parametrize("seed", range(5))
def test_no_step_away_from_it_lowers_the_cost(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(400, 7, generator=generator, dtype=torch.float64).exp()
    found = geometric_median(points, tolerance=1e-8)
    assert found.converged
    best = cost(points, found.point)
    for _ in range(50):
        step = torch.randn(7, generator=generator, dtype=torch.float64)
        assert cost(points, found.point + 1e-3 * step / step.norm()) > best


def test_outliers_do_not_move_it_far() -> None:
    points = torch.cat([torch.randn(99, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4), 1e6)])
    assert geometric_median(points).point.norm() < 1


def test_a_point_that_is_most_of_the_sample_is_the_median() -> None:
    points = torch.cat([torch.ones(6, 3), torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) * 10])
    found = geometric_median(points.double(), max_iterations=5000)
    assert found.converged
    torch.testing.assert_close(found.point, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_starting_on_a_point_of_the_sample_does_not_stick() -> None:
    crowd = torch.tensor([[1.0, 0.1], [1, -0.1], [1, 0.2], [1, -0.2], [1, 0.3], [1, -0.3]]).double()
    points = torch.cat([torch.zeros(1, 2).double(), crowd, torch.tensor([[-6.0, 0]]).double()])
    assert not points.mean(0).any()  # the iteration starts on the first point, far from the crowd where the median is
    found = geometric_median(points, tolerance=1e-9, max_iterations=20_000)
    assert found.converged
    assert found.point[0] > 0.9
    assert cost(points, found.point) < cost(points, points[0]) - 0.3


def test_one_point_and_equal_points() -> None:
    for points in (torch.ones(1, 3), torch.full((8, 3), 2.5)):
        found = geometric_median(points)
        assert found.converged
        torch.testing.assert_close(found.point, points[0])


def test_too_few_iterations_are_admitted() -> None:
    points = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).exp()
    found = geometric_median(points, tolerance=1e-9, max_iterations=2)
    assert not found.converged
    assert found.slope > 1e-9
