"""Fixtures of the kernels' tests; a module asks for them with `pytestmark = pytest.mark.usefixtures(...)`."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN or a large number: an element that a kernel skips shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments longer than 8 pairs are split, and programs take few latents, so that small shapes have several."""
    from topkapi.ops.kernels import weight_gradients

    monkeypatch.setattr(weight_gradients, "SPLIT", 8)
    monkeypatch.setattr(weight_gradients, "LONG", 9)
    monkeypatch.setattr(weight_gradients, "BIASES", {"positions": 2, "columns": 64, "warps": 1})
    for turn in ("WITH_ROWS", "SUMS_ALONE"):
        monkeypatch.setattr(weight_gradients, turn, {"latents": 4, "programs": 3, "wide": 16})
