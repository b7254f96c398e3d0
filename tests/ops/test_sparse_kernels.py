"""Each sparse kernel is as close to float64 as plain PyTorch in the same dtype, at odd shapes.

Seen to catch: columns read beyond the last; the last column not written; a block of sorted pairs counted both as whole
and pair by pair, or not at all; blocks of a segment counted from its first pair; the squared error against the target;
nobody's row of a weight read.
"""

from collections.abc import Callable

import pytest
import torch

from topkapi.errors import TopkapiError
from topkapi.ops import reference

pytest.importorskip("triton")

from topkapi.ops.kernels import weight_gradients
from topkapi.ops.kernels.decode_step import decode_step
from topkapi.ops.kernels.dense_sparse_matmul import dense_sparse_matmul
from topkapi.ops.kernels.matmul_at_sparse_indices import matmul_at_sparse_indices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# n, n_latents, d_model, k
SHAPES = [(0, 7, 5, 3), (1, 1, 1, 1), (1, 37, 5, 1), (9, 37, 33, 4), (20, 11, 100, 33), (3, 5000, 768, 32)]


pytestmark = pytest.mark.usefixtures("poisoned_memory", "short_blocks")


class Code:
    """A sparse code with zeros, duplicates in a token and a latent that every token has, and what goes with it."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        n, n_latents, d_model, k = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

        sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.n_latents = n_latents
        self.indices = torch.randint(n_latents, (n, k), generator=generator).to(DEVICE)
        self.indices[:, 0] = n_latents // 2
        self.values, self.weight, self.rows = draw(n, k, dtype=sums).relu(), draw(n_latents, d_model), draw(n, d_model)


def assert_as_close(kernel: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The kernel's error is at most twice that of plain PyTorch, and some roundings of the largest entry."""
    assert (kernel.dtype, kernel.shape) == (plain.dtype, plain.shape)
    if kernel.numel() == 0:
        return
    error, allowed = (kernel.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    final = torch.finfo(kernel.dtype).eps  # a bf16 result may be rounded to the neighbour that PyTorch did not take
    assert error <= 2 * allowed + max(final, 16 * torch.finfo(torch.float64).eps) * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    code = Code(shape, dtype)
    values, indices, weight, rows = code.values, code.indices, code.weight, code.rows
    exact = reference.dense_sparse_matmul(values.double(), indices, weight.double())
    plain = reference.dense_sparse_matmul(values, indices, weight)
    assert_as_close(dense_sparse_matmul(values, indices, weight), plain, exact)
    exact = reference.matmul_at_sparse_indices(rows.double(), weight.double(), indices)
    plain = reference.matmul_at_sparse_indices(rows, weight, indices)
    assert_as_close(matmul_at_sparse_indices(rows, weight, indices), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_may_come_back_wide(dtype: torch.dtype) -> None:
    code = Code((9, 37, 33, 4), dtype)
    sums = code.values.dtype
    plain = reference.dense_sparse_matmul(code.values, code.indices, code.weight, sums)
    exact = reference.dense_sparse_matmul(code.values.double(), code.indices, code.weight.double())
    assert_as_close(dense_sparse_matmul(code.values, code.indices, code.weight, sums), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:5], (60, 5, 7, 4)])  # 60: blocks of nobody's pairs alone
