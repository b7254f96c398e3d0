"""Hostile and mistaken requests: each is refused with a sentence, and every answer has the headers.

Seen to fail when: the Host header is not looked at; chunked bodies are not counted; NaN passes for a number; the
headers are added to good answers alone; digits of other scripts pass for numbers.
"""

import http.client
import json
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from topkapi.viewer.app import create_app
from topkapi.viewer.guard import HEADERS, Names
from topkapi.viewer.opened import Opened


def refused(answer, *statuses):
    assert answer.status_code in statuses, (answer.status_code, answer.text[:200])
    sentence = answer.json()["error"]
    assert isinstance(sentence, str)
    assert "Traceback" not in answer.text
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    return sentence


@pytest.mark.parametrize(
    "path",
    [
        "/api/latent/128",
        "/api/latent/-1",
        "/api/latent/1.0",
        "/api/latent/NaN",
        "/api/latent/1e1",
        "/api/latent/٣",
        "/api/latent/99999999999999999999999999999999",
        "/api/latent/%00",
        "/api/latent/%0d%0aset-cookie:x",
        "/api/latent/17/",
        "/api/latent/17/nothing",
        "/api/latent/500/examples",
        "/api/latent/500/votes",
        "/api",
        "/api/",
        "/api/nothing",
        "/nothing",
        "/%00",
        "/" + "a" * 5_000,
        "/index.html/more",
    ],
)
def test_what_is_not_there_is_not_found(client, path):
    refused(client.get(path), 404)


@pytest.mark.parametrize(
    "query",
    [
        "kind=best",
        "kind=",
        "n=0",
        "n=101",
        "n=1.5",
        "n=NaN",
        "n=1e999",
        "n=-1",
        "n=" + "9" * 5_000,
        "n[]=1&n=x",
        "seed=4294967296",
        "seed=-1",
        "seed=%D9%A1",
        "low=NaN",
        "low=inf",
        "high=1e999",
        "high=0x10",
        "high=1_000",
        "low=[1,2]",
        "low=%ff",
    ],
)
def test_numbers_that_are_none_are_refused(client, query):
    refused(client.get(f"/api/latent/17/examples?{query}"), 400)


BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"17", 400),
    (b'"text"', 400),
    (b"null", 400),
    (b'{"label": NaN, "note": ""}', 400),
    (b'{"label": -Infinity}', 400),
    (b'{"label": 1e999}', 400),
    (b'{"label": ' + b"9" * 6_000 + b"}", 400),
    (b'{"label": ["x"]}', 400),
    (b'{"label": {"a": 1}}', 400),
    (b'{"label": "x", "other": 1}', 400),
    (b'{"label": "\xff\xfe"}', 400),
    (b'{"label": "\\ud800"}', 400),
    (b'{"label": "' + b"x" * 201 + b'"}', 400),
    (b'{"label": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
    (b'{"label": "' + b"x" * 70_000 + b'"}', 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES)
def test_bodies_that_are_no_label_are_refused(client, body, status):
    refused(client.put("/api/labels/17", content=body, headers={"content-type": "application/json"}), status)
    assert client.get("/api/labels").json() == {"labels": {}}


def test_bodies_without_a_length_are_counted(client):
    parts = (b" " * 1_000 for _ in range(100))
    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    refused(client.put("/api/labels/17", content=parts, headers=headers), 413)


@pytest.mark.parametrize("length", ["-5", "1e3", "99999999999999999999999"])
def test_lengths_that_are_none_are_refused(client, length):
    headers = {"content-type": "application/json", "content-length": length}
    refused(client.put("/api/labels/17", content=b"{}", headers=headers), 413)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_only_json_is_read(client, kind):
    refused(client.put("/api/labels/17", content=b'{"label": "x"}', headers={"content-type": kind}), 415)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/about"),
        ("DELETE", "/api/labels/17"),
        ("PUT", "/api/labels"),
        ("GET", "/api/prompt"),
        ("PATCH", "/api/latent/17"),
        ("POST", "/index.html"),
        ("TRACE", "/api/about"),
        ("FOO", "/api/about"),
    ],
)
def test_other_methods_are_refused(client, method, path):
    refused(client.request(method, path), 405)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:80"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "localhost/../evil"},
        {"host": "localhost:port"},
        {"host": "[::1"},
        {"host": ""},
        {"host": "10.0.0.1"},
    ],
)
def test_strange_names_are_refused(client, headers):
    refused(client.get("/api/about", headers=headers), 403)
    refused(client.get("/", headers=headers), 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_own_names_are_answered(client, host):
    assert client.get("/api/about", headers={"host": host}).status_code == 200
    own = {"host": host, "origin": f"http://{host}"}
    assert client.put("/api/labels/1", json={"label": "x"}, headers=own).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9", "http://127.0.0.1.evil", ""])
def test_other_origins_change_nothing(client, origin):
    refused(client.put("/api/labels/1", json={"label": "x"}, headers={"origin": origin}), 403)
    refused(client.put("/api/labels/1", json={"label": "x"}, headers={"sec-fetch-site": "cross-site"}), 403)
    assert client.get("/api/labels").json() == {"labels": {}}


@pytest.mark.parametrize("path", ["about", "columns", "latent/3", "latent/3/votes", "latent/3/examples", "global"])
def test_other_sites_make_nothing_computed(client, path):
    for headers in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
    ):
        refused(client.get(f"/api/{path}", headers=headers), 403)
    assert client.get(f"/api/{path}", headers={"sec-fetch-site": "none"}).status_code in (200, 503)
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link to the page


