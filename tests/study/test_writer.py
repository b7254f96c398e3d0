"""Studies that are killed and continued, refused and damaged.

Seen to fail when: files are not cut back to what progress.json counts; sums are not saved with it; a range of latents
counts as done before it is written; a study of another split goes on as if it were the same.
"""

import json
import os
import shutil
import signal
import time
from copy import copy
from dataclasses import replace

import numpy as np
import pytest

import topkapi.study
from tests.command_line import contents
from tests.data.tiny import make_corpus
from tests.study.conftest import TOKENS, finished
from topkapi.cli import main
from topkapi.errors import TopkapiError
from topkapi.study import writer
from topkapi.train import open_text

KILLED = "tests.study.killed:study"


@pytest.fixture(scope="module", params=[(), ("--reservoir", "3")], ids=["complete", "reservoir"])
def whole(request, fork_server, trained, tmp_path_factory):
    """The options, the files of a study that nothing disturbs, its file operations and its seconds."""
    folder, options = tmp_path_factory.mktemp("whole"), ("--tokens", str(TOKENS), *request.param)
    fork_server.run(["--version"], folder / "log", folder / "cache")  # starting the server is not timed
    started = time.monotonic()
    assert run(fork_server, trained, folder, 0, options) == 0, (folder / "log").read_text()
    n_operations = int((folder / "log").read_text().splitlines()[-1])
    assert n_operations > 100
    return options, contents(folder / "study"), n_operations, time.monotonic() - started


def run(fork_server, trained, folder, kill_at, options):
    """A process's exit status; its log is in the folder."""
    arguments = [str(trained.run), str(folder / "study"), str(kill_at), *options]
    return fork_server.run(arguments, folder / "log", os.environ["XDG_CACHE_HOME"], call=KILLED)


@pytest.mark.parametrize("seed", range(3))
def test_a_study_killed_and_continued_has_the_same_bytes(fork_server, trained, whole, tmp_path, seed):
    options, wanted, n_operations, _ = whole
    random = np.random.default_rng(seed)
    hits = 0
    for first, last in ((30, n_operations // 6), (10, n_operations // 4), (1, n_operations)):  # most while it encodes
        status = run(fork_server, trained, tmp_path, int(random.integers(first, last)), options)
        hits += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
    assert hits
    assert run(fork_server, trained, tmp_path, 0, options) == 0, (tmp_path / "log").read_text()
    found = contents(tmp_path / "study")
    header, other = (json.loads(files.pop("study.json")) for files in (found, dict(wanted)))
    for facts in (header, other):
        del facts["checksum"], facts["about"]["run"]
    assert header == other
    assert found == {name: data for name, data in wanted.items() if name != "study.json"}


def test_a_study_killed_at_any_time_has_the_same_bytes(fork_server, trained, whole, tmp_path):
    options, wanted, _, seconds = whole
    random, log = np.random.default_rng(0), tmp_path / "log"
    for _ in range(2):
        arguments = [str(trained.run), str(tmp_path / "study"), "0", *options]
        pid = fork_server.start(arguments, log, os.environ["XDG_CACHE_HOME"], call=KILLED)
        time.sleep(random.uniform(0.3, 0.8) * seconds)
        os.kill(pid, signal.SIGKILL)
        assert fork_server.wait(pid) in (0, -signal.SIGKILL)
    assert run(fork_server, trained, tmp_path, 0, options) == 0, log.read_text()
    found = contents(tmp_path / "study")
    assert found.keys() == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted if name != "study.json")


def refused(capsys, arguments, *expected):
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("topkapi: ")]
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    for text in expected:
        assert text in lines[0]


