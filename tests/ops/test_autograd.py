"""gradcheck of every differentiable output; every other output is marked.

Seen to catch: grad_pre_acts without the mask values > 0; the sign of the pre-bias gradient.
"""

import torch
from torch.autograd import gradcheck

from topkapi import ops


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_encode_topk() -> None:
    inputs = (leaf(7, 5), leaf(11, 5, seed=1), leaf(11, seed=2), leaf(5, seed=3))
    for k in (1, 4, 11):
        assert gradcheck(lambda *tensors, k=k: ops.encode_topk(*tensors, k)[0], inputs)


def test_encode_topk_with_non_positive_values() -> None:
    inputs = (leaf(7, 5), leaf(11, 5, seed=1), (leaf(11, seed=2) - 3).detach().requires_grad_(), leaf(5, seed=3))
    values, indices = ops.encode_topk(*inputs, 6)
    assert (values == 0).any()
    assert not indices.requires_grad
    assert gradcheck(lambda *tensors: ops.encode_topk(*tensors, 6)[0], inputs)


def test_dense_sparse_matmul_with_repeated_indices() -> None:
    indices = torch.tensor([[0, 2, 2], [1, 1, 3]])
    assert gradcheck(lambda v, w: ops.dense_sparse_matmul(v, indices, w), (leaf(2, 3), leaf(4, 5, seed=1)))


def test_matmul_at_sparse_indices_with_repeated_indices() -> None:
    indices = torch.tensor([[0, 2, 2], [1, 1, 3]])
    assert gradcheck(lambda a, w: ops.matmul_at_sparse_indices(a, w, indices), (leaf(2, 5), leaf(4, 5, seed=1)))


def test_empty_batch() -> None:
    W_enc = leaf(4, 5)
    values, _ = ops.encode_topk(torch.zeros(0, 5, dtype=torch.float64), W_enc, leaf(4), leaf(5), 2)
    values.sum().backward()
    assert torch.equal(W_enc.grad, torch.zeros_like(W_enc))
