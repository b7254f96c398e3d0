"""Latents that two decoders share by construction are found, whatever the chunks.

Seen to fail when: an index within a chunk stands for one within the decoder; a later chunk replaces a nearer latent; a
pair is mutual if one of the two is the other's nearest.
"""

import pytest
import torch

from topkapi.errors import TopkapiError
from topkapi.statistics.matching import match, merged_densities


def decoder(n_latents, seed, d_model=64):
    return torch.randn(n_latents, d_model, generator=torch.Generator().manual_seed(seed))


def with_shared(n_shared, n_latents, noise=0.0):
    """Two decoders, of which b has `n_shared` latents of a, elsewhere and at another scale, and where it has them."""
    a, b = decoder(n_latents, 0), decoder(n_latents, 1)
    where = torch.randperm(n_latents, generator=torch.Generator().manual_seed(2))[:n_shared]
    b[where] = 3 * (a[:n_shared] + noise * decoder(n_shared, 3))
    return a, b, where


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_shared_latents_are_found(chunk):
    a, b, where = with_shared(60, 200, noise=0.2)
    found = match(a, b, chunk)
    assert found.rate_a(0.7) == found.rate_b(0.7) == found.mutual_rate(0.7) == pytest.approx(0.3)
    assert found.nearest_a[:60].tolist() == where.tolist()
    assert found.mutual_pairs(0.7).tolist() == [[i, int(j)] for i, j in enumerate(where)]


@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_nearest_latents_are_those_of_the_whole_matrix(chunk):
    a, b = decoder(50, 4), decoder(30, 5)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    found = match(a, b, chunk)
    torch.testing.assert_close(found.cosine_a, cosines.amax(1))
    torch.testing.assert_close(found.cosine_b, cosines.amax(0))
    assert found.nearest_a.equal(cosines.argmax(1))
    assert found.nearest_b.equal(cosines.argmax(0))
    pairs = {(i, j) for i, j in enumerate(cosines.argmax(1).tolist()) if cosines[:, j].argmax() == i}
    assert {tuple(pair) for pair in found.mutual_pairs(-1.0).tolist()} == pairs
    assert found.mutual_rate(-1.0) == len(pairs) / 30


def test_a_dictionary_matches_itself():
    a = decoder(40, 0)
    found = match(a, a.bfloat16())
    assert found.rate_a(0.99) == 1
    assert found.mutual_pairs(0.99).tolist() == [[i, i] for i in range(40)]


def test_unrelated_dictionaries_share_nothing():
    found = match(decoder(500, 0), decoder(500, 1))
    assert found.rate_a(0.7) == found.mutual_rate(0.7) == 0


def test_several_latents_may_share_a_nearest_one_but_only_one_is_mutual():
    one = decoder(1, 0)
    a = one + 0.05 * decoder(5, 1)
    found = match(a, one)
    assert found.rate_a(0.9) == 1
    assert found.mutual_pairs(0.9).tolist() == [[int(found.nearest_b), 0]]


def test_a_row_of_zeros_matches_nothing():
    a = decoder(5, 0)
    b = torch.cat([a[:1], torch.zeros(1, 64)])
    found = match(a, b)
    assert found.cosine_b[1] == 0
    assert not found.cosine_a.isnan().any()


def test_merged_densities_are_means_over_pairs():
    a, b, where = with_shared(3, 10)
    density_a, density_b = torch.linspace(0, 0.9, 10), torch.linspace(0.1, 1, 10)
    found = merged_densities(match(a, b), density_a, density_b, 0.9)
    torch.testing.assert_close(found, (density_a[:3] + density_b[where]) / 2)


def test_a_decoder_without_latents_is_named():
    with pytest.raises(TopkapiError, match="0 and 5"):
        match(decoder(0, 0), decoder(5, 0))
