"""A tiny language model, a corpus, a cache of their own and a config of twenty steps on them, for the whole session."""

import inspect
import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when a kernel's module is imported

try:
    import triton
except ModuleNotFoundError:  # a torch without CUDA does not bring it; tests of kernels are skipped
    triton = None


def _jit_unwrapped(function=None, **options):
    """`triton.jit` for functions that the checks of annotations have wrapped."""
    if function is None:
        return lambda function: _jit(inspect.unwrap(function), **options)
    return _jit(inspect.unwrap(function), **options)


if triton is not None:
    _jit, triton.jit = triton.jit, _jit_unwrapped

from tests.data.tiny import make_corpus, make_language_model
from tests.fork_server import ForkServer
from topkapi.config import (
    AuxKConfig,
    DataConfig,
    EvalConfig,
    LanguageModelConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


@pytest.fixture(scope="session", autouse=True)
def tiny_cache(tmp_path_factory):
    """The cache folder of the session: no test reads or fills the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "topkapi"


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory):
    """Folder of a random Llama of two layers, d_model 64."""
    return make_language_model(tmp_path_factory.mktemp("tiny") / "lm")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A corpus of some 5 000 tokens, by the name that DataConfig.corpora takes."""
    return make_corpus(tmp_path_factory.mktemp("tiny") / "corpus.jsonl", n_documents=40)


@pytest.fixture(scope="session")
def tiny_config(tiny_language_model, tiny_corpus):
    """Twenty steps on cached activations, a checkpoint each five, a line of metrics a step; AuxK has work to do."""
    return TrainConfig(
        language_model=LanguageModelConfig(name=str(tiny_language_model), site="resid_post.0"),
        data=DataConfig(corpora=(tiny_corpus,), max_tokens=4_000, context=16, shuffle_tokens=700, source="cache"),
        model=ModelConfig(n_latents=128, k=4),
        auxk=AuxKConfig(dead_after=300),
        optim=OptimConfig(lr=1e-3, lr_warmup=0.1, lr_decay=0.2, ema_decay=0.9),
        eval=EvalConfig(tokens=256, downstream_tokens=64),
        tokens=20 * 100,
        batch_tokens=100,
        log_every=1,
        save_every=5,
    )


@pytest.fixture
def tiny_live_config(tiny_config):
    """The same, with activations computed as training goes."""
    return replace(tiny_config, data=replace(tiny_config.data, source="live"))


@pytest.fixture(scope="module")
def one_thread():
    """One thread: the tensors here are so small that threads only wait for each other, and bits depend on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fork_server():
    """Starts topkapi processes in no time, see `tests.fork_server`."""
    server = ForkServer()
    yield server
    server.close()