def test_nobody_takes_part_in_nothing(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    code = Code(shape, dtype)
    n_latents, weight, rows = code.n_latents, code.weight, code.rows
    code.values[torch.rand(code.values.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6] = 0
    dropped = code.values == 0
    nobodys = torch.where(dropped, n_latents, code.indices)
    beyond = torch.cat([weight, torch.full_like(weight[:1], torch.nan)])[
        :n_latents
    ]  # what a read of row n_latents finds
    order = weight_gradients.order_by_latent(nobodys, n_latents)
    assert torch.equal(order.offsets.long(), reference.order_by_latent(nobodys, n_latents).offsets)
    plain = reference.order_by_latent(code.indices, n_latents)
    wanted = reference.dense_sparse_matmul(code.values, code.indices, weight)
    torch.testing.assert_close(dense_sparse_matmul(code.values, nobodys, beyond), wanted, equal_nan=False)
    wanted = reference.matmul_at_sparse_indices(rows, weight, code.indices).masked_fill(dropped, 0)
    found = matmul_at_sparse_indices(rows, beyond, nobodys)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not found[dropped].any()
    wanted = reference.transposed_dense_sparse_matmul(code.values, plain, rows, 0, n_latents)
    ours = weight_gradients.transposed_dense_sparse_matmul(code.values, order, rows, 0, n_latents)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    sums, products = weight_gradients.bias_gradients(code.values, order, weight)
    torch.testing.assert_close(sums, reference.latent_sums(code.values, plain, n_latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products, reference.bias_gradients(code.values, plain, weight)[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(weight_gradients.fired(code.values, order), reference.fired(code.values, plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_step(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    code = Code(shape, dtype)
    inputs = (code.values, code.indices, code.weight, code.rows)
    exact = reference.decode_step(*(x.double() if x.is_floating_point() else x for x in inputs), 0.3)
    plain = reference.decode_step(*inputs, 0.3)
    for kernel, by_torch, wanted in zip(decode_step(*inputs, 0.3), plain, exact, strict=True):
        assert_as_close(kernel, by_torch, wanted)


@pytest.mark.parametrize("launch", [{"held": 16}, {"columns": 32, "stages": 1}, {"held": 8, "columns": 256}])
def test_decode_step_is_the_same_for_other_launch_parameters(launch: dict[str, int]) -> None:
    code = Code((5, 90, 100, 12), torch.bfloat16)
    inputs = (code.values, code.indices, code.weight, code.rows, 0.3)
    for ours, other in zip(decode_step(*inputs), decode_step(*inputs, **launch), strict=True):
        torch.testing.assert_close(ours.float(), other.float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 7, 5, 3), (1, 1, 1, 1), (9, 37, 33, 4), (50, 300, 5, 8)])
def test_order(shape: tuple[int, int, int, int]) -> None:
    code = Code(shape, torch.float32)
    ours = weight_gradients.order_by_latent(code.indices, code.n_latents)
    for mine, wanted in zip(ours, reference.order_by_latent(code.indices, code.n_latents), strict=True):
        assert mine.dtype == torch.int32
        assert torch.equal(mine.long(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (50, 11, 100, 3)])
@pytest.mark.parametrize("columns", [256, 16])
def test_weight_gradients(
    shape: tuple[int, int, int, int], dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_gradients, "COLUMNS", columns)  # 16: several blocks of columns
    code = Code(shape, dtype)
    order = weight_gradients.order_by_latent(code.indices, code.n_latents)
    start, stop = code.n_latents // 4, code.n_latents
    exact = reference.transposed_dense_sparse_matmul(code.values.double(), order, code.rows.double(), start, stop)
    plain = reference.transposed_dense_sparse_matmul(code.values, order, code.rows, start, stop)
    ours = weight_gradients.transposed_dense_sparse_matmul(code.values, order, code.rows, start, stop)
    assert_as_close(ours, plain, exact)


@pytest.mark.parametrize("n_pairs", range(1, 40))
def test_every_pair_of_a_segment_is_counted_once(n_pairs: int) -> None:
    """Segments of any length that begin anywhere in a block of 8; ones, so that sums are counts."""
    before = n_pairs * 5 % 19
    indices = torch.tensor([0] * before + [1] * n_pairs + [2] * 3, device=DEVICE)[:, None]
    values = torch.ones(len(indices), 1, device=DEVICE)
    order = weight_gradients.order_by_latent(indices, 4)
    counts = weight_gradients.transposed_dense_sparse_matmul(values, order, torch.ones_like(values), 0, 4)
    assert counts.flatten().tolist() == [before, n_pairs, 3, 0]
    assert weight_gradients.latent_sums(values, order, 4).tolist() == [before, n_pairs, 3, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:5], (7, 0, 5, 1), (30, 3, 5, 2), (5, 90, 40, 16)])
def test_bias_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    code = Code(shape, dtype) if shape[1] else Code((0, 1, *shape[2:]), dtype)
    weight, n_latents = code.weight[: shape[1]], shape[1]
    order = weight_gradients.order_by_latent(code.indices, n_latents)
    exact = reference.bias_gradients(code.values.double(), order, weight.double())
    plain = reference.bias_gradients(code.values, order, weight)
    for kernel, by_torch, wanted in zip(
        weight_gradients.bias_gradients(code.values, order, weight), plain, exact, strict=True
    ):
        assert_as_close(kernel, by_torch, wanted)
    assert_as_close(weight_gradients.latent_sums(code.values, order, n_latents), plain[0], exact[0])
    assert torch.equal(weight_gradients.fired(code.values, order), reference.fired(code.values, order))


def all_results(code: Code) -> list[torch.Tensor]:
    order = weight_gradients.order_by_latent(code.indices, code.n_latents)
    return [
        dense_sparse_matmul(code.values, code.indices, code.weight),
        matmul_at_sparse_indices(code.rows, code.weight, code.indices),
        *decode_step(code.values, code.indices, code.weight, code.rows, 0.1),
        weight_gradients.transposed_dense_sparse_matmul(code.values, order, code.rows, 0, code.n_latents),
        *weight_gradients.bias_gradients(code.values, order, code.weight),
    ]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in every second place of memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("change", [lambda x: x, strided], ids=["again", "strided"])
def test_the_same_bits_again_and_from_any_strides(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    code, other = (Code((12, 20, 33, 6), torch.bfloat16) for _ in range(2))
    for name in ("values", "indices", "weight", "rows"):
        setattr(other, name, change(getattr(other, name)))
    for first, second in zip(all_results(code), all_results(other), strict=True):
        assert torch.equal(first, second)


def test_too_many_active_latents_are_refused() -> None:
    indices = torch.zeros(1, 4097, dtype=torch.int64, device=DEVICE)
    values, weight = torch.ones(1, 4097, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    with pytest.raises(TopkapiError, match="4096"):
        decode_step(values, indices, weight, torch.ones(1, 2, device=DEVICE), 1.0)


@pytest.mark.gpu
def test_large_shapes_on_a_gpu() -> None:
    for shape in ((4096, 20_000, 768, 32), (512, 3000, 4096, 64), (300, 5000, 100, 1024)):
        code = Code(shape, torch.bfloat16)
        inputs = (code.values, code.indices, code.weight, code.rows)
        exact = reference.decode_step(*(x.double() if x.is_floating_point() else x for x in inputs), 0.3)
        for kernel, plain, wanted in zip(
            decode_step(*inputs, 0.3), reference.decode_step(*inputs, 0.3), exact, strict=True
        ):
            assert_as_close(kernel, plain, wanted)
        order = weight_gradients.order_by_latent(code.indices, code.n_latents)
        given = (order, code.rows, 0, code.n_latents)
        wanted = reference.transposed_dense_sparse_matmul(code.values.double(), order, code.rows.double(), 0, shape[1])
        plain = reference.transposed_dense_sparse_matmul(code.values, *given)
        assert_as_close(weight_gradients.transposed_dense_sparse_matmul(code.values, *given), plain, wanted)
