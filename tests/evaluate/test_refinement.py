"""Refinement against scipy's non-negative least squares, and on autoencoders with known shrinkage.

Mutations seen caught: the gradient of entries at 0, or negative values, not looked at; inactive latents allowed; the
proximal term about 0 instead of the original values; refined and original sums exchanged; block exchanges only, which
end in a cycle.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from tests.evaluate.stand_ins import D_MODEL, identity_autoencoder, random_autoencoder
from topkapi.errors import TopkapiError
from topkapi.evaluate import refinement as module
from topkapi.evaluate.reconstruction import ReconstructionMetrics
from topkapi.evaluate.refinement import nonnegative_least_squares, refinement
from topkapi.model import Autoencoder


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalised(n: int, d_model: int = D_MODEL) -> torch.Tensor:
    return Autoencoder.normalise(draw(n, d_model).float()).x


def orthogonal_autoencoder(shift: float, activation: str, width: int = 16, k: int = 4) -> Autoencoder:
    """Orthonormal decoder rows, tied encoder: the latents of a sparse non-negative code are that code less `shift`."""
    ae = Autoencoder(d_model=width, n_latents=width, k=k, activation=activation)
    with torch.no_grad():
        rows = torch.linalg.qr(draw(width, width))[0]
        ae.W_dec.copy_(rows)
        ae.W_enc.copy_(rows)
        ae.latent_bias.fill_(-shift)
    return ae


def sparse_codes(n: int = 300, width: int = 16, k: int = 4) -> torch.Tensor:
    """k values from 1 to 3 a row, at random places."""
    places = draw(n, width).argsort(1)[:, :k]
    sizes = 1 + 2 * torch.rand(n, k, generator=torch.Generator().manual_seed(1))
    return torch.zeros(n, width).scatter(1, places, sizes)


@pytest.mark.parametrize(("k", "d_model"), [(1, 3), (5, 8), (12, 40), (12, 12), (20, 6)])
@pytest.mark.parametrize("correlated", [False, True])
def test_solutions_have_the_error_of_scipys(k, d_model, correlated):
    n = 30
    dictionary, target = draw(n, k, d_model), draw(n, d_model, seed=1)
    if correlated:  # rows that all but agree, and one pair that agrees
        dictionary = 1 + 0.01 * dictionary
        dictionary[:, 0] = dictionary[:, -1]
    start = draw(n, k, seed=2).abs() + 0.01
    gram, correlation = dictionary @ dictionary.mT, (dictionary @ target[:, :, None])[:, :, 0]
    found, solved = nonnegative_least_squares(gram, correlation, start)
    assert solved.all()
    assert (found >= 0).all()
    for rows, right, v in zip(dictionary.numpy(), target.numpy(), found.numpy(), strict=True):
        best = nnls(rows.T, right)[1] ** 2
        assert ((right - v @ rows) ** 2).sum() == pytest.approx(best, abs=1e-6 * (right**2).sum())


def test_entries_that_start_at_zero_stay_there_and_take_no_part():
    dictionary, target = draw(10, 6, 8), draw(10, 8, seed=1)
    start = draw(10, 6, seed=2).relu()
    gram, correlation = dictionary @ dictionary.mT, (dictionary @ target[:, :, None])[:, :, 0]
    found, _ = nonnegative_least_squares(gram, correlation, start)
    assert (found[start == 0] == 0).all()
    for i in range(10):
        support = (start[i] > 0).nonzero()[:, 0].numpy()
        if len(support):
            best = nnls(dictionary[i].numpy()[support].T, target[i].numpy())[0]
            assert found[i].numpy()[support] == pytest.approx(best, abs=1e-6)


def test_of_equal_rows_the_solution_closest_to_the_start_is_taken():
    dictionary = torch.tensor([[[1.0, 0], [1, 0]]], dtype=torch.float64)
    found, _ = nonnegative_least_squares(
        dictionary @ dictionary.mT, torch.tensor([[4.0, 4]]).double(), torch.tensor([[1.0, 2]]).double()
    )
    assert found[0].tolist() == pytest.approx([1.5, 2.5], abs=1e-5)


def test_shrunk_values_of_a_relu_autoencoder_are_restored():
    """Each value s is encoded as s - 0.25, exactly: refinement finds s."""
    ae, codes = orthogonal_autoencoder(0.25, "relu"), sparse_codes()
    found = refinement(ae, codes @ ae.W_dec.detach())
    s = codes[codes > 0].double()
    assert found.n_active == len(s)
    assert found.mean_ratio.value == pytest.approx((s / (s - 0.25)).mean().item(), rel=1e-5)
    assert found.total_ratio.value == pytest.approx((s.sum() / (s - 0.25).sum()).item(), rel=1e-5)
    assert 1 < found.mean_ratio.low < found.mean_ratio.value < found.mean_ratio.high
    assert found.normalized_mse_refined.value < 1e-10 < found.normalized_mse.value
    expected = torch.bincount((s / (s - 0.25) / module.BIN).long(), minlength=module.N_BINS)
    assert (found.histogram - expected).abs().sum() <= 4  # neighbours' bins, by rounding


def test_unshrunk_values_of_a_topk_autoencoder_stay():
    ae, codes = orthogonal_autoencoder(0, "topk"), sparse_codes()
    found = refinement(ae, codes @ ae.W_dec.detach())
    assert found.mean_ratio.value == pytest.approx(1, abs=1e-5)
    assert found.histogram[49:51].sum() == found.n_active == codes.count_nonzero()


def test_an_l1_penalty_shrinks_and_topk_does_not():
    """Both trained for 300 steps on sums of 3 of 24 directions."""
    codes = sparse_codes(2048, 24, 3)
    x = Autoencoder.normalise(codes @ torch.nn.functional.normalize(draw(24, 12).float(), dim=1)).x
    ratios = {}
    for activation in ("topk", "relu"):
        ae = Autoencoder(d_model=12, n_latents=24, k=3, activation=activation)
        optimiser = torch.optim.Adam(ae.parameters(), lr=3e-3)
        for _ in range(300):
            values, indices = ae.encode(x)
            loss = (ae.decode(values, indices) - x).square().sum(1).mean()
            if activation == "relu":
                loss = loss + 0.1 * (values * ae.W_dec.norm(dim=1)[indices]).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ratios[activation] = refinement(ae, x).total_ratio
    assert ratios["relu"].low > 1.1
    assert abs(ratios["topk"].value - 1) < 0.05


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("seed", range(5))
def test_the_error_never_rises(activation, seed):
    ae, x = random_autoencoder(12, 6, activation, seed), normalised(200)
    found = refinement(ae, x)
    assert found.n_unsolved == 0
    assert found.normalized_mse_refined.value <= found.normalized_mse.value
    values, indices = ae.encode(x)
    before, after, refined, _ = module.refine(ae, x, values, indices)
    assert (after <= before).all()
    assert (refined >= 0).all()
    assert (refined[values == 0] == 0).all()


def test_without_pivots_values_stay_and_tokens_count_as_unsolved(monkeypatch):
    monkeypatch.setattr(module, "PIVOTS", 0)
    found = refinement(random_autoencoder(), normalised(50))
    assert found.n_unsolved == 50
    assert found.normalized_mse_refined == found.normalized_mse
    assert found.mean_ratio.value == 1


def test_the_error_before_is_that_of_evaluation():
    ae, raw = random_autoencoder(), draw(60, D_MODEL).float()
    metrics = ReconstructionMetrics(ae)
    metrics.update(raw)
    found = refinement(ae, ae.normalise(raw).x)
    assert found.normalized_mse.value == pytest.approx(metrics.compute()["normalized_mse"], rel=1e-6)


def test_results_do_not_depend_on_how_tokens_are_cut(monkeypatch):
    ae, x = random_autoencoder(), normalised(60)
    whole = refinement(ae, x)
    monkeypatch.setattr(module, "WORK_ELEMENTS", 40)
    cut = refinement(ae, iter(x.split([7, 0, 33, 20])))
    for name in ("normalized_mse", "normalized_mse_refined", "mean_ratio", "total_ratio"):
        assert getattr(cut, name).value == pytest.approx(getattr(whole, name).value, rel=1e-6)
    assert torch.equal(cut.histogram, whole.histogram)


def test_intervals_cover_what_they_should():
    """Of 60 samples of 150 tokens, the 95 % interval of the mean ratio contains that of all 9 000 at least 51 times."""
    ae, x = random_autoencoder(activation="relu"), normalised(9000)
    truth = refinement(ae, x).total_ratio.value
    intervals = [refinement(ae, part, seed=i).total_ratio for i, part in enumerate(x.split(150))]
    assert sum(found.low <= truth <= found.high for found in intervals) >= 51
    assert np.mean([found.high - found.low for found in intervals]) < 1


def test_a_dead_autoencoder_has_no_ratio_and_says_why():
    ae = random_autoencoder()
    with torch.no_grad():
        ae.latent_bias.fill_(-100)
    found = refinement(ae, normalised(20))
    assert (found.mean_ratio.value, found.total_ratio.value) == (None, None)
    assert found.reason == "no latent fires on any of the tokens"
    assert found.normalized_mse == found.normalized_mse_refined


def test_without_tokens_or_spread_figures_are_none():
    found = refinement(identity_autoencoder(), [])
    assert (found.normalized_mse.value, found.mean_ratio.value, found.reason) == (None, None, "no token was given")
    found = refinement(identity_autoencoder(), normalised(1).expand(5, -1))
    assert found.normalized_mse.value is None
    assert "all tokens are the same" in found.reason


def test_a_wrong_shape_is_named():
    with pytest.raises(TopkapiError, match=r"x must be \(n, d_model=4\).*got \(3, 5\)"):
        refinement(identity_autoencoder(), torch.zeros(3, 5))
