"""The sparse operations in plain PyTorch: the specification for every kernel, and the path that runs on CPUs.

Nothing here records gradients; the backward formulas are in `topkapi.ops.autograd`. All functions run on any
device in any float dtype, and are deterministic on CPU. Called through `topkapi.ops`.

Two facts shape the CPU code, both measured at n_latents=16 384, d_model=576, k=32, 2 048 tokens on two cores:
touching fresh memory costs more than arithmetic (zeroing a new 38 MB tensor takes 78 ms, copying one 2.6 ms), so
large temporaries are kept and reused; and `embedding_bag`, in both directions, runs 5 times faster than gathering
rows and multiplying.

A code may have entries that belong to nobody: value 0 and the index n_latents. They are what a shard makes of its
candidates that others' beat (`keep_largest`), and take part in nothing.
"""

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.optim.adam import adam

from topkapi.ops import low_memory

SCRATCH_BYTES = 128 * 2**20  # of pre-activations held at a time
GROUP = 16  # pre-activations whose maximum stands for them in `_top_k`
BLOCK_ROWS = 1024  # 2.4 MB a tensor at d_model 576: gradient, weight, moments and average fit a 32 MB cache
_kept = threading.local()


class LatentOrder(NamedTuple):
    """The (token, latent) pairs of a sparse code, sorted by latent; ties keep the tokens' order.

    Pairs of nobody (latent n_latents) come last and belong to no segment.
    """

    pairs: Int[Tensor, " pairs"]
    """Positions in the flattened (n, k) code; a pair's token is its position // k."""
    latents: Int[Tensor, " pairs"]
    """Latent of each pair, ascending."""
    offsets: Int[Tensor, " n_latents_plus_1"]
    """Latent i owns pairs[offsets[i] : offsets[i + 1]]."""


class DecodeStep(NamedTuple):
    """What a step needs of its reconstruction, see `decode_step`."""

    squared_error: Float[Tensor, " n"]
    grad_recon: Float[Tensor, "n d_model"]
    grad_values: Float[Tensor, "n k"]


@dataclass(frozen=True)
class RowGradient:
    """The gradient of an (n_latents, d_model) weight as a sum of parts, reduced a row at a time.

    gradient[l] = sum over the pairs p of latent l of values[p] rows[token of p]  +  subset_rows[position[l]]
    """

    values: Float[Tensor, "n k"] | None = None
    order: LatentOrder | None = None
    rows: Float[Tensor, "n d_model"] | None = None
    subset_rows: Float[Tensor, "m d_model"] | None = None
    position: Int[Tensor, " n_latents"] | None = None
    """Row of `subset_rows` for each latent, -1 for none. Without it row l belongs to latent l."""


@dataclass
class RowState:
    """A weight, Adam's state of it, the average of it, and the copy that a step computes with.

    In float32 (or float64) mean and square have the weight's dtype and there are no scales. In low memory the weight
    is bf16, mean int8 and square uint8 with a scale a row, see `topkapi.ops.low_memory`.
    """

    weight: Float[Tensor, "n_latents d_model"]
    mean: Float[Tensor, "n_latents d_model"] | Int8[Tensor, "n_latents d_model"]
    square: Float[Tensor, "n_latents d_model"] | UInt8[Tensor, "n_latents d_model"]
    ema: Float[Tensor, "n_latents d_model"] | None = None
    working: Float[Tensor, "n_latents d_model"] | None = None
    """The weight in another dtype; None where the step computes with the weight itself."""
    mean_scale: Float[Tensor, " n_latents"] | None = None
    square_scale: Float[Tensor, " n_latents"] | None = None


