"""The optimiser: torch's Adam on projected gradients, in blocks, then unit norm, the average and the working copy.

Seen to catch: projection after Adam; the average taken before unit norm; clipping by a norm that misses the biases;
bias correction with the step after instead of this one; a working copy that is not the weight's.
"""

import math

import pytest
import torch

from topkapi import ops
from topkapi.config import OptimConfig
from topkapi.errors import TopkapiError
from topkapi.gradients import Gradients, WeightGradient
from topkapi.model import PARAMETERS, Autoencoder, Working
from topkapi.ops import SparseRows, reference
from topkapi.optim import Optimizer, learning_rate, unit_norm_

D_MODEL, N_LATENTS = 6, 37


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ROWS", 10)


def made() -> Autoencoder:
    ae = Autoencoder(d_model=D_MODEL, n_latents=N_LATENTS, k=2).double()
    unit_norm_(ae.W_dec.data)  # to double precision
    return ae


def random_gradients(seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [WeightGradient(N_LATENTS, dense=draw(N_LATENTS, D_MODEL)) for _ in range(2)]
    return Gradients(*weights, latent_bias=draw(N_LATENTS), pre_bias=draw(D_MODEL))


def tensors(gradients: Gradients) -> list[torch.Tensor]:
    return [gradients.W_enc.all(), gradients.W_dec.all(), gradients.latent_bias, gradients.pre_bias]


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_equals_torch_adam_step_by_step(clip_norm: float, unit_norm: bool) -> None:
    config = OptimConfig(lr=0.01, clip_norm=clip_norm, unit_norm_decoder=unit_norm, ema_decay=0.9)
    ae, plain = made(), made()
    optimizer = Optimizer(ae, config)
    scale = math.sqrt(D_MODEL - 1)
    groups = [
        {"params": [plain.W_enc, plain.W_dec], "lr": 0.01, "eps": config.eps},
        {"params": [plain.latent_bias, plain.pre_bias], "lr": 0.01, "eps": config.eps * scale},
    ]
    adam = torch.optim.Adam(groups)
    average = {name: torch.zeros_like(getattr(plain, name)) for name in PARAMETERS}
    for step in range(6):
        gradients = random_gradients(step)
        norm = optimizer.step_(ae, gradients, lr=0.01)
        for name, gradient in zip(PARAMETERS, tensors(gradients), strict=True):
            getattr(plain, name).grad = gradient.clone()
        if unit_norm:
            rows, grad = plain.W_dec.data, plain.W_dec.grad
            plain.W_dec.grad = grad - (grad * rows).sum(1, keepdim=True) * rows
        if clip_norm:
            parameters = [getattr(plain, name) for name in PARAMETERS]
            assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm)), rel=1e-6)
        adam.step()
        if unit_norm:
            plain.W_dec.data /= plain.W_dec.data.norm(dim=1, keepdim=True)
        for name in PARAMETERS:
            torch.testing.assert_close(getattr(ae, name).data, getattr(plain, name).data, rtol=1e-6, atol=1e-9)
            average[name] = 0.9 * average[name] + 0.1 * getattr(plain, name).data
    averaged = optimizer.averaged(ae)
    for name in PARAMETERS:
        wanted = average[name] / (1 - 0.9**6)
        if name == "W_dec" and unit_norm:
            wanted = wanted / wanted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(averaged[name], wanted, rtol=1e-6, atol=1e-9)


def test_the_step_of_a_row_is_orthogonal_to_it_before_its_norm_is_restored() -> None:
    """With one coordinate besides its own direction a row turns towards it; a gradient along the row does nothing."""
    ae = Autoencoder(d_model=2, n_latents=1, k=1).double()
    ae.W_dec.data.copy_(torch.tensor([[1.0, 0.0]]))
    optimizer = Optimizer(ae, OptimConfig(lr=0.1, ema_decay=0.0))
    along = WeightGradient(1, dense=torch.tensor([[3.0, 0.0]], dtype=torch.float64))
    zeros = WeightGradient(1, dense=torch.zeros(1, 2, dtype=torch.float64))
    biases = {"latent_bias": torch.zeros(1, dtype=torch.float64), "pre_bias": torch.zeros(2, dtype=torch.float64)}
    optimizer.step_(ae, Gradients(zeros, along, **biases), lr=0.1)
    assert ae.W_dec.tolist() == [[1.0, 0.0]]


def test_decoder_rows_have_unit_norm_live_and_averaged() -> None:
    ae = made().float()
    optimizer = Optimizer(ae, OptimConfig(lr=0.1, ema_decay=0.99))
    for step in range(5):
        gradients = random_gradients(step)
        single = Gradients(
            *(WeightGradient(N_LATENTS, dense=w.dense.float()) for w in (gradients.W_enc, gradients.W_dec)),
            latent_bias=gradients.latent_bias.float(),
            pre_bias=gradients.pre_bias.float(),
        )
        optimizer.step_(ae, single, lr=0.1)
    for rows in (ae.W_dec, optimizer.averaged(ae)["W_dec"]):
        assert (rows.norm(dim=1) - 1).abs().max() < 1e-6


def test_without_average_the_last_weights_are_published() -> None:
    ae = made()
    optimizer = Optimizer(ae, OptimConfig(lr=0.1, ema_decay=0.0))
    optimizer.step_(ae, random_gradients(0), lr=0.1)
    for name, weight in optimizer.averaged(ae).items():
        assert torch.equal(weight, getattr(ae, name))


