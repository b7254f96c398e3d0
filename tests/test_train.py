"""Seen to fail when: the dead counters, the EMA or the data position are not restored; a signal before the first step
after a resume finds no loss to check; checkpoints are pruned before all runs side by side have the new one; the
autoencoders side by side share a dead counter; an error of a checkpoint beside training is not raised."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import checkpoint as dcp

import topkapi.train
from tests.command_line import assert_same_run, contents, metrics, one_line, train_arguments
from tests.data.tiny import make_corpus
from topkapi import checkpoint, published
from topkapi.config import LossConfig, ModelConfig, OptimConfig, to_dict
from topkapi.data.activations import LiveBlocks
from topkapi.data.batches import ShuffledBatches
from topkapi.data.pipeline import BatchesAhead
from topkapi.errors import Interrupted, TopkapiError
from topkapi.model import Working
from topkapi.parallel import ALONE
from topkapi.train import Trainer, _warn_of_loss, load_run, saved_config, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(one_thread, tiny_config, tmp_path_factory):
    """A finished run of `tiny_config`."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train([tiny_config], [run])
    return run


def stop_in_step(monkeypatch, step, signal_number=signal.SIGTERM):
    """From here on a signal arrives while step `step` (from 1) is computed."""
    original = Trainer.step_

    def step_(self, x, done):
        if done == step - 1:
            os.kill(os.getpid(), signal_number)
        original(self, x, done)

    monkeypatch.setattr(Trainer, "step_", step_)