def test_mistakes_are_explained_in_one_line(trained, tmp_path, capsys):
    out = ("--out", tmp_path / "study")
    refused(capsys, ["study", tmp_path / "none", "--tokens", 10], "no run", "none")
    refused(capsys, ["study", trained.run, *out], "--tokens", "--help")
    refused(capsys, ["study", trained.run, *out, "--tokens", 0], "StudyConfig.tokens must be at least 1; got 0")
    refused(capsys, ["study", trained.run, *out, "--tokens", 10**6], "held_out text has", "--split train")
    assert not (tmp_path / "study").exists()


def test_the_command_writes_into_the_run_and_knows_when_it_is_done(trained, capsys, tmp_path):
    home = shutil.copytree(trained.run, tmp_path / "copy")
    arguments = ["study", str(home), "--tokens", "300"]
    assert main(arguments) == 0
    before = contents(home / "study")
    assert main(arguments) == 0
    assert "finished before" in capsys.readouterr().err
    assert contents(home / "study") == before
    refused(capsys, [*arguments, "--split", "train"], "something else", "split, text", "--out")
    study = topkapi.study.open(home / "study")
    study.verify()
    assert study.nearest(0, 1)
    refused(capsys, ["study", home, "--tokens", 200], "n_contexts")


def test_a_study_of_another_run_is_refused(trained, small_config, tmp_path):
    trained.study(tmp_path / "study")
    other = finished(replace(small_config, model=replace(small_config.model, seed=5)), tmp_path / "run")
    with pytest.raises(TopkapiError, match=r"something else: autoencoder differ"):
        other.study(tmp_path / "study")
    study = topkapi.study.open(tmp_path / "study", run=tmp_path / "run")
    assert study.n_fired.sum() > 0
    with pytest.raises(TopkapiError, match="of another autoencoder"):
        study.nearest(0)
    study, lm = topkapi.study.open(tmp_path / "study"), copy(trained.lm)
    lm.fingerprint = "other"
    with pytest.raises(TopkapiError, match="of another language model"):
        study.votes(0, lm)


def test_an_unfinished_study_does_not_go_on_with_another_corpus(trained, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_invert", stop)
        with pytest.raises(KeyboardInterrupt):
            trained.study(tmp_path / "study")
    with pytest.raises(TopkapiError, match="not finished"):
        topkapi.study.open(tmp_path / "study")
    corpus = make_corpus(tmp_path / "other.jsonl", 35)
    config = replace(trained.config, data=replace(trained.config.data, corpora=(corpus,)))
    changed = replace(trained, config=config, text=open_text(config).splits.held_out)
    with pytest.raises(TopkapiError, match=r"something else: text differ"):
        changed.study(tmp_path / "study")
    trained.study(tmp_path / "study").verify()


def test_damage_is_refused(trained, tmp_path):
    folder = tmp_path / "study"
    trained.study(folder)
    for name in contents(folder):
        path, before = folder / name, (folder / name).read_bytes()
        path.write_bytes(before[:-4])
        with pytest.raises(TopkapiError, match="damaged"):
            topkapi.study.open(folder)
        changed = bytearray(before)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(TopkapiError, match="damaged"):
            topkapi.study.open(folder).verify()
        with pytest.raises(TopkapiError, match="damaged"):
            trained.study(folder)
        path.unlink()
        with pytest.raises(TopkapiError, match=name):
            topkapi.study.open(folder)
        path.write_bytes(before)
    with pytest.raises(TopkapiError, match=r"study\.json"):
        topkapi.study.open(tmp_path)
    study = topkapi.study.open(folder)
    for wrong in (-1, study.n_latents):
        with pytest.raises(TopkapiError, match="no latent"):
            study.latent(wrong)
    with pytest.raises(TopkapiError, match="no row"):
        study.code(study.n_tokens)


def test_a_reservoir_refuses_what_needs_the_complete_code(trained, tmp_path):
    study = trained.study(tmp_path / "study", reservoir=2)
    for ask in (study.latent(0).coactive, lambda: study.code(0)):
        with pytest.raises(TopkapiError, match="without --reservoir"):
            ask()
