"""Backward formulas of the sparse operations, written once over the primitives, whichever implements them.

With P = (x - pre_bias) W_enc^T + latent_bias, z = ReLU(TopK_k(P)), recon = z W_dec + pre_bias, G = dL/drecon:

    decoder forward     recon  = z W_dec                        dense_sparse_matmul
    decoder gradient    dW_dec = z^T G                          transposed_dense_sparse_matmul
    latent gradient     dz     = (G W_dec^T) at the k indices   matmul_at_sparse_indices
    encoder gradient    dW_enc = dP^T (x - pre_bias)            transposed_dense_sparse_matmul
    bias gradients      dlatent_bias = g = sum over the batch of dP;   dpre_bias = -g W_enc

where dP is dz at the selected positive entries and 0 elsewhere. The last line is the pre-bias trick: summing dP
over the batch first turns a product of n rows into one matrix-vector product.

Weight gradients are `SparseRows`: not yet a tensor, but rows that can be reduced a block of latents at a time, so
that the optimiser can use them without the dense gradient ever existing. The `torch.autograd.Function`s at the end
are for everyone else: they return dense gradients.

Source: Gao et al. 2024, appendix D.2.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from topkapi.ops.dispatch import implementation
from topkapi.ops.reference import LatentOrder


@dataclass(frozen=True)
class SparseRows:
    """The gradient values^T rows of an (n_latents, d_model) weight, reduced on request."""

    values: Float[Tensor, "n k"]
    order: LatentOrder
    rows: Float[Tensor, "n d_model"]

    def block(self, start: int, stop: int) -> Float[Tensor, "stop_minus_start d_model"]:
        """Rows start..stop of the gradient, as a new tensor."""
        primitives = implementation(self.rows)
        return primitives.transposed_dense_sparse_matmul(self.values, self.order, self.rows, start, stop)

    def dense(self) -> Float[Tensor, "n_latents d_model"]:
        """The whole gradient."""
        return self.block(0, len(self.order.offsets) - 1)


class EncoderGradients(NamedTuple):
    """Gradients of a loss with respect to the encoder's parameters."""

    W_enc: SparseRows
    latent_bias: Float[Tensor, " n_latents"]
    pre_bias: Float[Tensor, " d_model"]


def encoder_gradients(
    grad_values: Float[Tensor, "n k"],
    values: Float[Tensor, "n k"],
    order: LatentOrder,
    x: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    pre_bias: Float[Tensor, " d_model"],
) -> EncoderGradients:
    """Gradients of the encoder from that of the active values; entries whose value is 0 pass none."""
    primitives = implementation(x)
    grad_pre_acts = grad_values * (values > 0)
    latent_bias, row_sum = primitives.bias_gradients(grad_pre_acts, order, W_enc)
    rows = SparseRows(grad_pre_acts, order, x - pre_bias)
    return EncoderGradients(rows, latent_bias, -row_sum)


class EncodeTopK(torch.autograd.Function):
    """`topkapi.ops.encode_topk`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, latent_bias: Tensor, pre_bias: Tensor, k: int, screening: str
    ) -> Any:
        with torch.cuda.device_of(x):  # kernels are launched on the current device
            values, indices = implementation(x).encode_topk(x, W_enc, latent_bias, pre_bias, k, screening)
        values = values.to(x.dtype)
        ctx.save_for_backward(x, W_enc, latent_bias, pre_bias, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> Any:
        x, W_enc, latent_bias, pre_bias, values, indices = ctx.saved_tensors
        order = implementation(x).order_by_latent(indices, len(W_enc))
        grads = encoder_gradients(grad_values, values, order, x, W_enc, pre_bias)
        grad_x = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_x = implementation(x).dense_sparse_matmul(grads.W_enc.values, indices, W_enc).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = grads.W_enc.dense().to(W_enc.dtype)
        return grad_x, grad_W, grads.latent_bias.to(latent_bias.dtype), grads.pre_bias.to(pre_bias.dtype), None, None


class DenseSparseMatmul(torch.autograd.Function):
    """`topkapi.ops.dense_sparse_matmul`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        with torch.cuda.device_of(weight):
            return implementation(weight).dense_sparse_matmul(values, indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, indices, weight = ctx.saved_tensors
        primitives = implementation(weight)
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = primitives.matmul_at_sparse_indices(grad, weight, indices).to(values.dtype)
        if ctx.needs_input_grad[2]:
            order = primitives.order_by_latent(indices, len(weight))
            grad_weight = SparseRows(values, order, grad).dense().to(weight.dtype)
        return grad_values, None, grad_weight


class MatmulAtSparseIndices(torch.autograd.Function):
    """`topkapi.ops.matmul_at_sparse_indices`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight, indices)
        with torch.cuda.device_of(weight):
            return implementation(weight).matmul_at_sparse_indices(a, weight, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, weight, indices = ctx.saved_tensors
        primitives = implementation(weight)
        grad_a = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_a = primitives.dense_sparse_matmul(grad, indices, weight).to(a.dtype)
        if ctx.needs_input_grad[1]:
            order = primitives.order_by_latent(indices, len(weight))
            grad_weight = SparseRows(grad, order, a).dense().to(weight.dtype)
        return grad_a, grad_weight, None
