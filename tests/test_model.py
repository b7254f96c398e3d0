"""The autoencoder: normalisation, initialisation, encoding, decoding.

Seen to catch: the encoder's scale from the sample's norm instead of the norm about pre_bias; decoding of fewer than
n_latents values with the dense path of activation relu.
"""

import pytest
import torch

from topkapi import Autoencoder, TopkapiError


def sample(n: int = 500, d_model: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d_model, generator=generator) * 3 + torch.linspace(-2, 2, d_model)


def test_normalise_and_back() -> None:
    raw = sample() * 100
    x, mean, norm = Autoencoder.normalise(raw)
    assert x.mean(-1).abs().max() < 1e-6
    assert (x.norm(dim=-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(
        Autoencoder.denormalise(x, mean, norm), raw, rtol=0, atol=1e-6 * float(raw.norm(dim=1).max())
    )


def test_a_constant_token_normalises_to_zero_and_comes_back() -> None:
    raw = torch.full((2, 5), 7.0)
    x, mean, norm = Autoencoder.normalise(raw)
    assert not x.any()
    assert torch.equal(Autoencoder.denormalise(x, mean, norm), raw)


def test_initialisation() -> None:
    ae = Autoencoder(d_model=16, n_latents=64, k=4, seed=3)
    x = ae.normalise(sample()).x
    ae.initialise_(x)
    assert (ae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    directions = ae.W_enc / ae.W_enc.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions, ae.W_dec, rtol=0, atol=1e-6)  # tied
    recon = ae.decode(*ae.encode(x)) - ae.pre_bias
    torch.testing.assert_close(recon.norm(dim=1).mean(), (x - ae.pre_bias).norm(dim=1).mean(), rtol=1e-4, atol=0)
    assert not ae.latent_bias.any()


def test_the_seed_decides_the_directions() -> None:
    one, same, other = (Autoencoder(d_model=8, n_latents=9, k=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.W_dec, same.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_translating_the_data_translates_pre_bias_alone() -> None:
    x, shift = sample() / 50, torch.linspace(0, 1, 16)
    here, there = (Autoencoder(d_model=16, n_latents=64, k=4) for _ in range(2))
    here.initialise_(x)
    there.initialise_(x + shift)
    torch.testing.assert_close(there.pre_bias, here.pre_bias + shift, rtol=0, atol=1e-4)
    recon = there.decode(*there.encode(x + shift))
    torch.testing.assert_close(recon, here.decode(*here.encode(x)) + shift, rtol=0, atol=1e-3)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_forward_is_encode_then_decode_at_the_raw_scale(activation: str) -> None:
    ae = Autoencoder(d_model=16, n_latents=64, k=4, activation=activation)
    raw = sample(24).view(2, 3, 4, 16)
    x, mean, norm = ae.normalise(raw.view(-1, 16))
    wanted = ae.denormalise(ae.decode(*ae.encode(x)), mean, norm).view_as(raw)
    assert torch.equal(ae(raw), wanted)
    assert ae(raw[0, 0, 0]).shape == (16,)


def test_decoding_some_latents_of_a_relu_autoencoder() -> None:
    ae = Autoencoder(d_model=16, n_latents=64, k=4, activation="relu")
    values, indices = torch.tensor([[2.0]]), torch.tensor([[5]])
    torch.testing.assert_close(ae.decode(values, indices), 2 * ae.W_dec[5:6] + ae.pre_bias)


def test_forward_is_differentiable_in_the_parameters() -> None:
    ae = Autoencoder(d_model=16, n_latents=64, k=4)
    ae(sample(10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ae.parameters())


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, 4, 0), (4, 4, 5), (4, 0, 1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(TopkapiError, match="1 <= k <= n_latents"):
        Autoencoder(d_model=sizes[0], n_latents=sizes[1], k=sizes[2])


def test_the_wrong_width_is_refused() -> None:
    with pytest.raises(TopkapiError, match="d_model=16"):
        Autoencoder(d_model=16, n_latents=64, k=4)(torch.zeros(3, 15))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_activations_of_any_dtype_come_back_in_it(dtype: torch.dtype, activation: str) -> None:
    ae = Autoencoder(d_model=16, n_latents=64, k=4, activation=activation)
    raw = sample(10).to(dtype)
    recon = ae(raw)
    assert recon.dtype == dtype
    torch.testing.assert_close(recon, ae(raw.float()).to(dtype))


def test_a_permuted_code_of_all_relu_latents_decodes_by_its_indices() -> None:
    ae = Autoencoder(d_model=16, n_latents=64, k=4, activation="relu")
    values, indices = ae.encode(ae.normalise(sample(6)).x)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ae.decode(values[:, order], indices[:, order]), ae.decode(values, indices))
