"""Seen to fail when: a checkpoint is written under its final name at once; a damaged checkpoint counts as none, so that
training starts again from step 0 without a word; pruning keeps the oldest; rows are sharded over the replicas; what is
written in the background is the state itself; old checkpoints go before the new one is there; the next one does not
wait for the last; an error of the background is not raised."""

import errno
import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from topkapi import checkpoint, files
from topkapi.errors import TopkapiError
from topkapi.parallel import open_mesh

META = {"tokens": 5, "position": {"epoch": 0, "place": 1, "row": 2}, "scale": 1 / 3}


def tensors(step):
    return {"W": torch.arange(12.0).view(3, 4) / 7 + step, "silent_for": torch.tensor([step, 2**40])}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 5, 10 and 15."""
    for step in (5, 10, 15):
        checkpoint.save(tmp_path / "run", step, tensors(step), META)
    return tmp_path / "run"


def damage(run, step, name="__0_0.distcp"):
    path = checkpoint.folder_of(run, step) / name
    path.write_bytes(path.read_bytes()[:-1])


def test_what_is_saved_is_loaded(run):
    (found,) = checkpoint.load_newest([run])
    assert (found.step, found.meta) == (15, META)
    assert_same(found.read(), tensors(15))


def test_the_newest_are_kept(run):
    checkpoint.keep_newest(run, 2)
    assert checkpoint.steps(run) == [10, 15]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.load_newest([tmp_path]) is None


def test_a_damaged_one_is_set_aside_for_the_one_before(run, capsys):
    damage(run, 15)
    (run / "checkpoints" / "step-00000010" / checkpoint.MANIFEST).unlink()
    (found,) = checkpoint.load_newest([run])
    assert found.step == 5
    assert_same(found.read(), tensors(5))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("warning: checkpoint") and "Falling back" in line for line in said)
    assert checkpoint.steps(run) == [5]
    assert (run / "checkpoints" / "step-00000015.damaged" / checkpoint.METADATA).exists()


def test_nothing_sound_is_an_error_each_time(run):
    for step in (5, 10, 15):
        damage(run, step)
    for _ in range(2):
        with pytest.raises(TopkapiError, match=r"every checkpoint of .* is damaged"):
            checkpoint.load_newest([run])


def test_runs_side_by_side_go_back_to_a_step_they_share(run, tmp_path):
    other = tmp_path / "other"
    for step in (5, 10):
        checkpoint.save(other, step, tensors(step), META)
    assert [found.step for found in checkpoint.load_newest([run, other])] == [10, 10]
    damage(other, 10)
    assert [found.step for found in checkpoint.load_newest([run, other])] == [5, 5]


def test_runs_without_a_step_in_common_are_refused(run, tmp_path):
    checkpoint.save(tmp_path / "other", 7, tensors(7), META)
    with pytest.raises(TopkapiError, match="no checkpoint of the same step"):
        checkpoint.load_newest([run, tmp_path / "other"])
    with pytest.raises(TopkapiError, match="no checkpoint of the same step"):
        checkpoint.load_newest([run, tmp_path / "new"])


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_older_ones(run, monkeypatch):
    for module, name in ((dcp.FileSystemWriter, "write_data"), (files, "sync"), (checkpoint, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save(run, 20, tensors(20), META)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            f"step-{step:08d}" for step in (5, 10, 15)
        ]


@pytest.fixture
def held(monkeypatch):
    """Nothing is written until this is set."""
    go, original = threading.Event(), dcp.FileSystemWriter.write_data

    def write_data(self, *arguments):
        assert go.wait(60)
        return original(self, *arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)
    return go


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_background_writes_the_state_as_it_was_and_then_removes_old_ones(run, held, device):
    saver = checkpoint.Saver(keep=2, in_background=True)
    state = {name: tensor.to(device) for name, tensor in tensors(20).items()}
    saver.save([checkpoint.Snapshot(run, 20, state, META)])
    for tensor in state.values():
        tensor.zero_()  # training goes on
    assert checkpoint.steps(run) == [5, 10, 15]
    held.set()
    saver.wait()
    assert checkpoint.steps(run) == [15, 20]
    (found,) = checkpoint.load_newest([run])
    assert (found.step, found.meta) == (20, META)
    assert_same(found.read(), tensors(20))
    saver.close()


def test_the_next_one_waits_for_the_last(run, held):
    saver = checkpoint.Saver(keep=9, in_background=True)
    saver.save([checkpoint.Snapshot(run, 20, tensors(20), META)])
    threading.Timer(0.2, held.set).start()
    saver.save([checkpoint.Snapshot(run, 25, tensors(25), META)])
    assert 20 in checkpoint.steps(run)
    saver.close()
    for step in (20, 25):
        assert_same(checkpoint.load(run, step).read(), tensors(step))


@pytest.mark.parametrize("noticed_by", ["save", "wait"])
def test_a_full_disk_in_the_background_leaves_the_older_ones(run, monkeypatch, noticed_by):
    for module, name in ((dcp.FileSystemWriter, "write_data"), (files, "sync"), (checkpoint, "write_json")):
        saver = checkpoint.Saver(keep=1, in_background=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            saver.save([checkpoint.Snapshot(run, 20, tensors(20), META)])
            with pytest.raises(OSError, match="No space left"):
                saver.wait() if noticed_by == "wait" else saver.save([])
        saver.close()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            f"step-{step:08d}" for step in (5, 10, 15)
        ]


def test_what_could_not_be_written_is_tried_once_more(run, monkeypatch, capsys):
    original, calls = dcp.FileSystemWriter.write_data, []

    def write_data(self, *arguments):
        calls.append(None)
        return full() if len(calls) == 1 else original(self, *arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)
    saver = checkpoint.Saver(keep=9, in_background=True)
    for step in (20, 25):
        saver.save([checkpoint.Snapshot(run, step, tensors(step), META)])
    saver.wait()
    saver.close()
    assert "trying once more" in capsys.readouterr().err
    for step in (20, 25):
        assert_same(checkpoint.load(run, step).read(), tensors(step))


def test_leftovers_of_a_kill_are_no_checkpoint(run):
    shutil.copytree(run / "checkpoints" / "step-00000015", run / "checkpoints" / ".step-00000020.tmp")
    assert checkpoint.steps(run) == [5, 10, 15]
    checkpoint.save(run, 20, tensors(20), META)
    assert checkpoint.load_newest([run])[0].step == 20


def whole_state():
    """A trainer's kinds of tensors, of 37 latents: they do not divide evenly."""
    n, d = 37, 6
    random = torch.Generator().manual_seed(0)
    rows = {
        "W_enc": torch.randn(n, d, generator=random),
        "W_dec": torch.randn(n, d, generator=random).bfloat16(),
        "W_dec.mean": torch.randint(-128, 128, (n, d), generator=random, dtype=torch.int8),
        "W_dec.square": torch.randint(0, 256, (n, d), generator=random, dtype=torch.uint8),
        "W_dec.mean_scale": torch.randn(n, generator=random),
        "silent_for": torch.randint(2**40, (n,), generator=random),
    }
    return rows, {"pre_bias": torch.randn(d, generator=random), "pre_bias.mean": torch.randn(d, generator=random)}


