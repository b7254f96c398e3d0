"""What is answered of a run and its study, against the study and against numbers found in another way.

Seen to fail when: a mode's upper end is left out; the interval of the density takes n instead of n + 1 above;
labels are written without the lock, or in the order in which threads happen to run; a strong tag is for both forms of
the table; the table's columns are not padded; a latent that never fired has a mean of 0; a kind of answers takes all
threads.
"""

import gzip
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
from scipy import stats
from starlette.testclient import TestClient

import topkapi.study
from tests.study.conftest import finished
from topkapi.errors import TopkapiError
from topkapi.files import write_text_atomic
from topkapi.viewer.app import create_app
from topkapi.viewer.binary import unpack
from topkapi.viewer.columns import table as table_of
from topkapi.viewer.labels import Labels
from topkapi.viewer.opened import Opened
from topkapi.viewer.overview import POINTS


def wait_for_index(client):
    while client.get("/api/about").json()["index"]["state"] != "ready":
        pass


def table(client):
    wait_for_index(client)
    return unpack(client.get("/api/columns").content)


def busiest(study):
    return int(study.n_fired.argmax())


def test_about_says_what_is_looked_at(client, study):
    about = client.get("/api/about").json()
    assert about["name"] == "tiny"
    assert about["static"] is False
    assert (about["n_latents"], about["k"], about["d_model"]) == (128, 4, 64)
    assert about["study"]["n_tokens"] == study.n_tokens
    assert about["model"] == {"state": "off", "why": about["model"]["why"]}
    documents, context = study.arrays["document_offsets"], study.context
    starts = study.arrays["context_ids"] * context
    covered = {np.searchsorted(documents, at, side="right") for start in starts for at in range(start, start + context)}
    assert about["study"]["n_documents"] == len(covered)


def test_numbers_of_a_latent_are_those_of_the_study(client, study):
    i = busiest(study)
    latent, found = study.latent(i), client.get(f"/api/latent/{i}").json()
    for name in ("n_fired", "density", "importance", "mean", "maximum", "is_sample"):
        assert found[name] == getattr(latent, name), name
    assert list(found["quantiles"].values()) == pytest.approx(latent.quantiles())
    assert found["histogram"]["counts"] == latent.histogram(50).counts.tolist()
    assert found["positions"]["fired"] == latent.positions().tolist()
    assert [(it["latent"], it["n_both"]) for it in found["coactive"]] == [it[:2] for it in latent.coactive(10)]
    assert [it["latent"] for it in found["nearest"]["encoder"]] == [it.latent for it in study.nearest(i, 10, "encoder")]
    values = latent.values.astype(float)
    assert found["kurtosis"] == pytest.approx((values**4).mean() / (values**2).mean() ** 2)
    assert found["skewness"] == pytest.approx((values**3).mean() / (values**2).mean() ** 1.5)
    ae = study.autoencoder
    encoder, decoder = ae.W_enc[i].detach().numpy(), ae.W_dec[i].detach().numpy()
    cosine = encoder @ decoder / np.linalg.norm(encoder) / np.linalg.norm(decoder)
    assert found["alignment"] == pytest.approx(cosine, abs=1e-6)


def test_intervals_hold_what_they_are_of(client, study):
    for i in (busiest(study), int(np.flatnonzero(study.n_fired == 0)[0])):
        found, n = client.get(f"/api/latent/{i}").json(), int(study.n_fired[i])
        low, high = (rate * study.n_tokens for rate in found["density_interval"])
        assert n == 0 or stats.poisson.sf(n - 1, low) == pytest.approx(0.025)
        assert stats.poisson.cdf(n, high) == pytest.approx(0.025)
    i = busiest(study)
    low, high = client.get(f"/api/latent/{i}").json()["importance_interval"]
    squares = np.zeros(study.n_tokens)
    squares[study.latent(i).rows] = study.latent(i).values.astype(float) ** 2
    half = 1.96 * squares.std() / np.sqrt(study.n_tokens)
    assert [low, high] == pytest.approx([squares.mean() - half, squares.mean() + half], rel=1e-3)


