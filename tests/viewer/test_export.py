"""An export holds what the server answers, for every latent, and overwrites nothing but an export.

Seen to fail when: the last file has latents of the one before; the marker of an export is not looked at.
"""

import json
import shutil

import pytest
from starlette.testclient import TestClient

from topkapi.cli import main
from topkapi.files import write_json
from topkapi.viewer import export as export_module
from topkapi.viewer.app import create_app
from topkapi.viewer.export import export


@pytest.fixture
def site(run, study, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "LATENTS_A_FILE", 50)
    export(run, study, tmp_path / "site", 2, True)
    return tmp_path / "site"


def assert_close(found, wanted):
    """Equal but for the last digits: latents are multiplied many at a time in an export, and here one."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(wanted, abs=1e-4) if isinstance(wanted, float) else wanted)


def test_files_are_what_the_server_answers(site, run, study):
    with TestClient(create_app(run, study), base_url="http://127.0.0.1") as client:
        while client.get("/api/about").json()["model"]["state"] != "ready":
            pass
        rows = [row for n in range(3) for row in json.loads((site / "api" / "latents" / f"{n}.json").read_bytes())]
        assert [row["i"] for row in rows] == list(range(study.n_latents))
        for i in (0, 49, 50, 127, int(study.n_fired.argmax())):
            examples, votes = rows[i].pop("examples"), rows[i].pop("votes")
            assert_close(rows[i], client.get(f"/api/latent/{i}").json())
            assert_close(votes, client.get(f"/api/latent/{i}/votes").json())
            for kind, n in (("top", 2), ("random", 2), ("near", 2), ("quantile", 1)):
                assert examples[kind] == client.get(f"/api/latent/{i}/examples?kind={kind}&n={n}").json()
        for name in ("global", "runs", "labels"):
            assert json.loads((site / "api" / f"{name}.json").read_bytes()) == client.get(f"/api/{name}").json()
        while client.get("/api/about").json()["index"]["state"] != "ready":
            pass
        assert (site / "api" / "columns.bin").read_bytes() == client.get("/api/columns").content
        assert (site / "index.html").read_text().replace(' data-backend="static"', "") == client.get("/").text
    about = json.loads((site / "api" / "about.json").read_bytes())
    assert about["static"] is True
    assert about["model"]["state"] == "off"
    assert sorted(path.name for path in (site / "api").iterdir() if path.is_file()) == [
        "about.json",
        "columns.bin",
        "global.json",
        "labels.json",
        "runs.json",
    ]


def earlier(site):
    """What tells an export."""
    (site / "api").mkdir(parents=True)
    (site / "api" / "about.json").write_text('{"static": true}')
    return site


def test_an_export_is_replaced_and_nothing_else(run, study, tmp_path, capsys):
    site = earlier(tmp_path / "site")
    command = ["export", str(run), str(site), "--examples", "1", "--no-votes"]
    (site / "stale").write_text("of the export before")
    assert main(command) == 0
    assert not (site / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    (tmp_path / "link").symlink_to(site)
    for name, said in (("mine", "something else"), ("file", "than a folder"), ("link", "no folder"), ("tiny", "else")):
        capsys.readouterr()
        assert main([*command[:2], str(tmp_path / name), *command[3:]]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis").read_text() == "years of work"
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_export_that_fails_leaves_what_was_there(run, study, tmp_path, monkeypatch):
    earlier(tmp_path / "site")
    before = sorted([*tmp_path.iterdir(), *(tmp_path / "site").rglob("*")])

    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_examples", fail)
    with pytest.raises(OSError, match="No space"):
        export(run, study, tmp_path / "site", 1, False)
    assert sorted([*tmp_path.iterdir(), *(tmp_path / "site").rglob("*")]) == before


def test_mistakes_of_the_commands_are_one_line(run, tmp_path, capsys):
    site = str(tmp_path / "site")
    cases = [
        (["export", str(run)], "name the folder"),
        (["export", str(run), "--examples", "3"], "name the folder"),
        (["export", str(run), site, "--examples", "0"], "--examples must be 1 or more"),
        (["export", str(tmp_path / "none"), site], "no run"),
        (["view", str(tmp_path / "none")], "no run"),
        (["view", "--port", "1"], "needs a run first"),
        (["view", str(run), "--port", "70000"], "port"),
        (["view", str(run), "--host", "1.2.3.4", "--port", "0"], "cannot listen"),
        (["view", str(run), "--host", "127.0.0..1", "--port", "0"], "cannot listen"),
        (["view", str(run), "--study", str(tmp_path / "other")], f"topkapi study {run} --tokens 16000 --out"),
    ]
    for arguments, said in cases:
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert said in err, (arguments, err)
        assert len([line for line in err.splitlines() if line.startswith("topkapi: ")]) == 1


def test_studies_that_cannot_be_shown_are_one_line(run, tmp_path, capsys):
    def said(*arguments):
        capsys.readouterr()
        assert main(["view", *map(str, arguments), "--port", "0"]) == 2
        return capsys.readouterr().err

    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config.pop("checksum")
    config["files"]["model.safetensors"] = "0" * 64
    write_json(other / "config.json", config)
    assert "another autoencoder" in said(other)
    assert "another autoencoder" in said(other, "--study", run / "study")
    (run / "study" / "values.bin").write_bytes(b"123")
    assert "values.bin is damaged" in said(run)
    (run / "study" / "study.json").write_text("{")
    assert "not JSON" in said(run)
    shutil.rmtree(run / "study")
    assert f"topkapi study {run} --tokens 16000" in said(run)
