"""The k largest of all shards' candidates are those of a stable sort, by plain PyTorch and by the kernel.

Seen to catch: ties going to higher shards, or to later candidates of a shard; equal candidates of lower shards not
counted; one more kept than k; candidates of 0 kept; a chunk of rows taken from the first rows.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topkapi.ops import reference

NOBODY = 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sizes = st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12))


def made(n: int, n_shards: int, width: int, distinct: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of all shards, equal ones in the order of their latents; few distinct values, some negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, distinct, (n_shards, n, width), generator=generator).float() / 4
    values = values.sort(dim=2, descending=True, stable=True).values
    indices = torch.rand(n_shards, n, NOBODY, generator=generator).argsort(2)[:, :, :width].sort(2).values
    return values.to(DEVICE), indices.to(DEVICE)


def by_sorting(values: torch.Tensor, indices: torch.Tensor, shard: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    n_shards, n, width = values.shape
    flat = values.transpose(0, 1).reshape(n, n_shards * width)
    chosen = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True) & (flat > 0)
    keep = keep.view(n, n_shards, width)[:, shard]
    return torch.where(keep, values[shard], 0), torch.where(keep, indices[shard], NOBODY)


def assert_right(
    values: torch.Tensor, indices: torch.Tensor, k: int, keep_largest: Callable[..., Any] = reference.keep_largest
) -> None:
    for shard in range(len(values)):
        ours = keep_largest(values[shard], indices[shard], values.flatten(0, 1), shard, k, NOBODY)
        for mine, wanted in zip(ours, by_sorting(values, indices, shard, k), strict=True):
            assert mine.dtype == wanted.dtype
            assert torch.equal(mine, wanted)


@given(sizes, st.sampled_from([1, 2, 5, 1000]), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=200)
def test_the_largest_of_all_shards_stay(size: tuple[int, int, int, int], distinct: int, seed: int) -> None:
    n, n_shards, width, k = size
    assert_right(*made(n, n_shards, width, distinct, seed), k)


def test_rows_are_gone_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 3 * 32 * 4 * 6)
    assert_right(*made(20, 4, 6, 5, seed=1), 7)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("distinct", [1, 3, 1000])
@pytest.mark.parametrize(
    ("n", "n_shards", "width", "k"),
    [(0, 2, 3, 2), (3, 1, 1, 1), (5, 3, 7, 4), (4, 8, 32, 32), (2, 5, 33, 200), (3, 2, 20, 1), (2, 16, 3, 100)],
)
def test_the_kernel_keeps_the_same(n: int, n_shards: int, width: int, k: int, distinct: int) -> None:
    pytest.importorskip("triton")
    from topkapi.ops.kernels import keep_largest

    assert_right(*made(n, n_shards, width, distinct, seed=n + k), k, keep_largest)


@pytest.mark.usefixtures("poisoned_memory")
def test_the_kernel_takes_candidates_in_any_order() -> None:
    pytest.importorskip("triton")
    from topkapi.ops.kernels import keep_largest

    values, indices = made(6, 3, 10, 1000, seed=3)
    order = torch.rand(10, generator=torch.Generator().manual_seed(0)).argsort().to(DEVICE)
    assert_right(values[:, :, order], indices[:, :, order], 8, keep_largest)
    values[:, :, 3] = 1e-42  # subnormal
    values[:, :, 4], values[:, :, 5] = torch.inf, -0.0
    assert_right(values, indices, 8, keep_largest)
    assert_right(values, indices, 29, keep_largest)


@pytest.mark.usefixtures("poisoned_memory")
def test_other_dtypes_and_long_rows_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from topkapi.ops.kernels import keep_largest

    values, indices = made(4, 3, 10, 4, seed=2)
    assert_right(values.double(), indices, 5, keep_largest)
    monkeypatch.setattr(sys.modules["topkapi.ops.kernels.keep_largest"], "LONGEST_ROW", 29)
    assert_right(values, indices, 5, keep_largest)
