"""Replicas and shards train exactly the autoencoder that one process trains on the whole batch.

Twenty steps of the real step, optimiser and dead counter in worlds of gloo processes against one process: loss, AuxK,
l0, the dense gradients, their norm, weights, averages and silent_for, to 1e-10 in float64. AuxK runs with dead latents
in the last shards only to begin with, gradients are clipped, and 101 latents do not divide evenly.

Seen to catch: a decoder gradient that is not summed over replicas; ties kept for the higher shard, or left open; AuxK's
candidates not gathered, its gradients not summed over replicas, its lists of another length on each shard; latents that
fired in another replica; the norm of one shard's gradients; the mean over a replica's tokens; pre_bias without the
other shards' encoders; the encoder's scale from one shard's reconstruction; the share lost of one shard.
"""

import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel_worker import DEAD_AFTER, LIMIT, Case, batches, cases, course, kernel_cases, made
from topkapi.config import AuxKConfig, LossConfig, ModelConfig, ParallelConfig, TrainConfig
from topkapi.errors import TopkapiError
from topkapi.exchange import auxk_candidates_of, candidates, candidates_of, cheaper_exchange
from topkapi.gradients import DeadSubset
from topkapi.model import Autoencoder, Working
from topkapi.ops import SparseRows, implementation, reference
from topkapi.parallel import ALONE, Mesh
from topkapi.scaling.shapes import Job, Layout, rank_of
from topkapi.step import _Batch, _plus, topk_step

ROOT = Path(__file__).parents[1]
WORLDS = [2, pytest.param(4, marks=pytest.mark.many_ranks), pytest.param(8, marks=pytest.mark.many_ranks)]
NAMES = [pytest.param(w, name, marks=() if w == 2 else pytest.mark.many_ranks) for w in (2, 4, 8) for name in cases(w)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of a world have found, by case; a world is launched once."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}

    def of(world: int) -> dict[str, list[dict[str, Any]]]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            run(world, folder, list(cases(world)))
            found[world] = {
                name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)] for name in cases(world)
            }
        return found[world]

    return of


def run(world: int, folder: Path, names: list[str]) -> None:
    """Launch a world and wait for it, at most LIMIT seconds; nothing of it is left behind."""
    arguments = [sys.executable, "-m", "tests.parallel_worker", str(world), str(folder), *names]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=LIMIT + 30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def alone() -> Any:
    """What one process finds, by case; cases that differ in the mesh alone share it."""
    found: dict[Any, dict[str, Any]] = {}

    def of(case: Case) -> dict[str, Any]:
        key = (case.n_latents, case.dtype, case.steps, case.batch, case.ties, case.together, case.kernels, case.relu)
        if key not in found:
            found[key] = course(case)
        return found[key]

    return of


def joined(ranks: list[dict[str, Any]], case: Case) -> dict[str, torch.Tensor]:
    """What the shards of the first replica have, together, what owners have, and what all of them have."""
    shards = [rank["shard"] for rank in ranks[: case.n_shards]]
    owners = [rank["own"] for shard in range(case.n_shards) for rank in ranks[shard :: case.n_shards]]
    found = [{name: torch.cat([one[name] for one in some]) for name in some[0]} for some in (shards, owners)]
    return ranks[0]["whole"] | found[0] | found[1]


def assert_equal(ranks: list[dict[str, Any]], one: dict[str, Any], case: Case) -> None:
    """What the ranks found is what one process found."""
    ours, wanted = joined(ranks, case), one["whole"] | one["shard"] | one["own"]
    assert ours.keys() == wanted.keys()
    for what, tensor in wanted.items():
        # Adam divides by the root of small gradients' squares: rounding errors of float32 grow from step to step
        float32 = 1e-5 if what.endswith((" 0", " first")) else 2e-3
        assert_same(what, ours[what], tensor, 1e-10 if case.dtype == torch.float64 else float32)