def train_until(configs, runs, step, resume=False, match="SIGTERM"):
    """Train until a signal comes in the middle of step `step`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, step)
        with pytest.raises(Interrupted, match=match):
            train(configs, runs, resume=resume)


def test_a_finished_run_folder_holds_what_it_should(undisturbed, tiny_config):
    assert {path.name for path in undisturbed.iterdir()} == {
        ".lock", "README.md", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors",
    }  # fmt: skip
    assert checkpoint.steps(undisturbed) == [15, 20]
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["tokens"] == tiny_config.tokens
    assert lines[0]["lr"] > 0
    assert lines[-1]["normalized_mse"] < lines[0]["normalized_mse"] - 0.01
    assert max(line["auxk"] for line in lines) > 0, "no latent died: AuxK is not covered"
    ae, config = load_run(undisturbed)
    assert config == tiny_config.resolved(64)
    assert ae.summary["steps"] == 20
    assert ae.summary["last_batch"]["normalized_mse"] == lines[-1]["normalized_mse"]


@pytest.mark.parametrize("stops", [(10,), (3,), (7, 13), (20,)])
def test_stopped_and_resumed_equals_undisturbed(undisturbed, tiny_config, tmp_path, stops):
    run = tmp_path / "run"
    for stop in stops:
        said = f"SIGTERM: .* saved at step {stop} of 20; continue with topkapi"
        train_until([tiny_config], [run], stop, resume=True, match=said)
        assert checkpoint.steps(run)[-1] == stop
        assert not (run / "model.safetensors").exists()
    train([tiny_config], [run], resume=True)
    assert_same_run(run, undisturbed)
    assert (run / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()


@pytest.fixture
def beside_config(tiny_config):
    """`tiny_config` with checkpoints written beside training."""
    return replace(tiny_config, async_checkpoints=True)


def test_training_goes_on_beside_a_checkpoint_and_ends_alike(undisturbed, beside_config, tmp_path, monkeypatch):
    run, reached, found = tmp_path / "run", threading.Event(), []
    step_, write_data = Trainer.step_, dcp.FileSystemWriter.write_data

    def stepping(self, x, done):
        if done == 8:
            found.append(checkpoint.steps(run))
            reached.set()
        step_(self, x, done)

    def writing(self, *arguments):
        assert reached.wait(60)
        return write_data(self, *arguments)

    monkeypatch.setattr(Trainer, "step_", stepping)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", writing)
    train([beside_config], [run])
    assert found == [[]]  # the checkpoint of step 5 was being written in step 9
    assert_same_run(run, undisturbed)
    assert checkpoint.steps(run) == checkpoint.steps(undisturbed)


def test_stopped_beside_a_checkpoint_and_resumed_equals_undisturbed(undisturbed, beside_config, tmp_path):
    run = tmp_path / "run"
    for stop in (5, 6, 13):
        said = f"SIGTERM: .* saved at step {stop} of 20; continue with topkapi"
        train_until([beside_config], [run], stop, resume=True, match=said)
        assert checkpoint.steps(run)[-1] == stop
    train([beside_config], [run], resume=True)
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("step", [10, 20], ids=["the next one", "the end"])
def test_a_full_disk_beside_training_is_told_no_later_than_at(undisturbed, beside_config, tmp_path, monkeypatch, step):
    run, original, begun = tmp_path / "run", dcp.FileSystemWriter.write_data, []

    def write_data(self, *arguments):
        begun.append(None)
        if len(begun) >= step // 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", write_data)
        with pytest.raises(OSError, match="No space left"):
            train([beside_config], [run])
    assert metrics(run)[-1]["step"] == min(step + 5, 20)
    assert checkpoint.steps(run)[-1] == step - 5
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not (run / "model.safetensors").exists()
    train([beside_config], [run], resume=True)
    assert_same_run(run, undisturbed)


def test_stopped_while_waiting_for_data_right_after_a_resume(undisturbed, tiny_config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train_until([tiny_config], [run], 4)

    def wait_long(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(ShuffledBatches, "__next__", wait_long)
        with pytest.raises(Interrupted, match=r"SIGINT: .* saved at step 4 of 20"):
            train([tiny_config], [run], resume=True)
    train([tiny_config], [run], resume=True)
    assert_same_run(run, undisturbed)


def test_stopped_while_the_source_is_opened(tiny_config, tmp_path, monkeypatch):
    def open_long(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("topkapi.train.open_source", open_long)
    with pytest.raises(Interrupted, match="no step was done; run the same command again"):
        train([tiny_config], [tmp_path / "run"])
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_locked_run_is_refused(fork_server, tiny_config, tiny_cache, tmp_path, number):
    config = replace(tiny_config, tokens=20_000, save_every=1000)
    run, log = tmp_path / "run", tmp_path / "log"
    pid = fork_server.start(train_arguments(config, run), log, tiny_cache.parent)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 7:
        assert time.monotonic() < deadline, log.read_text()
    with pytest.raises(TopkapiError, match="another process is training in"):
        train([config], [run], resume=True)
    os.kill(pid, number)
    assert fork_server.wait(pid) == 128 + number
    line = one_line(log.read_text())
    assert line.startswith(f"topkapi: stopped by {number.name}: {run} saved at step ")
    assert line.endswith(f"of 200; continue with topkapi train {run} --resume.")
    assert 7 <= checkpoint.steps(run)[-1] < 200
    log.unlink()
    assert fork_server.run(["train", str(run), "--resume"], log, tiny_cache.parent) == 0, log.read_text()
    assert [line["step"] for line in metrics(run)] == list(range(1, 201))
    train([config], [tmp_path / "whole"])
    assert_same_run(run, tmp_path / "whole")


def neighbours(config):
    """Autoencoders that differ in all that may differ."""
    wide = replace(config, model=ModelConfig(n_latents=200, k=7, seed=1))
    clipped = replace(config, optim=replace(config.optim, lr=1e-2, clip_norm=0.1, ema_decay=0.0))
    relu = replace(
        config,
        model=ModelConfig(n_latents=96, activation="relu"),
        loss=LossConfig(sparsity="l1", l1_coefficient=0.05),
    )
    free = replace(
        relu,
        loss=LossConfig(sparsity="l1_decoder_norm", l1_coefficient=0.05),
        optim=OptimConfig(lr=1e-3, unit_norm_decoder=False),
    )
    return [config, wide, clipped, relu, free]


def test_side_by_side_equals_alone(undisturbed, tiny_config, tmp_path):
    configs = neighbours(tiny_config)
    together = [tmp_path / f"together-{i}" for i in range(len(configs))]
    train_until(configs, together, 12, match="continue with the same command with --resume")
    train(configs, together, resume=True)
    alone = [undisturbed]
    for i, config in enumerate(configs[1:]):
        alone.append(tmp_path / f"alone-{i}")
        train([config], [alone[-1]])
    for ours, theirs in zip(together, alone, strict=True):
        assert_same_run(ours, theirs)


def test_live_activations_train_exactly_as_cached_ones(undisturbed, tiny_live_config, tmp_path):
    run = tmp_path / "run"
    train([tiny_live_config], [run])
    assert_same_run(run, undisturbed)


@pytest.fixture
def ahead(monkeypatch):
    """Batches are made ready by a thread, as on a GPU."""
    monkeypatch.setattr("topkapi.train.open_batches", BatchesAhead)


def test_batches_made_ahead_train_exactly_alike(undisturbed, tiny_config, tiny_live_config, tmp_path, ahead):
    for config, stops in ((tiny_config, (7, 13)), (tiny_live_config, (8,))):
        run = tmp_path / config.data.source
        for stop in stops:
            train_until([config], [run], stop, resume=True)
        train([config], [run], resume=True)
        assert_same_run(run, undisturbed)


def test_stopped_while_a_thread_computes_what_is_awaited(undisturbed, tiny_live_config, tmp_path, monkeypatch, ahead):
    run, original, blocks = tmp_path / "run", LiveBlocks.harvest, []

    def harvest(self, i, advance):
        blocks.append(i)
        if len(blocks) == 3:
            time.sleep(0.5)  # by now the loop waits
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.01)
                advance(0)
        return original(self, i, advance)

    with monkeypatch.context() as patch:
        patch.setattr(LiveBlocks, "harvest", harvest)
        with pytest.raises(Interrupted, match=r"SIGINT: .* saved at step \d+ of 20"):
            train([tiny_live_config], [run])
    train([tiny_live_config], [run], resume=True)
    assert_same_run(run, undisturbed)


def test_a_harvest_that_fails_in_the_thread_ends_the_run(tiny_live_config, tmp_path, monkeypatch, ahead):
    original = LiveBlocks.harvest

    def harvest(self, i, advance):
        if len(self._counts) == 2:
            raise TopkapiError("not finite")
        return original(self, i, advance)

    monkeypatch.setattr(LiveBlocks, "harvest", harvest)
    with pytest.raises(TopkapiError, match="not finite"):
        train([tiny_live_config], [tmp_path / "run"])
    assert len(metrics(tmp_path / "run")) > 5


def test_resuming_a_finished_run_changes_nothing(undisturbed, tiny_config, capsys):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}

    before, held = stamps(), contents(undisturbed)
    train([tiny_config], [undisturbed], resume=True)
    assert stamps() == before
    assert contents(undisturbed) == held
    assert "finished before, nothing left to do" in capsys.readouterr().err


def test_a_damaged_finished_autoencoder_is_written_again(tiny_config, tmp_path):
    run = tmp_path / "run"
    train([tiny_config], [run])
    before = contents(run)
    (run / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
    train([tiny_config], [run], resume=True)
    assert contents(run) == before


def test_a_damaged_newest_checkpoint_costs_its_steps_only(undisturbed, tiny_config, tmp_path, capsys):
    run = tmp_path / "run"
    train_until([tiny_config], [run], 13)
    state = run / "checkpoints" / "step-00000013" / "__0_0.distcp"
    state.write_bytes(state.read_bytes()[:1000])
    train([tiny_config], [run], resume=True)
    assert_same_run(run, undisturbed)
    said = capsys.readouterr().err
    assert f"warning: checkpoint: {state} is damaged" in said
    assert "resuming at step 10" in said


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside training"])
def test_a_failure_between_two_runs_leaves_a_checkpoint_they_share(tiny_config, tmp_path, monkeypatch, beside):
    config = replace(tiny_config, keep_checkpoints=1, async_checkpoints=beside)
    configs = [replace(config, model=replace(config.model, seed=seed)) for seed in (0, 1)]
    runs = [tmp_path / "a", tmp_path / "b"]
    original = checkpoint.save

    def save(run, step, *rest):
        if run == runs[1] and step == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(OSError, match="No space left"):
            train(configs, runs)
    assert [checkpoint.steps(run) for run in runs] == [[5, 10], [5]]
    train(configs, runs, resume=True)
    for config, run in zip(configs, runs, strict=True):
        train([config], [tmp_path / "alone" / run.name])
        assert_same_run(run, tmp_path / "alone" / run.name)


def test_a_run_does_not_go_on_with_another_corpus(tiny_config, tmp_path):
    corpus = make_corpus(tmp_path / "corpus.jsonl", 30)
    config = replace(tiny_config, data=replace(tiny_config.data, corpora=(corpus,)))
    run = tmp_path / "run"
    train_until([config], [run], 6)
    before = contents(run)
    make_corpus(tmp_path / "corpus.jsonl", 29)
    with pytest.raises(TopkapiError, match="trained on other activations: tokens changed since"):
        train([config], [run], resume=True)
    assert contents(run) == before


def test_saved_settings_are_complete(undisturbed, tiny_config):
    saved = json.loads((undisturbed / "config.json").read_text())
    assert saved["training"] == to_dict(tiny_config.resolved(64))
    assert Path(saved["language_model"]).is_dir()


def forget(run, *names):
    """Make a run's config.json that of a version without these fields."""
    description = published.read_config(run)
    for name in names:
        del description["training"][name]
    published.write_config(run, description)