def test_a_server_for_all_has_the_names_of_its_addresses():
    assert "192.168.3.4:8000" in Names("0.0.0.0")
    assert "evil.example" not in Names("0.0.0.0")
    assert "192.168.3.4" not in Names("127.0.0.1")
    assert "lab-machine:80" in Names("lab-machine")


def raw(address, request):
    """The answer to bytes as they are: clients would tidy them."""
    host = urlsplit(address).netloc
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.connect()
    connection.sock.sendall(request.replace(b"HOST", host.encode()))
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    body = answer.read()
    connection.close()
    return answer.status, body


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/%252e%252e/etc/passwd",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/..\\..\\etc\\passwd",
        "/static/../../app.py",
        "/../app.py",
        "/%2e%2e/app.py",
        "/vendor/..%2f..%2fapp.py",
        "/./../__init__.py",
        "/index.html%00.js",
    ],
)
def test_no_path_leads_out_of_the_page(viewer_url, path):
    status, body = raw(viewer_url, f"GET {path} HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n".encode())
    assert status == 404, body[:200]
    assert b"error" in body
    assert b"root:" not in body


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: HOST\r\nHost: evil\r\nConnection: close\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
    ],
)
def test_broken_requests_are_refused(viewer_url, request_):
    status, body = raw(viewer_url, request_)
    assert status in (400, 403)
    assert b"Traceback" not in body


def test_links_out_of_the_page_are_not_followed(run, study, tmp_path, monkeypatch):
    static = tmp_path / "static"
    static.mkdir()
    (static / "index.html").write_text("page")
    (tmp_path / "secret").write_text("secret")
    (static / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("topkapi.viewer.app.STATIC", static)
    with TestClient(create_app(run, study, model=False), base_url="http://127.0.0.1") as client:
        assert client.get("/").text == "page"
        refused(client.get("/link"), 404)


def test_a_failure_says_no_more_than_that(run, study, monkeypatch, capsys):
    def fail(_self):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Opened, "about", fail)
    with TestClient(create_app(run, study, model=False), base_url="http://127.0.0.1") as client:
        assert "secret" not in refused(client.get("/api/about"), 500)
    assert "/secret/path" in capsys.readouterr().err


def test_text_stays_text(client, study):
    evil = "</script><img src=x onerror=alert(1)>\u2028"
    client.put("/api/labels/5", json={"label": evil, "note": ""})
    answer = client.get("/api/labels")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["labels"]["5"]["label"] == evil.strip()
    assert evil.strip() not in client.get("/").text


def test_pages_get_the_headers_too(client):
    for path in ("/", "/api/about", "/api/columns", "/nothing"):
        answer = client.get(path)
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_imports_of_labels_are_checked_as_a_whole(client):
    for labels in ({"1": {"label": "x"}, "128": {"label": "y"}}, {"1": {"label": "x"}, "2": 3}, {" 1": {}}, [], "x"):
        refused(client.post("/api/labels", json={"labels": labels}), 400)
    assert client.get("/api/labels").json() == {"labels": {}}
    many = {str(i): {"label": "x" * 200, "note": "n" * 1_000} for i in range(128)}
    assert len(json.dumps(many)) > 2**16
    assert client.post("/api/labels", json={"labels": many}).status_code == 200
