"""Studies that several processes write, that are killed and continued, refused and damaged.

Seen to fail when: files are not cut back to what progress.json counts; sums are not saved with it; a range of latents
counts as done before it is written; a study of another split goes on as if it were the same; ranks' blocks are taken in
another order; files of others are not looked for.
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
from topkapi.files import read_json, write_json
from topkapi.parallel import Mesh
from topkapi.study import writer
from topkapi.train import open_text

KILLED = "tests.study.killed:study"


@pytest.fixture(scope="module", params=[(), ("--reservoir", "3")], ids=["complete", "reservoir"])
def whole(request, fork_server, trained, tmp_path_factory):
    """The options, the files of a study that nothing disturbs, its file operations and its seconds."""
    folder, options = tmp_path_factory.mktemp("whole"), ("--tokens", str(TOKENS), *request.param)
    fork_server.run(["--version"], folder / "log", folder / "cache")  # starting the server is not timed
    started = time.monotonic()
    assert run(fork_server, trained, folder, options) == [0], said(folder)
    assert n_operations(folder) > 100
    return options, contents(folder / "study"), n_operations(folder), time.monotonic() - started


def start(fork_server, trained, folder, options, n_ranks=1, disturbance="kill", rank=0, at=0):
    """Processes that write a study, see `tests.study.killed`; their logs are in the folder."""
    arguments = [str(trained.run), str(folder / "study"), disturbance, str(rank), str(at), *options]
    cache = os.environ["XDG_CACHE_HOME"]
    if n_ranks == 1:
        return [fork_server.start(arguments, folder / "rank-0", cache, call=KILLED)]
    return fork_server.start_world(n_ranks, arguments, folder, cache, call=KILLED)


def run(fork_server, *how, **more):
    """The exit statuses of a world that has ended."""
    return [fork_server.wait(pid) for pid in start(fork_server, *how, **more)]


def said(folder):
    return "".join(path.read_text() for path in sorted(folder.glob("rank-*")))


def n_operations(folder, rank=0):
    return int((folder / f"rank-{rank}").read_text().splitlines()[-1])


def same(folder, wanted):
    """Every file has the bytes wanted; study.json but for where the run is, as seen from the study."""
    found, wanted = contents(folder / "study"), dict(wanted)
    header, other = (json.loads(files.pop("study.json")) for files in (found, wanted))
    for facts in (header, other):
        del facts["checksum"], facts["about"]["run"]
    return header == other and found == wanted


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_processes_write_the_same_bytes_together(fork_server, trained, whole, tmp_path, n_ranks):
    options, wanted, *_ = whole
    assert run(fork_server, trained, tmp_path, options, n_ranks) == [0] * n_ranks, said(tmp_path)
    assert same(tmp_path, wanted)
    assert min(n_operations(tmp_path, rank) for rank in range(n_ranks)) > 10, "all had work"


@pytest.mark.parametrize(("seed", "worlds"), [(0, (1, 2, 1, 1)), (1, (3, 1, 2))])
def test_a_study_killed_and_continued_has_the_same_bytes(fork_server, trained, whole, tmp_path, seed, worlds):
    options, wanted, n_files, _ = whole
    random, hits = np.random.default_rng(seed), 0
    *killed, last = worlds
    spans = ((30, n_files // 6), (10, n_files // 4), (1, n_files))  # most while it encodes
    for n_ranks, span in zip(killed, spans[-len(killed) :], strict=True):
        disturbed = {"rank": (rank := int(random.integers(n_ranks))), "at": int(random.integers(*span))}
        if rank:
            disturbed["at"] //= 8  # others than rank 0 write nothing
        found = run(fork_server, trained, tmp_path, options, n_ranks, **disturbed)
        hits += -signal.SIGKILL in found
        if n_ranks > 1 and -signal.SIGKILL in found:
            assert f"rank {rank} of {n_ranks} is gone" in said(tmp_path)
            assert 0 not in found
    assert hits
    assert run(fork_server, trained, tmp_path, options, last) == [0] * last, said(tmp_path)
    assert same(tmp_path, wanted)


def test_a_study_killed_at_any_time_has_the_same_bytes(fork_server, trained, whole, tmp_path):
    options, wanted, _, seconds = whole
    random = np.random.default_rng(0)
    for _ in range(2):
        (pid,) = start(fork_server, trained, tmp_path, options)
        time.sleep(random.uniform(0.3, 0.8) * seconds)
        os.kill(pid, signal.SIGKILL)
        assert fork_server.wait(pid) in (0, -signal.SIGKILL)
    assert run(fork_server, trained, tmp_path, options) == [0], said(tmp_path)
    assert same(tmp_path, wanted)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_with_one_line(fork_server, trained, tmp_path, rank):
    options = ("--tokens", str(TOKENS))
    statuses = run(fork_server, trained, tmp_path, options, 2, disturbance="raise", rank=rank, at=4)
    assert 0 not in statuses
    lines = [line for line in said(tmp_path).splitlines() if "topkapi: " in line]
    assert len(lines) == 1, said(tmp_path)
    assert lines[0].endswith("something is wrong here.")
    assert "Traceback" not in said(tmp_path)


def test_processes_that_read_something_else_are_refused():
    class Second(Mesh):
        """The mesh of two processes, as rank 1 sees it."""

        def on_first(self, _):
            return {"text": "a", "site": "resid_post.0"}

        def raise_any(self, failure):
            if failure:
                raise failure

    second = Second(n_replicas=2, rank=1)
    writer.require_agreement({"text": "a", "site": "resid_post.0"}, second)
    with pytest.raises(TopkapiError, match="rank 1 of 2 has another text than rank 0"):
        writer.require_agreement({"text": "b", "site": "resid_post.0"}, second)


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
        with pytest.raises(TopkapiError, match=r"damaged.* Delete the folder .* and run topkapi study again"):
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


@pytest.mark.parametrize("reservoir", [0, 2])
def test_files_of_others_in_its_folder_stay(trained, tmp_path, reservoir):
    """Model weights are called pytorch_model.bin, and --out may be a folder that has some."""
    (tmp_path / "pytorch_model.bin").write_text("weights")
    for _ in range(2):  # written, then found finished
        trained.study(tmp_path, reservoir=reservoir)
    files = json.loads((tmp_path / "study.json").read_text())["files"]
    wanted = {*(f"{name}.bin" for name in files), "pytorch_model.bin", "study.json", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == wanted


@pytest.mark.parametrize("name", ["tokens.bin", "candidate_rows.bin", "state-0.npz"])
def test_a_file_of_others_with_the_name_of_a_studys_is_not_written_over(trained, tmp_path, name):
    (tmp_path / name).write_text("somebody's tokens")
    with pytest.raises(TopkapiError, match=f"{tmp_path / name} is not of a study that goes on here.*--out"):
        trained.study(tmp_path)
    assert contents(tmp_path) == {name: b"somebody's tokens"}


def test_a_study_that_was_killed_before_its_first_block_goes_on(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer, "harvest", None)
        with pytest.raises(TypeError):
            trained.study(tmp_path)
    assert {"progress.json", "positions.bin"} <= contents(tmp_path).keys()
    whole = read_json(tmp_path / "progress.json", "Study")
    write_json(tmp_path / "progress.json", whole | {"n_rows": None})
    with pytest.raises(TopkapiError, match=r"progress.json has no n_rows, or another thing in its place. Delete"):
        trained.study(tmp_path)
    write_json(tmp_path / "progress.json", whole)
    trained.study(tmp_path).verify()


def test_a_header_that_lacks_something_is_refused_in_words(trained, tmp_path):
    trained.study(tmp_path)
    text = (tmp_path / "study.json").read_text()
    for *outer, name in (["identity"], ["about", "n_tokens"], ["files", "positions"], ["files", "maxima", "sha256"]):
        header = json.loads(text)
        del header["checksum"]
        inner = header
        for key in outer:
            inner = inner[key]
        del inner[name]
        write_json(tmp_path / "study.json", header)
        lacking = ".".join([*outer, name])
        with pytest.raises(TopkapiError, match=f"study.json has no {lacking}, or another thing in its place. Delete"):
            topkapi.study.open(tmp_path)
