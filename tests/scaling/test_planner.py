"""The planner prefers what must be better, and time and memory move the way they must.

Seen to fail when: a ring between nodes is as fast as one inside; half of the biases' moments are forgotten; adding up
gradients of micro-batches costs nothing.
"""

from dataclasses import replace

import pytest
import torch

from topkapi.config import OptimConfig
from topkapi.dead import DeadCounter
from topkapi.errors import TopkapiError
from topkapi.exchange import candidates, truncation_losses
from topkapi.model import PARAMETERS, Autoencoder
from topkapi.optim import Optimizer
from topkapi.scaling.hardware import H100, H200, Link
from topkapi.scaling.memory import fits, memory, total, weights_and_state
from topkapi.scaling.planner import Search, for_picture, plan, plans
from topkapi.scaling.shapes import Job, Layout, rank_of
from topkapi.scaling.step_time import UPDATE, Path, collective_seconds, compute, path_of, step_time
from topkapi.scaling.volumes import Volume

PAPER = Job(n_latents=2**24, d_model=12_288, k=256, batch_tokens=131_072)
WIDE = Job(n_latents=2**20, d_model=4_096, k=64, batch_tokens=131_072)


def faster(gpu, **factors):
    """A GPU whose links or rates are so many times as fast."""
    inside, between = factors.get("inside", 1), factors.get("between", 1)
    return replace(
        gpu,
        inside=Link(gather=gpu.inside.gather * inside, sum=gpu.inside.sum * inside, hop=gpu.inside.hop),
        between=Link(gather=gpu.between.gather * between, sum=gpu.between.sum * between, hop=gpu.between.hop),
        rates=replace(
            gpu.rates,
            bytes=gpu.rates.bytes * factors.get("memory", 1),
            bf16_flops=gpu.rates.bf16_flops * factors.get("matmul", 1),
        ),
    )


@pytest.mark.parametrize("k", [32, 256])
def test_candidates_that_lose_less_than_a_thousandth(k):
    """The table of the truncation: smallest counts for 8 to 512 shards, at most 0.1 % lost."""
    shards = (8, 16, 32, 64, 128, 256, 512)
    wanted = {32: (10, 7, 5, 4, 3, 3, 2), 256: (44, 26, 16, 10, 7, 5, 4)}[k]
    assert tuple(candidates(k, n, capacity=0.0) for n in shards) == wanted
    for n, count in zip(shards, wanted, strict=True):
        losses = truncation_losses(k, n)
        assert losses[count] < 1e-3
        assert losses[count - 1] >= 1e-3 or count == 2


@pytest.mark.parametrize(
    ("k", "shards", "offered", "per_cent"),
    [(32, 8, 8, 0.50), (32, 16, 4, 3.2), (32, 32, 2, 9.8), (32, 64, 1, 20.8), (256, 32, 16, 0.07), (256, 512, 1, 21.2)],
)
def test_what_a_capacity_of_two_loses(k, shards, offered, per_cent):
    assert 100 * truncation_losses(k, shards)[offered] == pytest.approx(per_cent, rel=0.06)


def test_capacity_is_a_share_and_never_below_two():
    assert candidates(256, 8, capacity=2.0) == 64
    assert candidates(4, 512, capacity=0.1) == 2
    assert candidates(1, 512, capacity=2.0) == 1
    assert candidates(32, 1, capacity=2.0) == 32


def test_losses_are_those_of_drawn_latents():
    drawn = torch.randint(16, (20_000, 32), generator=torch.Generator().manual_seed(0))
    hits = torch.nn.functional.one_hot(drawn, 16).sum(1)
    lost = (hits - 4).clamp_min(0).sum() / drawn.numel()
    assert float(lost) == pytest.approx(truncation_losses(32, 16)[4], rel=0.02)


def test_one_shard_for_each_gpu_where_weights_fit_no_other_way():
    found = plans(PAPER, H100, Search(n_gpus=512))
    assert found[0].mesh == "1 x 512"
    assert found[0].layout.selection == "capacity"
    assert found[0].rank.candidates == 4
    assert not fits(PAPER, Layout(n_replicas=64, n_shards=8), H100)
    assert [one.layout.n_shards for one in found] == [512, 256, 128, 64, 32, 16]
    assert all(one.fits for one in found)


def test_replicas_where_links_are_slow_and_the_dictionary_is_small():
    job = Job(n_latents=16_384, d_model=768, k=32, batch_tokens=2**21)
    slow = faster(H200, inside=0.01, between=0.01)
    assert plans(job, slow, Search(n_gpus=8))[0].layout.n_shards == 1
    assert rank_of(job, plans(job, slow, Search(n_gpus=8))[0].layout).exchange == "dense"


