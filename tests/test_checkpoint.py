"""Seen to fail when: a checkpoint is written under its final name at once; a damaged checkpoint counts as none, so that
training starts again from step 0 without a word; pruning keeps the oldest."""

import errno
import os
import shutil

import pytest
import torch

from topkapi import checkpoint, files
from topkapi.errors import TopkapiError

META = {"tokens": 5, "position": {"epoch": 0, "place": 1, "row": 2}, "scale": 1 / 3}


def tensors(step):
    return {"W": torch.arange(12.0).view(3, 4) / 7 + step, "silent_for": torch.tensor([step, 2**40])}


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 5, 10 and 15."""
    for step in (5, 10, 15):
        checkpoint.save(tmp_path / "run", step, tensors(step), META)
    return tmp_path / "run"


def damage(run, step):
    path = run / "checkpoints" / f"step-{step:08d}" / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:-1])


def test_what_is_saved_is_loaded(run):
    (found,) = checkpoint.load_newest([run])
    assert (found.step, found.meta) == (15, META)
    assert found.tensors.keys() == tensors(15).keys()
    for name, tensor in tensors(15).items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


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
    assert torch.equal(found.tensors["W"], tensors(5)["W"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("warning: checkpoint") and "Falling back" in line for line in said)
    assert checkpoint.steps(run) == [5]
    assert (run / "checkpoints" / "step-00000015.damaged" / checkpoint.STATE).exists()


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


def test_a_full_disk_leaves_the_older_ones(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((checkpoint, "save_tensors"), (files, "sync"), (checkpoint, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save(run, 20, tensors(20), META)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            f"step-{step:08d}" for step in (5, 10, 15)
        ]


def test_leftovers_of_a_kill_are_no_checkpoint(run):
    shutil.copytree(run / "checkpoints" / "step-00000015", run / "checkpoints" / ".step-00000020.tmp")
    assert checkpoint.steps(run) == [5, 10, 15]
    checkpoint.save(run, 20, tensors(20), META)
    assert checkpoint.load_newest([run])[0].step == 20
