"""The encode_topk kernels against all pre-activations in float64.

Seen to catch: a cut one key too high, candidates taken without the bound's check, groups numbered without the tile,
columns of the two halves of a group swapped, one candidate of the sample not scored again, the sample's tiles
multiplied again with the others, only the first 16 of its groups kept.
"""

import sys

import pytest
import torch

pytest.importorskip("triton")

from topkapi.ops.kernels.encode_topk import encode_topk, redone

kernel = sys.modules["topkapi.ops.kernels.encode_topk"]  # the package's name is the function's
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(n: int, n_latents: int, d_model: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_model, generator=generator)
    W_enc = torch.randn(n_latents, d_model, generator=generator) / d_model**0.5
    latent_bias, pre_bias = torch.randn(n_latents, generator=generator) / 10, torch.randn(d_model, generator=generator)
    return x.to(DEVICE, dtype), W_enc.to(DEVICE, dtype), latent_bias.to(DEVICE), pre_bias.to(DEVICE, dtype) / 10


def pre_activations(x, W_enc, latent_bias, pre_bias):
    """In float64, from x - pre_bias as the kernels round it."""
    centred = (x - pre_bias).to(W_enc.dtype).double()
    return centred @ W_enc.double().T + latent_bias.double()


def launches_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The arguments of each launch of a kernel from now on; tensors hold what they hold in the end."""
    launches, real = [], getattr(kernel, name)

    class Recorded:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                launches.append(dict(zip(real.arg_names, arguments, strict=False)) | options)
                real[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(kernel, name, Recorded())
    return launches


def recall(indices, pre_acts, k: int) -> float:
    chosen = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, indices, True)
    return chosen.gather(1, pre_acts.topk(k).indices).double().mean().item()


def assert_consistent(values, indices, pre_acts, k: int) -> None:
    """Distinct latents, and their own values."""
    assert indices.shape == values.shape == (len(pre_acts), k)
    assert values.dtype == torch.float32
    assert all(len(set(row)) == k for row in indices.tolist())
    torch.testing.assert_close(values.double(), pre_acts.gather(1, indices).relu(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "n_latents", "d_model", "k"),
    [(0, 4096, 16, 4), (1, 4096, 16, 1), (5, 4099, 48, 4), (3, 9001, 144, 33)],
)
def test_the_largest_are_found(dtype, n, n_latents, d_model, k):
    tensors = make(n, n_latents, d_model, dtype)
    values, indices = encode_topk(*tensors, k)
    pre_acts = pre_activations(*tensors)
    assert_consistent(values, indices, pre_acts, k)
    if n:
        assert redone.counters, "these shapes are screened"
        expected = pre_acts.topk(k).values.relu()
        torch.testing.assert_close(values.sort(descending=True).values.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "n", "n_latents", "d_model", "k"),
    [(torch.bfloat16, 7, 12_345, 144, 32), (torch.float16, 7, 12_345, 144, 32), (torch.bfloat16, 2, 16_500, 48, 256)],
)
def test_sixteen_bit_operands_give_the_very_largest(dtype, n, n_latents, d_model, k):
    tensors = make(n, n_latents, d_model, dtype)
    values, indices = encode_topk(*tensors, k)
    pre_acts = pre_activations(*tensors)
    assert_consistent(values, indices, pre_acts, k)
    kth = pre_acts.topk(k).values[:, -1:]
    chosen = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, indices, True)
    assert chosen[pre_acts > kth + 4e-6 * kth.abs()].all(), "but for ties within the rounding of float32"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "screening", "k"),
    [
        (torch.bfloat16, "bf16", 32),
        (torch.bfloat16, "bf16", 100),
        (torch.float32, "bf16", 32),
        (torch.bfloat16, "fp8", 32),
    ],
)
def test_what_the_matmul_summed_in_float32_is_not_scored_again(dtype, screening, k, monkeypatch):
    launches = launches_of("rescore", monkeypatch)
    tensors = make(3, 9001, 144, dtype)
    encode_topk(*tensors, k, screening)
    pre_acts, found = pre_activations(*tensors), launches[0]
    assert (found["n_found_ptr"] >= k).all()
    assert found["STRICT"] == (dtype == torch.bfloat16 and screening == "bf16")
    if not found["STRICT"]:
        assert found["kept_ptr"].dtype == torch.bfloat16
        return
    n_scored_again = 0
    for row, n_found in enumerate(found["n_found_ptr"].tolist()):
        latents, places = (found[name][row, :n_found].long() for name in ("candidate_ptr", "place_ptr"))
        scored_again = places < 8 * found["of_sample_ptr"][row]
        n_scored_again += int(scored_again.sum())
        assert scored_again.tolist() == sorted(scored_again.tolist(), reverse=True), "they come first"
        tiles = latents // 256
        assert torch.equal(scored_again, (tiles % 16 == 0) & (tiles < 32)), "tile 32 is none of the sample's"
        stored = found["kept_ptr"][row].flatten()[places].double()
        tolerance = torch.where(scored_again, 2**-7, 2e-6) * (1 + stored.abs())  # the interpreter cuts to bf16
        assert ((stored - pre_acts[row, latents]).abs() <= tolerance).all()
    assert 0 < n_scored_again < found["n_found_ptr"].sum() / 4


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("screening", "k"), [("bf16", 32), ("fp8", 100)])
def test_each_group_that_reaches_the_bound_is_kept_once(screening, k, monkeypatch):
    bounded, selected = launches_of("bound_rows", monkeypatch), launches_of("select_candidates", monkeypatch)
    tensors = make(2, 9001, 144, torch.bfloat16)
    encode_topk(*tensors, k, screening)
    sample, bound, kept = bounded[0], bounded[0]["bound_ptr"], selected[0]
    largest = sample["sample_ptr"].amax(2)
    assert torch.equal(sample["largest_ptr"], largest)
    assert torch.equal(bound, largest.topk(sample["rank"]).values[:, -1].float())
    for row, (n_kept, n_sampled) in enumerate(zip(kept["count_ptr"], sample["of_sample_ptr"], strict=True)):
        groups, values = kept["group_ptr"][row, :n_kept].long(), kept["value_ptr"][row, :n_kept]
        assert len(set(groups.tolist())) == n_kept
        reaches = (largest[row] >= bound[row]).nonzero().flatten()
        assert torch.equal(groups[:n_sampled], reaches // 32 * 512 + reaches % 32), "32 groups a tile, 16 tiles apart"
        assert torch.equal(values[:n_sampled], sample["sample_ptr"][row, reaches].to(values.dtype))
        if screening == "bf16":
            columns = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25], device=DEVICE)
            group = torch.arange(9001 // 32 * 4, device=DEVICE)
            exact = pre_activations(*tensors)[row, (group // 4 * 32 + group % 4 * 2)[:, None] + columns].amax(1)
            clearly = group[exact > bound[row] + 0.02 * bound[row].abs()]
            assert torch.isin(clearly, groups).all()
            assert (exact[groups[groups < len(exact)]] > bound[row] - 0.02 * bound[row].abs()).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tiles", [(0, 16), (3, 15, 17, 32), (0, 1, 16, 32)], ids=["in the sample", "not", "both"])
def test_the_largest_are_found_wherever_they_are(tiles, tied):
    x, W_enc, latent_bias, pre_bias = make(2, 33 * 256 - 50, 16, torch.bfloat16)
    lifted = (torch.tensor(tiles)[:, None] * 256 + torch.arange(7, 97, 9)).flatten().to(DEVICE)  # 10 of each tile
    latent_bias[lifted] += 20
    if tied:
        W_enc[lifted], latent_bias[lifted] = W_enc[7].clone(), 20.0
    values, indices = encode_topk(x, W_enc, latent_bias, pre_bias, 20)
    pre_acts = pre_activations(x, W_enc, latent_bias, pre_bias)
    assert_consistent(values, indices, pre_acts, 20)
    assert torch.isin(indices, lifted).all()
    torch.testing.assert_close(values.double(), pre_acts.topk(20).values, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_screening_finds_nearly_all(dtype):
    tensors = make(5, 9001, 144, dtype)
    values, indices = encode_topk(*tensors, 32, "fp8")
    pre_acts = pre_activations(*tensors)
    assert_consistent(values, indices, pre_acts, 32)
    # The interpreter's conversion to fp8 cuts where a GPU's rounds: three times the error.
    assert recall(indices, pre_acts, 32) >= (0.999 if DEVICE == "cuda" else 0.96)


@pytest.mark.parametrize(
    ("n", "n_latents", "d_model", "k"),
    [(4, 1000, 16, 8), (3, 5000, 7, 8), (2, 300, 5, 300), (1, 1, 3, 1), (2, 4096, 16, 100)],
)
def test_shapes_that_screening_does_not_suit(n, n_latents, d_model, k):
    tensors = make(n, n_latents, d_model, torch.bfloat16)
    values, indices = encode_topk(*tensors, k)
    assert not redone.counters
    assert_consistent(values, indices, pre_activations(*tensors), k)


def test_ties_without_end_end_with_distinct_latents():
    x, W_enc, latent_bias, _ = make(3, 4200, 16)
    values, indices = encode_topk(torch.zeros_like(x), W_enc, torch.zeros_like(latent_bias), None, 5)
    assert values.eq(0).all()
    assert all(len(set(row)) == 5 for row in indices.tolist())
    assert [int(c) for c in redone.counters[0][:2]] == [3, 3], "all rows are redone one by one"


def test_duplicate_latents_are_told_apart_by_index():
    x, W_enc, latent_bias, pre_bias = make(2, 4200, 16, torch.bfloat16)
    W_enc[3000:3020], latent_bias[3000:3020] = W_enc[10], 20.0
    values, indices = encode_topk(x, W_enc, latent_bias, pre_bias, 8)
    assert_consistent(values, indices, pre_activations(x, W_enc, latent_bias, pre_bias), 8)
    assert indices.sort().values.tolist() == [list(range(3000, 3008))] * 2


def test_rows_that_mislead_the_sample_are_redone():
    x, W_enc, latent_bias, pre_bias = make(3, 4096 * 2, 16, torch.bfloat16)
    latent_bias[:256] += 20  # the sample holds them all: its bound is far too high for the second tile's rows
    W_enc[:256] *= 0.01
    values, indices = encode_topk(x, W_enc, latent_bias, pre_bias, 100)
    assert int(redone.counters[0][0]) > 0
    assert_consistent(values, indices, pre_activations(x, W_enc, latent_bias, pre_bias), 100)
    assert recall(indices, pre_activations(x, W_enc, latent_bias, pre_bias), 100) == 1


@pytest.mark.parametrize(("n_latents", "k"), [(8192, 100)])
def test_rows_that_keep_too_many_groups_are_redone_with_room_for_more(n_latents, k):
    x, W_enc, latent_bias, pre_bias = make(3, n_latents, 64, torch.bfloat16)
    latent_bias[torch.arange(n_latents) // 256 % 16 == 0] -= 0.7  # the sample is below the others
    values, indices = encode_topk(x, W_enc, latent_bias, pre_bias, k)
    assert [int(c) for c in redone.counters[0]] == [3, 0, 3]
    pre_acts = pre_activations(x, W_enc, latent_bias, pre_bias)
    assert_consistent(values, indices, pre_acts, k)
    assert recall(indices, pre_acts, k) == 1


def test_segments_of_latents_are_merged(monkeypatch):
    monkeypatch.setattr(kernel, "SEGMENT", 4096)
    tensors = make(3, 4096 * 2 + 100, 16)
    values, indices = encode_topk(*tensors, 9)
    pre_acts = pre_activations(*tensors)
    assert_consistent(values, indices, pre_acts, 9)
    assert recall(indices, pre_acts, 9) == 1


def test_chunks_of_tokens_bound_the_memory():
    W = torch.empty(131_072, 768, dtype=torch.bfloat16, device="meta")
    assert kernel._rows_at_once(W, 32, strict=True) == 65_536
    for k in (1, 64, 256):
        rows = kernel._rows_at_once(W, k, strict=True)
        assert 2 * rows * 131_072 / 16 * 9 / 8 <= kernel.SAMPLE_BYTES
        assert 32 * rows * kernel._plan(W, k, kernel.FIRST).capacity <= kernel.KEPT_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, "SAMPLE_BYTES"), (torch.bfloat16, "KEPT_BYTES")])
def test_chunks_of_tokens_change_nothing(dtype, bound, monkeypatch):
    tensors = make(130, 4096, 16, dtype)
    whole = encode_topk(*tensors, 4)
    monkeypatch.setattr(kernel, bound, 1)  # chunks have 128 rows at least
    parts = encode_topk(*tensors, 4)
    assert len(redone.counters) == 2
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_a_latent_that_is_not_a_number_takes_a_place_and_counts_as_zero():
    x, W_enc, latent_bias, pre_bias = make(3, 4096, 16, torch.bfloat16)
    W_enc[1000], latent_bias[1001] = float("nan"), 20.0  # of one group
    values, indices = encode_topk(x, W_enc, latent_bias, pre_bias, 2)
    assert indices.tolist() == [[1001, 1000]] * 3
    assert (values[:, 0] > 10).all()
    assert (values[:, 1] == 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's
def test_numbers_that_are_none_end_in_numbers_that_are_none_or_zero():
    x, W_enc, latent_bias, pre_bias = make(2, 4096, 16)
    x[0, 0] = float("nan")
    values, indices = encode_topk(x, W_enc, latent_bias, pre_bias, 4)
    assert ((indices >= 0) & (indices < 4096)).all()
    assert_consistent(values[1:], indices[1:], pre_activations(x, W_enc, latent_bias, pre_bias)[1:], 4)


def test_a_view_that_is_not_contiguous_is_read_right():
    x, W_enc, latent_bias, pre_bias = make(6, 4096, 32)
    whole = encode_topk(
        x[::2, ::2].contiguous(), W_enc[:, ::2].contiguous(), latent_bias, pre_bias[:16].contiguous(), 4
    )
    views = encode_topk(x[::2, ::2], W_enc[:, ::2], latent_bias, pre_bias[:16], 4)
    assert torch.equal(whole[0], views[0])
    assert torch.equal(whole[1], views[1])