def part_of_state(mesh, fill=None):
    """This process's part; with `fill`, tensors of its shape and nothing of its content."""
    rows, same = whole_state()
    parts = {name: mesh.latents(37) if name == "silent_for" else mesh.owned(37) for name in rows}
    mine = {name: tensor[parts[name]].clone() for name, tensor in rows.items()} | same
    if fill is not None:
        mine = {name: torch.full_like(tensor, fill) for name, tensor in mine.items()}
    state = {
        name: checkpoint.Rows(x, 37, of_shard=name == "silent_for") if name in rows else x for name, x in mine.items()
    }
    return mine, state


def save_in_world(run, n_shards):
    with open_mesh(n_shards, "cpu") as mesh:
        checkpoint.save(Path(run), 5, part_of_state(mesh)[1], META, mesh)


def save_in_background(run, n_shards):
    with open_mesh(n_shards, "cpu") as mesh:
        saver, (mine, state) = checkpoint.Saver(1, True, mesh), part_of_state(mesh)
        for step in (4, 5):
            saver.save([checkpoint.Snapshot(Path(run), step, state, META)])
        for tensor in mine.values():
            tensor.zero_()
        saver.wait()
        assert checkpoint.steps(Path(run)) == [5]
        saver.close()


def load_in_world(run, n_shards):
    with open_mesh(n_shards, "cpu") as mesh:
        (found,) = checkpoint.load_newest([Path(run)], mesh)
        assert (found.step, found.meta) == (5, META)
        mine, state = part_of_state(mesh, fill=7)
        found.read_into(state, mesh)
        assert_same(mine, part_of_state(mesh)[0])


