"""safetensors files with a checksum."""

import errno
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.files import sha256


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, not atomically: call it inside `write_atomic` or a folder that is renamed.

    Raises:
        OSError: the disk is full or the folder read-only (safetensors has an error of its own for these).
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner alone
    except SafetensorError as error:
        full = "StorageFull" in str(error) or "No space left" in str(error)
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number) if full else str(error), str(path)) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_tensors(path: Path, checksum: str, what: str, remedy: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose SHA-256 is `checksum`.

    Raises:
        TopkapiError: missing, damaged, or another file; `what` names the thing in the message, and `remedy` says
            what to do.
    """
    remedy = f" {remedy}" if remedy else ""
    if not path.is_file():
        raise TopkapiError(f"{what}: no file {path}.{remedy}")
    if sha256(path) != checksum:
        raise TopkapiError(f"{what}: {path} is damaged or another file: its SHA-256 is not the one recorded.{remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise TopkapiError(f"{what}: {path} is not a safetensors file: {error}.") from None
