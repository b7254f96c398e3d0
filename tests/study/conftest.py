"""A trained autoencoder, its study, and the same code found without the package's files: a dense matrix."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import topkapi.study
from topkapi.config import StudyConfig, TrainConfig
from topkapi.data.activations import harvest
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.evaluate import spread_contexts
from topkapi.model import Autoencoder
from topkapi.study import invert, writer
from topkapi.train import load_run, open_text, train

TOKENS = 1_000
BLOCK_TOKENS = 160  # so that there are several blocks, the last one short


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    """Bits depend on threads."""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Blocks, ranges and chunks so small that there are several of each, and progress saved after each block."""
    monkeypatch.setattr(writer, "BLOCK_TOKENS", BLOCK_TOKENS)
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(invert, "ENTRIES_AT_ONCE", 500)
    monkeypatch.setattr(invert, "CHUNK_ENTRIES", 300)


@dataclass
class Trained:
    """A finished run and what `write_study` takes beside."""

    run: Path
    config: TrainConfig
    ae: Autoencoder
    lm: LanguageModel
    text: TokenFile

    def study(self, folder, **settings):
        """Write a study into `folder` and open it."""
        settings = StudyConfig(**{"tokens": TOKENS, **settings})
        topkapi.study.write_study(self.run, self.ae, self.lm, self.text, self.config.data, settings, folder)
        return topkapi.study.open(folder)


@pytest.fixture(scope="session")
def small_config(tiny_config):
    data = replace(tiny_config.data, held_out=0.5, source="live", max_norm_ratio=3.0)
    return replace(tiny_config, data=data, tokens=500)


def finished(config, run):
    torch.set_num_threads(1)
    train([config], [run])
    ae, config = load_run(run)
    text = open_text(config)
    return Trained(run, config, ae, text.language_model, text.splits.held_out)


@pytest.fixture(scope="session")
def trained(small_config, tmp_path_factory):
    return finished(small_config, tmp_path_factory.mktemp("study") / "run")


@dataclass
class Dense:
    """What a study says, by looking at everything."""

    values: np.ndarray  # (rows, n_latents), 0 where a latent does not fire
    positions: np.ndarray  # into the split's tokens
    context_ids: np.ndarray


@torch.no_grad()
def dense(trained):
    context = trained.config.data.context
    ids = spread_contexts(trained.text, context, TOKENS)
    step = BLOCK_TOKENS // context
    rows, places = [], []
    for start in range(0, len(ids), step):
        block, _ = harvest(trained.lm, trained.text, ids[start : start + step], trained.config.data)
        values, indices = trained.ae.encode(trained.ae.normalise(block.x.float()).x)
        rows.append(torch.zeros(len(values), trained.ae.n_latents).scatter_(1, indices, values))
        places.append(block.positions)
    return Dense(torch.cat(rows).numpy(), torch.cat(places).numpy(), ids)


@pytest.fixture(scope="session")
def wanted(trained):
    return dense(trained)


@pytest.fixture
def study(trained, tmp_path):
    return trained.study(tmp_path / "study")
