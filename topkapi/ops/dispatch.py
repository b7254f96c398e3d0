"""Which implementation of the primitives a call uses: Triton kernels for CUDA tensors, plain PyTorch otherwise.

Decided at each call from the tensors given, so importing Topkapi imports no Triton, and tests can choose:

    with reference_only():   # plain PyTorch on any device
    with kernels_only():     # kernels on any device: on CPU under TRITON_INTERPRET=1
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType

from torch import Tensor

from topkapi.errors import TopkapiError

_forced: ContextVar[str] = ContextVar("forced", default="")


def implementation(tensor: Tensor) -> ModuleType:
    """The module whose primitives suit `tensor`: `topkapi.ops.kernels` or `topkapi.ops.reference`.

    Raises:
        TopkapiError: kernels are wanted and Triton is not installed.
    """
    chosen = _forced.get() or ("kernels" if tensor.is_cuda else "reference")
    try:
        return import_module(f"topkapi.ops.{chosen}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise TopkapiError("a GPU needs the package triton: pip install triton, or take the CPU.") from None


@contextmanager
def reference_only() -> Iterator[None]:
    """Use plain PyTorch on every device within the block."""
    yield from _force("reference")


@contextmanager
def kernels_only() -> Iterator[None]:
    """Use the kernels on every device within the block; on CPU they need TRITON_INTERPRET=1."""
    yield from _force("kernels")


def _force(name: str) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
