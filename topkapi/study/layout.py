"""The files of a study: raw little-endian arrays, and study.json, which describes them and is written last.

docs/study-format.md says what each array holds.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from topkapi.errors import TopkapiError
from topkapi.files import read_file, read_json, require_shape, sha256

FORMAT = 1  # raised when files change their meaning
STUDY, PROGRESS = "study.json", "progress.json"
READ_BYTES = 2**24  # files up to here are read when a study is opened: those of 2 million latents
WHAT = "Study"
CHANGED = "damaged: its SHA-256 is not the one recorded"
BY_TOKEN = ("row_offsets", "indices", "values")  # what a reservoir leaves out
CANDIDATES = ("candidate_offsets", "candidate_rows", "candidate_values")  # what a reservoir is drawn from
DTYPES = {
    "context_ids": "<i8",
    "document_offsets": "<i8",
    "positions": "<u4",
    "row_offsets": "<i8",
    "indices": "<u4",
    "values": "<f4",
    "latent_offsets": "<i8",
    "latent_rows": "<u4",
    "latent_values": "<f4",
    "n_fired": "<i8",
    "sums": "<f8",
    "sum_squares": "<f8",
    "maxima": "<f4",
}
"""Of every array but `tokens`, which has the dtype of the token file."""
SHAPE = {
    "identity": {"autoencoder": str, "language_model": str, "site": str, "split": str}
    | dict.fromkeys(("n_latents", "context", "reservoir"), int),
    "about": {"run": str, "n_tokens": int, "d_model": int, "activation": str},
    "files": {name: dict for name in ("tokens", *DTYPES) if name not in BY_TOKEN}
    | {"*": {"dtype": str, "length": int, "sha256": str}},
}
"""Of study.json."""
NAMES = (*DTYPES, "tokens", *CANDIDATES)  # of arrays that a study has, finished or not


def path_of(folder: Path, name: str) -> Path:
    """Where an array is."""
    return folder / f"{name}.bin"


def facts_of(folder: Path, name: str, dtype: str) -> dict[str, Any]:
    """What study.json says of an array that is on the disk."""
    path = path_of(folder, name)
    return {"dtype": dtype, "length": path.stat().st_size // np.dtype(dtype).itemsize, "sha256": sha256(path)}


def bytes_of(facts: dict[str, Any]) -> int:
    """How long the file of an array is that has these facts, in bytes."""
    return facts["length"] * np.dtype(facts["dtype"]).itemsize


def read_header(folder: Path) -> dict[str, Any]:
    """study.json of a finished study, once all its files are seen to be there in their full length.

    Raises:
        TopkapiError: no finished study, of another format, or a file is missing or too short.
    """
    if not (folder / STUDY).exists() and (folder / PROGRESS).exists():
        raise TopkapiError(f"{WHAT} {folder} is not finished: run the same topkapi study again, it goes on.")
    if not (folder / STUDY).exists():
        remedy = "Give the folder that topkapi study wrote, as in runs/demo/study."
    else:
        remedy = f"Delete the folder {folder} and run topkapi study again."
    header = read_json(folder / STUDY, WHAT, remedy)
    if header.get("format") != FORMAT:
        raise TopkapiError(f"{WHAT} {folder} has format {header.get('format')!r}; this version reads {FORMAT}.")
    require_shape(header, SHAPE, folder / STUDY, WHAT, remedy)
    for name, facts in header["files"].items():
        path, wanted = path_of(folder, name), bytes_of(facts)
        if not path.is_file() or path.stat().st_size != wanted:
            raise damaged(path, "missing" if not path.is_file() else f"damaged: not {wanted:,} bytes long")
    return header


def damaged(path: Path, state: str) -> TopkapiError:
    """The error for a file of a study that is not as it was written."""
    return TopkapiError(f"{WHAT}: {path} is {state}. Delete the folder {path.parent} and run topkapi study again.")


def verify(folder: Path, header: dict[str, Any]) -> None:
    """Read every file once. Raises TopkapiError for the first one that changed since it was written."""
    for name, facts in header["files"].items():
        if sha256(path := path_of(folder, name)) != facts["sha256"]:
            raise damaged(path, CHANGED)


def verified(folder: Path, name: str, facts: Mapping[str, Any]) -> np.ndarray:
    """An array, read into memory. Raises TopkapiError if it changed since it was written."""
    data = read_file(path := path_of(folder, name))
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise damaged(path, CHANGED)
    return np.frombuffer(data, facts["dtype"])


def mapped(folder: Path, name: str, dtype: str) -> np.ndarray:
    """An array, memory-mapped."""
    path = path_of(folder, name)
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of a finished study: those of up to READ_BYTES in memory, with their checksum seen, others mapped.

    What is in memory stays as it was opened, whatever becomes of its file. The system ends a process that reads a
    mapped file where it was cut off since (SIGBUS). So the file is looked at whenever its array is taken, which costs
    microseconds: take an array when it is read, and keep it no longer.

    Raises:
        TopkapiError: a file that is read is damaged; when an array is taken whose mapped file is not the one that was
            opened, or was written since.
    """

    def __init__(self, folder: Path, files: Mapping[str, dict[str, Any]]) -> None:
        large = {name: facts for name, facts in files.items() if bytes_of(facts) > READ_BYTES}
        self._paths = {name: path_of(folder, name) for name in large}
        self._opened = {name: _state(path) for name, path in self._paths.items()}  # before they are mapped
        self._arrays = {
            name: mapped(folder, name, facts["dtype"]) if name in large else verified(folder, name, facts)
            for name, facts in files.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        if (path := self._paths.get(name)) and (now := _state(path)) != (then := self._opened[name]):
            found = "was removed" if now is None else f"has changed (it had {then[0]:,} bytes, and has {now[0]:,})"
            raise TopkapiError(
                f"{WHAT}: {path} {found} since it was opened. Open the study again; for the viewer, start topkapi view "
                "again."
            )
        return array

    @property
    def mapped(self) -> bool:
        """Whether there are any whose checksum was not seen."""
        return bool(self._paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _state(path: Path) -> tuple[int, int, int] | None:
    """What tells one content of a file from another without reading it, its size first; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def continued(path: Path, length: int) -> BinaryIO:
    """A file, made if need be, open for more to follow its first `length` bytes; what came after them is cut off.

    Raises:
        TopkapiError: it has fewer bytes.
    """
    file = path.open("ab")
    if file.tell() < length:
        file.close()
        raise damaged(path, "damaged: shorter than it was")
    file.truncate(length)
    return file


def require_same(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse a folder whose study is of something else. Raises TopkapiError, which names what differs."""
    if changed := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise TopkapiError(
            f"{folder} holds a study of something else: {', '.join(changed)} differ. Restore what has changed, or name "
            "another folder with --out."
        )
