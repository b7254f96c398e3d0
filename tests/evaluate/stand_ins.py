"""A language model and autoencoders so small that every measure can be computed by hand."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.model import Autoencoder

D_MODEL, VOCABULARY, SPECIAL = 4, 6, 0


class RunningMeanModel(LanguageModel):
    """Activation = embedding[token]; logits = (mean of the activations so far) unembedding.

    The running mean makes later predictions depend on earlier positions, as attention does.
    """

    def __init__(self, embedding: Tensor, unembedding: Tensor) -> None:
        self.embedding, self.unembedding = embedding, unembedding
        self.d_model, self.special_ids, self.batch_contexts = embedding.shape[1], {SPECIAL}, 32
        self.model = torch.nn.Module()  # without parameters
        self.shapes: list[tuple[int, ...]] = []

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]

    @torch.no_grad()
    def logits(self, tokens: Tensor, replace: Any = None) -> Tensor:
        at_site = self.embedding[tokens]
        at_site = replace(at_site) if replace else at_site
        so_far = at_site.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        out = so_far @ self.unembedding
        self.shapes.append(tuple(out.shape))
        return out


def random_model(seed: int = 0, vocabulary: int = VOCABULARY, zero_mean: bool = False) -> RunningMeanModel:
    """A `RunningMeanModel` with bf16-representable embeddings, so that harvesting does not round them."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocabulary, D_MODEL, generator=generator)
    if zero_mean:
        embedding[:, 1::2] = -embedding[:, ::2]
    unembedding = 3 * torch.randn(D_MODEL, vocabulary, generator=generator)
    return RunningMeanModel(embedding.bfloat16().float(), unembedding)


def token_file(tokens: list[int] | np.ndarray) -> TokenFile:
    """A token file of these tokens, one document."""
    tokens = np.asarray(tokens, dtype=np.uint16)
    return TokenFile(tokens, np.array([0, len(tokens)]), fingerprint="test")


def random_tokens(n: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, n)


def random_autoencoder(n_latents: int = 8, k: int = 2, activation: str = "topk", seed: int = 0) -> Autoencoder:
    """Random weights, biases included."""
    ae = Autoencoder(d_model=D_MODEL, n_latents=n_latents, k=k, activation=activation, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return ae


def identity_autoencoder() -> Autoencoder:
    """Latents x and -x: at most d_model of them are positive, so k = d_model loses nothing."""
    ae = Autoencoder(d_model=D_MODEL, n_latents=2 * D_MODEL, k=D_MODEL)
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    with torch.no_grad():
        ae.W_enc.copy_(both)
        ae.W_dec.copy_(both)
    return ae


def zero_autoencoder() -> Autoencoder:
    """Reconstructs 0 in normalised space: raw, every coordinate becomes the token's own mean."""
    ae = Autoencoder(d_model=D_MODEL, n_latents=3, k=1)
    with torch.no_grad():
        ae.W_dec.zero_()
    return ae


def reconstruct_by_hand(ae: Autoencoder, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, latents, recon, raw recon) of rows, in float64 loops without the package."""
    W_enc, W_dec, latent_bias, pre_bias = (
        p.detach().double().numpy() for p in (ae.W_enc, ae.W_dec, ae.latent_bias, ae.pre_bias)
    )
    mean = raw.mean(1, keepdims=True)
    norm = np.sqrt(((raw - mean) ** 2).sum(1, keepdims=True))
    x = (raw - mean) / norm
    latents = np.maximum((x - pre_bias) @ W_enc.T + latent_bias, 0)
    if ae.activation == "topk":
        for row in latents:
            row[np.argsort(-row)[ae.k :]] = 0
    recon = latents @ W_dec + pre_bias
    return x, latents, recon, recon * norm + mean
