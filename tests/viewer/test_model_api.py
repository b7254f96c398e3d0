"""What the language model answers line by line, against `topkapi.explore`; who waits, who goes away, what is refused.

Seen to fail when: a cancelled task goes on to its end; a waiting task is not told so; a multiple is taken as a value;
the ablation's position counts from the study instead of from the context; the study's own autoencoder moves to the
language model's device.
"""

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import topkapi.explore
import topkapi.study
from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError
from topkapi.explore import Edit, Spliced, ablation_effects, attribute, measure, sample
from topkapi.viewer.app import create_app
from topkapi.viewer.model_api import LIMITS
from topkapi.viewer.opened import Opened
from topkapi.viewer.patterns import Pattern
from topkapi.viewer.worker import MOST_WAITING, Busy, Worker

TEXT = "The old captain finds a broken compass"


def ready(client):
    while (state := client.get("/api/about").json()["model"]["state"]) == "loading":
        time.sleep(0.01)
    return state


@pytest.fixture(scope="module")
def home(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def study(home):
    return topkapi.study.open(home / "study", home)


@pytest.fixture(scope="module")
def client(home, study):
    with TestClient(create_app(home, study), base_url="http://127.0.0.1") as client:
        assert ready(client) == "ready"
        yield client


@pytest.fixture(scope="module")
def spliced(home):
    return topkapi.explore.open(home)


def ask(client, address, **values):
    answer = client.post(f"/api/{address}", json=values)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    *progress, last = [json.loads(line) for line in answer.text.splitlines()]
    assert all(line.keys() == {"progress"} for line in progress)
    return last["result"]


def refused(client, address, status=400, **values):
    answer = client.post(f"/api/{address}", json=values)
    assert answer.status_code == status, answer.text[:300]
    return answer.json()["error"]


def test_tokens_are_one_text_each(client):
    found = client.post("/api/tokenise", json={"text": TEXT}).json()["tokens"]
    assert "".join(token["text"] for token in found) == TEXT
    assert client.post("/api/tokenise", json={"text": ""}).json() == {"tokens": []}


def test_a_prompt_has_its_latents(client, spliced):
    tokens = spliced.tokens(TEXT)
    code, found = spliced.code(tokens), ask(client, "prompt", text=TEXT)
    assert [token["id"] for token in found["tokens"]] == tokens[0].tolist()
    for at, token in enumerate(found["tokens"]):
        assert token["kept"] == bool(code.kept[0, at])
        assert token["error"] == pytest.approx(float(code.error[0, at]), rel=1e-4)
        values = {int(i): float(v) for i, v in zip(code.indices[0, at], code.values[0, at], strict=True) if v > 0}
        assert dict(token["active"]) == pytest.approx(values, rel=1e-4)
        assert token["n_active"] == len(values)
    p = spliced.logits(tokens)[0, -1].softmax(-1)
    assert found["next"][0]["id"] == int(p.argmax())
    assert [it["p"] for it in found["next"]] == pytest.approx(p.topk(10).values.tolist(), rel=1e-4)


def test_attributions_are_measured_beside(client, spliced, home):
    positive, negative = [[" the", " a"], [" this"]]
    ids = [[topkapi.explore.single_token(spliced.lm, text) for text in texts] for texts in (positive, negative)]
    found = ask(client, "attribution", text=TEXT, positive=positive, negative=negative, top=6, verify=4)
    wanted = attribute(spliced, spliced.tokens(TEXT), *ids)
    assert found["metric"] == pytest.approx(wanted.metric, abs=1e-5)
    assert [row["latent"] for row in found["rows"]] == wanted.latents[:6].tolist()
    np.testing.assert_allclose([row["by_position"] for row in found["rows"]], wanted.at[:6], atol=1e-5)
    measured = measure(spliced, spliced.tokens(TEXT), wanted.latents[:4].tolist(), *ids)
    assert [row["measured"] for row in found["rows"]] == pytest.approx([*measured, None, None], abs=1e-5)
    assert found["rank_correlation"]["n"] == 4
    assert (
        ask(client, "attribution", text=TEXT, positive=[" the"], negative=[" a"], verify=0)["rank_correlation"] is None
    )


def test_steps_of_an_attribution_are_told(client):
    values = {"text": TEXT, "positive": [" the"], "negative": [" this"], "verify": 0, "steps": 4}
    lines = client.post("/api/attribution", json=values).text.splitlines()
    told = [line["progress"] for line in map(json.loads, lines) if "progress" in line]
    assert told[-1] == {"done": 5, "total": 5, "what": "attributing"}


def test_an_ablation_is_of_the_studys_token(client, study, spliced):
    i = int(study.n_fired.argmax())
    example = study.latent(i).top(1)[0]
    found = ask(client, "ablation", latent=i, row=example.row)
    number = int(study.arrays["positions"][example.row]) // study.context
    context = study.arrays["tokens"][number * study.context :][: study.context]
    wanted = ablation_effects(spliced, torch.tensor([context.tolist()]), example.position, i)
    assert (found["at"], found["document"]) == (example.position, example.document)
    assert found["value"] == pytest.approx(example.value, rel=1e-3)
    assert [it["kl"] for it in found["positions"]] == pytest.approx(wanted.kl, abs=1e-6)
    assert [it["loss_change"] for it in found["positions"]] == pytest.approx(wanted.loss_change, abs=1e-5)
    assert len(found["tokens"]) == study.context == found["at"] + len(found["positions"])
    up = [effect["logit"] for effect in found["positions"][0]["up"]]
    assert up == pytest.approx([effect.logit for effect in wanted.up[0]], abs=1e-5)


def test_steering_in_multiples_of_the_maximum(client, study, spliced):
    i = int(study.n_fired.argmax())
    edits = [{"latent": i, "value": 4, "unit": "maximum", "where": "all"}]
    found = ask(client, "steer", text=TEXT, edits=edits, n_samples=3, n_tokens=5, seed=1, pattern="e")
    edit = Edit(i, "clamp", 4 * study.latent(i).maximum)
    wanted = sample(spliced, spliced.tokens(TEXT), [edit], 3, 5, 1.0, 1)
    assert found["mean_kl"] == pytest.approx(wanted.mean_kl, rel=1e-3)
    assert [it["first_difference"] for it in found["samples"]] == [wanted.first_difference(s) for s in range(3)]
    texts = ["".join(it["steered"]) for it in found["samples"]]
    assert found["counts"]["steered"]["n"] == sum("e" in text for text in texts)
    assert found["counts"]["clean"]["of"] == 3
    assert [len(it["kl"]) for it in found["samples"]] == [len(it["steered"]) for it in found["samples"]]
    last = len(found["prompt"]) - 1
    at_one = [{"latent": i, "value": 2.5, "unit": "absolute", "where": [last]}]
    assert ask(client, "steer", text=TEXT, edits=at_one, n_samples=1, n_tokens=2)["counts"] is None


def test_votes_have_texts_and_deviations(client, study, spliced):
    found, wanted = client.get("/api/latent/7/votes").json(), study.votes(7, spliced.lm)
    assert [it["token"] for it in found["up"]] == [it.token for it in wanted.up]
    logits = spliced.lm.model.lm_head.weight @ spliced.ae.W_dec[7]
    z = ((logits - logits.mean()) / logits.std(correction=0)).detach()
    assert [it["z"] for it in found["down"]] == pytest.approx(z.sort().values[:10].tolist(), abs=1e-4)
    assert found["caveat"]


EDIT = {"latent": 1, "value": 1.0}


@pytest.mark.parametrize(
    ("address", "values", "said"),
    [
        ("prompt", {}, "text must be a text"),
        ("prompt", {"text": ""}, "empty"),
        ("prompt", {"text": 5}, "text must be a text"),
        ("prompt", {"text": "the " * 300}, "at most 128 fit"),
        ("prompt", {"text": "a", "other": 1}, "unknown field 'other'"),
        ("attribution", {"text": "a", "positive": [], "negative": [" the"]}, "positive must have one"),
        ("attribution", {"text": "a", "positive": [" the"], "negative": [" zebra crossing"]}, "must be one token"),
        ("attribution", {"text": "a", "positive": [" the"], "negative": [" the"]}, "both have ' the'"),
        ("attribution", {"text": "a", "positive": " the", "negative": [" a"]}, "must be a list"),
        ("attribution", {"text": "a", "positive": [7], "negative": [" a"]}, "must be a text"),
        ("attribution", {"text": "a", "positive": [" the"] * 17, "negative": [" a"]}, "at most|16 entries"),
        ("attribution", {"text": "a", "positive": [" the"], "negative": [" a"], "steps": 65}, "steps must be"),
        ("attribution", {"text": "a", "positive": [" the"], "negative": [" a"], "verify": True}, "verify must be"),
        ("ablation", {"latent": 128, "row": 0}, "latent must be"),
        ("ablation", {"latent": -1, "row": 0}, "latent must be"),
        ("ablation", {"latent": 1, "row": 10**40}, "row must be"),
        ("ablation", {"latent": 1.5, "row": 0}, "latent must be"),
        ("ablation", {"latent": [1], "row": 0}, "latent must be"),
        ("steer", {"text": "a", "edits": []}, "one edit at least"),
        ("steer", {"text": "a", "edits": [EDIT] * 17}, "16 entries"),
        ("steer", {"text": "a", "edits": [3]}, "must be an object"),
        ("steer", {"text": "a", "edits": [{"latent": 1, "value": 10**400}]}, "value must be"),
        ("steer", {"text": "a", "edits": [EDIT | {"unit": "miles"}]}, "unit must be"),
        ("steer", {"text": "a", "edits": [EDIT | {"where": "nowhere"}]}, "where must be"),
        ("steer", {"text": "a", "edits": [EDIT | {"where": []}]}, "where must be"),
        ("steer", {"text": "a", "edits": [EDIT | {"where": [500]}]}, "where must be"),
        ("steer", {"text": "a", "edits": [EDIT], "n_samples": 33}, "n_samples must be"),
        ("steer", {"text": "a", "edits": [EDIT], "n_tokens": 129}, "n_tokens must be"),
        ("steer", {"text": "the " * 100, "edits": [EDIT], "n_tokens": 60}, "fit"),
        ("steer", {"text": "a", "edits": [EDIT], "temperature": 0}, "temperature must be"),
        ("steer", {"text": "a", "edits": [EDIT], "pattern": "("}, "no regular expression"),
        ("steer", {"text": "a", "edits": [EDIT], "pattern": "x" * 201}, "200 characters"),
    ],
)
def test_what_cannot_be_done_is_said_before_it_is_begun(client, address, values, said):
    assert re.search(said, refused(client, address, **values))


def test_a_silent_latent_has_no_maximum_and_no_ablation(client, study):
    silent = int(np.flatnonzero(study.n_fired == 0)[0])
    edit = {"latent": silent, "value": 2, "unit": "maximum"}
    assert "never fired" in refused(client, "steer", text="a", edits=[edit])
    lines = client.post("/api/ablation", json={"latent": silent, "row": 3}).text.splitlines()
    assert "not active" in json.loads(lines[-1])["error"]


def test_without_a_model_there_is_no_model_work(home, study, monkeypatch):
    with TestClient(create_app(home, study, model=False), base_url="http://127.0.0.1") as client:
        for answer in (client.post("/api/prompt", json={"text": "a"}), client.get("/api/latent/1/votes")):
            assert answer.status_code == 503
            assert answer.json()["model"]["state"] == "off"
        assert client.post("/api/tokenise", json={"text": "a b"}).status_code == 200

    def fail(*_arguments):
        raise TopkapiError("the model is gone")

    monkeypatch.setattr(LanguageModel, "load", fail)
    with TestClient(create_app(home, study), base_url="http://127.0.0.1") as client:
        assert ready(client) == "failed"
        assert "the model is gone" in refused(client, "prompt", 503, text="a")
        assert client.get("/api/latent/3").status_code == 200


def test_the_language_models_device_does_not_take_the_autoencoder_from_its_readers(home, monkeypatch):
    monkeypatch.setattr(LanguageModel, "device", torch.device("meta"))
    opened = Opened(home, topkapi.study.open(home / "study", home), model=True)
    opened.start()
    assert opened.worker.wait().ae.W_dec.device.type == "meta"
    assert opened.study.autoencoder.W_dec.device.type == "cpu"
    opened.close()


def test_requests_at_the_same_time_do_not_mix(client):
    texts = [f"{TEXT} {word}" for word in ("slowly", "again", "often", "never", "quietly", "yesterday")]
    alone = {text: ask(client, "prompt", text=text) for text in texts}
    found = {}

    def one(text):
        found[text] = ask(client, "prompt", text=text)
        client.put(f"/api/labels/{len(text)}", json={"label": text})

    threads = [threading.Thread(target=one, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_limits_are_those_that_about_names(client):
    assert client.get("/api/about").json()["limits"] == LIMITS


@pytest.fixture
def worker():
    worker = Worker(lambda: object.__new__(Spliced))
    worker.start()
    yield worker
    worker.stop(1.0)


def test_work_that_nobody_waits_for_ends(worker):
    reached, go_on = threading.Event(), threading.Event()
    steps = []

    def work(_spliced, report):
        for step in range(1_000):
            report(step, 1_000, "counting")
            steps.append(step)
            reached.set()
            go_on.wait()
        return {}

    async def leave():
        lines = worker.lines(work)
        await anext(lines)
        await asyncio.to_thread(reached.wait)
        await lines.aclose()
        go_on.set()
        return [line async for line in worker.lines(lambda _spliced, _report: {"done": True})]

    assert asyncio.run(leave())[-1] == {"result": {"done": True}}
    assert len(steps) <= 2


def test_those_who_wait_are_told_and_too_many_are_refused(worker):
    go_on = threading.Event()

    async def crowd():
        def slow(_spliced, _report):
            go_on.wait()
            return {}

        first = worker.lines(slow)
        await anext(first)
        others = [worker.lines(lambda _spliced, _report: {}) for _ in range(MOST_WAITING)]
        told = [await anext(lines) for lines in others]
        with pytest.raises(Busy):
            await anext(worker.lines(slow))
        go_on.set()
        last = [[line async for line in lines][-1] for lines in (first, *others)]
        return told, last

    told, last = asyncio.run(crowd())
    assert all(line["progress"]["what"] == "waiting" for line in told)
    assert last == [{"result": {}}] * (1 + MOST_WAITING)


def test_those_who_went_away_take_nobodys_place(worker):
    go_on = threading.Event()

    async def crowd():
        first = worker.lines(lambda _spliced, _report: {"waited": go_on.wait()})
        await anext(first)
        for _ in range(MOST_WAITING):
            gone = worker.lines(lambda _spliced, _report: {})
            await anext(gone)
            await gone.aclose()
        last = worker.lines(lambda _spliced, _report: {"done": True})
        await anext(last)
        go_on.set()
        return [line async for line in last][-1]

    assert asyncio.run(crowd()) == {"result": {"done": True}}


def test_work_that_fails_says_so_and_the_next_is_done(worker, capsys):
    def fail(_spliced, _report):
        raise RuntimeError("secret")

    def mistake(_spliced, _report):
        raise TopkapiError("a mistake.")

    async def last(work):
        return [line async for line in worker.lines(work)][-1]

    assert "secret" not in asyncio.run(last(fail))["error"]
    assert "secret" in capsys.readouterr().err
    assert asyncio.run(last(mistake)) == {"error": "a mistake."}
    assert asyncio.run(last(lambda _spliced, _report: {"n": 1})) == {"result": {"n": 1}}


def test_a_pattern_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr("topkapi.viewer.patterns.SECONDS", 0.5)
    assert Pattern("ab+").count(["ab", "a", "abb"]) == 2
    with pytest.raises(TopkapiError, match="too long"):
        Pattern("(a+)+$").count(["a" * 60 + "b"])


def test_a_client_that_goes_away_ends_its_work(viewer_url, monkeypatch):
    ended = threading.Event()

    def slow(*arguments):
        try:
            for _ in range(1_200):
                arguments[-1](1)
                time.sleep(0.05)
        finally:
            ended.set()

    monkeypatch.setattr("topkapi.viewer.experiments.sample", slow)
    host, port = urlsplit(viewer_url).hostname, urlsplit(viewer_url).port
    while json.loads(urlopen(viewer_url + "api/about").read())["model"]["state"] != "ready":
        time.sleep(0.05)
    body = json.dumps({"text": "The", "edits": [EDIT]}).encode()
    head = f"POST /api/steer HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200" in connection.recv(100)
        assert not ended.wait(0.3)
    assert ended.wait(20)
    request = Request(viewer_url + "api/prompt", b'{"text": "The"}', {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        assert "result" in json.loads(answer.read().splitlines()[-1])
