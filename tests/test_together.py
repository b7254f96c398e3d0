"""Processes that train together: started as torchrun starts them, on CPUs, with real signals.

Seen to fail when: each process stops at its own signal; the handlers of signals are gone while a process that lost
another finds out which; nobody speaks for one that was killed; every replica reads the first part of a batch; dead
counters are not restored; all processes write to the console.
"""

import errno
import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
from torch.distributed import checkpoint as dcp

import topkapi.train
from tests.command_line import assert_close_run, assert_same_run, contents, metrics, one_line, train_arguments
from topkapi import checkpoint, cli
from topkapi.config import LossConfig, ModelConfig, ParallelConfig
from topkapi.data.pipeline import BatchesAhead
from topkapi.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")

SECOND_SIGNAL_AFTER = 0.7  # seconds, in processes that are disturbed


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

    def ends_well(self):
        assert self.wait() == [0] * len(self.pids), self.said()

    def said(self):
        return "".join((self.folder / f"rank-{rank}").read_text() for rank in range(len(self.pids)))


@pytest.fixture(scope="module")
def start(fork_server, tiny_cache, tmp_path_factory):
    """Starts a world for a config and a run folder."""

    def start(config, run, *more, n_ranks=2, plan=None):
        """`plan` goes to `planned`, which disturbs the world."""
        arguments, options = [*train_arguments(config, run), *more], {}
        if plan is not None:
            arguments, options = [json.dumps(plan), *arguments], {"call": "tests.test_together:planned"}
        return World(fork_server, tmp_path_factory.mktemp("world") / "logs", tiny_cache, n_ranks, arguments, **options)

    return start


def planned(plan, *arguments):
    """In a process of a world: train, with something happening in step `step` (from 1) of rank `rank`.

    With `writing=n` it happens when that rank writes tensors for the n-th time.
    """
    plan, original = json.loads(plan), Trainer.step_
    if plan.get("writing") and os.environ["RANK"] == str(plan["rank"]):
        disturb_writing(plan)

    def step_(self, x, done):
        if done == plan.get("step", 0) - 1 and os.environ["RANK"] == str(plan["rank"]):
            if "signal" in plan:
                os.kill(os.getpid(), plan["signal"])
            if "full" in plan:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
            if "bug" in plan:
                raise ValueError("a bug")
            if "sleep" in plan:
                time.sleep(60)
        original(self, x, done)

    Trainer.step_ = step_
    topkapi.train.SECOND_SIGNAL_AFTER = SECOND_SIGNAL_AFTER
    if plan.get("ahead"):
        topkapi.train.open_batches = BatchesAhead
    return cli.main(list(arguments))


def disturb_writing(plan):
    original, n_times = dcp.FileSystemWriter.write_data, []

    def write_data(self, *arguments):
        n_times.append(None)
        if len(n_times) >= plan["writing"] and "full" in plan:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        if len(n_times) == plan["writing"]:
            os.kill(os.getpid(), plan["signal"])
        return original(self, *arguments)

    dcp.FileSystemWriter.write_data = write_data


def sharded(config, shards=2):
    return replace(config, parallel=ParallelConfig(shards=shards))


@pytest.fixture(scope="module", params=[1, 2], ids=["replicas", "shards"])
def divided(request, tiny_config):
    """`tiny_config` for two replicas, or two shards."""
    return sharded(tiny_config, request.param)


@pytest.fixture(scope="module")
def whole(start, divided, tmp_path_factory):
    """A finished run of two processes, and all that they said."""
    run = tmp_path_factory.mktemp("whole") / "run"
    world = start(divided, run)
    world.ends_well()
    return run, world


