"""One tiny language model and corpus for all tests of topkapi.data, and a cache folder of their own."""

import numpy as np
import pytest
import torch

from tests.data.tiny import make_corpus, make_language_model
from topkapi.config import DataConfig, LanguageModelConfig
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile, tokenize


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder for what the whole session shares."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Matrices this small take ten times longer when two threads share a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def llama(home):
    return make_language_model(home / "llama")


@pytest.fixture(scope="session")
def gpt2(home):
    return make_language_model(home / "gpt2", "gpt2")


@pytest.fixture(scope="session")
def corpus(home):
    return make_corpus(home / "corpus.jsonl", n_documents=60)


@pytest.fixture(scope="session")
def lm(llama):
    config = LanguageModelConfig(name=str(llama), site="resid_post.0", batch_contexts=4)
    return LanguageModel.load(config, torch.device("cpu"))


@pytest.fixture
def config(corpus):
    return DataConfig(corpora=(corpus,), context=16, shuffle_tokens=500)


@pytest.fixture
def splits(config, lm):
    return tokenize(config, lm.tokenizer, lm.name)


@pytest.fixture
def numbers():
    """A token file whose token i is i."""
    return TokenFile(np.arange(100, dtype=np.uint16), np.array([0, 40, 100]), fingerprint="numbers")