def assert_same(name: str, ours: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == wanted.shape, name
    if wanted.dtype in (torch.bool, torch.int64):
        assert torch.equal(ours, wanted), name
    else:
        size = float(wanted.double().abs().max())
        assert float((ours.double() - wanted.double()).abs().max()) <= tolerance * (1e-3 + size), name


@pytest.mark.parametrize(("world", "name"), [case for case in NAMES if "capacity" not in case.values[1]])
def test_a_mesh_trains_what_one_process_trains(world: int, name: str, worlds: Any, alone: Any) -> None:
    case = cases(world)[name]
    assert_equal(worlds(world)[name], alone(case), case)


@pytest.mark.slow
def test_kernels_do_the_same(tmp_path: Path, alone: Any) -> None:
    pytest.importorskip("triton")
    run(2, tmp_path, list(kernel_cases()))
    for name, case in kernel_cases().items():
        assert_equal([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)], alone(case), case)


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_replicas_stay_equal_to_the_bit(world: int, name: str, worlds: Any) -> None:
    ranks, n_shards = worlds(world)[name], cases(world)[name].n_shards
    for rank, found in enumerate(ranks):
        for what, tensor in found["shard"].items():
            assert torch.equal(tensor, ranks[rank % n_shards]["shard"][what]), what
        for what, tensor in found["whole"].items():
            assert torch.equal(tensor, ranks[0]["whole"][what]), what


def test_the_cases_are_what_they_are_for(alone: Any) -> None:
    case = cases(2)["1x2 sparse"]
    found = alone(case)
    n_dead = [found["shard"][f"dead {step}"].split(51) for step in range(case.steps)]
    assert any(not first.any() and last.any() for first, last in n_dead)  # dead in the last shard alone
    assert any(first.any() and last.any() for first, last in n_dead)
    assert sum(float(found["whole"][f"auxk {step}"]) > 0 for step in range(case.steps)) > 10
    assert all(float(found["whole"][f"norm {step}"]) > 0.05 for step in range(5))  # clipped
    revived = [found["shard"][f"silent_for {step}"] for step in range(case.steps)]
    assert any((revived[i][revived[i - 1] >= DEAD_AFTER] == 0).any() for i in range(1, case.steps))


def test_ties_are_many(alone: Any) -> None:
    case = cases(2)["1x2 ties"]
    sample, x, *_ = batches(case)
    ae = made(case, sample, ALONE)
    values = ((x - ae.pre_bias) @ ae.W_enc.T + ae.latent_bias).sort(descending=True).values
    k = case.k
    at_edge = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
    assert at_edge.float().mean() > 0.2
    assert alone(case)["whole"]["l0 0"] == k


@pytest.mark.parametrize("world", WORLDS)
def test_the_share_lost_is_counted(world: int, worlds: Any) -> None:
    for name, case in cases(world).items():
        if case.parallel.selection != "capacity":
            assert not any("lost" in what for what in worlds(world)[name][0]["whole"])
            continue
        sample, x, *_ = batches(case)
        ae = made(case, sample, ALONE)
        pre_acts = (x - ae.pre_bias) @ ae.W_enc.T + ae.latent_bias
        values, latents = pre_acts.topk(case.k)
        mesh = Mesh(1, case.n_shards)
        lost = 0
        for shard in range(case.n_shards):
            part = mesh.latents(case.n_latents, shard)
            mine = (latents >= part.start) & (latents < part.stop) & (values > 0)
            put_forward = pre_acts[:, part].topk(min(case.parallel.candidates, part.stop - part.start)).values[:, -1:]
            lost += int((mine & (values < put_forward)).sum())
        measured = float(worlds(world)[name][0]["whole"]["lost 0"])
        assert lost > 0
        assert measured == pytest.approx(lost / int((values > 0).sum()), abs=1e-6)


def test_exact_selection_loses_nothing_where_one_shard_has_all(alone: Any) -> None:
    found = alone(cases(2)["1x2 together"])
    assert not found["shard"]["fired 0"][10:].any()  # the other shards' latents are beaten everywhere
    assert float(found["whole"]["l0 0"]) > 5


def test_a_world_that_fails_says_why_and_ends(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="KeyError: 'no such case'"):
        run(2, tmp_path, ["no such case"])


@pytest.mark.parametrize(("k", "wanted"), [(256, [44, 26, 16, 10, 7, 5, 4]), (32, [10, 7, 5, 4, 3, 3, 2])])
def test_candidates_lose_less_than_a_thousandth(k: int, wanted: list[int]) -> None:
    assert [candidates(k, 2**i, 1e-9) for i in range(3, 10)] == wanted


