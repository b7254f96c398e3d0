"""Probe loss: does the dictionary have one latent that tells a known concept?

For each binary task, a set of texts (examples) with labels y:

1. `encode_examples`: one activation z_i of each latent for each example, pooled over the example's tokens.
2. `probe_task`: the best one-dimensional logistic probe: min over latents i, weights w and biases b of the mean of
   -y log p - (1 - y) log(1 - p), p = sigmoid(w z_i + b), on training examples; its loss on the others counts.
3. `probe_loss`: the mean over tasks, with a bootstrap interval.

Source: Gao et al. 2024, section 4.2. They probe pre-activations and choose on the examples that they report. Here the
values after TopK and ReLU are probed, the code that the autoencoder passes on: their zeros cost nothing, so that a
dictionary of 131 072 latents is probed in seconds. `dense_codes` takes pre-activations too, or the channels of x, their
baseline.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import softplus

from topkapi.errors import TopkapiError
from topkapi.evaluate.sampling import ResampledSums, chunks
from topkapi.model import Autoencoder
from topkapi.statistics.intervals import Estimate, estimate

RIDGE = 1e-6  # see `fit_probes`
PROBED_ELEMENTS = 2**18  # activations fitted at once, 2 MiB of float64: a third of the time of 2**21 on a CPU
STEPS = 100  # of Newton's method, halvings included; about 8 are needed, 20 where a latent separates the classes
CONVERGED = 1e-12  # nats; expected gain of the next step, twice


@dataclass(frozen=True)
class ExampleCodes:
    """One activation for each latent and example, in CSR form with latents as rows; entries left out are 0."""

    n_examples: int
    offsets: Int64[Tensor, " n_latents_plus_1"]
    """Latent i owns entries offsets[i] to offsets[i + 1] of the following."""
    examples: Int64[Tensor, " entries"]
    values: Float[Tensor, " entries"]


@torch.no_grad()
def encode_examples(
    ae: Autoencoder,
    blocks: Iterable[tuple[Tensor, Tensor]],
    n_examples: int,
    pooling: str = "max",
) -> ExampleCodes:
    """Each latent's activation on each example, pooled over the example's tokens.

        max    the largest of any token      mean    the mean over tokens      last    that of the last token

    `blocks` yields normalised activations (n, d_model) and the number, below `n_examples`, of the example that each row
    belongs to. The numbers never fall, and an example's rows are in one block. An example without rows has zeros.
    Memory: its entries above 0, 20 bytes each while they are sorted, and one chunk of encoder output.

    Raises:
        TopkapiError: another pooling, a wrong shape, or numbers that fall, recur in a later block or are out of range.
    """
    if pooling not in ("max", "mean", "last"):
        raise TopkapiError(f"pooling must be max, mean or last; got {pooling!r}.")
    device, reduce = ae.W_dec.device, "sum" if pooling == "mean" else "max"
    parts = [(torch.zeros(0, dtype=torch.int64, device=device), ae.W_dec.new_zeros(0))]  # keys, values
    n_rows, previous = torch.zeros(n_examples, device=device), -1
    for x, examples in blocks:
        previous = _check_examples(x, examples, previous, n_examples)
        if pooling == "last" and len(x):
            last = examples != torch.cat([examples[1:], examples.new_tensor([-1])])
            x, examples = x[last], examples[last]
        examples = examples.to(device, torch.int64)
        n_rows += torch.bincount(examples, minlength=n_examples)
        start = 0
        for chunk in chunks(ae, x):
            code, latents = ae.encode(chunk)
            active = code > 0
            rows = examples[start : start + len(chunk), None].expand_as(latents)
            keys = latents[active].long() * n_examples + rows[active]
            parts.append(_pooled(keys, code[active], reduce))
            start += len(chunk)
    keys, values = _pooled(*map(torch.cat, zip(*parts, strict=True)), reduce)
    latents, examples = keys // max(1, n_examples), keys % max(1, n_examples)
    if pooling == "mean":
        values = values / n_rows[examples]
    offsets = torch.searchsorted(latents, torch.arange(ae.n_latents + 1, device=device))
    return ExampleCodes(n_examples, offsets, examples, values)


def _check_examples(x: Tensor, examples: Tensor, previous: int, n_examples: int) -> int:
    """The last example's number, once the block's numbers are what `encode_examples` asks for."""
    if len(x) != len(examples):
        raise TopkapiError(f"Each row needs its example's number; got {len(x)} rows and {len(examples)} numbers.")
    if not len(examples):
        return previous
    first, last = int(examples[0]), int(examples[-1])
    if first <= previous or (examples[1:] < examples[:-1]).any() or last >= n_examples:
        raise TopkapiError(
            f"Numbers of examples must rise from 0 to at most {n_examples - 1}, all rows of one in one block; "
            f"got {first} to {last} after {previous}."
        )
    return last


def _pooled(
    keys: Int64[Tensor, " entries"], values: Float[Tensor, " entries"], reduce: Literal["sum", "max"]
) -> tuple[Int64[Tensor, " keys"], Float[Tensor, " keys"]]:
    """The keys, each once and rising, with the sum or the largest of their values; in a fixed order."""
    keys, order = keys.sort(stable=True)
    keys, counts = keys.unique_consecutive(return_counts=True)
    if not len(keys):
        return keys, values
    return keys, torch.segment_reduce(values[order], reduce, lengths=counts)


def dense_codes(activations: Float[Tensor, "n_examples n_latents"]) -> ExampleCodes:
    """Codes of activations given as a whole matrix, which may be negative: pre-activations, or channels of x."""
    latents, examples = activations.T.nonzero(as_tuple=True)
    offsets = torch.searchsorted(latents, torch.arange(activations.shape[1] + 1, device=latents.device))
    return ExampleCodes(len(activations), offsets, examples, activations.T[latents, examples])


@dataclass(frozen=True)
class TaskProbe:
    """The best probe of a task; logit = weight z_latent + bias. Losses in nats."""

    latent: int | None
    weight: float
    bias: float
    train_loss: float | None
    test_losses: Float64[Tensor, " n_test"] | None
    """Of each test example; None, as are latent and train_loss, where no latent fires on a training example."""
    test_examples: Int64[Tensor, " n_test"]
    """Their numbers among all examples, rising."""
    prior_loss: float
    """Mean loss on test examples of always answering the share of positive training examples."""
    n_train: int
    n_test: int


@torch.no_grad()
def probe_task(
    codes: ExampleCodes,
    labels: Bool[Tensor, " n_examples"],
    test_share: float = 0.5,
    seed: int = 0,
    ridge: float = RIDGE,
) -> TaskProbe:
    """The probe with the lowest loss on the training examples, and its losses on the test examples.

    `test_share` of each class, chosen by `seed`, are test examples: at least one of each, and at least one is left.
    Latents that fire on no training example are no candidates; of equal losses the first latent is taken.

    Raises:
        TopkapiError: another number of labels than of examples, fewer than two examples of a class, or `test_share`
            not between 0 and 1.
    """
    device = codes.values.device
    train = _training_examples(labels, codes.n_examples, test_share, seed).to(device)
    labels = labels.to(device)
    weights, biases, losses = _fit_latents(codes, labels, train, ridge)
    prior = labels[train].double().mean()
    positive = labels[~train].double()
    prior_losses = -(positive * prior.log() + (1 - positive) * (1 - prior).log())
    sizes = {"prior_loss": prior_losses.mean().item(), "n_train": int(train.sum()), "n_test": len(positive)}
    sizes["test_examples"] = (~train).nonzero()[:, 0].cpu()
    if not losses.isfinite().any():
        return TaskProbe(latent=None, weight=0.0, bias=0.0, train_loss=None, test_losses=None, **sizes)
    best = int((losses == losses.min()).nonzero()[0])
    entries = slice(int(codes.offsets[best]), int(codes.offsets[best + 1]))
    z = torch.zeros(codes.n_examples, dtype=torch.float64, device=device)
    z[codes.examples[entries]] = codes.values[entries].double()
    logits = (weights[best] * z + biases[best])[~train]
    return TaskProbe(
        latent=best,
        weight=weights[best].item(),
        bias=biases[best].item(),
        train_loss=losses[best].item(),
        test_losses=(softplus(logits) - positive * logits).cpu(),
        **sizes,
    )


def _training_examples(labels: Tensor, n_examples: int, test_share: float, seed: int) -> Bool[Tensor, " n_examples"]:
    """True for the examples to fit on, chosen at random within each class."""
    if len(labels) != n_examples:
        raise TopkapiError(f"Each of the {n_examples} examples needs a label; got {len(labels)} labels.")
    if not 0 < test_share < 1:
        raise TopkapiError(f"test_share must be between 0 and 1; got {test_share}.")
    generator = torch.Generator().manual_seed(seed)
    train = torch.ones(n_examples, dtype=torch.bool)
    for positive in (False, True):
        members = (labels.cpu() == positive).nonzero()[:, 0]
        if len(members) < 2:
            raise TopkapiError(
                f"A task needs two examples of each class, one to fit and one to test; got {len(members)} whose label "
                f"is {positive}."
            )
        n_test = min(max(1, round(test_share * len(members))), len(members) - 1)
        train[members[torch.randperm(len(members), generator=generator)[:n_test]]] = False
    return train


def _fit_latents(
    codes: ExampleCodes, labels: Bool[Tensor, " n_examples"], train: Bool[Tensor, " n_examples"], ridge: float = RIDGE
) -> tuple[Float64[Tensor, " n_latents"], Float64[Tensor, " n_latents"], Float64[Tensor, " n_latents"]]:
    """Weight, bias and training loss of every latent's probe; loss inf where it fires on no training example.

    Latents with about as many entries are fitted together, padded to the longest with weight 0. All examples on which a
    latent is 0 are one entry, whose weight is their number.
    """
    kept = train[codes.examples]
    examples, values = codes.examples[kept], codes.values[kept]
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])[codes.offsets]
    counts = offsets.diff()
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    out = torch.zeros(3, len(counts), dtype=torch.float64, device=values.device)
    out[2] = torch.inf
    n_train, n_positive = train.sum(), (labels & train).sum()
    start = 0
    while start < len(order):
        longest = int(counts[order[start]])
        latents = order[start : start + max(1, PROBED_ELEMENTS // (longest + 1))]
        column = torch.arange(longest, device=values.device)
        inside = column < counts[latents, None]
        entries = torch.where(inside, offsets[latents, None] + column, 0)
        z = torch.where(inside, values[entries], 0)
        positive = inside & labels[examples[entries]]
        silent = torch.stack([n_train - counts[latents], n_positive - positive.sum(1)])[:, :, None]
        out[:, latents] = torch.stack(
            fit_probes(
                torch.cat([z, torch.zeros_like(z[:, :1])], 1).double(),
                torch.cat([inside, silent[0]], 1).double(),
                torch.cat([positive, silent[1]], 1).double(),
                ridge,
            )
        )
        start += len(latents)
    return out[0], out[1], out[2]


def fit_probes(
    z: Float64[Tensor, "latents m"],
    weight: Float64[Tensor, "latents m"],
    positive: Float64[Tensor, "latents m"],
    ridge: float = RIDGE,
) -> tuple[Float64[Tensor, " latents"], Float64[Tensor, " latents"], Float64[Tensor, " latents"]]:
    """Weight w, bias b and mean loss in nats (without the ridge) of each row's logistic regression on one variable.

        minimise  mean(softplus(l) - y l) + ridge / 2 (w std(z))^2,   l = w z + b

    Entry j stands for weight[j] examples, of which positive[j] have y = 1. The ridge, which does not depend on the
    scale of z, keeps w finite where z separates the classes; there it leaves a loss of some 1e-4 nats by default.

    Newton's method on standardised z, all rows at once; a step that does not lower the objective is halved.
    """
    total = weight.sum(1, keepdim=True)
    weight, positive = weight / total, positive / total
    mean = (weight * z).sum(1, keepdim=True)
    std = (weight * (z - mean).square()).sum(1, keepdim=True).sqrt()
    std = torch.where(std > 0, std, 1)
    z = (z - mean) / std
    point = torch.stack([torch.zeros_like(mean[:, 0]), positive.sum(1).logit()])  # w, b
    trial, step = point, torch.zeros_like(point)
    lowest, loss = torch.full_like(point[0], torch.inf), torch.zeros_like(point[0])
    done = torch.zeros_like(lowest, dtype=torch.bool)
    for _ in range(STEPS):
        new_loss, objective, newton, gain = _newton_step(z, weight, positive, trial, ridge)
        lower = objective < lowest
        point, lowest = torch.where(lower, trial, point), torch.where(lower, objective, lowest)
        loss = torch.where(lower, new_loss, loss)
        done |= lower & (gain < CONVERGED)
        step = torch.where(lower, newton, step / 2)
        trial = torch.where(done, point, point + step)
        if done.all():
            break
    w = point[0] / std[:, 0]
    return w, point[1] - w * mean[:, 0], loss


def _newton_step(
    z: Tensor, weight: Tensor, positive: Tensor, point: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At a point (w, b): loss, objective, Newton's step, and the gain that it promises, times two."""
    w, b = point
    logits = w[:, None] * z + b[:, None]
    loss = (weight * softplus(logits) - positive * logits).sum(1)
    p = logits.sigmoid_()
    slope = weight * p - positive
    curve = weight * p * (1 - p)
    gw, gb = (slope * z).sum(1) + ridge * w, slope.sum(1)
    hww, hwb, hbb = (curve * z * z).sum(1) + ridge, (curve * z).sum(1), curve.sum(1)
    determinant = hww * hbb - hwb * hwb
    step = torch.stack([hwb * gb - hbb * gw, hwb * gw - hww * gb]) / determinant
    return loss, loss + ridge / 2 * w * w, step, -(step[0] * gw + step[1] * gb)


