"""Tiny random language models of three families with random autoencoders, and a trained run with its study."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import topkapi.study
from tests.data.tiny import make_language_model
from topkapi.config import StudyConfig
from topkapi.data.language_model import LanguageModel
from topkapi.explore import Spliced
from topkapi.model import Autoencoder
from topkapi.train import load_run, open_text, train

FAMILIES = ("llama", "gpt2", "neox")
SITES = ("resid_pre.1", "resid_post.0", "attn_out.1", "mlp_out.0")


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    """Tensors are tiny: threads only wait for each other."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved models and their tokenizers, by family."""
    made = {name: make_language_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "gpt2")}
    tokenizer = AutoTokenizer.from_pretrained(made["llama"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
        end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = GPTNeoXConfig(vocab_size=512, hidden_size=64, intermediate_size=128, **heads, **end)
        model = GPTNeoXForCausalLM(config)
    made["neox"] = tmp_path_factory.mktemp("neox")
    model.save_pretrained(made["neox"])
    tokenizer.save_pretrained(made["neox"])
    return made


@pytest.fixture(scope="session")
def models(folders):
    """transformers' own models and tokenizers, in float64, by family."""
    loaded = {}
    for name, path in folders.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        _use_float64_norms(model)
        loaded[name] = model, AutoTokenizer.from_pretrained(path)
    return loaded


def _use_float64_norms(model):
    """transformers' RMS norms compute in float32 whatever they are given."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)


@pytest.fixture
def make(models):
    """A spliced model of a family at a site, in float64; the models are shared, their hooks must not stay."""

    def made(family="llama", site="resid_post.0", **settings):
        lm = LanguageModel.wrap(*models[family], site=site)
        return Spliced(lm, random_autoencoder(**settings))

    yield made
    for model, _ in models.values():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "a hook stayed"


def random_autoencoder(n_latents=96, k=6, activation="topk", d_model=64):
    """In float64, with latents that matter: biases, and an encoder that is not the decoder."""
    ae = Autoencoder(d_model=d_model, n_latents=n_latents, k=k, activation=activation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return ae.double()


@pytest.fixture(scope="session")
def run(tiny_config, tmp_path_factory):
    """A finished run with a study in RUN/study."""
    torch.set_num_threads(1)
    config = replace(tiny_config, data=replace(tiny_config.data, held_out=0.5, source="live"), tokens=500)
    folder = tmp_path_factory.mktemp("explore") / "run"
    train([config], [folder])
    ae, config = load_run(folder)
    text = open_text(config)
    settings = StudyConfig(tokens=1_000)
    topkapi.study.write_study(
        folder, ae, text.language_model, text.splits.held_out, config.data, settings, folder / "study"
    )
    return folder
