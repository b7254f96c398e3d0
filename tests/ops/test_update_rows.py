"""The fused optimiser kernel does what the plain one does, and low memory follows float32.

Seen to catch: no projection; the first AuxK row added for latents without one; the average of the row before unit norm;
the weight rounded with the square's random bits; the clipping factor squared; squares of low memory that become 0.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch

from topkapi.ops import reference
from topkapi.ops.reference import AdamStep, RowGradient, RowState

pytest.importorskip("triton")

from topkapi.ops.kernels import weight_gradients
from topkapi.ops.kernels.update_rows import WIDE, gradient_squares, update_rows_
from topkapi.ops.kernels.weight_gradients import order_by_latent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, N_LATENTS, K = 14, 9, 3
STEP = AdamStep(lr=1e-2, beta1=0.9, beta2=0.999, eps=6.25e-10, ema_decay=0.99, n_steps=1, unit_norm=True, seed=3)


pytestmark = pytest.mark.usefixtures("poisoned_memory", "short_blocks")


def made(kind: str, d_model: int) -> RowState:
    """State of a weight with unit rows, one of them zero: float32 with a bf16 copy, float64, or low memory."""
    rows = torch.randn(N_LATENTS, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    rows[4] = 0
    dtype = {"float32": torch.float32, "float64": torch.float64, "low_memory": torch.bfloat16}[kind]
    weight = rows.to(dtype).to(DEVICE)
    ema = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    if kind == "low_memory":
        codes = [torch.zeros_like(weight, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
        return RowState(weight, *codes, ema, None, *(torch.zeros(N_LATENTS, device=DEVICE) for _ in codes))
    working = torch.full_like(weight, torch.nan, dtype=torch.bfloat16) if kind == "float32" else None
    return RowState(weight, torch.zeros_like(weight), torch.zeros_like(weight), ema, working)


def gradient(d_model: int, seed: int, parts: str, dtype: torch.dtype = torch.float32) -> RowGradient:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        sizes = 10.0 ** -(torch.arange(size[-1]) % 7)  # squares so small that their share of a row's largest is lost
        return (torch.randn(size, generator=generator, dtype=dtype) * sizes).to(DEVICE)

    if parts == "dense":
        return RowGradient(subset_rows=draw(N_LATENTS, d_model))
    indices = torch.randint(N_LATENTS - 1, (N, K), generator=generator)  # the last latent is never chosen
    indices[:, 0] = 3
    values, order = draw(N, K).relu(), order_by_latent(indices.to(DEVICE), N_LATENTS)
    found = RowGradient(values, order, draw(N, d_model))
    if parts == "sparse":
        return found
    position = torch.full((N_LATENTS,), -1, dtype=torch.int32)
    position[[5, 8]] = torch.tensor([0, 1], dtype=torch.int32)
    return replace(found, subset_rows=draw(2, d_model), position=position.to(DEVICE))


def assert_same(ours: RowState, wanted: RowState, steps: int) -> None:
    """Equal up to roundings of the largest entry; codes up to one level in few places."""
    for field in fields(RowState):
        mine, theirs = getattr(ours, field.name), getattr(wanted, field.name)
        if theirs is None:
            assert mine is None
        elif mine.dtype in (torch.int8, torch.uint8):
            difference = (mine.int() - theirs.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() <= 0.01
        else:
            eps = torch.finfo(mine.dtype).eps
            if field.name == "ema":  # takes up a share of a bf16 weight, which may be rounded the other way
                eps = max(eps, torch.finfo(ours.weight.dtype).eps * (1 - STEP.ema_decay))
            assert (mine.double() - theirs.double()).abs().max() <= 16 * steps * eps * theirs.double().abs().max()


@pytest.mark.parametrize("kind", ["float32", "float64", "low_memory"])
@pytest.mark.parametrize("parts", ["sparse", "subset", "dense"])
@pytest.mark.parametrize(("d_model", "unit_norm"), [(33, True), (33, False), (5, True), (100, False)])
def test_equals_plain_pytorch(kind: str, parts: str, d_model: int, unit_norm: bool) -> None:
    ours = made(kind, d_model)
    wanted = deepcopy(ours)
    grad_scale = torch.tensor(0.3, device=DEVICE) if parts == "subset" else None
    for n_steps in (1, 2):
        grad = gradient(d_model, n_steps, parts, torch.float64 if kind == "float64" else torch.float32)
        for state, update in ((ours, update_rows_), (wanted, reference.update_rows_)):
            update(state, grad, STEP._replace(n_steps=n_steps, unit_norm=unit_norm), grad_scale)
    assert_same(ours, wanted, 2)
    if unit_norm and kind != "low_memory":
        norms = ours.weight.double().norm(dim=1)
        assert (norms - 1).abs().max() < 1e-6  # the row of zeros too: its gradient is not zero


@pytest.mark.parametrize("kind", ["float32", "low_memory"])
def test_wide_rows_of_bf16(kind: str) -> None:
    """From WIDE on state is asked for ahead on Hopper, where bf16 is widened in assembly."""
    d_model = WIDE + 16
    ours = made(kind, d_model)
    wanted, grad = deepcopy(ours), gradient(d_model, 1, "sparse")
    grad = replace(grad, rows=grad.rows.bfloat16())
    update_rows_(ours, grad, STEP)
    reference.update_rows_(wanted, grad, STEP)
    assert_same(ours, wanted, 1)


@pytest.mark.parametrize("kind", ["float32", "low_memory"])
@pytest.mark.parametrize("launch", [{"pairs": 8}, {"columns_a_warp": 16}, {"sliced": False}], ids=str)
def test_launch_parameters_change_roundings_only(
    kind: str, launch: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_gradients, "COLUMNS", 16)
    ours = made(kind, 70)
    wanted = deepcopy(ours)
    update_rows_(ours, gradient(70, 1, "subset"), STEP._replace(unit_norm=False), None, **launch)
    reference.update_rows_(wanted, gradient(70, 1, "subset"), STEP._replace(unit_norm=False))
    assert_same(ours, wanted, 1)


@pytest.mark.parametrize("kind", ["float32", "low_memory"])
def test_the_same_bits_again(kind: str) -> None:
    first, second = made(kind, 33), made(kind, 33)
    for n_steps in (1, 2):
        for state in (first, second):
            update_rows_(state, gradient(33, n_steps, "subset"), STEP._replace(n_steps=n_steps))
    for field in fields(RowState):
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("update", [update_rows_, reference.update_rows_])
def test_a_row_is_rounded_alike_whoever_owns_it(update: Callable[..., None]) -> None:
    whole, half = made("low_memory", 33), N_LATENTS // 2
    dense = torch.randn(N_LATENTS, 33, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for rows in (slice(0, half), slice(half, N_LATENTS)):
        part = RowState(*(None if tensor is None else tensor[rows].clone() for tensor in vars(whole).values()))
        update(part, RowGradient(subset_rows=dense[rows]), STEP._replace(first_latent=rows.start))
        again = deepcopy(whole)
        update(again, RowGradient(subset_rows=dense), STEP)
        for name, tensor in vars(part).items():
            assert tensor is None or torch.equal(tensor, getattr(again, name)[rows]), name


def test_no_tokens_is_a_step_with_gradient_zero() -> None:
    ours = made("float32", 33)
    update_rows_(ours, gradient(33, 1, "sparse"), STEP)
    wanted, empty = deepcopy(ours), torch.zeros(0, K, device=DEVICE)
    none = RowGradient(empty, order_by_latent(empty.long(), N_LATENTS), torch.zeros(0, 33, device=DEVICE))
    update_rows_(ours, none, STEP._replace(n_steps=2))
    reference.update_rows_(
        wanted, RowGradient(subset_rows=torch.zeros(N_LATENTS, 33, device=DEVICE)), STEP._replace(n_steps=2)
    )
    assert_same(ours, wanted, 2)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("parts", ["sparse", "subset", "dense"])
def test_gradient_squares(parts: str, project: bool) -> None:
    weight, grad = made("float32", 33).weight, gradient(33, 1, parts)
    ours = gradient_squares(grad, weight, project)
    torch.testing.assert_close(ours, reference.gradient_squares(grad, weight, project), rtol=1e-6, atol=0)


def test_low_memory_follows_float32_over_200_updates() -> None:
    d_model, full, low = 33, made("float32", 33), made("low_memory", 33)
    full.weight, start = low.weight.float(), low.weight.float()
    drift = torch.randn(N_LATENTS, d_model, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    for n_steps in range(1, 201):
        step = STEP._replace(lr=1e-3, n_steps=n_steps)
        grad = gradient(d_model, n_steps, "sparse")
        grad = replace(
            grad, subset_rows=drift, position=torch.arange(N_LATENTS, device=DEVICE)
        )  # noise and a direction
        for state in (full, low):
            reference.update_rows_(state, grad, step)
    moved = (full.weight - start).norm()
    assert moved > 0.05 * start.norm()
    assert (low.weight.float() - full.weight).norm() < 0.1 * moved