def test_a_latent_that_never_fired_has_gaps(client, study):
    i = int(np.flatnonzero(study.n_fired == 0)[0])
    found = client.get(f"/api/latent/{i}").json()
    for name in ("mean", "maximum", "quantiles", "skewness", "kurtosis", "histogram", "dip", "importance_interval"):
        assert found[name] is None, name
    assert found["modes"] == found["coactive"] == []
    for kind in ("top", "random", "quantile", "near"):
        answer = client.get(f"/api/latent/{i}/examples?kind={kind}").json()
        assert answer["n_matching"] == sum(len(group["examples"]) for group in answer["groups"]) == 0


def test_modes_divide_the_firings(client, study):
    i = busiest(study)
    modes = client.get(f"/api/latent/{i}").json()["modes"]
    assert modes[0]["low"] == 0
    assert sum(mode["share"] for mode in modes) == pytest.approx(1)
    counted = [
        client.get(f"/api/latent/{i}/examples", params={"low": mode["low"], "high": mode["high"]}).json()["n_matching"]
        for mode in modes
    ]
    assert sum(counted) == study.n_fired[i]


@pytest.mark.parametrize("kind", ["top", "random", "quantile", "near"])
def test_examples_are_those_of_the_study(client, study, kind):
    latent = study.latent(busiest(study))
    wanted = {
        "top": lambda: [latent.top(3)],
        "random": lambda: [latent.random(3, 7)],
        "quantile": lambda: latent.by_quantile(5, 3, 7),
        "near": lambda: [latent.near_misses(3)],
    }[kind]()
    answer = client.get(f"/api/latent/{latent.i}/examples?kind={kind}&n=3&seed=7").json()
    assert answer["n_matching"] == latent.n_fired
    for group, examples in zip(answer["groups"], wanted, strict=True):
        assert [(e["value"], e["row"]) for e in group["examples"]] == [(e.value, e.row) for e in examples]
        for shown, example in zip(group["examples"], examples, strict=True):
            assert len(shown["tokens"]) == len(example.tokens)
            assert shown["values"] == example.values


def test_examples_of_an_interval_lie_in_it(client, study):
    i = busiest(study)
    low, high = study.latent(i).quantiles([0.4, 0.6])
    answer = client.get(f"/api/latent/{i}/examples", params={"kind": "random", "low": low, "high": high}).json()
    values = study.latent(i).values
    assert answer["n_matching"] == ((values >= low) & (values < high)).sum() > 0
    assert all(low <= e["value"] < high for e in answer["groups"][0]["examples"])


def test_the_table_is_made_of_the_study_and_its_index(client, study):
    header, columns = table(client)
    assert header["n_latents"] == study.n_latents
    assert columns["n_fired"].tolist() == study.n_fired.tolist()
    np.testing.assert_allclose(columns["importance"], study.importance, rtol=1e-6)
    fired = study.n_fired > 0
    assert np.isnan(columns["mean"]).tolist() == (~fired).tolist()
    assert (columns["modes"] == 0).tolist() == (~fired).tolist()
    assert (columns["top_token"] == 2**32 - 1).tolist() == (~fired).tolist()
    for i in np.flatnonzero(fired)[:20]:
        found = client.get(f"/api/latent/{i}").json()
        assert columns["kurtosis"][i] == pytest.approx(found["kurtosis"], rel=1e-6)
        assert columns["modes"][i] == len(found["modes"])
        strongest = client.get(f"/api/latent/{i}/examples?n=1").json()["groups"][0]["examples"][0]
        assert header["tokens"][columns["top_token"][i]].strip() == strongest["tokens"][strongest["at"]].strip()


