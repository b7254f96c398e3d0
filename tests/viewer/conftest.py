"""A tiny run with a study, and the viewer of it: as an application, and served on a free port for browsers."""

import shutil
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

import topkapi.study
from tests.study.conftest import finished
from tests.viewer.serving import served
from topkapi.viewer.app import create_app

TOKENS = 1_000


@pytest.fixture(autouse=True, scope="session")
def _one_thread_for_all():
    """Tensors are so small that threads only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tmp_path_factory):
    """A finished run of 128 latents with its study; not to be written into."""
    data = replace(tiny_config.data, held_out=0.5, source="live")
    trained = finished(replace(tiny_config, data=data, tokens=500), tmp_path_factory.mktemp("viewer") / "tiny")
    trained.study(trained.run / "study", tokens=TOKENS)
    return trained.run


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run, for one test."""
    return shutil.copytree(tiny_run, tmp_path / "tiny")


@pytest.fixture
def all_mapped(monkeypatch):
    """Files of any size are mapped, as those of a large study are."""
    monkeypatch.setattr("topkapi.study.layout.READ_BYTES", -1)


@pytest.fixture
def study(run):
    return topkapi.study.open(run / "study", run)


@pytest.fixture
def client(run, study):
    """Asks the viewer of `run`, without a language model."""
    with TestClient(create_app(run, study, model=False), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def viewer_url(tiny_run, tmp_path_factory):
    """The address of the viewer of a copy of the tiny run, language model included."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("served") / "tiny")
    with served(run) as address:
        yield address
