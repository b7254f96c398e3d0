"""The sparse operations in plain PyTorch: the specification for every kernel, and the path that runs on CPUs.

Nothing here records gradients; the backward formulas are in `topkapi.ops.autograd`. All functions run on any
device in any float dtype, and are deterministic on CPU. Called through `topkapi.ops`.

Two facts shape the CPU code, both measured at n_latents=16 384, d_model=576, k=32, 2 048 tokens on two cores:
touching fresh memory costs more than arithmetic (zeroing a new 38 MB tensor takes 78 ms, copying one 2.6 ms), so
large temporaries are kept and reused; and `embedding_bag`, in both directions, runs 5 times faster than gathering
rows and multiplying.
"""

import threading
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

SCRATCH_BYTES = 128 * 2**20  # of pre-activations held at a time
GROUP = 16  # pre-activations whose maximum stands for them in `_top_k`
_kept = threading.local()


class LatentOrder(NamedTuple):
    """The (token, latent) pairs of a sparse code, sorted by latent; ties keep the tokens' order."""

    pairs: Int[Tensor, " pairs"]
    """Positions in the flattened (n, k) code."""
    tokens: Int[Tensor, " pairs"]
    """Token of each pair, pairs // k."""
    offsets: Int[Tensor, " n_latents_plus_1"]
    """Latent i owns pairs[offsets[i] : offsets[i + 1]]."""


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, columns) tensor; on CPU the same memory each time, a thread to itself."""
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    kept = _kept.__dict__.get(like.dtype)
    if kept is None or kept.numel() < rows * columns:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside it
            kept = _kept.__dict__[like.dtype] = torch.empty(rows * columns, dtype=like.dtype)
    return kept[: rows * columns].view(rows, columns)


@torch.no_grad()
def encode_topk(
    x: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    latent_bias: Float[Tensor, " n_latents"],
    pre_bias: Float[Tensor, " d_model"],
    k: int,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """See `topkapi.ops.encode_topk`. Holds at most SCRATCH_BYTES of pre-activations (one row at least)."""
    n, n_latents = len(x), len(W_enc)
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    rows = max(1, SCRATCH_BYTES // (max(n_latents, 1) * x.element_size()))
    for start in range(0, n, rows):
        part = x[start : start + rows] - pre_bias
        pre_acts = _scratch(len(part), n_latents, x)
        torch.addmm(latent_bias, part, W_enc.T, out=pre_acts)
        values[start : start + rows], indices[start : start + rows] = _top_k(pre_acts, k)
    return values.relu_(), indices


def _top_k(pre_acts: Float[Tensor, "n n_latents"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row and their columns, in no particular order.

    Where k is small beside n_latents, first keeps the k groups of GROUP columns with the largest maxima: the k
    largest values of a row lie in them. Group j is the columns j, j + n_groups, j + 2 n_groups, ..., so the maxima
    are taken over a leading axis, which vectorises. Halves the time of selection against `torch.topk` on the row.
    """
    n, n_latents = pre_acts.shape
    n_groups = n_latents // GROUP
    if n_groups + GROUP * k > n_latents // 4:
        return tuple(pre_acts.topk(k, sorted=False))
    grouped = pre_acts[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    _, groups = grouped.amax(1).topk(k, sorted=False)
    members = torch.arange(0, n_groups * GROUP, n_groups, device=pre_acts.device)
    columns = (groups[:, None, :] + members[:, None]).flatten(1)
    if n_groups * GROUP < n_latents:
        rest = torch.arange(n_groups * GROUP, n_latents, device=pre_acts.device).expand(n, -1)
        columns = torch.cat([columns, rest], dim=1)
    values, chosen = pre_acts.gather(1, columns).topk(k, sorted=False)
    return values, columns.gather(1, chosen)


@torch.no_grad()
def dense_sparse_matmul(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    weight: Float[Tensor, "n_latents d_model"],
) -> Float[Tensor, "n d_model"]:
    """See `topkapi.ops.dense_sparse_matmul`."""
    if indices.numel() == 0:  # embedding_bag refuses bags of no entries
        return weight.new_zeros(len(indices), weight.shape[1])
    return embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


@torch.no_grad()
def matmul_at_sparse_indices(
    a: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "n_latents d_model"],
    indices: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """See `topkapi.ops.matmul_at_sparse_indices`.

    The operator below is the one autograd runs for the gradient of `embedding_bag` with respect to its weights
    per sample; reached through autograd it would first cost a forward pass that nobody needs.
    """
    n, k = indices.shape
    if indices.numel() == 0:
        return a.new_zeros(n, k)
    offsets = torch.arange(0, n * k, k, device=indices.device)
    bags = torch.arange(n, device=indices.device).repeat_interleave(k)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a.contiguous(), weight, indices.flatten(), offsets, bags, 0
    )
    return dots.view(n, k)


@torch.no_grad()
def order_by_latent(indices: Int[Tensor, "n k"], n_latents: int) -> LatentOrder:
    """The pairs of a sparse code sorted by latent: one sort serves every weight gradient of a step."""
    latents, pairs = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(latents, torch.arange(n_latents + 1, device=indices.device))
    return LatentOrder(pairs, pairs // max(indices.shape[1], 1), offsets)


@torch.no_grad()
def transposed_dense_sparse_matmul(
    values: Float[Tensor, " pairs"],
    order: LatentOrder,
    rows: Float[Tensor, "n d_model"],
    start: int,
    stop: int,
) -> Float[Tensor, "stop_minus_start d_model"]:
    """Rows start..stop of the transposed sparse code times `rows`: the weight gradients of a sparse layer.

        out[l - start] = sum over the pairs p of latent l of values[p] rows[order.tokens[p]]

    `values` are those of the code in the order of `order.pairs`: code_values.flatten()[order.pairs]. Cost
    2 n k d_model flops over all latents. Deterministic: a latent's pairs are added in the tokens' order.

    Source: Gao et al. 2024, appendix D.2 (decoder gradient and encoder gradient).
    """
    first, last = int(order.offsets[start]), int(order.offsets[stop])
    if first == last:
        return rows.new_zeros(stop - start, rows.shape[1])
    return embedding_bag(
        order.tokens[first:last],
        rows,
        order.offsets[start:stop] - first,  # include_last_offset would read better, and leaves the fast path
        per_sample_weights=values[first:last],
        mode="sum",
    )


@torch.no_grad()
def latent_sums(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], n_latents: int
) -> Float[Tensor, " n_latents"]:
    """Sum over the batch of each latent's values: out[l] = sum of values[i, j] with indices[i, j] = l."""
    return values.new_zeros(n_latents).index_add_(0, indices.flatten(), values.flatten())