@pytest.fixture(scope="module")
def alone(one_thread, tiny_config, tmp_path_factory):
    """A finished run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train([tiny_config], [run])
    return run


def test_two_processes_train_as_one_does(whole, alone, divided):
    run, world = whole
    assert_close_run(run, alone)
    assert contents(run).keys() - contents(alone).keys() == {
        "checkpoints/step-00000015/__1_0.distcp",
        "checkpoints/step-00000020/__1_0.distcp",
    }
    assert sum(line.startswith("finished: ") for line in world.said().splitlines()) == 1
    assert (world.folder / "rank-1").read_text() == ""
    assert json.loads((run / "config.json").read_text())["autoencoder"]["n_latents"] == divided.model.n_latents


@pytest.mark.parametrize("stops", [((0, 7),), ((1, 3), (0, 12))])
def test_a_signal_to_one_process_stops_all_after_the_same_step(start, whole, divided, tmp_path, stops):
    run = tmp_path / "run"
    for rank, step in stops:
        world = start(divided, run, "--resume", plan={"rank": rank, "step": step, "signal": signal.SIGTERM})
        assert world.wait() == [128 + signal.SIGTERM] * 2, world.said()
        lines = [line for line in world.said().splitlines() if line.startswith("topkapi: ")]
        assert lines == [
            f"topkapi: stopped by SIGTERM: {run} saved at step {step + 1} of 20; continue with topkapi train {run} "
            "--resume."
        ]
        assert checkpoint.steps(run)[-1] == step + 1
        assert checkpoint.load(run, step + 1).meta["n_steps"] == step + 1
    start(divided, run, "--resume").ends_well()
    assert_same_run(run, whole[0])


@pytest.mark.many_ranks
@pytest.mark.parametrize("first", [1, 2, 4])
def test_four_processes_train_as_one_does(start, alone, tiny_config, tmp_path, first):
    for then in (1, 2, 4, None):
        run = tmp_path / str(then)
        config = sharded(tiny_config, first)
        world = start(config, run, n_ranks=4, plan={"rank": 3, "step": 8, "signal": signal.SIGTERM})
        assert world.wait() == [128 + signal.SIGTERM] * 4, world.said()
        if then is None:
            train([tiny_config], [run], resume=True)
        else:
            start(sharded(tiny_config, then), run, "--resume", n_ranks=4).ends_well()
        assert_close_run(run, alone)


def test_two_autoencoders_side_by_side(start, whole, divided, tmp_path):
    variants = ["model.k=4", "model.n_latents=77,model.k=6"]
    start(divided, tmp_path / "both", "--variants", *variants).ends_well()
    assert_same_run(tmp_path / "both" / variants[0], whole[0])
    other = replace(divided, model=ModelConfig(n_latents=77, k=6), parallel=ParallelConfig())
    train([other], [tmp_path / "alone"])
    assert_close_run(tmp_path / "both" / variants[1], tmp_path / "alone")


def test_relu_baselines_over_replicas(start, tiny_config, tmp_path):
    relu = replace(
        tiny_config,
        model=ModelConfig(n_latents=96, activation="relu"),
        loss=LossConfig(sparsity="l1", l1_coefficient=0.05),
    )
    start(relu, tmp_path / "run").ends_well()
    train([relu], [tmp_path / "alone"])
    assert_close_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_costs_the_steps_since_the_checkpoint(
    start, whole, divided, tmp_path, victim
):
    run = tmp_path / "run"
    world = start(divided, run, plan={"rank": victim, "step": 13, "signal": signal.SIGKILL})
    world.until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 12)
    started = time.monotonic()
    assert world.server.wait(world.pids[victim]) == -signal.SIGKILL
    os.kill(world.pids[1 - victim], signal.SIGTERM)  # as torchrun does
    assert world.server.wait(world.pids[1 - victim]) == 2, world.said()
    assert time.monotonic() - started < 20
    assert f"rank {victim} of 2 is gone (process {world.pids[victim]} was killed" in one_line(world.said())
    assert checkpoint.steps(run)[-1] == 10
    start(divided, run, "--resume").ends_well()
    assert_same_run(run, whole[0])


@pytest.mark.parametrize(
    ("what", "status", "line"),
    [
        ("full", 2, "topkapi: rank 1 of 2: the system refused somewhere: No space left on device."),
        ("bug", 1, "ValueError: a bug"),
    ],
)
def test_an_error_of_one_process_is_told_once_with_its_rank(start, tiny_config, tmp_path, what, status, line):
    world = start(tiny_config, tmp_path / "run", plan={"rank": 1, "step": 7, what: True})
    ended = world.wait()
    assert ended[1] == status
    assert ended[0] == 2
    assert (world.folder / "rank-1").read_text().count(line) == 1
    assert "rank 1 of 2" in world.said()
    assert not [
        text for text in (world.folder / "rank-0").read_text().splitlines() if "topkapi" in text or "Error" in text
    ]
    assert checkpoint.steps(tmp_path / "run") == [5]


def test_a_second_signal_ends_a_process_that_waits_for_another(start, tiny_config, tmp_path):
    run = tmp_path / "run"
    world = start(tiny_config, run, plan={"rank": 1, "step": 7, "sleep": True})
    world.until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 6)
    time.sleep(0.5)
    for _ in range(2):
        os.kill(world.pids[0], signal.SIGTERM)
        os.kill(world.pids[0], signal.SIGTERM)  # one signal may come twice
        time.sleep(1.2 * SECOND_SIGNAL_AFTER)
    assert world.server.wait(world.pids[0]) == 128 + signal.SIGTERM
    assert "stopped by a second signal" in one_line((world.folder / "rank-0").read_text())
    os.kill(world.pids[1], signal.SIGKILL)
    world.server.wait(world.pids[1])


def test_what_is_refused_is_said_once(start, tiny_config, tmp_path):
    run = tmp_path / "run"
    cases = [
        (replace(tiny_config, batch_tokens=99), "--batch-tokens 99 cannot be divided among 2 replicas: take 98"),
        (sharded(replace(tiny_config, model=ModelConfig(n_latents=1, k=1))), "1 latents do not fill 2 shards"),
        (sharded(tiny_config, 3), "2 processes cannot hold replicas of 3 shards"),
    ]
    for config, expected in cases:
        world = start(config, run)
        assert world.wait() == [2, 2]
        assert one_line(world.said()).startswith(f"topkapi: {expected}")
    assert not (run / "config.json").exists()


@pytest.mark.parametrize("arguments", [["eval", "runs/none"], ["plan", "--gpus", "2"]], ids=lambda it: it[0])
def test_a_command_for_one_process_says_so_once(fork_server, tiny_cache, tmp_path, arguments):
    world = World(fork_server, tmp_path / "logs", tiny_cache, 2, arguments)
    assert world.wait() == [2, 2]
    assert "without torchrun" in one_line(world.said())


def test_a_run_goes_on_in_another_number_of_processes(start, alone, divided, tiny_config, tmp_path):
    run = tmp_path / "run"
    world = start(divided, run, plan={"rank": 0, "step": 6, "signal": signal.SIGINT})
    assert world.wait() == [128 + signal.SIGINT] * 2, world.said()
    train([tiny_config], [run], resume=True)
    assert_close_run(run, alone)
    run = tmp_path / "other"
    world = start(tiny_config, run, n_ranks=1, plan={"rank": 0, "step": 6, "signal": signal.SIGINT})
    assert world.wait() == [128 + signal.SIGINT], world.said()
    start(divided, run, "--resume").ends_well()
    assert_close_run(run, alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_it_writes_beside_training_costs_that_checkpoint_alone(
    start, whole, alone, divided, tiny_config, tmp_path, victim
):
    run, beside = tmp_path / "run", {"async_checkpoints": True}
    world = start(replace(divided, **beside), run, plan={"rank": victim, "writing": 2, "signal": signal.SIGKILL})
    ended = world.wait()
    assert (ended[victim], ended[1 - victim]) == (-signal.SIGKILL, 2), world.said()
    assert f"rank {victim} of 2 is gone (process {world.pids[victim]} was killed" in one_line(world.said())
    assert checkpoint.steps(run) == [5]
    shutil.copytree(run, tmp_path / "one")
    start(replace(divided, **beside), run, "--resume").ends_well()
    assert_same_run(run, whole[0])
    assert not [name for name in contents(run) if ".tmp" in name]
    train([replace(tiny_config, **beside)], [tmp_path / "one"], resume=True)
    assert_close_run(tmp_path / "one", alone)


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside training"])
def test_a_disk_that_is_full_for_one_process_is_told_once_and_alike(start, divided, tmp_path, beside):
    config = replace(divided, async_checkpoints=beside)
    world = start(config, tmp_path / "run", plan={"rank": 1, "writing": 2, "full": True})
    assert world.wait() == [2, 2]
    lines = world.said().splitlines()
    assert sum("trying once more" in line for line in lines) == beside
    said = "\n".join(line for line in lines if "trying once more" not in line)
    assert one_line(said).startswith("topkapi: the system refused somewhere: No space left on device.")
    assert checkpoint.steps(tmp_path / "run") == [5]
    assert len(metrics(tmp_path / "run")) == (15 if beside else 10)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_waits_for_what_is_written_beside_training(start, whole, divided, tmp_path, rank):
    config, run = replace(divided, async_checkpoints=True), tmp_path / "run"
    world = start(config, run, plan={"rank": rank, "step": 5, "signal": signal.SIGTERM})
    assert world.wait() == [128 + signal.SIGTERM] * 2, world.said()
    assert checkpoint.steps(run) == [5, 6]
    start(config, run, "--resume").ends_well()
    assert_same_run(run, whole[0])


def test_batches_made_ahead_by_live_language_models_train_alike(start, whole, divided, tmp_path):
    live = replace(divided, data=replace(divided.data, source="live"))
    run = tmp_path / "run"
    world = start(live, run, plan={"rank": 1, "step": 8, "signal": signal.SIGTERM, "ahead": True})
    assert world.wait() == [128 + signal.SIGTERM] * 2, world.said()
    start(live, run, "--resume", plan={"rank": 0, "ahead": True}).ends_well()
    assert_same_run(run, whole[0])
