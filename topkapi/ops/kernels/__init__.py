"""The primitives of `topkapi.ops.reference` as Triton kernels, one file an op, for CUDA tensors.

Same names and signatures as the reference. Nothing here records gradients.
"""

from topkapi.ops.kernels.auxk import mask_selected_, select_topk_
from topkapi.ops.kernels.decode_step import decode_step
from topkapi.ops.kernels.dense_sparse_matmul import dense_sparse_matmul
from topkapi.ops.kernels.encode_topk import encode_topk
from topkapi.ops.kernels.error_gradient import recon_gradient, residual_gradient_
from topkapi.ops.kernels.keep_largest import keep_largest
from topkapi.ops.kernels.matmul_at_sparse_indices import matmul_at_sparse_indices
from topkapi.ops.kernels.update_rows import gradient_squares, update_rows_
from topkapi.ops.kernels.weight_gradients import (
    bias_gradients,
    fired,
    latent_sums,
    order_by_latent,
    transposed_dense_sparse_matmul,
)

__all__ = [
    "bias_gradients",
    "decode_step",
    "dense_sparse_matmul",
    "encode_topk",
    "fired",
    "gradient_squares",
    "keep_largest",
    "latent_sums",
    "mask_selected_",
    "matmul_at_sparse_indices",
    "order_by_latent",
    "recon_gradient",
    "residual_gradient_",
    "select_topk_",
    "transposed_dense_sparse_matmul",
    "update_rows_",
]