def run_both(fork_server, folder, run, writer, reader, save=save_in_world):
    """Save in a world of (ranks, shards), load in another; a world of one rank is the test's own process."""
    for (n_ranks, n_shards), call in ((writer, save), (reader, load_in_world)):
        if n_ranks == 1:
            call(run, n_shards)
            continue
        logs = folder / f"{run.name}-{call.__name__}"
        logs.mkdir()
        ended = fork_server.run_world(
            n_ranks, [str(run), n_shards], logs, folder, call=f"tests.test_checkpoint:{call.__name__}"
        )
        assert ended == [0] * n_ranks, "".join((logs / f"rank-{rank}").read_text() for rank in range(n_ranks))


@pytest.mark.parametrize(
    ("writer", "reader"), [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 1), (2, 2))], ids=["1 to 2", "2 to 1", "replicas"]
)
def test_any_mesh_reads_what_another_wrote(fork_server, tmp_path, writer, reader):
    run_both(fork_server, tmp_path, tmp_path / "run", writer, reader)
    rows, same = whole_state()
    assert_same(checkpoint.load(tmp_path / "run", 5).read(), rows | same)


@pytest.mark.parametrize("writer", [(2, 1), (2, 2), pytest.param((4, 2), marks=pytest.mark.many_ranks)])
def test_processes_write_together_in_the_background(fork_server, tmp_path, writer):
    run_both(fork_server, tmp_path, tmp_path / "run", writer, (1, 1), save_in_background)


@pytest.mark.many_ranks
def test_any_mesh_of_four_reads_what_another_wrote(fork_server, tmp_path):
    meshes = [(1, 1), (4, 1), (4, 2), (4, 4)]
    for i, (writer, reader) in enumerate(itertools.product(meshes, meshes)):
        run_both(fork_server, tmp_path, tmp_path / f"run-{i}", writer, reader)


def save_where_rank_1_cannot(run, in_background):
    with open_mesh(2, "cpu") as mesh:
        saver = checkpoint.Saver(1, in_background, mesh)
        if mesh.rank == 1:
            dcp.FileSystemWriter.write_data = full
        if in_background:
            saver.save([checkpoint.Snapshot(Path(run), 20, part_of_state(mesh)[1], META)])
        with pytest.raises(OSError, match="No space left") as raised:
            saver.save([checkpoint.Snapshot(Path(run), 20, part_of_state(mesh)[1], META)])
        assert raised.value.is_common
        saver.close()


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
def test_a_disk_that_is_full_for_one_process_is_an_error_for_all(fork_server, run, tmp_path, in_background):
    call = "tests.test_checkpoint:save_where_rank_1_cannot"
    ended = fork_server.run_world(2, [str(run), in_background], tmp_path, tmp_path, call=call)
    assert ended == [0, 0], (tmp_path / "rank-0").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in (5, 10, 15)]


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    folder = checkpoint.folder_of(tmp_path, 5)
    folder.mkdir(parents=True)
    (folder / "state.safetensors").touch()
    with pytest.raises(TopkapiError, match="written by an earlier version of Topkapi"):
        checkpoint.load_newest([tmp_path])
