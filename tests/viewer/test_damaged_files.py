"""Damaged files of a run, of its study and of what lies beside: each answer is a gap that is told, or a sentence.

Seen to fail when: an eval.json with a text for a number is trusted; a point of a sweep may have any name; numbers
beyond floating point go into the law; a pipe is waited for; a study's files are not looked at after an index out of
range; a labels.json that is a folder is read; of a study that is served sizes are looked at and not times, or nothing;
its files are read at each failure, or while an answer waits; what is read at opening is not verified, or mapped; of
what is mapped counts and maxima of a latent are not compared, or latents beside it that are none are counted.
"""

import json
import os
import shutil
import time
from threading import Event, Timer

import numpy as np
import pytest
from starlette.testclient import TestClient

import topkapi.study
from topkapi.errors import TopkapiError
from topkapi.files import write_atomic, write_json
from topkapi.sweep import POINTS, SETTINGS
from topkapi.viewer import app, overview, runs
from topkapi.viewer.answers import to_json
from topkapi.viewer.app import create_app
from topkapi.viewer.export import export
from topkapi.viewer.opened import Opened

DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\x00\xff\xfe" * 500,
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"9" * 6_000,
    b'{"step": 1, "tokens": ' + b"9" * 6_000 + b"}",
]
STRANGE = ["many", None, True, [], {}, [1, "x"], float("nan"), float("inf"), -1, 0, 1e308, 10**400, "\ud800"]
POINT = {
    **{"name": "one", "n_latents": 64, "k": 4, "sparsity": "none", "l1_coefficient": 0.0, "lr": 1e-3, "seed": 0},
    **{"decoder_norm": True, "d_model": 64, "tokens": 500, "n_parameters": 9, "flops": 1.0, "n_tokens": 5},
    **{name: 0.5 for name in ("normalized_mse", "l0", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero_ablation")},
    **{name: 0.5 for name in ("ce_mean_ablation", "kl", "loss_recovered")},
}

FIELDS = ("name", "n_latents", "k", "sparsity", "tokens", "normalized_mse")


def put(path, content):
    """A file of these bytes, or a folder in its place."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


def exchange(path, content):
    """Another file in its place: what is mapped by a thread of a viewer that was just closed must not be cut off."""
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def beside(run):
    """The answer about runs as the page reads it: numbers and gaps alone."""
    found = json.loads(to_json(runs.beside(run)))
    for row in found["runs"]:
        for name in ("n_latents", "k", "tokens", "lr", "seed", *runs.METRICS):
            assert row[name] is None or isinstance(row[name], int | float), (name, row)
    return found


@pytest.fixture
def other(run):
    """A sound run beside `run`, which is listed."""
    put(run.parent / "other" / "config.json", (run / "config.json").read_bytes())
    return run.parent / "other"


def with_config(other, change):
    config = json.loads((other / "config.json").read_text())
    config.pop("checksum")
    change(config)
    write_json(other / "config.json", config)


def test_an_evaluation_that_is_none_is_told_and_its_numbers_are_gaps(run, other):
    strange = [json.dumps({"normalized_mse": value, "l0": 4.0}).encode() for value in STRANGE]
    strange += [json.dumps({"normalized_mse": 0.5, "intervals": value}).encode() for value in STRANGE]
    for content in (*DAMAGED, *strange, None):
        put(other / "eval.json", content)
        found = beside(run)
        assert [row["name"] for row in found["runs"]] == ["other", "tiny"]
        assert all(problem["path_name"] == "other" for problem in found["problems"])
        to_json(runs.evaluation(other))
    for content in (b'{"normalized_mse": "text"}', b"[]", None):
        put(other / "eval.json", content)
        (problem,) = beside(run)["problems"]
        assert "eval.json" in problem["why"]


def test_configs_that_are_none_are_passed_over_or_have_gaps(run, other):
    sound = (other / "config.json").read_bytes()
    for content in (*DAMAGED, sound[: len(sound) // 2], None):
        put(other / "config.json", content)
        assert [row["name"] for row in beside(run)["runs"]] == ["tiny"]
    for value in STRANGE:
        for change in (
            lambda config, value=value: config["autoencoder"].update(n_latents=value, k=value),
            lambda config, value=value: config["autoencoder"].update(activation=value),
            lambda config, value=value: config.update(summary=value),
            lambda config, value=value: config.update(training=value),
            lambda config, value=value: config.update(autoencoder=value),
        ):
            put(other / "config.json", sound)
            with_config(other, change)
            beside(run)


def test_sweeps_that_are_none_are_told(run):
    folder = run.parent / "sweep"
    put(folder / SETTINGS, b"{}")
    names = [3, "", "..", "../..", "/etc", "a\0b", "x" * 5_000, "\ud800"]
    strange = [json.dumps(POINT | {"name": name}).encode() for name in names]
    strange += [json.dumps(POINT | {field: value}).encode() for field in FIELDS for value in STRANGE]
    for content in (*DAMAGED, *strange, None):
        put(folder / POINTS, content)
        beside(run)
    put(folder / POINTS, json.dumps(POINT).encode() + b"\n{\n")
    (problem,) = beside(run)["problems"]
    assert problem["path_name"] == "sweep"
    assert "line 2" in problem["why"]
    put(folder / POINTS, json.dumps(POINT).encode())
    assert [row["path_name"] for row in beside(run)["runs"]] == ["sweep/one", "tiny"]


def test_strange_losses_leave_the_law_of_the_others(run, other, monkeypatch):
    monkeypatch.setattr(runs, "N_BOOTSTRAP", 5)
    put(other / "eval.json", json.dumps({"normalized_mse": 10**400}).encode())
    folder = run.parent / "sweep"
    put(folder / SETTINGS, b"{}")
    sound = [
        POINT | {"name": f"{n}-{k}", "n_latents": n, "k": k, "normalized_mse": 3 * n**-0.2 * k**-0.3}
        for n in (64, 128, 256, 512)
        for k in (2, 4, 8)
    ]
    strange = [POINT | {"name": str(value), "normalized_mse": value} for value in (float("nan"), float("inf"), -1.0)]
    put(folder / POINTS, "\n".join(map(json.dumps, sound + strange)).encode())
    assert beside(run)["fit"]["n_points"] == len(sound)


def test_metrics_that_are_none_are_passed_over(run):
    sound = (run / "metrics.jsonl").read_bytes().splitlines()
    strange = [json.dumps({"step": 1, "tokens": 5, "l0": value}).encode() for value in STRANGE]
    strange += [json.dumps({"step": 1, "tokens": value, "l0": 1}).encode() for value in STRANGE]
    put(run / "metrics.jsonl", b"\n".join([*DAMAGED, *strange, *sound]))
    found = json.loads(to_json(overview.training(run)))
    assert len(found["tokens"]) >= len(sound)
    assert all(isinstance(tokens, int | float) for tokens in found["tokens"])
    put(run / "metrics.jsonl", None)
    assert overview.training(run)["tokens"] == []


def ask(client, path):
    """The status of an answer, which has a sentence where it is none."""
    started = time.monotonic()
    answer = client.get(path)
    assert time.monotonic() - started < 10, path
    assert answer.status_code < 500, (path, answer.text)
    if answer.status_code != 200:
        assert isinstance(answer.json()["error"], str)
    return answer.status_code


def test_labels_damaged_while_they_are_served_are_told(client, run):
    assert ask(client, "/api/labels") == 200
    for content in (*DAMAGED, None):
        put(run / "labels.json", content)
        assert ask(client, "/api/labels") == ask(client, "/api/latent/3") == 400
        assert client.put("/api/labels/3", json={"label": "x"}).status_code == 400
    assert ask(client, "/api/latent/3/examples") == 200


def test_pipes_are_not_waited_for(client, run, other):
    (run.parent / "sweep").mkdir()
    for path, asked in [
        (other / "config.json", "runs"),
        (run / "eval.json", "runs"),
        (run.parent / "sweep" / "sweep.jsonl", "runs"),
        (run / "metrics.jsonl", "global"),
        (run / "labels.json", "labels"),
    ]:
        put(run.parent / "sweep" / SETTINGS, b"{}")
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        give_up = Timer(10, lambda path=path: os.close(os.open(path, os.O_RDWR)))  # ends whoever waits for it
        give_up.start()
        ask(client, f"/api/{asked}")
        give_up.cancel()


@pytest.mark.usefixtures("all_mapped")
@pytest.mark.parametrize("change", ["cut off", "written over", "exchanged", "deleted"])
def test_a_study_that_changes_while_it_is_served_is_told(client, run, study, change, capsys):
    i = int(study.n_fired.argmax())
    paths = (f"latent/{i}", f"latent/{i}/examples")
    assert all(ask(client, f"/api/{path}") == 200 for path in paths)
    for name in study.arrays:
        path = run / "study" / f"{name}.bin"
        content = path.read_bytes()
        if change == "cut off":
            os.truncate(path, len(content) - 1)  # within its last page, so that reading it ends no process in any case
        elif change == "written over":
            with path.open("r+b") as file:
                file.write(content[::-1])
        elif change == "exchanged":
            exchange(path, content)
        else:
            path.unlink()
        with pytest.raises(TopkapiError, match=rf"{name}\.bin .* since it was opened"):
            study.arrays[name]
    for path in (f"latent/{i + 1}", f"latent/{i}/examples"):
        assert "start topkapi view again" in client.get(f"/api/{path}").json()["error"]
        assert ask(client, f"/api/{path}") == 400
    assert client.put("/api/labels/3", json={"label": "kept"}).status_code == 200  # labels are the autoencoder's
    capsys.readouterr()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_studys_files_are_read_once_and_not_waited_for(client, study, monkeypatch, capsys, is_damaged):
    def fail(_opened):
        raise IndexError("out of range")

    def verify():
        begun.append(1)
        assert may_end.wait(10)
        if is_damaged:
            raise TopkapiError("a file is damaged")

    begun, may_end = [], Event()
    monkeypatch.setattr(app, "VERIFY_SECONDS", 0.05)
    monkeypatch.setattr(study, "verify", verify)
    monkeypatch.setattr(Opened, "about", fail)
    give_up = Timer(5, may_end.set)  # where answers wait for it
    give_up.start()
    answers = [client.get("/api/about") for _ in range(3)]
    give_up.cancel()
    assert not may_end.is_set()
    assert all("being read" in answer.json()["error"] and answer.status_code == 503 for answer in answers)
    may_end.set()
    monkeypatch.setattr(app, "VERIFY_SECONDS", 10.0)
    for _ in range(2):
        answer = client.get("/api/about")
        assert answer.status_code == (400 if is_damaged else 500)
        assert ("a file is damaged" in answer.text) == is_damaged
    assert begun == [1]
    assert ("IndexError" in capsys.readouterr().err) != is_damaged


def test_what_is_read_at_opening_is_verified_and_stays_as_it_was(run, study, client):
    i = int(study.n_fired.argmax())
    paths = (f"latent/{i}", f"latent/{i}/examples")
    before = [client.get(f"/api/{path}").json() for path in paths]
    for name, array in study.arrays.items():
        assert not isinstance(array, np.memmap)  # which would end this process below
        path = run / "study" / f"{name}.bin"
        content = path.read_bytes()
        exchange(path, bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(TopkapiError, match=rf"{name}\.bin is damaged"):
            topkapi.study.open(run / "study", run)
        exchange(path, content)
    for name in study.arrays:
        os.truncate(run / "study" / f"{name}.bin", 0)
    assert [client.get(f"/api/{path}").json() for path in paths] == before
    assert ask(client, f"/api/latent/{i + 1}/examples") == 200


@pytest.mark.usefixtures("all_mapped")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.parametrize("name", ["latent_rows", "latent_offsets", "latent_values", "row_offsets", "indices"])
def test_what_is_asked_of_a_damaged_latent_is_told(run, name):
    path, told = run / "study" / f"{name}.bin", {}
    fired = np.flatnonzero(topkapi.study.open(run / "study", run).n_fired).tolist()
    for seed in range(4):
        exchange(path, np.random.default_rng(seed).bytes(path.stat().st_size))
        study = topkapi.study.open(run / "study", run)
        for i in fired:
            try:
                study.latent(i).coactive()
            except TopkapiError as error:
                told[seed, i] = str(error)
    assert len(told) == 4 * len(fired)
    assert all("is damaged" in said for said in told.values())


@pytest.mark.usefixtures("all_mapped")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_a_damaged_study_is_not_exported(run, tmp_path, capsys):
    for name in topkapi.study.open(run / "study", run).arrays:
        path = run / "study" / f"{name}.bin"
        content = path.read_bytes()
        exchange(path, np.random.default_rng(0).bytes(len(content)))
        with pytest.raises(TopkapiError):
            export(run, topkapi.study.open(run / "study", run), tmp_path / "site", 2, votes=False)
        assert not (tmp_path / "site").exists()
        exchange(path, content)
    capsys.readouterr()


@pytest.mark.usefixtures("all_mapped")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_a_damaged_study_is_told(run, capsys):
    sound = topkapi.study.open(run / "study", run)
    i = int(sound.n_fired.argmax())
    told = set()
    for name in sound.arrays:
        path = run / "study" / f"{name}.bin"
        content, size = path.read_bytes(), path.stat().st_size
        exchange(path, np.random.default_rng(0).bytes(size))
        shutil.rmtree(run / "study" / "index", ignore_errors=True)
        study = topkapi.study.open(run / "study", run)
        with TestClient(create_app(run, study, model=False), base_url="http://127.0.0.1") as client:
            paths = [f"latent/{i}", "latent/0", "columns", "global", "about", "runs"]
            paths += [f"latent/{i}/examples?kind={kind}" for kind in ("top", "random", "quantile", "near")]
            if any(ask(client, f"/api/{path}") == 400 for path in paths):
                told.add(name)
        exchange(path, content)
    assert {"latent_rows", "positions", "row_offsets"} <= told
    assert {"latent_offsets", "latent_values", "maxima", "n_fired", "indices"} <= told
    capsys.readouterr()