class AdamStep(NamedTuple):
    """The numbers of one optimiser step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    ema_decay: float
    n_steps: int
    """Updates with this one: the first is 1."""
    unit_norm: bool
    """Remove the gradient's part along its row before, scale the row to unit norm after."""
    seed: int = 0
    """Of stochastic rounding (low memory); another one for each weight."""
    first_latent: int = 0
    """Number of the first row among all latents: a row is rounded alike whichever process owns it."""


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
    pre_bias: Float[Tensor, " d_model"] | None,
    k: int,
    screening: str = "bf16",  # noqa: ARG001 - for kernels; here everything is computed in the dtype of W_enc
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """See `topkapi.ops.encode_topk`. Holds at most SCRATCH_BYTES of pre-activations (one row at least).

    `pre_bias` None stands for zeros.
    """
    n, n_latents = len(x), len(W_enc)
    latent_bias = latent_bias.to(W_enc.dtype)
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    rows = max(1, SCRATCH_BYTES // (max(n_latents, 1) * x.element_size()))
    for start in range(0, n, rows):
        part = x[start : start + rows]
        if pre_bias is not None:
            part = part - pre_bias.to(W_enc.dtype)
        pre_acts = _scratch(len(part), n_latents, x)
        torch.addmm(latent_bias, part, W_enc.T, out=pre_acts)
        values[start : start + rows], indices[start : start + rows] = _top_k(pre_acts, k)
    return values.relu_(), indices


def _top_k(pre_acts: Float[Tensor, "n n_latents"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row and their columns, the largest first; of equal ones above 0 the first columns first.

    So the same latents are kept however the columns are divided among processes. Equal values are rare: rows that have
    them are found by looking at the k + 1 largest, and only these are gone through again. On other devices than CPUs
    any of equal ones are kept: how many rows have them is not known there without waiting for the device.
    """
    if pre_acts.device.type != "cpu":
        return _largest(pre_acts, k)
    values, columns = _largest(pre_acts, min(k + 1, pre_acts.shape[1]))
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)
    rows = tied.any(1).nonzero().flatten()
    values, columns = values[:, :k], columns[:, :k]
    if len(rows):
        values[rows], columns[rows] = _first_of_equals(pre_acts[rows], values[rows, k - 1 :], k)
    return values, columns


def _largest(pre_acts: Float[Tensor, "n n_latents"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row, sorted, and their columns; of equal ones any.

    Where k is small beside n_latents, first keeps the k groups of GROUP columns with the largest maxima: the k
    largest values of a row lie in them. Group j is the columns j, j + n_groups, j + 2 n_groups, ..., so the maxima
    are taken over a leading axis, which vectorises. Halves the time of selection against `torch.topk` on the row.
    """
    n, n_latents = pre_acts.shape
    n_groups = n_latents // GROUP
    if n_groups + GROUP * k > n_latents // 4:
        return tuple(pre_acts.topk(k))
    grouped = pre_acts[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    _, groups = grouped.amax(1).topk(k, sorted=False)
    members = torch.arange(0, n_groups * GROUP, n_groups, device=pre_acts.device)
    columns = (groups[:, None, :] + members[:, None]).flatten(1)
    if n_groups * GROUP < n_latents:
        rest = torch.arange(n_groups * GROUP, n_latents, device=pre_acts.device).expand(n, -1)
        columns = torch.cat([columns, rest], dim=1)
    values, chosen = pre_acts.gather(1, columns).topk(k)
    return values, columns.gather(1, chosen)


def _first_of_equals(
    pre_acts: Float[Tensor, "n n_latents"], edge: Float[Tensor, "n 1"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """`_top_k` of rows whose k-th largest value is `edge`, by counting."""
    above = ~(pre_acts <= edge)  # not a number counts as above, as it does in `torch.topk`
    keep = _with_first_equals(above, pre_acts == edge, k)
    columns = keep.nonzero()[:, 1].view(-1, k)
    values, order = pre_acts.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


@torch.no_grad()
def keep_largest(
    values: Float[Tensor, "n c"],
    indices: Int[Tensor, "n c"],
    gathered: Float[Tensor, "shards_times_n c"],
    shard: int,
    k: int,
    nobody: int,
) -> tuple[Float[Tensor, "n c"], Int[Tensor, "n c"]]:
    """The candidates of one shard that are among the k largest of all shards'; the others become 0 and `nobody`.

    `gathered` holds the candidates' values of shard 0, then those of shard 1, and so on, `values` among them. Of equal
    values those of lower shards are kept, and within a shard the first, so that exactly k of a row stay if as many are
    above 0; candidates that are 0 or less never do. With shards in the order of their latents, and candidates
    of equal value too, these are the k largest by value, then latent. Holds about SCRATCH_BYTES at most.
    """
    n, width = values.shape
    everyone = gathered.view(len(gathered) // max(n, 1), n, width).transpose(0, 1)  # (n, shards, width)
    out, latents = torch.empty_like(values), torch.empty_like(indices)
    rows = max(1, SCRATCH_BYTES // (32 * max(everyone[:1].numel(), 1)))  # of copies, masks, counts and the sort
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        keep = _among_largest(everyone[part].flatten(1), k)[:, shard * width : (shard + 1) * width]
        out[part] = torch.where(keep, values[part], 0)
        latents[part] = torch.where(keep, indices[part], nobody)
    return out, latents


def _among_largest(values: Float[Tensor, "n m"], k: int) -> Bool[Tensor, "n m"]:
    """Which entries of a row are above 0 and among the k largest; of equal ones the first."""
    edge = values.topk(min(k, values.shape[1])).values[:, -1:]
    return _with_first_equals(values > edge, values == edge, k) & (values > 0)


def _with_first_equals(above: Bool[Tensor, "n m"], equal: Bool[Tensor, "n m"], k: int) -> Bool[Tensor, "n m"]:
    """The entries above a row's edge, and the first of those equal to it, k in all."""
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


@torch.no_grad()
def dense_sparse_matmul(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    weight: Float[Tensor, "n_latents d_model"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n d_model"]:
    """See `topkapi.ops.dense_sparse_matmul`. The sum is taken in float32 (float64 for float64).

    It comes back as `dtype`, or as the weight's. Entries of nobody count for nothing.
    """
    return _decode(values, indices, weight).to(dtype or weight.dtype)


def _decode(values: Tensor, indices: Tensor, weight: Tensor) -> Float[Tensor, "n d_model"]:
    if indices.numel() == 0:  # embedding_bag refuses bags of no entries
        return _wide(weight[:0]).new_zeros(len(indices), weight.shape[1])
    weight = _wide(weight)
    latents = indices.clamp(max=len(weight) - 1)  # nobody's value is 0
    return embedding_bag(latents, weight, per_sample_weights=values.to(weight.dtype), mode="sum")


def _wide(x: Tensor) -> Tensor:
    """In the dtype that sums are taken in: float32, or float64 for float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@torch.no_grad()
def matmul_at_sparse_indices(
    a: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "n_latents d_model"],
    indices: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """See `topkapi.ops.matmul_at_sparse_indices`. Comes back in float32 (float64 for float64 weights); nobody's are 0.

    The operator below is the one autograd runs for the gradient of `embedding_bag` with respect to its weights
    per sample; reached through autograd it would first cost a forward pass that nobody needs.
    """
    n, k = indices.shape
    weight = _wide(weight)
    if indices.numel() == 0:
        return weight.new_zeros(n, k)
    offsets = torch.arange(0, n * k, k, device=indices.device)
    bags = torch.arange(n, device=indices.device).repeat_interleave(k, output_size=n * k)
    latents = indices.flatten().long().clamp(max=len(weight) - 1)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a.to(weight.dtype).contiguous(), weight, latents, offsets, bags, 0
    )
    return dots.view(n, k).masked_fill_(indices >= len(weight), 0)


@torch.no_grad()
def decode_step(
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    target: Float[Tensor, "n d_model"],
    scale: float,
) -> DecodeStep:
    """Squared error of a sparse code against `target`, and its gradients: decoder forward and backward at once.

        error         = values W_dec - target
        squared_error = sum over d_model of error^2
        grad_recon    = scale error                                                  in the dtype of target
        grad_values   = grad_recon W_dec^T at the code's indices where values > 0, else 0

    With target = x - pre_bias, error is the reconstruction's; with scale = 2 c / (n d_model) the gradients are those
    of c times the mean squared error. Sums are float32 (float64 for float64), and so are the first and the last.
    """
    error = _decode(values, indices, W_dec).sub_(target)
    squared_error = error.pow(2).sum(1)
    grad = error.mul_(scale)
    grad_values = matmul_at_sparse_indices(grad, W_dec, indices).mul_(values > 0)
    return DecodeStep(squared_error, grad.to(target.dtype), grad_values)


@torch.no_grad()
def recon_gradient(
    recon: Float[Tensor, "n d_model"], target: Float[Tensor, "n d_model"], scale: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d_model"]]:
    """Squared error of a reconstruction, a row, and its gradient: of `decode_step` what follows the decoder.

        error = recon - target;   squared_error = sum over d_model of error^2;   grad = scale error

    The error and its sums are float32 (float64 for float64), the gradient has the dtype of target.
    """
    error = _wide(recon) - target
    squared_error = error.pow(2).sum(1)
    return squared_error, error.mul_(scale).to(target.dtype)


@torch.no_grad()
def order_by_latent(indices: Int[Tensor, "n k"], n_latents: int) -> LatentOrder:
    """The pairs of a sparse code sorted by latent: one sort serves every weight gradient of a step."""
    latents, pairs = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(latents, torch.arange(n_latents + 1, dtype=latents.dtype, device=indices.device))
    return LatentOrder(pairs, latents, offsets)


@torch.no_grad()
def transposed_dense_sparse_matmul(
    values: Float[Tensor, "n k"],
    order: LatentOrder,
    rows: Float[Tensor, "n d_model"],
    start: int,
    stop: int,
) -> Float[Tensor, "stop_minus_start d_model"]:
    """Rows start..stop of the transposed sparse code times `rows`: the weight gradients of a sparse layer.

        out[l - start] = sum over the pairs p of latent l of values[p] rows[token of p]

    Cost 2 n k d_model flops over all latents. Deterministic: a latent's pairs are added in the tokens' order, in
    float32 (float64 for float64).

    Source: Gao et al. 2024, appendix D.2 (decoder gradient and encoder gradient).
    """
    first, last = int(order.offsets[start]), int(order.offsets[stop])
    rows = _wide(rows)
    if first == last:
        return rows.new_zeros(stop - start, rows.shape[1])
    pairs = order.pairs[first:last]
    return embedding_bag(
        pairs // values.shape[1],
        rows,
        order.offsets[start:stop] - first,  # include_last_offset would read better, and leaves the fast path
        per_sample_weights=values.flatten()[pairs].to(rows.dtype),
        mode="sum",
    )


@torch.no_grad()
def latent_sums(values: Float[Tensor, "n k"], order: LatentOrder, n_latents: int) -> Float[Tensor, " n_latents"]:
    """Sum over the batch of each latent's values: out[l] = sum over the pairs p of latent l of values[p]."""
    ordered = _wide(values).flatten()[order.pairs]
    return ordered.new_zeros(n_latents + 1).index_add_(0, order.latents, ordered)[:n_latents]


@torch.no_grad()
def fired(values: Float[Tensor, "n k"], order: LatentOrder) -> Bool[Tensor, " n_latents"]:
    """Which latents have a value above 0 somewhere in the batch."""
    above = (values > 0).flatten()[order.pairs].float()
    return above.new_zeros(len(order.offsets)).index_add_(0, order.latents, above)[:-1] > 0


@torch.no_grad()
def bias_gradients(
    values: Float[Tensor, "n k"], order: LatentOrder, weight: Float[Tensor, "n_latents d_model"]
) -> tuple[Float[Tensor, " n_latents"], Float[Tensor, " d_model"]]:
    """`latent_sums` of the gradients at the pre-activations, and the rows of `weight` times them, summed.

    The first is the gradient of latent_bias. The second, negative, is the encoder's share of the gradient of pre_bias:
    summing over the batch before multiplying makes a matrix-vector product of it. In float32, float64 for float64.

    Source: Gao et al. 2024, appendix D.2.
    """
    sums, weight = latent_sums(values, order, len(weight)), _wide(weight)
    return sums, sums.to(weight.dtype) @ weight


@torch.no_grad()
def gradient_squares(
    gradient: RowGradient, weight: Float[Tensor, "n_latents d_model"], project: bool
) -> Float[Tensor, ""]:
    """Sum of squares of a gradient, without the part of each row along the weight's if `project`."""
    squares = [_gradient_rows(gradient, weight, start, stop, project).pow(2).sum() for start, stop in _blocks(weight)]
    return torch.stack(squares).double().sum()


@torch.no_grad()
def update_rows_(
    state: RowState, gradient: RowGradient, step: AdamStep, grad_scale: Float[Tensor, ""] | None = None
) -> None:
    """One optimiser step of a weight, in place: project, scale, Adam, unit norm, average, working copy.

        g = gradient (minus its part along the row) times grad_scale
        m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
        w = w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps);   w = w / |w|;   ema = lerp(ema, w, 1 - decay)

    A block of rows at a time, whose gradient is reduced just before: on a CPU the passes over a block run while it is
    in the processor's cache, and no gradient of the weight's size exists. A row of zeros keeps its norm.
    """
    for start, stop in _blocks(state.weight):
        part = slice(start, stop)
        grad = _gradient_rows(gradient, state.weight, start, stop, step.unit_norm)
        if grad_scale is not None:
            grad *= grad_scale
        if state.mean_scale is None:
            weight, mean, square = state.weight[part], state.mean[part], state.square[part]
        else:
            weight = state.weight[part].float()
            mean = low_memory.decode_mean(state.mean[part], state.mean_scale[part])
            square = low_memory.decode_square(state.square[part], state.square_scale[part])
        adam_(weight, grad, mean, square, step)
        if step.unit_norm:
            unit_norm_(weight)
        if state.mean_scale is not None:
            rows, key = (
                (step.first_latent + start, step.first_latent + stop),
                low_memory.key_of(step.seed, step.n_steps),
            )
            first, second = low_memory.random_bits(*rows, weight.shape[1], key, weight.device)
            state.mean[part], state.mean_scale[part] = low_memory.encode_mean(mean, first)
            state.square[part], state.square_scale[part] = low_memory.encode_square(square, second)
            state.weight[part] = low_memory.round_weight(weight, first)
        if state.ema is not None:
            state.ema[part].lerp_(state.weight[part].to(state.ema.dtype), 1 - step.ema_decay)
        if state.working is not None:
            state.working[part].copy_(state.weight[part])


def adam_(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamStep) -> None:
    """torch's Adam without weight decay, in place, bias-corrected."""
    adam(
        [parameter],
        [grad],
        [mean],
        [square],
        [],
        [torch.full((), float(step.n_steps - 1), device=parameter.device)],
        fused=True,
        amsgrad=False,
        beta1=step.beta1,
        beta2=step.beta2,
        lr=step.lr,
        weight_decay=0.0,
        eps=step.eps,
        maximize=False,
    )


def unit_norm_(rows: Float[Tensor, "n d_model"]) -> None:
    """Scale each row to unit norm, in place; a row of zeros stays."""
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _gradient_rows(
    gradient: RowGradient, weight: Tensor, start: int, stop: int, project: bool
) -> Float[Tensor, "rows d_model"]:
    """Rows start..stop of a gradient, as a new tensor, projected if asked."""
    if gradient.order is not None:
        grad = transposed_dense_sparse_matmul(gradient.values, gradient.order, gradient.rows, start, stop)
        if gradient.subset_rows is not None:
            has_row = (gradient.position[start:stop] >= 0).nonzero().flatten()
            chosen = gradient.position[start:stop][has_row]
            grad.index_add_(0, has_row, gradient.subset_rows[chosen].to(grad.dtype))
    else:
        grad = _wide(gradient.subset_rows[start:stop]).clone()
    if project:
        rows = weight[start:stop].to(grad.dtype)
        grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)
    return grad


def _blocks(weight: Tensor) -> list[tuple[int, int]]:
    rows = BLOCK_ROWS if weight.device.type == "cpu" else max(len(weight), 1)
    return [(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]


@torch.no_grad()
def select_topk_(pre_acts: Float[Tensor, "n m"], bias: Float[Tensor, " m"], k: int) -> Tensor:
    """Turn pre-activations without bias into a code, in place: ReLU(TopK_k(pre_acts + bias)) as a dense matrix.

    Returns which entries are above 0, in the form that `mask_selected_` takes. Of equal entries at the edge any may be
    kept, the same ones each time. A column is left out by a bias that no pre-activation reaches.
    """
    pre_acts += bias
    if k >= pre_acts.shape[1]:
        pre_acts.relu_()
    else:
        values, columns = _top_k(pre_acts, k)
        pre_acts.zero_().scatter_(1, columns, values.relu_())
    return pre_acts > 0


@torch.no_grad()
def mask_selected_(grad: Float[Tensor, "n m"], selected: Tensor) -> Float[Tensor, " m"]:
    """Set the entries of `grad` that `select_topk_` did not keep to 0, in place; returns the sums of its columns.

    They are float32 (float64 for float64).
    """
    return _wide(grad.masked_fill_(~selected, 0)).sum(0)


@torch.no_grad()
def residual_gradient_(
    auxk_recon: Float[Tensor, "n d_model"],
    grad_recon: Float[Tensor, "n d_model"],
    inverse_scale: float,
    factor: Float[Tensor, ""],
) -> Float[Tensor, " n"]:
    """Turn a reconstruction of the residual into the gradient of its error, in place; returns each row's squared error.

        error = auxk_recon - residual,   residual = -inverse_scale grad_recon;   auxk_recon = factor error

    `grad_recon` and 1 / `inverse_scale` are those of `decode_step`. Sums are float32 (float64 for float64).
    """
    error = torch.add(_wide(auxk_recon), grad_recon, alpha=inverse_scale)
    auxk_recon.copy_(error * factor)
    return error.pow_(2).sum(1)