def test_a_run_of_an_older_version_is_opened_and_resumed(undisturbed, tiny_config, tmp_path, capsys):
    old, run = tmp_path / "old", tmp_path / "run"
    shutil.copytree(undisturbed, old)
    train_until([tiny_config], [run], 12)
    for folder in (old, run):
        forget(folder, "async_checkpoints", "parallel")
    capsys.readouterr()
    assert saved_config(old) == load_run(old)[1] == saved_config(undisturbed)
    assert capsys.readouterr().err.count("without parallel, async_checkpoints") == 1
    train([saved_config(run)], [run], resume=True)
    assert "without parallel, async_checkpoints" in capsys.readouterr().err
    assert_same_run(run, undisturbed)


def test_a_broken_neighbour_is_left_behind(undisturbed, tiny_config, tmp_path, capsys):
    broken = replace(tiny_config, optim=replace(tiny_config.optim, lr=1e38))
    runs = [tmp_path / "broken", tmp_path / "sound"]
    with pytest.raises(TopkapiError, match="broken did not finish, see above; the others did"):
        train([broken, tiny_config], runs)
    assert "The others go on without it" in capsys.readouterr().err
    assert not (runs[0] / "model.safetensors").exists()
    assert_same_run(runs[1], undisturbed)


def test_what_is_lost_is_counted_in_logged_steps_alone(tiny_config, tmp_path, monkeypatch):
    asked, step = [], topkapi.train.topk_step

    def recorded(*given, count_lost):
        asked.append(count_lost)
        return step(*given, count_lost=count_lost)

    monkeypatch.setattr("topkapi.train.topk_step", recorded)
    train([replace(tiny_config, log_every=3, tokens=700)], [tmp_path / "run"])
    assert [i for i, counts in enumerate(asked, 1) if counts] == [3, 6, 7]


def test_much_that_is_lost_in_selection_is_said_once(capsys):
    trainer = object.__new__(Trainer)
    trainer.has_warned_of_loss, trainer._last = False, None
    for lost, said in ((0.001, False), (0.034, True), (0.04, False)):
        trainer.latest = {"lost": lost}
        _warn_of_loss(trainer)
        assert ("3.4% of the k largest" in capsys.readouterr().err) == said


def test_loading_waits_for_rows_that_still_travel(tmp_path):
    trainer, working, came = object.__new__(Trainer), object.__new__(Working), []
    working._travelling = {"W_enc": lambda: came.append("W_enc")}
    trainer.working, trainer.source_identity, trainer.mesh, trainer._state = working, {}, ALONE, dict

    class Saved(checkpoint.Checkpoint):
        def read_into(self, state, mesh=ALONE):
            assert came == ["W_enc"]  # a gather that ends later may bring back what was there before
            raise KeyboardInterrupt

    meta = {"tokens": 1, "position": {}, "n_steps": 1, "scale": 1.0, "metrics": {}, "source": {}}
    with pytest.raises(KeyboardInterrupt):
        trainer.load_(Saved(1, meta, tmp_path))
