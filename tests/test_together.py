"""Processes that train together: started as torchrun starts them, on CPUs, with real signals.

Seen to fail when: ...
"""

import os
import signal
import time
from dataclasses import replace

import pytest

from tests.command_line import assert_same_run, metrics, one_line, train_arguments
from topkapi import checkpoint
from topkapi.config import LossConfig, ModelConfig, ParallelConfig
from topkapi.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


class World:
    """Processes that run one command line together."""

    def __init__(self, server, folder, cache, n_ranks, arguments, **options):
        self.server, self.folder = server, folder
        folder.mkdir(parents=True)
        self.pids = server.start_world(n_ranks, arguments, folder, cache.parent, **options)

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def wait(self):
        return [self.server.wait(pid) for pid in self.pids]

    def said(self):
        return "".join((self.folder / f"rank-{rank}").read_text() for rank in range(len(self.pids)))


@pytest.fixture
def world(fork_server, tiny_cache, tmp_path):
    """Starts a world for a config in the folder `run`, or another."""

    def start(config, *more, n_ranks=2, run=None, **options):
        run = run or tmp_path / "run"
        arguments = [*train_arguments(config, run), *more]
        folder = tmp_path / f"world-{len(list(tmp_path.glob('world-*')))}"
        return World(fork_server, folder, tiny_cache, n_ranks, arguments, **options)

    return start


@pytest.fixture(scope="module")
def alone(one_thread, tiny_config, tmp_path_factory):
    """A finished run of `tiny_config` by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train([tiny_config], [run])
    return run


def sharded(config, shards):
    return replace(config, parallel=ParallelConfig(shards=shards))


def longer(config):
    """A run that is long enough to be stopped."""
    return replace(config, tokens=20_000, save_every=1000)


def test_replicas_train_as_one_process_does(world, alone, tiny_config, tmp_path):
    both = world(tiny_config)
    assert both.wait() == [0, 0], both.said()
    assert_same_run(tmp_path / "run", alone)
    lines = both.said().splitlines()
    assert [line.startswith("finished: ") for line in lines].count(True) == 1
    assert (both.folder / "rank-1").read_text() == ""


@pytest.mark.parametrize("heard", [(0,), (1,), (1, 0)])
def test_a_signal_stops_all_after_the_same_step(world, tiny_config, tmp_path, heard):
    run, config = tmp_path / "run", longer(tiny_config)
    both = world(config)
    both.until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 7)
    for rank in heard:
        os.kill(both.pids[rank], signal.SIGTERM)
        time.sleep(0.02)
    assert both.wait() == [128 + signal.SIGTERM] * 2, both.said()
    line = one_line(both.said())
    assert line.startswith(f"topkapi: stopped by SIGTERM: {run} saved at step ")
    step = checkpoint.steps(run)[-1]
    assert 7 <= step < 200
    assert f"saved at step {step} of 200" in line
    assert checkpoint.load(run, step).meta["n_steps"] == step
    again = world(config, "--resume")
    assert again.wait() == [0, 0], again.said()
    train([config], [tmp_path / "whole"])
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_costs_the_steps_since_the_checkpoint(
    world, alone, tiny_config, tmp_path, victim
):
    run, config = tmp_path / "run", replace(longer(tiny_config), save_every=5)
    both = world(config)
    both.until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 12)
    started = time.monotonic()
    os.kill(both.pids[victim], signal.SIGKILL)
    ended = both.wait()
    assert time.monotonic() - started < 20
    assert ended[victim] == -signal.SIGKILL
    assert ended[1 - victim] == 2, both.said()
    assert f"rank {victim} of 2 is gone (process {both.pids[victim]} was killed" in one_line(both.said())
    steps = len(metrics(run))
    assert steps - 5 <= checkpoint.steps(run)[-1] <= steps
    again = world(config, "--resume")
    assert again.wait() == [0, 0], again.said()
    train([config], [tmp_path / "whole"])
    assert_same_run(run, tmp_path / "whole")


def test_what_is_refused_is_said_once(world, tiny_config, tmp_path):
    run = tmp_path / "run"
    relu = replace(
        tiny_config,
        model=ModelConfig(n_latents=96, activation="relu"),
        loss=LossConfig(sparsity="l1", l1_coefficient=0.05),
    )
    cases = [
        (replace(tiny_config, batch_tokens=99), "--batch-tokens 99 cannot be divided among 2 replicas: take 98"),
        (relu, "ReLU baselines train in one process; 2 were launched"),
        (sharded(tiny_config, 3), "2 processes cannot hold replicas of 3 shards"),
    ]
    for config, expected in cases:
        both = world(config)
        assert both.wait() == [2, 2]
        assert expected in one_line(both.said())
        assert "rank" not in one_line(both.said()).partition("--nproc")[0]
    assert not (run / "config.json").exists()
