"""Whole-step gradients equal dense autograd in float64 to 1e-10, by plain PyTorch and by the kernels.

Seen to catch: AuxK's target with pre_bias subtracted twice; pre_bias receiving AuxK's gradient; the residual not
detached; block boundaries of the dead subset off by one; alpha left out of AuxK's gradient; a chunk of tokens taking
the place of the sums before it; padding of the dead subset, or latents that fired since, taking part.
"""

from dataclasses import replace

import pytest
import torch

from topkapi import auxk as module
from topkapi import loss
from topkapi.config import AuxKConfig, LossConfig
from topkapi.gradients import DeadSubset
from topkapi.model import PARAMETERS, Autoencoder, Working
from topkapi.ops import auxk
from topkapi.ops.dispatch import kernels_only, reference_only
from topkapi.step import Step, relu_step, topk_step

N, D_MODEL, N_LATENTS, K = 64, 10, 48, 5
FEW = 12  # tokens, where Triton's interpreter runs: it takes tens of milliseconds each
CONFIG = AuxKConfig(auxk=8, coefficient=1 / 3)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(bias: float = 0.0, seed: int = 0) -> tuple[Autoencoder, torch.Tensor]:
    torch.manual_seed(seed)
    ae = Autoencoder(d_model=D_MODEL, n_latents=N_LATENTS, k=K, seed=seed)
    for name in PARAMETERS:
        parameter = getattr(ae, name)
        parameter.data += 0.3 * torch.randn_like(parameter)
    ae.latent_bias.data += bias
    return ae, ae.normalise(torch.randn(N, D_MODEL)).x


def dead_latents(count: int) -> torch.Tensor:
    dead = torch.zeros(N_LATENTS, dtype=torch.bool)
    dead[torch.randperm(N_LATENTS, generator=torch.Generator().manual_seed(9))[:count]] = True
    return dead


def subset(count: int) -> DeadSubset:
    return DeadSubset.of(dead_latents(count))


def dense_topk(pre_acts: torch.Tensor, k: int) -> torch.Tensor:
    """ReLU(TopK) as a dense matrix, through autograd."""
    chosen = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k).indices, 1.0)
    return (pre_acts * chosen).relu()


def by_autograd(
    ae: Autoencoder, x: torch.Tensor, scale: float, dead: torch.Tensor, config: AuxKConfig
) -> list[torch.Tensor]:
    latents = dense_topk((x - ae.pre_bias) @ ae.W_enc.T + ae.latent_bias, ae.k)
    recon = latents @ ae.W_dec + ae.pre_bias
    total = loss.mse(x, recon, scale)
    k = min(config.auxk, int(dead.sum()))
    if k:
        pre_acts = (x - ae.pre_bias.detach()) @ ae.W_enc.T + ae.latent_bias
        dead_latents = dense_topk(pre_acts.masked_fill(~dead, -1e30), k)
        total = total + loss.auxk(x - recon, dead_latents @ ae.W_dec, config.coefficient)
    return [total, *torch.autograd.grad(total, [getattr(ae, name) for name in PARAMETERS])]


