"""Matplotlib (extra `plot`), asked for when a picture is drawn and not before."""

import importlib.util
from typing import Any

from topkapi.errors import TopkapiError


def require_matplotlib() -> None:
    """Raise TopkapiError if matplotlib is missing: to be called before long work that ends in a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TopkapiError("a picture needs matplotlib: pip install 'topkapi[plot]'.")


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Raises TopkapiError if matplotlib is missing."""
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
