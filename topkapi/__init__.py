"""Topkapi trains TopK sparse autoencoders on the activations of language models, and measures them."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from topkapi.errors import TopkapiError

if TYPE_CHECKING:
    from topkapi.model import Autoencoder

__all__ = ["Autoencoder", "TopkapiError", "__version__"]


def __getattr__(name: str) -> Any:
    """`Autoencoder`, when it is first asked for: it brings torch, which the command line does without for --help."""
    if name != "Autoencoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from topkapi.model import Autoencoder

    return Autoencoder


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
