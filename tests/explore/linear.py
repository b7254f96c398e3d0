"""A language model that is linear after its site, so that what an ablation changes can be written down.

Activation = embedding[token]; logits = (mean of the activations so far) unembedding.
"""

from types import SimpleNamespace

import torch
from torch import nn

from tests.explore.conftest import random_autoencoder
from topkapi.data.language_model import LanguageModel
from topkapi.explore import Spliced

VOCABULARY = 50


class Layer(nn.Module):
    def forward(self, hidden):
        return hidden


class Base(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.layers = nn.Embedding.from_pretrained(embedding), nn.ModuleList([Layer()])

    def forward(self, input_ids, use_cache=False):
        return self.layers[0](self.embedding(input_ids))


class LinearModel(nn.Module):
    """What `LanguageModel` needs of transformers' models."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        embedding, unembedding = torch.randn(2, VOCABULARY, 64, dtype=torch.float64, generator=generator)
        self.base_model = Base(embedding)
        self.register_parameter("unembedding", nn.Parameter(unembedding.T.contiguous(), requires_grad=False))
        self.dtype = torch.float64
        self.config = SimpleNamespace(
            hidden_size=64, num_hidden_layers=1, vocab_size=VOCABULARY, get_text_config=lambda: self.config
        )
        self.config.to_diff_dict = dict

    def forward(self, input_ids, use_cache=False):
        hidden = self.base_model(input_ids, use_cache=use_cache)
        so_far = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=so_far @ self.unembedding)


def linear_spliced():
    """Spliced, in float64; no token is special."""
    tokenizer = SimpleNamespace(added_tokens_decoder={}, all_special_ids=[], eos_token_id=None)
    return Spliced(LanguageModel.wrap(LinearModel(), tokenizer, site="resid_post.0"), random_autoencoder())