def test_shards_where_the_dictionary_is_large_and_the_batch_small():
    """Replicas would send each other more of what they have updated than there is of the batch."""
    assert plans(replace(WIDE, batch_tokens=16_384), H200, Search(n_gpus=8))[0].layout.n_shards == 8


def test_replicas_where_links_cost_nothing():
    """They divide the optimiser's work as shards do, and decode fewer tokens."""
    free = faster(H200, inside=1e6, between=1e6)
    free = replace(free, collective=1e-12, inside=replace(free.inside, hop=1e-12), host=1e-9)
    assert plans(WIDE, free, Search(n_gpus=8))[0].layout.n_shards == 1


def test_every_plan_fits_and_the_best_is_the_fastest():
    found = plans(WIDE, H200, Search(n_gpus=64))
    assert all(total(one.memory) <= one.gpu.memory * one.gpu.usable for one in found)
    whole = [one for one in found if not one.is_shortened]
    assert found[: len(whole)] == whole
    assert [one.tokens_per_second for one in whole] == sorted((one.tokens_per_second for one in whole), reverse=True)


def test_what_is_asked_for_is_kept():
    found = plans(WIDE, H200, Search(n_gpus=16, shards=4, selection="capacity", candidates=40, exchange="dense"))
    assert len(found) == 1
    assert found[0].mesh == "4 x 4"
    assert (found[0].rank.candidates, found[0].rank.exchange) == (40, "dense")
    with pytest.raises(TopkapiError, match="--shards 3 does not divide --gpus 16: take 1, 2, 4, 8, 16"):
        plans(WIDE, H200, Search(n_gpus=16, shards=3))