@dataclass(frozen=True)
class ProbeLoss:
    """The mean over tasks of the loss on test examples, in nats, and each task's."""

    mean: Estimate
    tasks: dict[str, Estimate]


def probe_loss(probes: Mapping[str, TaskProbe], sources: Mapping[str, str] | None = None, seed: int = 0) -> ProbeLoss:
    """Probe loss over tasks, each counting alike, with the interval of drawing the test examples anew.

    `sources` names the set of examples that a task is of, where several share one and number them alike: an example is
    then drawn, or not, in all of them at once, and counted once. Without it each task has examples of its own. Tasks,
    training examples and the probes chosen by them stay as they are. A task without a probe leaves the mean undefined:
    a mean over fewer tasks does not compare.

    Raises:
        TopkapiError: no task.
    """
    if not probes:
        raise TopkapiError("Probe loss needs at least one task; got none.")
    tasks = {
        name: Estimate(None, None, None, probe.n_test, "no latent fires on a training example")
        for name, probe in probes.items()
    }
    sharing: dict[str, list[str]] = {}
    for name, probe in probes.items():
        if probe.test_losses is not None:
            sharing.setdefault((sources or {}).get(name, name), []).append(name)
    means, n = [], 0
    for number, names in enumerate(sharing.values()):
        sums = _resampled([probes[name] for name in names], seed + number)
        for name, (count, total) in zip(names, sums.sums.T.unflatten(0, (-1, 2)), strict=True):
            means.append(total / count)
            tasks[name] = estimate(means[-1].numpy(), probes[name].n_test)
        n += sums.n
    if silent := [name for name, found in tasks.items() if found.value is None]:
        why = f"no latent fires on a training example of {', '.join(silent)}"
        return ProbeLoss(Estimate(None, None, None, n, why), tasks)
    return ProbeLoss(estimate(torch.stack(means).mean(0).numpy(), n), tasks)


def _resampled(probes: list[TaskProbe], seed: int) -> ResampledSums:
    """Test examples of each task and the sum of their losses, a pair of columns a task, of examples drawn anew."""
    examples = torch.cat([probe.test_examples for probe in probes]).unique()
    columns = torch.zeros(len(examples), 2 * len(probes), dtype=torch.float64)
    for i, probe in enumerate(probes):
        rows = torch.searchsorted(examples, probe.test_examples)
        columns[rows, 2 * i], columns[rows, 2 * i + 1] = 1, probe.test_losses
    sums = ResampledSums(columns.shape[1], seed=seed)
    sums.add(columns)
    return sums