def test_the_table_is_sent_again_only_when_it_changed(client):
    wait_for_index(client)
    first = client.get("/api/columns", headers={"accept-encoding": "gzip"})
    assert first.headers["content-encoding"] == "gzip"
    plain = client.get("/api/columns", headers={"accept-encoding": "identity"})
    assert first.content == plain.content
    assert first.headers["etag"].startswith("W/") or first.headers["etag"] != plain.headers["etag"]  # other bytes
    again = client.get("/api/columns", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


def test_the_table_is_made_before_it_is_asked_for(run, study, monkeypatch):
    monkeypatch.setattr("topkapi.viewer.opened.warm_up", lambda _stop: None)
    opened = Opened(run, study, model=False)
    opened.start()
    opened._loading.shutdown()
    made = unpack(table_of(study, opened.index))[1]
    monkeypatch.setattr("topkapi.viewer.columns.table", None)
    for name, column in unpack(gzip.decompress(opened.table.current().zipped))[1].items():
        np.testing.assert_array_equal(column, made[name])
    opened.close()


def test_the_whole_dictionary(client, study):
    found = client.get("/api/global").json()
    assert sum(found["density"]["counts"]) + found["density"]["n_dead"] == study.n_latents
    for fit in found["density"]["fits"].values():
        expected = np.array(fit["curve"])
        assert abs(expected.sum() / sum(found["density"]["counts"]) - 1) < 0.2
    assert found["cumulative"]["share_of_importance"][-1] == pytest.approx(1)
    assert sum(found["alignment"]["counts"]) == study.n_latents
    densest = np.sort(study.density)[::-1][:64].sum() / study.density.sum()
    assert found["dense"]["mass"] == pytest.approx(densest)
    assert len(found["training"]["tokens"]) == len(found["training"]["series"]["normalized_mse"]) > 0


def test_many_slow_answers_keep_no_others_waiting(client, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(Opened, "overview", property(lambda _opened: {"waited": may_end.wait(20)}))
    askers = [threading.Thread(target=client.get, args=("/api/global",)) for _ in range(45)]
    for asker in askers:
        asker.start()
    give_up = threading.Timer(5, may_end.set)
    give_up.start()
    for path in ("/", "/api/about", "/api/latent/3", "/app.js"):
        assert client.get(path).status_code == 200
    assert not may_end.is_set()
    give_up.cancel()
    may_end.set()
    for asker in askers:
        asker.join()


def test_damaged_lines_of_metrics_are_passed_over(client, run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    damaged = ["", "{", "[]", '{"step": 1}', '{"tokens": null}', '{"tokens": "many", "l0": 3}']
    (run / "metrics.jsonl").write_text("\n".join([*damaged, *lines]))
    assert len(client.get("/api/global").json()["training"]["tokens"]) == len(lines)


def test_what_is_measured_and_trained_while_a_run_is_looked_at_is_shown(client, run):
    (run / "eval.json").unlink(missing_ok=True)
    before = client.get("/api/global").json()
    assert before["evaluation"] is None
    (run / "eval.json").write_text('{"l0": 4.5}')
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "tokens": 1e6 + step, "l0": 3}) + "\n" for step in range(2 * POINTS))
    after = client.get("/api/global").json()
    assert after["evaluation"]["l0"] == 4.5
    assert len(before["training"]["tokens"]) < len(after["training"]["tokens"]) <= POINTS
    assert after["density"] == before["density"]


def test_runs_beside_are_listed_and_broken_ones_passed_over(client, run):
    (run.parent / "broken").mkdir()
    (run.parent / "broken" / "config.json").write_text("{")
    (run.parent / "other").mkdir()
    (run.parent / "other" / "config.json").write_bytes((run / "config.json").read_bytes())
    (run.parent / "other" / "eval.json").write_text('{"normalized_mse": 0.25, "kl": NaN}')
    found = client.get("/api/runs").json()
    assert found["here"] == "tiny"
    assert [row["name"] for row in found["runs"]] == ["other", "tiny"]
    assert found["runs"][0]["normalized_mse"] == 0.25
    assert [row["has_study"] for row in found["runs"]] == [False, True]


def test_of_very_many_folders_those_that_changed_last_are_looked_at(client, run, monkeypatch):
    monkeypatch.setattr("topkapi.viewer.runs.MOST", 3)
    os.utime(run, (0, 0))
    for age, name in enumerate(("d", "b", "c", "a")):
        shutil.copytree(run, run.parent / name, ignore=shutil.ignore_patterns("study", "*.safetensors"))
        os.utime(run.parent / name, (10**9 - age, 10**9 - age))
    found = client.get("/api/runs").json()
    assert [row["name"] for row in found["runs"]] == ["b", "d", "tiny"]
    assert found["n_left_out"] == 2


