"""Files that are either whole or absent: atomic writes, checksums, and JSON that notices damage."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from topkapi.errors import TopkapiError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, flush it to disk, then rename it to `path`.

    A reader sees the old file or the new one, never a part. Raises OSError (disk full, read-only folder, a folder at
    `path`) with the temporary file removed and the old file untouched.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, flushed and renamed to it at the end: what `write_atomic` is for a file.

    Where `folder` has appeared meanwhile, that one stays. Raises OSError (disk full, read-only folder) with the
    temporary folder removed.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if not folder.exists():
            temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def expanded(path: str) -> Path:
    """A path with ~ and ~NAME replaced by home folders; where there is no such NAME, as it is: no file then."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def require_writable(what: str, path: Path | str, is_folder: bool = False) -> None:
    """Raise TopkapiError if the file (or folder) of an option cannot be written: to be called before long work.

    `what` names it in the message; "" is an option that is not given. Nothing is left behind: folders that are missing
    are made by whoever writes. What is no file, such as /dev/null, is refused: `write_atomic` would take its place.
    """
    if not path:
        return
    path, kind = Path(path), "folder" if is_folder else "file"
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        raise TopkapiError(f"{what} {path}: something else than a {kind} has that name. Give another.")
    there = path.absolute() if is_folder else path.absolute().parent
    nearest = next(folder for folder in (there, *there.parents) if folder.exists())
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise TopkapiError(
            f"{what} {path}: nothing can be written in {nearest} ({error.strerror}). Give another {kind}."
        ) from None


def write_text_atomic(path: Path, text: str) -> None:
    """`write_atomic` of a UTF-8 text."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray | int]) -> None:
    """`write_atomic` of an npz file."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, numpy would add a suffix
            np.savez(file, **arrays)

    write_atomic(path, save)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders of a killed process; call it while holding the folder's `lock`."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def lock(folder: Path, busy: Callable[[], None], name: str = ".lock") -> Iterator[None]:
    """Hold `folder`, made if need be, for this block alone; it is freed however the process ends.

    `busy` is called if another process or thread holds it: it raises, or returns to wait for that one. Another `name`
    is another lock, for a part of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces), in hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a dict atomically, with the key "checksum" that `read_json` verifies."""
    value = json.loads(json.dumps(value))  # as it will be read back: tuples become lists, keys strings
    write_text_atomic(path, json.dumps(value | {"checksum": sha256_json(value)}, indent=2) + "\n")


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: missing, a folder, not to be read, or a pipe or a device, which might have no end.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))
        return file.read()


def read_json(path: Path, what: str, remedy: str = "") -> dict[str, Any]:
    """The dict that `write_json` wrote, without its checksum.

    Raises:
        TopkapiError: no such file, not JSON, or changed since it was written; `what` names the thing in the message,
            and `remedy` says what to do.
    """
    remedy = f" {remedy}" if remedy else ""
    try:
        value = json.loads(read_file(path).decode("utf-8"))
        checksum = value.pop("checksum", None) if isinstance(value, dict) else None
        is_same = checksum == sha256_json(value)
    except FileNotFoundError:
        raise TopkapiError(f"{what}: no file {path}.{remedy}") from None
    except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, of whole numbers with thousands of digits
        raise TopkapiError(f"{what}: {path} is damaged: not JSON ({error}).{remedy}") from None
    if checksum is None:
        raise TopkapiError(f"{what}: {path} has no checksum: it is damaged, or not a file of Topkapi's.{remedy}")
    if not is_same:
        raise TopkapiError(f"{what}: {path} is damaged or was edited: its content does not match its checksum.{remedy}")
    return value


def require_shape(value: dict[str, Any], shape: Mapping[str, Any], path: Path, what: str, remedy: str) -> None:
    """Raise TopkapiError if a dict that `read_json` read lacks something, as one that others wrote may.

    `shape` has types by name, or dicts of them; the name "*" stands for all that are there.
    """
    if name := _missing(value, shape):
        raise TopkapiError(f"{what}: {path} has no {name}, or another thing in its place. {remedy}".rstrip())


def _missing(value: dict[str, Any], shape: Mapping[str, Any]) -> str:
    """The first name of a shape that a dict lacks or has with another type, as in "about.k"; "" if there is none."""
    for wanted, kind in shape.items():
        for name in value if wanted == "*" else [wanted]:
            found = value.get(name)
            if not isinstance(found, dict if isinstance(kind, Mapping) else kind):
                return name
            if isinstance(kind, Mapping) and (inner := _missing(found, kind)):
                return f"{name}.{inner}"
    return ""
