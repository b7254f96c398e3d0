"""Topkapi trains TopK sparse autoencoders on the activations of language models, and measures them."""

__version__ = "0.1.0"

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from topkapi.errors import TopkapiError

if TYPE_CHECKING:
    from topkapi.model import Autoencoder

__all__ = ["Autoencoder", "TopkapiError", "__version__"]


def __getattr__(name: str) -> Any:
    """`Autoencoder` and the modules, when they are first asked for: the command line does without torch for --help."""
    if name == "Autoencoder":
        from topkapi.model import Autoencoder

        return Autoencoder
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
