"""Topkapi trains, scales, reads and steers TopK sparse autoencoders on language-model activations."""

__version__ = "0.1.0"

from topkapi.errors import TopkapiError
from topkapi.model import Autoencoder

__all__ = ["Autoencoder", "TopkapiError", "__version__"]
