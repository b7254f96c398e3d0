"""Probes against scikit-learn's logistic regression, pooling against loops, and tasks with known answers.

Mutations seen caught: silent examples counted twice; z not standardised; test examples fitted on, or training examples
scored; a mean over another number of tokens; a split without shuffling; texts that tasks share drawn by themselves.
"""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.evaluate.stand_ins import D_MODEL, random_autoencoder
from topkapi.errors import TopkapiError
from topkapi.evaluate import probes as module
from topkapi.evaluate import sampling
from topkapi.evaluate.probes import TaskProbe, dense_codes, encode_examples, fit_probes, probe_loss, probe_task
from topkapi.model import Autoencoder


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coins(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.4


def sparse_activations(n: int, n_latents: int, seed: int = 0) -> torch.Tensor:
    """Latents of all densities, from silent to always on, and of all scales."""
    shift = torch.linspace(-3.5, 3, n_latents)
    return (draw(n, n_latents, seed=seed) + shift).relu() * torch.logspace(-3, 3, n_latents)


def scikit_learns_loss(z: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Weight, bias and mean loss of the same problem: its C is 1 / (n ridge)."""
    scale = z.std() or 1.0
    column = (z - z.mean())[:, None] / scale
    model = LogisticRegression(C=1 / (module.RIDGE * len(z)), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    model.fit(column, y)
    p = model.predict_proba(column)[:, 1]
    w = model.coef_[0, 0] / scale
    return w, model.intercept_[0] - w * z.mean(), -np.log(np.where(y, p, 1 - p)).mean()


def test_every_latents_probe_is_that_of_scikit_learn(monkeypatch):
    """In blocks of all sizes; labels lean on latent 20."""
    z = sparse_activations(120, 40).double()
    labels = (z[:, 20] / z[:, 20].std() + draw(120, seed=5)) > z[:, 20].mean() / z[:, 20].std()
    monkeypatch.setattr(module, "PROBED_ELEMENTS", 400)
    everything = torch.ones(120, dtype=torch.bool)
    weights, biases, losses = module._fit_latents(dense_codes(z), labels, everything)
    assert math.isinf(losses[0])
    for i in range(40):
        if (z[:, i] > 0).any():
            w, b, loss = scikit_learns_loss(z[:, i].numpy(), labels.numpy())
            assert losses[i].item() == pytest.approx(loss, abs=1e-6)
            assert (weights[i].item(), biases[i].item()) == pytest.approx((w, b), rel=1e-3, abs=1e-3)


def test_classes_that_a_latent_separates_have_a_finite_probe_and_a_loss_near_zero():
    z = torch.cat([torch.zeros(30), 1 + torch.rand(30, generator=torch.Generator().manual_seed(0))]).double()
    for scale in (1e-4, 1, 1e4):
        column, y = (scale * z)[None], (z > 0).double()[None]
        w, b, loss = fit_probes(column, torch.ones_like(column), y)
        assert 0 < loss.item() < 1e-3
        assert loss.item() == pytest.approx(scikit_learns_loss(scale * z.numpy(), z.numpy() > 0)[2], abs=1e-6)
        assert torch.isfinite(w).all()
        assert torch.isfinite(b).all()


def test_weights_stand_for_repeated_examples():
    z, y = draw(30).double(), coins(30).double()
    times = torch.arange(1, 31) % 4
    once = fit_probes(z[None], times[None].double(), (times * y)[None])
    again = fit_probes(
        z.repeat_interleave(times)[None], torch.ones(1, int(times.sum())).double(), y.repeat_interleave(times)[None]
    )
    for one, other in zip(once, again, strict=True):
        assert one.item() == pytest.approx(other.item(), abs=1e-9)


def test_the_latent_that_knows_the_concept_is_found_and_scored_on_unseen_examples():
    """P(y) = sigmoid(2 z_7 - 1) exactly: the loss on test examples is the entropy of that, w = 2, b = -1."""
    z = draw(20_000, 12).abs()
    y = torch.rand(20_000, generator=torch.Generator().manual_seed(9)) < (2 * z[:, 7] - 1).sigmoid()
    found = probe_task(dense_codes(z), y)
    assert (found.latent, found.n_train, found.n_test) == (7, 10_000, 10_000)
    assert (found.weight, found.bias) == pytest.approx((2, -1), abs=0.1)
    p = (2 * z[:, 7].double() - 1).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    loss = probe_loss({"task": found})
    assert loss.mean.low < entropy < loss.mean.high
    assert loss.mean.value == pytest.approx(entropy, abs=0.02)
    assert loss.mean.value == pytest.approx(found.test_losses.mean().item(), rel=1e-12)
    assert loss.mean.value < found.prior_loss - 0.1


def test_test_examples_do_not_touch_the_probe():
    z, y = sparse_activations(200, 20), coins(200)
    train = module._training_examples(y, 200, 0.5, 0)
    changed = torch.where(train[:, None], z, draw(200, 20, seed=3).abs())
    one, other = probe_task(dense_codes(z), y), probe_task(dense_codes(changed), y)
    assert (one.latent, one.weight, one.bias, one.train_loss) == (
        other.latent,
        other.weight,
        other.bias,
        other.train_loss,
    )
    assert one.test_losses.mean() != other.test_losses.mean()
    assert torch.equal(one.test_examples, (~train).nonzero()[:, 0])
    logits = (one.weight * z[:, one.latent] + one.bias)[one.test_examples].double()
    losses = torch.nn.functional.softplus(torch.where(y[one.test_examples], -logits, logits))
    torch.testing.assert_close(one.test_losses, losses, rtol=1e-5, atol=1e-6)


def test_each_class_is_split_alike_and_by_the_seed():
    y = coins(100)
    train = module._training_examples(y, 100, 0.3, 0)
    assert (~train & y).sum() == round(0.3 * int(y.sum()))
    assert (~train & ~y).sum() == round(0.3 * int((~y).sum()))
    assert torch.equal(train, module._training_examples(y, 100, 0.3, 0))
    assert not torch.equal(train, module._training_examples(y, 100, 0.3, 1))
    tiny = module._training_examples(torch.tensor([True, True, False, False]), 4, 0.01, 0)
    assert [tiny[:2].sum(), tiny[2:].sum()] == [1, 1]


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_pooled_codes_equal_loops(pooling, activation, monkeypatch):
    """Example 2 has no rows; chunks of 3 rows cut through examples."""
    ae = random_autoencoder(activation=activation)
    x = Autoencoder.normalise(draw(17, D_MODEL)).x
    numbers = torch.tensor([0] * 4 + [1] * 1 + [3] * 7 + [4] * 5)
    values, indices = ae.encode(x)
    dense = torch.zeros(17, ae.n_latents).scatter(1, indices, values.detach())
    pool = {"max": lambda z: z.amax(0), "mean": lambda z: z.mean(0), "last": lambda z: z[-1]}[pooling]
    wanted = torch.stack([pool(dense[numbers == i]) if i in numbers else dense[0] * 0 for i in range(6)])
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 3 * ae.n_latents)
    codes = encode_examples(ae, [(x[:5], numbers[:5]), (x[5:5], numbers[5:5]), (x[5:], numbers[5:])], 6, pooling)
    found = torch.zeros(ae.n_latents, 6)
    for i in range(ae.n_latents):
        part = slice(codes.offsets[i], codes.offsets[i + 1])
        found[i, codes.examples[part]] = codes.values[part]
    assert torch.allclose(found.T, wanted, atol=1e-6)
    assert len(codes.values) == wanted.count_nonzero()


def test_dense_codes_keep_negative_activations():
    z = draw(60, 3)
    y = (-3 * z[:, 1] + draw(60, seed=1)) > 0
    found = probe_task(dense_codes(z), y)
    assert found.latent == 1
    assert found.weight < 0


def test_the_mean_counts_each_task_alike_and_its_interval_is_that_of_drawing_test_examples():
    probes = {
        str(i): probe_task(dense_codes(sparse_activations(n, 10, i)), coins(n, i)) for i, n in enumerate((80, 800))
    }
    found = probe_loss(probes)
    losses = [probe.test_losses for probe in probes.values()]
    assert found.mean.value == pytest.approx(np.mean([loss.mean().item() for loss in losses]), rel=1e-12)
    error = math.sqrt(sum((loss.var() / len(loss)).item() for loss in losses)) / 2
    assert found.mean.high - found.mean.low == pytest.approx(2 * 1.96 * error, rel=0.3)
    assert found == probe_loss(probes) != probe_loss(probes, seed=1)


def tasks_of_shared_texts(n_tasks: int, n_texts: int, own: float) -> tuple[dict[str, TaskProbe], float]:
    """Tasks, each tested on another half of the same texts, and the standard error of their mean loss.

    The loss of a text is a part that it has in all tasks, of variance 1, and a part of the task's own.
    """
    shared, probes, share_of_text = draw(n_texts).double(), {}, torch.zeros(n_texts).double()
    for task in range(n_tasks):
        test = torch.randperm(n_texts, generator=torch.Generator().manual_seed(task))[: n_texts // 2].sort().values
        losses = 5 + shared[test] + own * draw(len(test), seed=task + 1)
        share_of_text[test] += 1 / (n_tasks * len(test))
        probes[str(task)] = TaskProbe(0, 0.0, 0.0, 0.0, losses, test, 0.0, n_texts - len(test), len(test))
    return probes, math.sqrt(share_of_text.square().sum().item() + own**2 / (n_tasks * len(test)))


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_texts_that_tasks_share_are_drawn_together(own):
    """Drawn by themselves the interval is less than half as wide as it should be."""
    probes, error = tasks_of_shared_texts(n_tasks=20, n_texts=600, own=own)
    found = probe_loss(probes, dict.fromkeys(probes, "posts")).mean
    apart = probe_loss(probes).mean
    means = [probe.test_losses.mean().item() for probe in probes.values()]
    assert found.value == apart.value == pytest.approx(np.mean(means), rel=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert apart.high - apart.low < (found.high - found.low) / 2
    assert (found.n, apart.n) == (600, 20 * 300)


def test_tasks_of_two_sources_are_independent_of_each_other():
    probes, _ = tasks_of_shared_texts(n_tasks=4, n_texts=600, own=0.0)
    found = probe_loss(probes, {"0": "posts", "1": "posts", "2": "mails", "3": "mails"}).mean
    errors = [
        probe_loss({name: probes[name] for name in names}, dict.fromkeys(names, "")).mean for names in ("01", "23")
    ]
    expected = math.hypot(*(one.high - one.low for one in errors)) / 2
    assert found.high - found.low == pytest.approx(expected, rel=0.25)


def test_a_dead_autoencoder_has_no_probe_loss_and_says_why():
    dead = probe_task(dense_codes(torch.zeros(20, 5)), coins(20))
    assert (dead.latent, dead.train_loss, dead.test_losses) == (None, None, None)
    live = probe_task(dense_codes(sparse_activations(20, 5)), coins(20))
    found = probe_loss({"spam": live, "news": dead})
    assert (found.mean.value, found.tasks["news"].value) == (None, None)
    assert found.tasks["spam"].value is not None
    assert found.mean.reason == "no latent fires on a training example of news"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(20, dtype=torch.bool), "two examples of each class.*got 0 whose label is True"),
        (torch.ones(20, dtype=torch.bool), "got 0 whose label is False"),
        (torch.arange(20) == 3, "got 1 whose label is True"),
        (torch.ones(19, dtype=torch.bool), "Each of the 20 examples needs a label; got 19"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(TopkapiError, match=message):
        probe_task(dense_codes(draw(20, 3)), labels)


def test_other_wrong_inputs_are_named():
    ae, x = random_autoencoder(), Autoencoder.normalise(draw(3, D_MODEL)).x
    for numbers, message in [
        ([0, 1], "got 3 rows and 2 numbers"),
        ([0, 2, 1], "must rise"),
        ([0, 1, 5], "at most 4"),
        ([-1, 0, 1], "must rise"),
    ]:
        with pytest.raises(TopkapiError, match=message):
            encode_examples(ae, [(x, torch.tensor(numbers))], 5)
    with pytest.raises(TopkapiError, match="all rows of one in one block"):
        encode_examples(ae, [(x, torch.tensor([0, 1, 1]))] * 2, 5)
    with pytest.raises(TopkapiError, match="pooling must be max, mean or last; got 'first'"):
        encode_examples(ae, [], 5, "first")
    with pytest.raises(TopkapiError, match="test_share must be between 0 and 1"):
        probe_task(dense_codes(draw(20, 3)), coins(20), test_share=1.0)
    with pytest.raises(TopkapiError, match="at least one task"):
        probe_loss({})
