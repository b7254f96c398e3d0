"""AuxK's kernels equal the reference: entries, zeros, masks and sums, for any row length, ties and signs.

On a CPU they run in Triton's interpreter, which rounds to bf16 by cutting off: inputs here are exact in bf16.
Seen to catch: ties taken up to k + 1; the last group of a row left out; a mask whose odd columns are swapped with the
even ones; rows that two programs add up.
"""

import pytest
import torch

from topkapi.errors import TopkapiError
from topkapi.ops import reference

pytest.importorskip("triton")

from topkapi.ops.kernels import auxk as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def made(n: int, m: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations and a bias whose sums are exact in bf16."""
    torch.manual_seed(n * m)
    pre_acts, bias = torch.randn(n, m), torch.zeros(m)
    if kind == "ties":
        pre_acts, bias = (pre_acts * 2).round() / 2, torch.randn(m).round() / 4
    elif kind == "negative":
        pre_acts -= 3
    elif kind == "wide":  # many octaves: the k-th largest is far from the largest
        pre_acts = (pre_acts.abs() ** 12).clamp_min(1e-30)
    elif kind == "equal":
        pre_acts.fill_(0.5)
    elif kind == "zero":
        pre_acts.zero_()
    bias[1::5] = -1e30
    return pre_acts.bfloat16().to(DEVICE), bias.to(DEVICE)


@pytest.mark.parametrize("kind", ["normal", "ties", "negative", "wide", "equal", "zero"])
@pytest.mark.parametrize(
    ("n", "m", "k"), [(1, 8, 1), (3, 8, 3), (2, 64, 64), (3, 192, 20), (2, 264, 1000), (2, 1000, 300)]
)
def test_selection_keeps_the_k_largest(n: int, m: int, k: int, kind: str) -> None:
    pre_acts, bias = made(n, m, kind)
    ours, theirs = pre_acts.clone(), pre_acts.clone()
    selected = kernels.select_topk_(ours, bias, k)
    reference.select_topk_(theirs, bias, k)
    assert selected.dtype == torch.uint8
    assert torch.equal(ours.sort(1).values, theirs.sort(1).values)
    kept = ours > 0
    assert torch.equal(ours[kept], (pre_acts + bias).bfloat16()[kept])
    assert not kept[:, 1::5].any()
    # ties from the lowest group of eight on: a group that misses one leaves none to the groups after it
    edge = torch.where(kept, ours, torch.inf).amin(1, keepdim=True)
    missed = ((pre_acts + bias).bfloat16() == edge) & ~kept
    taken = kept & (ours == edge)
    group = torch.arange(m, device=DEVICE) // 8
    for row in range(n):
        if missed[row].any():
            assert group[taken[row]].max() <= group[missed[row]].min()

    grad = torch.randn(n, m, device=DEVICE).bfloat16()
    wanted = grad * kept
    sums = kernels.mask_selected_(grad, selected)
    assert torch.equal(grad, wanted)
    torch.testing.assert_close(sums, wanted.float().sum(0))


@pytest.mark.parametrize("window", [1, 7, 40_000])
def test_selection_does_not_depend_on_where_the_search_starts(window: int) -> None:
    pre_acts, bias = made(3, 264, "wide")
    ours, theirs = pre_acts.clone(), pre_acts.clone()
    assert torch.equal(kernels.select_topk_(ours, bias, 20, window=window), kernels.select_topk_(theirs, bias, 20))
    assert torch.equal(ours, theirs)


def test_infinity_is_the_largest() -> None:
    pre_acts, bias = made(1, 64, "normal")
    pre_acts[0, 7] = torch.inf
    kernels.select_topk_(pre_acts, bias, 1)
    assert pre_acts[0, 7] == torch.inf
    assert (pre_acts > 0).sum() == 1


@pytest.mark.parametrize(("m", "dtype"), [(5, torch.bfloat16), (100, torch.bfloat16), (64, torch.float32)])
def test_what_the_kernel_does_not_take_goes_the_reference_way(m: int, dtype: torch.dtype) -> None:
    pre_acts, bias = made(3, m, "normal")
    pre_acts = pre_acts.to(dtype)
    ours, theirs = pre_acts.clone(), pre_acts.clone()
    selected = kernels.select_topk_(ours, bias, 4)
    assert torch.equal(selected, reference.select_topk_(theirs, bias, 4))
    assert torch.equal(ours, theirs)
    grad, other = ours.clone(), ours.clone()
    assert torch.equal(kernels.mask_selected_(grad, selected), reference.mask_selected_(other, selected))


@pytest.mark.parametrize("n", [0, 1, 5, 37])
def test_mask_covers_every_row_once(n: int) -> None:
    pre_acts, bias = made(n, 64, "normal")
    selected = kernels.select_topk_(pre_acts, bias, 9)
    grad = torch.randn(n, 64, device=DEVICE).bfloat16()
    wanted = grad * (pre_acts > 0)
    sums = kernels.mask_selected_(grad, selected, rows_a_program=6, tile=(4, 4), num_warps=1)
    assert torch.equal(grad, wanted)
    torch.testing.assert_close(sums, wanted.float().sum(0))


def test_what_is_not_contiguous_is_refused() -> None:
    wide = torch.zeros(4, 128, dtype=torch.bfloat16, device=DEVICE)[:, ::2]
    with pytest.raises(TopkapiError, match="contiguous"):
        kernels.select_topk_(wide, torch.zeros(64, device=DEVICE), 3)
    selected = torch.zeros(4, 8, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(TopkapiError, match="contiguous"):
        kernels.mask_selected_(wide, selected)