def agree(step: Step, wanted: list[torch.Tensor]) -> None:
    ours = [step.terms.total(), step.gradients.W_enc.all(), step.gradients.W_dec.all()]
    ours += [step.gradients.latent_bias, step.gradients.pre_bias]
    for name, mine, theirs in zip(("total", *PARAMETERS), ours, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-10 * (1 + theirs.abs().max()), name


@pytest.mark.parametrize("n_dead", [0, 1, 3, 8, 20, N_LATENTS])  # none, fewer than auxk, as many, more, all
@pytest.mark.parametrize("bias", [0.0, -1.0])  # -1: most top-k values are not positive
@pytest.mark.parametrize("dense_below", [0, 1000])  # AuxK the sparse way, the dense way
def test_step_equals_dense_autograd(
    n_dead: int, bias: float, dense_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.DENSE_AUXK_BELOW, "cpu", dense_below)
    ae, x = made(bias)
    dead = dead_latents(n_dead)
    step = topk_step(ae, x, 3.0, DeadSubset.of(dead), CONFIG)
    assert (bias == 0.0) == (float(step.l0) > K - 0.5)
    assert (n_dead == 0) == (float(step.terms.auxk) == 0.0)
    agree(step, by_autograd(ae, x, 3.0, dead, CONFIG))


@pytest.mark.parametrize("n_dead", [0, 3, 20, N_LATENTS])
@pytest.mark.parametrize("dense_below", [0, 1000])
def test_step_by_kernels_equals_dense_autograd(n_dead: int, dense_below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(module.DENSE_AUXK_BELOW, "cpu", dense_below)
    ae, x = made()
    x = x[:FEW]
    dead = dead_latents(n_dead)
    with kernels_only():
        agree(topk_step(ae, x, 3.0, DeadSubset.of(dead, padding=64), CONFIG), by_autograd(ae, x, 3.0, dead, CONFIG))


def parts(step: Step) -> list[torch.Tensor]:
    found = step.gradients
    return [
        step.terms.normalized_mse,
        step.terms.auxk,
        *(weight.all() for weight in (found.W_enc, found.W_dec)),
        found.latent_bias,
        found.pre_bias,
    ]


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_bf16_kernels_are_as_exact_as_bf16_pytorch(n_dead: int) -> None:
    pytest.importorskip("triton")
    ae, x = made()
    ae, x = ae.float(), x[:FEW].bfloat16()
    dead = dead_latents(n_dead)
    rounded = Autoencoder(d_model=D_MODEL, n_latents=N_LATENTS, k=K)
    working = Working(ae, "bf16")
    for name in PARAMETERS:
        source = getattr(working, name) if name.startswith("W") else getattr(ae, name)
        getattr(rounded, name).data = source.detach().double()
    wanted = parts(topk_step(rounded, x.double(), 3.0, DeadSubset.of(dead), CONFIG))
    with kernels_only():
        ours = topk_step(ae, x, 3.0, DeadSubset.of(dead, padding=64), CONFIG, working)
        assert all(part.dtype == torch.float32 for part in parts(ours))
        ours = parts(ours)
    with reference_only():
        theirs = parts(topk_step(ae, x, 3.0, DeadSubset.of(dead), CONFIG, working))
    for mine, plain, exact in zip(ours, theirs, wanted, strict=True):
        # 2**-6: Triton's interpreter rounds to bf16 by cutting off, so that errors of 2**-8 add up in one direction
        assert (mine - exact).norm() <= 2 * (plain - exact).norm() + 2**-6 * exact.norm()


@pytest.mark.parametrize("dense_below", [0, 1000])
def test_chunks_of_tokens_add_up(dense_below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.DENSE_AUXK_BELOW, "cpu", dense_below)
    ae, x = made()
    whole = parts(topk_step(ae, x, 3.0, subset(20), CONFIG))
    monkeypatch.setattr(auxk, "SCRATCH_BYTES", 7 * 8 * auxk.SPARSE_ENTRY_BYTES)
    chunked = parts(topk_step(ae, x, 3.0, subset(20), CONFIG))
    for one, many in zip(whole, chunked, strict=True):
        assert torch.allclose(one, many, rtol=0, atol=1e-12)


def test_latents_that_fired_since_take_no_part() -> None:
    ae, x = made()
    dead = dead_latents(20)
    near = dead_latents(30)  # the first 20 of them are the same
    latents = near.nonzero().flatten()
    step = topk_step(ae, x, 3.0, DeadSubset(latents, dead[latents]), CONFIG)
    agree(step, by_autograd(ae, x, 3.0, dead, CONFIG))
    rows = step.gradients.W_enc.subset_rows
    assert not rows[~dead[latents]].any()
    assert step.gradients.W_enc.position[latents].tolist() == list(range(30))


def test_a_constant_residual_has_no_variance() -> None:
    ae, x = made()
    assert float(topk_step(ae, x[:1].repeat(64, 1), 3.0, subset(6), CONFIG).terms.auxk) == 0.0


def test_ties_give_the_gradient_of_the_latents_kept() -> None:
    ae, x = made()
    ae.W_enc.data[1::2] = ae.W_enc.data[::2]  # each pre-activation twice
    ae.W_dec.data[1::2] = ae.W_dec.data[::2]
    ae.latent_bias.data.zero_()
    step = topk_step(ae, x, 3.0, subset(20), CONFIG)
    wanted = by_autograd(ae, x, 3.0, dead_latents(20), CONFIG)
    assert torch.allclose(step.terms.total(), wanted[0], rtol=0, atol=1e-10)
    # which of two equal latents is kept is free: the pair's summed gradient is not
    pairs = [g.view(-1, 2, D_MODEL).sum(1) for g in (step.gradients.W_enc.all(), step.gradients.W_dec.all())]
    for mine, theirs in zip(pairs, wanted[1:3], strict=True):
        assert torch.allclose(mine, theirs.view(-1, 2, D_MODEL).sum(1), rtol=0, atol=1e-10)
    assert torch.allclose(step.gradients.pre_bias, wanted[4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 7, 16, 48])
def test_blocks_of_rows_are_the_gradient(rows: int) -> None:
    ae, x = made()
    gradients = topk_step(ae, x, 3.0, subset(20), CONFIG).gradients
    for weight in (gradients.W_enc, gradients.W_dec):
        blocks = [weight.block(i, min(i + rows, N_LATENTS)) for i in range(0, N_LATENTS, rows)]
        assert torch.equal(torch.cat(blocks), weight.all())


def test_auxk_that_is_not_finite_changes_nothing() -> None:
    ae, x = made()
    dead = dead_latents(6)
    without = topk_step(ae, x, 3.0, subset(0), CONFIG)
    ae.W_dec.data[dead] = 1e200  # dead rows of a size that overflows when squared, and fire in no token
    ae.latent_bias.data[dead] = -5.0
    ae.W_enc.data[dead] *= 1e-3
    alone = topk_step(ae, x, 3.0, subset(0), CONFIG)
    ae.latent_bias.data[dead] = 0.0
    assert torch.isfinite(alone.terms.total())
    pre_acts = (x - ae.pre_bias) @ ae.W_enc.T + ae.latent_bias
    k_th = pre_acts.masked_fill(dead, -torch.inf).topk(K).values[:, -1:]
    x = x[(pre_acts[:, dead] < k_th).all(1)]  # tokens on which the main model leaves the dead latents alone
    broken, without = (topk_step(ae, x, 3.0, found, CONFIG) for found in (DeadSubset.of(dead), subset(0)))
    assert float(broken.terms.auxk) == 0.0
    for name in ("W_enc", "W_dec"):
        assert torch.equal(getattr(broken.gradients, name).all(), getattr(without.gradients, name).all())
    assert torch.equal(broken.gradients.latent_bias, without.gradients.latent_bias)
    assert torch.equal(broken.gradients.pre_bias, without.gradients.pre_bias)


def test_auxk_with_a_residual_without_variance_is_zero() -> None:
    ae, _ = made()
    x = ae.pre_bias.detach().expand(4, -1).clone()
    ae.latent_bias.data.fill_(-1.0)  # nothing fires: the residual is 0 for every token
    assert float(topk_step(ae, x, 3.0, subset(6), CONFIG).terms.auxk) == 0.0


def test_auxk_gives_pre_bias_no_gradient() -> None:
    ae, x = made()
    with_auxk, without = (topk_step(ae, x, 3.0, subset(n), CONFIG) for n in (20, 0))
    assert float(with_auxk.terms.auxk) > 0
    assert torch.equal(with_auxk.gradients.pre_bias, without.gradients.pre_bias)


def test_fired_is_by_value_not_by_index() -> None:
    ae, x = made(bias=-1.0)
    step = topk_step(ae, x, 3.0, subset(0), CONFIG)
    values, indices = ae.encode(x)
    fired = torch.zeros(N_LATENTS, dtype=torch.bool)
    for value, index in zip(values.flatten().tolist(), indices.flatten().tolist(), strict=True):
        fired[index] |= value > 0
    assert torch.equal(step.fired, fired)
    assert step.fired.sum() < len(indices.unique())  # some were selected with value 0


def test_scaling_the_inputs_scales_latents_and_biases_alone() -> None:
    ae, x = made()
    scaled, c = made()[0], 7.0
    scaled.pre_bias.data *= c
    scaled.latent_bias.data *= c
    dead = subset(20)
    ours, theirs = topk_step(ae, x, 3.0, dead, CONFIG), topk_step(scaled, c * x, 3.0 / c**2, dead, CONFIG)
    torch.testing.assert_close(ours.terms.total(), theirs.terms.total())
    torch.testing.assert_close(ours.gradients.W_enc.all(), theirs.gradients.W_enc.all())
    torch.testing.assert_close(ours.gradients.W_dec.all(), theirs.gradients.W_dec.all())
    torch.testing.assert_close(ours.gradients.latent_bias, c * theirs.gradients.latent_bias)
    torch.testing.assert_close(ours.gradients.pre_bias, c * theirs.gradients.pre_bias)


def test_empty_batch_gives_zero_gradients() -> None:
    ae, x = made()
    step = topk_step(ae, x[:0], 3.0, subset(20), CONFIG)
    assert not step.gradients.W_dec.all().any()
    assert not step.fired.any()


@pytest.mark.parametrize("sparsity", ["l1", "l1_decoder_norm"])
def test_relu_step_is_the_loss_it_says(sparsity: str) -> None:
    ae, x = made()
    ae.activation = "relu"
    config = LossConfig(sparsity=sparsity, l1_coefficient=0.2)
    step = relu_step(ae, x, 3.0, config)
    latents = ((x - ae.pre_bias) @ ae.W_enc.T + ae.latent_bias).relu()
    norms = ae.W_dec.norm(dim=1) if sparsity == "l1_decoder_norm" else torch.ones(N_LATENTS)
    l1 = 0.2 * (latents @ norms).mean()
    torch.testing.assert_close(step.terms.l1, l1.detach())
    total = 3.0 * ((latents @ ae.W_dec + ae.pre_bias - x) ** 2).mean() + l1
    agree(step, [total, *torch.autograd.grad(total, [getattr(ae, name) for name in PARAMETERS])])


def test_weighted_l1_is_the_same_for_any_rescaling_of_latents() -> None:
    ae, x = made()
    ae.activation = "relu"
    other, c = made()[0], torch.rand(N_LATENTS, 1) + 0.5
    other.activation = "relu"
    other.W_dec.data *= c
    other.W_enc.data /= c
    other.latent_bias.data /= c[:, 0]
    weighted = LossConfig(sparsity="l1_decoder_norm", l1_coefficient=0.2)
    ours, theirs = (relu_step(a, x, 3.0, weighted).terms for a in (ae, other))
    torch.testing.assert_close(ours.total(), theirs.total())
    plain = replace(weighted, sparsity="l1")
    ours, theirs = (relu_step(a, x, 3.0, plain).terms for a in (ae, other))
    torch.testing.assert_close(ours.normalized_mse, theirs.normalized_mse)
    assert not torch.isclose(ours.l1, theirs.l1)
