"""The sparse operations of a TopK autoencoder: the one door to their implementations.

`encode_topk`, `dense_sparse_matmul` and `matmul_at_sparse_indices` are differentiable. The rest are the pieces a
hand-written training step is made of (`topkapi.step`), under `implementation(tensor)`. Functions of tensors only:
no module, no settings. CUDA tensors go to Triton kernels, others to plain PyTorch (`topkapi.ops.dispatch`).
"""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.ops import autograd
from topkapi.ops.autograd import EncoderGradients, SparseRows, encoder_gradients
from topkapi.ops.dispatch import implementation, kernels_only, reference_only
from topkapi.ops.reference import AdamStep, DecodeStep, LatentOrder, RowGradient, RowState

__all__ = [
    "AdamStep",
    "DecodeStep",
    "EncoderGradients",
    "LatentOrder",
    "RowGradient",
    "RowState",
    "SparseRows",
    "dense_sparse_matmul",
    "encode_topk",
    "encoder_gradients",
    "implementation",
    "kernels_only",
    "matmul_at_sparse_indices",
    "reference_only",
]


def encode_topk(
    x: Float[Tensor, "..."],  # (n, d_model), checked below: users pass (batch, context, d_model)
    W_enc: Float[Tensor, "n_latents d_model"],
    latent_bias: Float[Tensor, " n_latents"],
    pre_bias: Float[Tensor, " d_model"],
    k: int,
    screening: Literal["bf16", "fp8"] = "bf16",
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Values and indices of the k latents with the largest pre-activations of each token, after ReLU.

        pre_acts = (x - pre_bias) W_enc^T + latent_bias
        values, indices = TopK_k(pre_acts);  values = max(values, 0)

    A token with fewer than k positive pre-activations has zeros among its values. On a CPU entries are ordered by
    value, then latent, so that of equal pre-activations above 0 the lower latents are kept. On a GPU they are in no
    particular order, and for some shapes, and in float64, any of equal ones may be kept, the same ones each time.
    Differentiable in all four tensors. Cost 2 n d_model n_latents flops; pre-activations are made in chunks and never
    kept.

    On a GPU candidates are found with products in the precision `screening` and then scored from the tensors as given,
    in float32; `topkapi.ops.kernels.encode_topk` says when the result is exact. Elsewhere `screening` changes nothing.

    Raises:
        TopkapiError: shapes disagree, k lies outside [1, n_latents], or another screening.

    Source: Gao et al. 2024, section 2.3 and appendix D.2.
    """
    n_latents, d_model = W_enc.shape
    if x.ndim != 2 or x.shape[1] != d_model:
        raise TopkapiError(
            f"x must be (n, d_model={d_model}); got {tuple(x.shape)}. Flatten batch and context first: x.flatten(0, 1)."
        )
    if not 1 <= k <= n_latents:
        raise TopkapiError(f"k must be between 1 and n_latents={n_latents}; got {k}.")
    if screening not in ("bf16", "fp8"):
        raise TopkapiError(f"screening must be bf16 or fp8; got {screening!r}.")
    return autograd.EncodeTopK.apply(x, W_enc, latent_bias, pre_bias, k, screening)


def dense_sparse_matmul(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    weight: Float[Tensor, "n_latents d_model"],
) -> Float[Tensor, "n d_model"]:
    """The sparse code (values, indices) times `weight` (an SpMM): decoding without bias.

        out[i] = sum_j values[i, j] weight[indices[i, j]]

    Cost 2 n k d_model flops; reads k rows of `weight` a token. Differentiable in `values` and `weight`.

    Raises:
        TopkapiError: an index lies outside [0, n_latents) (checked on CPU only: a check on a GPU would stall it).

    Source: Gao et al. 2024, appendix D.2.
    """
    _check_indices(indices, len(weight))
    return autograd.DenseSparseMatmul.apply(values, indices, weight)


def matmul_at_sparse_indices(
    a: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "n_latents d_model"],
    indices: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Dot products of each row of `a` with the k rows of `weight` that `indices` selects (an SDDMM).

        out[i, j] = <a[i], weight[indices[i, j]]>

    Cost 2 n k d_model flops; reads k rows of `weight` a token. Differentiable in `a` and `weight`. It is the
    gradient of `dense_sparse_matmul` with respect to its values.

    Raises:
        TopkapiError: an index lies outside [0, n_latents) (checked on CPU only: a check on a GPU would stall it).

    Source: Gao et al. 2024, appendix D.2.
    """
    _check_indices(indices, len(weight))
    return autograd.MatmulAtSparseIndices.apply(a, weight, indices)


def _check_indices(indices: Tensor, n_latents: int) -> None:
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if low < 0 or high >= n_latents:
        raise TopkapiError(f"indices must lie in [0, n_latents={n_latents}); got values from {low} to {high}.")
