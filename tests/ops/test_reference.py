"""The sparse operations equal dense matrix algebra.

Seen to catch: groups of columns taken consecutively while their members are enumerated with a stride (wrong values);
`rest` left out of the candidates (last columns never selected); offsets counted from the wrong block; of equal
pre-activations the last columns kept; not a number counted as less than the edge; rows with equal values looked for
on a device too.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topkapi import ops
from topkapi.errors import TopkapiError
from topkapi.ops import reference

sizes = st.tuples(st.integers(0, 9), st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**31 - 1))


def made(
    n: int, n_latents: int, d_model: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d_model), (n_latents, d_model), (n_latents,), (d_model,))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def dense(values: torch.Tensor, indices: torch.Tensor, n_latents: int) -> torch.Tensor:
    return values.new_zeros(len(values), n_latents).scatter_add(1, indices, values)


@given(sizes, st.integers(1, 8))
@settings(deadline=None, max_examples=150)
def test_encode_topk_keeps_the_k_largest(size: tuple[int, int, int, int], k: int) -> None:
    n, n_latents, d_model, seed = size
    k = min(k, n_latents)
    x, W_enc, latent_bias, pre_bias = made(n, n_latents, d_model, seed)
    values, indices = ops.encode_topk(x, W_enc, latent_bias, pre_bias, k)
    pre_acts = (x - pre_bias) @ W_enc.T + latent_bias
    wanted = pre_acts.topk(k).values.relu()
    assert values.shape == indices.shape == (n, k)
    torch.testing.assert_close(values.sort(descending=True).values, wanted)
    torch.testing.assert_close(pre_acts.gather(1, indices).relu(), values)
    assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize("k", [1, 5, 2000])
def test_chunks_give_what_one_pass_gives(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, latent_bias, pre_bias = made(37, 2000, 8, seed=1, dtype=torch.float32)
    whole = ops.encode_topk(x, W_enc, latent_bias, pre_bias, k)
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 5 * 2000 * 4)
    parts = ops.encode_topk(x, W_enc, latent_bias, pre_bias, k)
    order = [found[1].argsort(1) for found in (whole, parts)]
    assert torch.equal(whole[1].gather(1, order[0]), parts[1].gather(1, order[1]))
    torch.testing.assert_close(whole[0].gather(1, order[0]), parts[0].gather(1, order[1]))


def test_ties_keep_exactly_k_distinct_latents() -> None:
    x, pre_bias = torch.ones(3, 2), torch.zeros(2)
    W_enc, latent_bias = torch.ones(1000, 2), torch.zeros(1000)
    values, indices = ops.encode_topk(x, W_enc, latent_bias, pre_bias, 7)
    assert values.tolist() == [[2.0] * 7] * 3
    assert all(len(row.unique()) == 7 for row in indices)


@given(sizes, st.integers(1, 40), st.sampled_from([2, 4, 40]))
@settings(deadline=None, max_examples=200)
def test_of_equal_pre_activations_the_first_are_kept(size: tuple[int, int, int, int], k: int, distinct: int) -> None:
    n, n_latents, _, seed = size
    k, generator = min(k, n_latents), torch.Generator().manual_seed(seed)
    x = torch.eye(n, dtype=torch.float64)  # pre-activations are the weights
    W_enc = torch.randint(-distinct, distinct, (n_latents, n), generator=generator).double()
    zeros = torch.zeros(n_latents, dtype=torch.float64)
    values, indices = ops.encode_topk(x, W_enc, zeros, torch.zeros(n, dtype=torch.float64), k)
    wanted, columns = W_enc.T.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, wanted[:, :k].relu())
    positive = values > 0
    assert torch.equal(indices[positive], columns[:, :k][positive])


def test_ties_beside_numbers_that_are_none() -> None:
    pre_acts = torch.tensor([[1.0, torch.nan, 3.0, 3.0, 2.0, 3.0], [1, 1, 1, -torch.inf, torch.inf, 1]])
    values, columns = reference._top_k(pre_acts, 3)
    assert columns.tolist() == [[1, 2, 3], [4, 0, 1]]
    assert values[0, 0].isnan()


@pytest.mark.parametrize(("n_latents", "k"), [(40, 8), (5000, 16)])  # without groups of columns, and with
def test_selection_on_a_device_does_not_wait_for_it(n_latents: int, k: int) -> None:
    """A meta tensor has shapes and no numbers: an operator that the host must wait for has no result there."""
    x, W_enc, latent_bias, pre_bias = (tensor.to("meta") for tensor in made(6, n_latents, 8, seed=0))
    values, indices = reference.encode_topk(x, W_enc, latent_bias, pre_bias, k)
    assert values.shape == indices.shape == (6, k)
    assert reference.select_topk_(x @ W_enc.T, latent_bias, k).shape == (6, n_latents)


def test_nobody_takes_part_in_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    n, n_latents, k = 9, 12, 5
    _, weight, _, _ = made(n, n_latents, 6, seed=1)
    rows = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    indices = torch.randint(n_latents, (n, k), generator=generator)
    values = torch.rand(n, k, generator=generator, dtype=torch.float64)
    dropped = torch.rand(n, k, generator=generator) < 0.5
    values[dropped] = 0
    nobodys = torch.where(dropped, n_latents, indices)
    order, wanted = reference.order_by_latent(nobodys, n_latents), reference.order_by_latent(indices, n_latents)
    assert int(order.offsets[-1]) == int((~dropped).sum())
    for mine, theirs in zip(
        (
            reference.dense_sparse_matmul(values, nobodys, weight),
            reference.transposed_dense_sparse_matmul(values, order, rows, 0, n_latents),
            *reference.bias_gradients(values, order, weight),
            reference.fired(values, order),
        ),
        (
            reference.dense_sparse_matmul(values, indices, weight),
            reference.transposed_dense_sparse_matmul(values, wanted, rows, 0, n_latents),
            *reference.bias_gradients(values, wanted, weight),
            reference.fired(values, wanted),
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    dots = reference.matmul_at_sparse_indices(rows, weight, nobodys)
    torch.testing.assert_close(dots, (rows @ weight.T).gather(1, indices).masked_fill(dropped, 0))


@given(sizes, st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_products_equal_dense_algebra(size: tuple[int, int, int, int], k: int) -> None:
    n, n_latents, d_model, seed = size
    x, weight, _, _ = made(n, n_latents, d_model, seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_latents, (n, k), generator=generator)  # repeats within a token are allowed
    values = torch.randn(n, k, generator=generator, dtype=torch.float64)
    code = dense(values, indices, n_latents)
    torch.testing.assert_close(ops.dense_sparse_matmul(values, indices, weight), code @ weight)
    torch.testing.assert_close(ops.matmul_at_sparse_indices(x, weight, indices), (x @ weight.T).gather(1, indices))
    order = reference.order_by_latent(indices, n_latents)
    rows = [
        reference.transposed_dense_sparse_matmul(values, order, x, i, min(i + 100, n_latents))
        for i in range(0, n_latents, 100)
    ]
    torch.testing.assert_close(torch.cat(rows), code.T @ x)
    torch.testing.assert_close(reference.latent_sums(values, order, n_latents), code.sum(0))
    torch.testing.assert_close(reference.bias_gradients(values, order, weight), (code.sum(0), code.sum(0) @ weight))
    hits = torch.zeros(n, n_latents).index_put(
        (torch.arange(n)[:, None].expand(n, k), indices), (values > 0).float(), True
    )
    assert torch.equal(reference.fired(values, order), (hits > 0).any(0))


@given(sizes, st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_decode_step_is_the_gradient_of_its_squared_error(size: tuple[int, int, int, int], k: int) -> None:
    n, n_latents, d_model, seed = size
    target, weight, _, _ = made(n, n_latents, d_model, seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_latents, (n, k), generator=generator)
    values = torch.randn(n, k, generator=generator, dtype=torch.float64).relu().requires_grad_()
    recon = dense(values, indices, n_latents) @ weight
    squared_error = (recon - target).pow(2).sum(1)
    step = reference.decode_step(values.detach(), indices, weight, target, 0.6)
    torch.testing.assert_close(step.squared_error, squared_error.detach())
    torch.testing.assert_close(step.grad_recon, 0.6 * (recon - target).detach())
    wanted = torch.autograd.grad(0.3 * squared_error.sum(), values)[0] * (values > 0)
    torch.testing.assert_close(step.grad_values, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_close_as_dense_algebra_in_the_same_dtype(dtype: torch.dtype) -> None:
    x, W_enc, latent_bias, pre_bias = made(16, 300, 32, seed=3, dtype=dtype)
    values, indices = ops.encode_topk(x, W_enc, latent_bias, pre_bias, 8)
    code = dense(values.double(), indices, 300)
    exact = code @ W_enc.double()
    plain = code.to(dtype) @ W_enc
    ours = ops.dense_sparse_matmul(values, indices, W_enc)
    error, allowed = (ours.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


def test_repeated_calls_give_the_same_bits() -> None:
    arguments = made(64, 3000, 24, seed=5, dtype=torch.float32)
    first, second = (ops.encode_topk(*arguments, 16) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("k", [0, 301])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(TopkapiError, match="k must be between 1 and n_latents=300"):
        ops.encode_topk(*made(4, 300, 8, seed=0), k)


def test_wrong_width_says_how_to_flatten() -> None:
    _, W_enc, latent_bias, pre_bias = made(4, 30, 8, seed=0)
    with pytest.raises(TopkapiError, match="flatten"):
        ops.encode_topk(torch.zeros(4, 7, dtype=torch.float64), W_enc, latent_bias, pre_bias, 2)


@pytest.mark.parametrize("index", [-1, 30])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    x, weight, _, _ = made(1, 30, 8, seed=0)
    indices = torch.tensor([[index]])
    with pytest.raises(TopkapiError, match="n_latents=30"):
        ops.matmul_at_sparse_indices(x, weight, indices)
    with pytest.raises(TopkapiError, match="n_latents=30"):
        ops.dense_sparse_matmul(torch.ones(1, 1, dtype=torch.float64), indices, weight)