def test_labels_are_kept(client, run, study):
    label = {"label": "<b>years</b>", "note": "after 'in'\nsecond line ✓"}
    assert client.put("/api/labels/17", json=label).json()["labels"] == {"17": label}
    assert client.get("/api/latent/17").json()["label"] == label
    with TestClient(create_app(run, study, model=False), base_url="http://127.0.0.1") as another:
        assert another.get("/api/labels").json()["labels"] == {"17": label}
        another.post("/api/labels", json={"labels": {"3": {"label": "x"}, "17": {"label": "y"}}})
    found = client.get("/api/labels").json()["labels"]
    assert found == {"3": {"label": "x", "note": ""}, "17": {"label": "y", "note": ""}}
    client.put("/api/labels/17", json={"label": " ", "note": ""})
    assert list(client.get("/api/labels").json()["labels"]) == ["3"]


def test_labels_written_at_the_same_time_are_all_kept(client, run):
    def label(i):
        answers.append(client.put(f"/api/labels/{i}", json={"label": f"number {i}", "note": ""}).status_code)
        answers.append(client.get(f"/api/latent/{i}").status_code)

    answers = []
    threads = [threading.Thread(target=label, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 80
    assert len(json.loads((run / "labels.json").read_text())["labels"]) == 40


def test_of_two_labels_at_the_same_time_the_later_one_is_kept(client, monkeypatch):
    set_, is_saving, may_save = Labels.set, threading.Event(), threading.Event()

    def slowly(self, labels):
        if labels[17]["label"] == "first":
            is_saving.set()
            may_save.wait(0.3)  # while the second one arrives
        return set_(self, labels)

    monkeypatch.setattr(Labels, "set", slowly)
    first = threading.Thread(target=client.put, args=("/api/labels/17",), kwargs={"json": {"label": "first"}})
    first.start()
    assert is_saving.wait(5)
    answer = client.put("/api/labels/17", json={"label": "second"}).json()
    first.join()
    assert client.get("/api/labels").json()["labels"]["17"]["label"] == "second"
    assert answer["replaced"] == {"17": {"label": "first", "note": ""}}


def test_labels_of_two_viewers_are_all_kept(run, study, monkeypatch):
    def slowly(path, text):
        time.sleep(0.05)  # in which the other one has read what is there now
        write_text_atomic(path, text)

    monkeypatch.setattr("topkapi.viewer.labels.write_text_atomic", slowly)
    viewers = [Labels(run, study.identity["autoencoder"], study.n_latents) for _ in range(4)]
    threads = [
        threading.Thread(target=viewer.set, args=({i: {"label": str(i), "note": ""}},))
        for i, viewer in enumerate(viewers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(viewers[0].all()) == [0, 1, 2, 3]


def test_labels_of_one_tick_of_the_clock_are_told_apart(run, study):
    labels = Labels(run, study.identity["autoencoder"], study.n_latents)
    for text in ("one", "two"):  # as long as each other
        labels.set({17: {"label": text, "note": ""}})
        os.utime(labels.path, ns=(10**18, 10**18))
        assert labels.all()[17]["label"] == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "damaged"),
        ('{"labels": {"x": {}}, "autoencoder": ""}', "damaged"),
        ('{"labels": {}, "autoencoder": "ab"}', "another"),
    ],
)
def test_labels_that_are_not_the_runs_are_refused_at_the_start(run, study, content, said):
    (run / "labels.json").write_text(content)
    with pytest.raises(TopkapiError, match=said):
        create_app(run, study, model=False)


def test_reservoir_studies_and_other_autoencoders(tiny_config, tmp_path):
    from dataclasses import replace

    relu = replace(
        tiny_config,
        data=replace(tiny_config.data, held_out=0.5, source="live"),
        model=replace(tiny_config.model, activation="relu"),
        loss=replace(tiny_config.loss, sparsity="l1", l1_coefficient=1e-3),
        tokens=300,
    )
    trained = finished(relu, tmp_path / "relu")
    trained.study(trained.run / "study", tokens=300, reservoir=5)
    study = topkapi.study.open(trained.run / "study", trained.run)
    with TestClient(create_app(trained.run, study, model=False), base_url="http://127.0.0.1") as client:
        i = busiest(study)
        found = client.get(f"/api/latent/{i}").json()
        assert found["is_sample"]
        assert found["coactive"] is None
        assert client.get(f"/api/latent/{i}/examples?kind=quantile").status_code == 200
        _, columns = table(client)
        assert columns["n_fired"].tolist() == study.n_fired.tolist()
        assert client.get("/api/global").status_code == 200