def test_candidates_follow_the_capacity_and_its_bounds() -> None:
    assert candidates(256, 8, 2.0) == 64
    assert candidates(256, 512, 2.0) == 4
    assert candidates(32, 1, 2.0) == 32
    assert candidates(1, 64, 2.0) == 1
    assert candidates(2, 512, 1.0) == 2
    assert candidates(32, 2, 4.0) == 32
    exact, few = ParallelConfig(), ParallelConfig(selection="capacity")
    insists = ParallelConfig(selection="capacity", candidates=3)
    assert [candidates_of(32, 10_000, 8, config) for config in (exact, few, insists)] == [32, 10, 3]
    assert [candidates_of(32, 30, 8, config) for config in (exact, few, insists)] == [4, 4, 3]
    assert [candidates_of(32, 30, 1, config) for config in (exact, few, insists)] == [30, 30, 30]
    assert [auxk_candidates_of(512, 2294, 512, config) for config in (exact, few, insists)] == [512, 5, 5]
    assert [auxk_candidates_of(512, 3, 512, config) for config in (exact, few)] == [3, 3]
    assert auxk_candidates_of(512, 2294, 1, few) == 512


@pytest.mark.parametrize("k", [32, 256])
def test_shards_of_random_latents_lose_what_the_binomial_says(k: int) -> None:
    n, n_latents = 300, 131_072  # so many that drawing without putting back is the same
    generator = torch.Generator().manual_seed(k)
    pre_acts = torch.rand(n, n_latents, generator=generator)
    latents = pre_acts.topk(k).indices
    for n_shards in (2**i for i in range(1, 10)):
        of_shard = torch.zeros(n, n_shards, dtype=torch.int64)
        of_shard.scatter_add_(1, latents // (n_latents // n_shards), torch.ones_like(latents))
        for put_forward in (candidates(k, n_shards, 2.0), max(k // n_shards, 1)):
            chance = [math.comb(k, i) * (n_shards - 1) ** (k - i) / n_shards**k for i in range(k + 1)]
            predicted = n_shards / k * sum((i - put_forward) * p for i, p in enumerate(chance) if i > put_forward)
            measured = float((of_shard - put_forward).clamp_min(0).sum()) / (n * k)
            deviation = math.sqrt(predicted * (1 + k / n_shards) / (n * k)) + 2 / (n * k)
            assert abs(measured - predicted) < 5 * deviation
            if put_forward == candidates(k, n_shards, 2.0):
                assert predicted < 1e-3
    shards = pre_acts[:40].view(40, 16, -1).transpose(0, 1).topk(candidates(k, 16, 2.0), dim=2).values
    kept = [reference.keep_largest(v, v.long(), shards.flatten(0, 1), s, k, -1)[0] for s, v in enumerate(shards)]
    assert torch.equal((torch.stack(kept) > 0).sum((0, 2)), torch.full((40,), k))


def test_the_exchange_with_fewer_bytes_is_taken() -> None:
    # dense: 2 32768 768 4 / 2 = 101 MB a step for 2 replicas; sparse: a token 2 768 2 + 12 32 = 3456 bytes
    assert cheaper_exchange(2, 29_000, 32_768, 768, 32, 2) == "sparse"
    assert cheaper_exchange(2, 29_500, 32_768, 768, 32, 2) == "dense"
    assert cheaper_exchange(8, 7_000, 32_768, 768, 32, 2) == "sparse"
    assert cheaper_exchange(8, 7_500, 32_768, 768, 32, 2) == "dense"
    assert cheaper_exchange(8, 7_500, 131_072, 768, 32, 2) == "sparse"


def test_auto_is_the_exchange_with_fewer_bytes() -> None:
    weights = object.__new__(Working)
    weights.W_enc = torch.empty(0, 768, dtype=torch.bfloat16)
    given = (32, 131_072, torch.zeros(768), weights, 1.0, 1)
    for n_tokens, parallel, sends_rows in (
        (29_000, ParallelConfig(), True),
        (29_500, ParallelConfig(), False),
        (29_500, ParallelConfig(exchange="sparse"), True),
        (29_000, ParallelConfig(exchange="dense"), False),
    ):
        batch = _Batch(*given, Mesh(2, 4), parallel)
        assert batch.replicas_send_rows(torch.empty(n_tokens, 768, device="meta")) == sends_rows


def test_every_owner_has_latents_or_all_are_refused() -> None:
    for n_latents, n_replicas, n_shards in itertools.product(range(1, 40), range(1, 6), range(1, 6)):
        meshes = [Mesh(n_replicas, n_shards, rank) for rank in range(n_replicas * n_shards)]
        job = Job(n_latents=n_latents, d_model=8, k=1, batch_tokens=60, auxk=0)
        try:
            parts = [mesh.owned(n_latents, rank) for mesh in meshes[:1] for rank in range(len(meshes))]
        except TopkapiError:
            with pytest.raises(TopkapiError):
                rank_of(job, layout(n_replicas, n_shards))
            continue
        ordered = [parts[rank] for shard in range(n_shards) for rank in range(shard, len(meshes), n_shards)]
        assert [part.start for part in ordered] == [0, *(part.stop for part in ordered[:-1])]
        assert ordered[-1].stop == n_latents
        assert all(part.stop > part.start for part in parts)
        rank_of(job, layout(n_replicas, n_shards))


def test_a_dense_gradient_is_padded_with_zeros_and_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.step.ADDED_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    values, rows = torch.rand(6, 2, generator=generator), torch.randn(6, 4, generator=generator)
    indices = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(6)])
    gradient = SparseRows(values, implementation(rows).order_by_latent(indices, 7), rows)
    wanted = torch.zeros(6, 7).scatter_(1, indices, values).T @ rows
    once = _plus(None, gradient, 9)
    torch.testing.assert_close(once, torch.cat([wanted, torch.zeros(2, 4)]))
    torch.testing.assert_close(_plus(once.clone(), gradient, 9), 2 * once)
    assert torch.equal(_plus(None, gradient, 7), once[:7])


def layout(n_replicas: int, n_shards: int) -> Layout:
    return Layout(n_replicas=n_replicas, n_shards=n_shards)


@pytest.mark.parametrize("n_latents", [5, 16, 37])
def test_a_shard_starts_with_its_rows(n_latents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Autoencoder(d_model=6, n_latents=n_latents, k=1, seed=3)
    directions = torch.randn(n_latents, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(plain.W_dec, directions / directions.norm(dim=1, keepdim=True))
    monkeypatch.setattr("topkapi.model.DRAWN_TOGETHER", 8)
    whole = Autoencoder(d_model=6, n_latents=n_latents, k=1, seed=3)
    assert len(whole.W_dec.unique(dim=0)) == n_latents  # no block repeats another
    mesh = Mesh(1, 3)
    parts = [mesh.latents(n_latents, shard) for shard in range(3)]
    shards = [Autoencoder(d_model=6, n_latents=n_latents, k=1, seed=3, latents=part) for part in parts]
    for name in ("W_enc", "W_dec", "latent_bias"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(whole, name))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shards": 0}, "at least 1"),
        ({"capacity": 0.0}, "above 0"),
        ({"candidates": -1}, "0 \\(chosen\\)"),
        ({"candidates": 4}, "selection capacity"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TopkapiError, match=said):
        ParallelConfig(**wrong)


def test_relu_is_not_divided() -> None:
    relu, penalty = ModelConfig(activation="relu"), LossConfig(sparsity="l1", l1_coefficient=0.1)
    with pytest.raises(TopkapiError, match=r"--parallel\.shards at 1"):
        TrainConfig(model=relu, loss=penalty, parallel=ParallelConfig(shards=2))
    with pytest.raises(TopkapiError, match=r"--parallel\.micro-batch-tokens at 0"):
        TrainConfig(model=relu, loss=penalty, parallel=ParallelConfig(micro_batch_tokens=7))


def test_one_process_ignores_the_settings() -> None:
    case = Case()
    sample, x, *_ = batches(case)
    ae = made(case, sample, ALONE)
    subset = DeadSubset.of(torch.zeros(case.n_latents, dtype=torch.bool))
    plain = topk_step(ae, x, 1.0, subset, AuxKConfig(auxk=3))
    few = ParallelConfig(selection="capacity", candidates=1, exchange="dense", shards=4)
    other = topk_step(ae, x, 1.0, subset, AuxKConfig(auxk=3), parallel=few)
    assert torch.equal(plain.gradients.W_enc.all(), other.gradients.W_enc.all())
    assert other.lost is None
