"""Topkapi trains TopK sparse autoencoders on the activations of language models, and measures them."""

__version__ = "0.1.0"

from topkapi.errors import TopkapiError
from topkapi.model import Autoencoder

__all__ = ["Autoencoder", "TopkapiError", "__version__"]