def test_a_batch_that_does_not_fit_is_gone_through_in_micro_batches():
    """The fewest that fit: half as many would not, and a quarter of the tokens would be slower."""
    small, long = replace(H200, memory=H200.memory // 2), replace(WIDE, batch_tokens=2**22)
    best = plans(long, small, Search(n_gpus=16, shards=8))[0]
    assert not best.is_shortened
    assert best.rank.n_micro_batches > 1
    assert fits(long, best.layout, small)
    assert not fits(long, replace(best.layout, micro_batch_tokens=2 * best.rank.micro_rows), small)
    shorter = replace(best.layout, micro_batch_tokens=best.rank.micro_rows // 4)
    assert plan(long, shorter, small).step.seconds > best.step.seconds
    assert plans(replace(long, batch_tokens=2**20), small, Search(n_gpus=16, shards=8))[0].rank.n_micro_batches == 1


def test_micro_batches_take_gradients_of_the_weights_size_and_time_to_add_them_up():
    for layout in (Layout(), Layout(n_shards=8), Layout(n_replicas=2, n_shards=4)):
        whole, halves = (replace(layout, micro_batch_tokens=n) for n in (0, WIDE.batch_tokens // 32))
        assert rank_of(WIDE, halves).sums
        latents = WIDE.n_latents // layout.n_shards
        assert memory(WIDE, halves)["dense gradients"] == 8 * latents * WIDE.d_model
        assert step_time(WIDE, halves, H200).seconds > step_time(WIDE, whole, H200).seconds
        times = [step_time(WIDE, replace(layout, micro_batch_tokens=n), H200).seconds for n in (2**10, 2**12, 2**14)]
        assert times == sorted(times, reverse=True)
    moved = [
        compute(WIDE, layout, rank_of(WIDE, layout), H200.cache)[UPDATE]["bytes"]
        for layout in (Layout(n_shards=8, micro_batch_tokens=n) for n in (2**13, 2**12))
    ]
    read_and_written = 16 * (2 * 2**17 * 4096) * 16  # 16 more micro-batches, bytes of a number
    assert moved[1] - moved[0] == pytest.approx(read_and_written, rel=0.05)


def test_a_batch_that_fits_in_no_micro_batches_is_cut_to_one_that_does():
    huge = replace(WIDE, batch_tokens=2**26)
    best = plans(huge, H200, Search(n_gpus=16, shards=16))[0]
    assert best.is_shortened
    assert best.job.batch_tokens % best.layout.n_replicas == 0
    assert fits(best.job, best.layout, H200)
    a_replica = best.job.batch_tokens // best.layout.n_replicas
    longer = replace(best.job, batch_tokens=int(1.2 * a_replica) * best.layout.n_replicas)
    assert not fits(longer, best.layout, H200)


def test_too_little_memory_is_explained():
    with pytest.raises(TopkapiError, match=r"8 H100 are too few: weights and state take 7.42 TB, .*--state low_memory"):
        plans(PAPER, H100, Search(n_gpus=8))
    with pytest.raises(TopkapiError, match="Take --no-ema, fewer latents, or more than"):
        plans(replace(PAPER, state="low_memory"), H100, Search(n_gpus=8))
    with pytest.raises(TopkapiError, match="can divide neither"):
        plans(Job(n_latents=10, d_model=4, k=2, batch_tokens=10), H100, Search(n_gpus=11))


@pytest.mark.parametrize("layout", [Layout(n_shards=64), Layout(n_replicas=8, n_shards=8), Layout(n_replicas=64)])
def test_nothing_gets_slower_on_faster_machines(layout):
    for job in (WIDE, replace(WIDE, dead=0.05), replace(WIDE, precision="fp8", state="low_memory")):
        base = step_time(job, layout, H200).seconds
        for what in ("inside", "between", "memory", "matmul"):
            times = [step_time(job, layout, faster(H200, **{what: factor})).seconds for factor in (0.5, 1, 2, 8)]
            assert times == sorted(times, reverse=True)
            assert times[1] == base


def test_more_of_anything_takes_longer():
    layout = Layout(n_replicas=2, n_shards=4)
    base = step_time(WIDE, layout, H200).seconds
    for change in ({"n_latents": 2**21}, {"d_model": 8192}, {"k": 128}, {"batch_tokens": 2**18}, {"dead": 0.01}):
        more = replace(WIDE, **change)
        assert step_time(more, layout, H200).seconds > base
        assert total(memory(more, layout)) > total(memory(WIDE, layout))


def test_a_step_is_no_shorter_than_the_host_needs():
    job = Job(n_latents=1024, d_model=64, k=8, batch_tokens=64)
    step = step_time(job, Layout(), H200)
    assert step.device < step.seconds == step.host


@pytest.mark.parametrize(
    ("group", "members", "shards", "nodes"),
    [("shards", 8, 8, 1), ("shards", 16, 16, 2), ("replicas", 4, 2, 1), ("replicas", 8, 8, 8), ("replicas", 8, 2, 2)],
)
def test_nodes_that_a_group_spreads_over(group, members, shards, nodes):
    layout = Layout(n_replicas=members if group == "replicas" else 1, n_shards=shards)
    assert path_of(Volume("", group, members, "gather", 1), layout, 8).nodes == nodes


def test_a_ring_crosses_nodes_on_as_many_cards_as_it_has_gpus_there():
    gpu = replace(H200, between=replace(H200.between, gather=1e9, sum=1e9))
    eight, two, one = (
        collective_seconds(Volume("", "shards", 16, "gather", 10**9), Path(16, nodes), gpu) for nodes in (2, 8, 16)
    )
    assert eight == pytest.approx(15 / 8, rel=1e-3)
    assert two == pytest.approx(15 / 2, rel=1e-3)
    assert one == pytest.approx(15, rel=1e-3)
    assert collective_seconds(Volume("", "shards", 8, "gather", 10**9), Path(8, 1), gpu) < 0.03


def test_weights_and_state_are_the_bytes_of_a_real_trainer():
    for ema_decay in (0.0, 0.9):
        ae = Autoencoder(d_model=24, n_latents=96, k=4)
        optimizer = Optimizer(ae, OptimConfig(lr=1e-3, ema_decay=ema_decay))
        counter = DeadCounter(96)
        held = {
            "weights": sum(getattr(ae, name).nbytes for name in PARAMETERS),
            "moments": sum(m.mean.nbytes + m.square.nbytes for m in optimizer.moments.values()),
            "silence of latents": counter.silent_for.nbytes,
        }
        if ema_decay:
            held["average"] = sum(m.ema.nbytes for m in optimizer.moments.values())
        job = Job(n_latents=96, d_model=24, k=4, precision="float32", ema=bool(ema_decay))
        assert weights_and_state(job, 96) == held


def test_low_memory_weights_and_state_are_the_bytes_of_a_real_trainer():
    ae = Autoencoder(d_model=24, n_latents=96, k=4)
    for name in ("W_enc", "W_dec"):
        getattr(ae, name).data = getattr(ae, name).data.bfloat16()
    optimizer = Optimizer(ae, OptimConfig(lr=1e-3, ema_decay=0.0, state="low_memory"))
    state = sum(tensor.nbytes for tensor in optimizer.state().values())
    found = weights_and_state(Job(n_latents=96, d_model=24, k=4, state="low_memory", ema=False), 96)
    assert found["moments"] == state
    assert found["weights"] == sum(getattr(ae, name).nbytes for name in PARAMETERS)


def test_the_picture_has_a_bar_for_each_number_of_shards():
    found = for_picture(PAPER, H100, Search(n_gpus=512))
    assert [one.layout.n_shards for one in found] == [2**i for i in range(10)]
    assert not any(one.is_shortened for one in found)
    assert [one.fits for one in found] == [False] * 4 + [True] * 6


def test_a_plan_without_shortening_says_whether_it_fits():
    assert not plan(PAPER, Layout(n_shards=8), H100, shorten=False).fits