def sparse_gradients(seed: int) -> Gradients:
    """Gradients in the parts that a TopK step hands over: pairs of a sparse code, and rows of the dead latents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    indices = torch.randint(N_LATENTS, (9, 2), generator=generator)
    order = ops.implementation(indices).order_by_latent(indices, N_LATENTS)
    position = torch.full((N_LATENTS,), -1, dtype=torch.int32)
    position[[0, 9, 10, N_LATENTS - 1]] = torch.arange(4, dtype=torch.int32)
    weights = [
        WeightGradient(
            N_LATENTS,
            sparse=SparseRows(draw(9, 2), order, draw(9, D_MODEL)),
            subset_rows=draw(4, D_MODEL),
            position=position,
        )
        for _ in range(2)
    ]
    return Gradients(*weights, latent_bias=draw(N_LATENTS), pre_bias=draw(D_MODEL))


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_parts_of_a_gradient_are_applied_as_their_sum(clip_norm: float) -> None:
    config = OptimConfig(lr=0.01, clip_norm=clip_norm, ema_decay=0.9)
    ae, other = made().float(), made().float()
    ours, theirs = Optimizer(ae, config), Optimizer(other, config)
    for step in range(3):
        gradients = sparse_gradients(step)
        dense = [WeightGradient(N_LATENTS, dense=part.all()) for part in (gradients.W_enc, gradients.W_dec)]
        norms = (
            ours.step_(ae, gradients, 0.01),
            theirs.step_(other, Gradients(*dense, gradients.latent_bias, gradients.pre_bias), 0.01),
        )
        assert norms == (None, None) or torch.isclose(*norms)
    for name, state in ours.state().items():
        torch.testing.assert_close(state, theirs.state()[name])
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(ae, name), getattr(other, name))


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_kernels_do_the_same(clip_norm: float) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = OptimConfig(lr=0.01, clip_norm=clip_norm, ema_decay=0.9)
    found = []
    for implementation in (ops.reference_only, ops.kernels_only):
        ae = made().float().to(device)
        optimizer = Optimizer(ae, config, Working(ae, "bf16"))
        with implementation():
            for step in range(3):
                gradients = sparse_gradients(step)
                optimizer.step_(ae, moved(gradients, device), 0.01)
        found.append({name: getattr(ae, name).detach() for name in PARAMETERS} | optimizer.state())
        assert (optimizer.working.W_dec.float() - ae.W_dec).abs().max() < 2**-7
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], rtol=1e-5, atol=1e-6)


def moved(gradients: Gradients, device: str) -> Gradients:
    """The same gradients on a device."""

    def weight(part: WeightGradient) -> WeightGradient:
        sparse = part.sparse
        order = type(sparse.order)(*(tensor.to(device) for tensor in sparse.order))
        rows = SparseRows(sparse.values.to(device), order, sparse.rows.to(device))
        subset = {"subset_rows": part.subset_rows.to(device), "position": part.position.to(device)}
        return WeightGradient(part.n_latents, sparse=rows, **subset)

    biases = (gradients.latent_bias.to(device), gradients.pre_bias.to(device))
    return Gradients(weight(gradients.W_enc), weight(gradients.W_dec), *biases)


def test_working_weights_follow() -> None:
    ae = made().float()
    working = Working(ae, "bf16")
    optimizer = Optimizer(ae, OptimConfig(lr=0.1), working)
    optimizer.step_(ae, sparse_gradients(0), 0.1)
    assert torch.equal(working.W_enc, ae.W_enc.bfloat16())
    assert torch.equal(working.W_dec, ae.W_dec.bfloat16())
    same = Working(ae)
    Optimizer(ae, OptimConfig(lr=0.1), same).step_(ae, sparse_gradients(1), 0.1)
    assert torch.equal(same.W_dec, ae.W_dec)


def low_memory_autoencoder() -> Autoencoder:
    ae = made().float()
    for name in ("W_enc", "W_dec"):
        getattr(ae, name).data = getattr(ae, name).data.bfloat16()
    return ae


def test_low_memory_goes_on_where_it_was_saved() -> None:
    config = OptimConfig(lr=0.01, ema_decay=0.9, state="low_memory")
    ae = low_memory_autoencoder()
    optimizer = Optimizer(ae, config)
    for step in range(2):
        optimizer.step_(ae, sparse_gradients(step), 0.01)
    state = optimizer.state()
    assert state["W_enc.mean"].dtype == torch.int8
    assert state["W_dec.square"].dtype == torch.uint8
    assert state["W_dec.square_scale"].shape == (N_LATENTS,)
    assert optimizer.averaged(ae)["W_dec"].dtype == torch.float32
    resumed = low_memory_autoencoder()
    resumed.load_state_dict(ae.state_dict())
    other = Optimizer(resumed, config)
    other.n_steps = optimizer.n_steps
    for name, tensor in other.state().items():
        tensor.copy_(state[name])
    for autoencoder, each in ((ae, optimizer), (resumed, other)):
        each.step_(autoencoder, sparse_gradients(2), 0.01)
    for name in PARAMETERS:
        assert torch.equal(getattr(ae, name), getattr(resumed, name))


def test_low_memory_state_asks_for_bf16_weights() -> None:
    with pytest.raises(TopkapiError, match="W_enc is torch"):
        Optimizer(made().float(), OptimConfig(lr=0.1, state="low_memory"))


def test_learning_rate_rises_holds_and_falls() -> None:
    config = OptimConfig(lr=2.0, lr_warmup=0.1, lr_decay=0.2)
    steps = (0, 4, 9, 50, 80, 90, 99)
    assert [learning_rate(config, step, 100) for step in steps] == pytest.approx([0.2, 1, 2, 2, 2, 1, 0.1])
    assert learning_rate(OptimConfig(lr=2.0), 99, 100) == 2.0
