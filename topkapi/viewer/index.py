"""What the table of latents shows beside the study's own columns: kurtosis, number of modes, strongest token.

All firings have to be read for it, so it is made once, in the background while the page can be used already, and kept
in STUDY/index. It is tied to the study's identity: the index of a study that was since written anew is made again, and
so is a damaged one.

1. Kurtosis and strongest firing, exact: one pass over the code by latent, ranges of latents at a time.
2. Modes of each latent, as its page counts them (`topkapi.viewer.modes`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from topkapi.console import say
from topkapi.files import read_file, sha256_json, write_atomic
from topkapi.study import Study
from topkapi.study.invert import ranges
from topkapi.study.layout import damaged, path_of
from topkapi.viewer.answers import to_json
from topkapi.viewer.binary import pack, unpack
from topkapi.viewer.modes import MOST_FIRINGS, find_modes
from topkapi.viewer.texts import Texts

FORMAT = 1  # raised when any of its numbers changes its meaning
FILE = Path("index") / "latents.bin"  # in the study's folder
NOT_COUNTED = 255
NO_TOKEN = 2**32 - 1
ENTRIES_AT_ONCE = 2**22  # firings in float64, a hundred MiB
LATENTS_AT_ONCE = 2_048  # counted between two versions


class Index:
    """The columns as far as they are known, which `build` fills in."""

    def __init__(self, study: Study) -> None:
        n = study.n_latents
        self.study, self.path = study, study.folder / FILE
        self.arrays = {
            "kurtosis": np.full(n, np.nan, "<f4"),
            "modes": np.full(n, NOT_COUNTED, "u1"),
            "top_token": np.full(n, NO_TOKEN, "<u4"),
        }
        self.tokens: list[str] = []
        """Texts that `top_token` counts from 0."""
        self.done = 0
        """Latents whose modes are counted."""
        self.version = 0
        """Raised whenever there is more to show."""
        self.why = ""
        """What kept it from being made, if something did."""

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to be counted."""
        return self.done == self.study.n_latents

    def facts(self) -> dict[str, Any]:
        """How far it is."""
        return {
            "state": "failed" if self.why else "ready" if self.is_ready else "building",
            "done": self.done,
            "total": self.study.n_latents,
        }

    def build(self, texts: Callable[[], Texts], stop: Event) -> None:
        """Read it from its file, or make it and write that; `stop` ends it early. What it raises is said as well."""
        try:
            if not self._load() and self._read_firings(texts, stop):
                self.version += 1
                if self._count_modes(stop):
                    if self.study.arrays.mapped:
                        self.study.verify()  # or what was made of damaged files would stay when they are mended
                    self._save()
        except Exception as error:
            self.why = str(error) or type(error).__name__
            say(f"warning: modes, kurtosis and top tokens cannot be shown: {self.why}")
            raise
        self.version += 1

    def _read_firings(self, texts: Callable[[], Texts], stop: Event) -> bool:
        arrays, offsets = self.study.arrays, self._offsets()
        strongest = np.full(self.study.n_latents, -1, np.int64)
        for start, end in ranges(offsets, ENTRIES_AT_ONCE):
            if stop.is_set():
                return False
            values = np.asarray(arrays["latent_values"][offsets[start] : offsets[end]])
            first = offsets[start : end + 1] - offsets[start]
            fired = np.flatnonzero(np.diff(first))  # `reduceat` knows no empty parts
            if len(fired):
                squares, self.arrays["kurtosis"][start + fired] = _moments(values, first[:-1][fired])
                self._require_counted(start + fired, squares)
                strongest[start + fired] = offsets[start] + _strongest(values, first[:-1][fired])
        known = np.flatnonzero(strongest >= 0)
        places = arrays["positions"][arrays["latent_rows"][strongest[known]]]
        ids, which = np.unique(arrays["tokens"][places], return_inverse=True)
        self.tokens = [texts().alone(token) for token in ids.tolist()]
        self.arrays["top_token"][known] = which
        return True

    def _require_counted(self, some: Int64[np.ndarray, " m"], squares: Float64[np.ndarray, " m"]) -> None:
        """Raise TopkapiError where the values of some latents have other sums of squares than the study counted: what
        was made of damaged ones would be kept."""
        known = self.study.arrays["sum_squares"][some]
        if not self.study.reservoir and not np.allclose(squares, known, rtol=1e-6, atol=0):
            state = "damaged, or latent_offsets.bin is: sums of squares are not those that were counted"
            raise damaged(path_of(self.study.folder, "latent_values"), state)

    def _count_modes(self, stop: Event) -> bool:
        offsets = self._offsets()
        for start in range(0, self.study.n_latents, LATENTS_AT_ONCE):
            end = min(start + LATENTS_AT_ONCE, self.study.n_latents)
            # a copy: looking at the file for each latent slows requests down, and between two looks it may be cut off
            values = np.split(
                self.study.arrays["latent_values"][offsets[start] : offsets[end]].copy(),
                offsets[start + 1 : end] - offsets[start],
            )
            for i, firings in enumerate(values, start):
                if stop.is_set():
                    return False
                self.arrays["modes"][i] = min(len(find_modes(firings)), NOT_COUNTED - 1)
            self.version += 1
            self.done = end  # last: who sees that all are counted asks for the table, which must be a new one
        return True

    def _offsets(self) -> Int64[np.ndarray, " n_latents_plus_1"]:
        """A copy of where the firings of each latent begin: what is mapped may not be kept."""
        return np.array(self.study.arrays["latent_offsets"])

    def _identity(self) -> str:
        return sha256_json({"format": FORMAT, "firings": MOST_FIRINGS, "files": self.study.header["files"]})

    def _load(self) -> bool:
        try:
            header, arrays = unpack(read_file(self.path))
            tokens = header["tokens"]
            whole = header["identity"] == self._identity() and header["sha256"] == _digest(arrays, tokens)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            whole = False
        if whole and arrays.keys() == self.arrays.keys():
            self.tokens, self.arrays = tokens, arrays
            self.version += 1
            self.done = self.study.n_latents
        return self.is_ready

    def _save(self) -> None:
        header = {
            "identity": self._identity(),
            "sha256": _digest(self.arrays, self.tokens),
            "n_latents": self.study.n_latents,
            "tokens": self.tokens,
        }
        try:
            write_atomic(self.path, lambda path: path.write_bytes(pack(header, self.arrays)))
        except OSError as error:
            say(f"warning: the index of latents cannot be kept in {self.path.parent}: {error.strerror}.")


def _moments(
    values: Float32[np.ndarray, " n"], first: Int64[np.ndarray, " parts"]
) -> tuple[Float64[np.ndarray, " parts"], Float64[np.ndarray, " parts"]]:
    """The sum of squares and E[a^4] / E[a^2]^2 of each part, which begins at `first`."""
    squares = values.astype(np.float64) ** 2
    counts = np.diff(first, append=len(values))
    sums = np.add.reduceat(squares, first)
    return sums, np.add.reduceat(squares**2, first) * counts / sums**2


def _strongest(values: Float32[np.ndarray, " n"], first: Int64[np.ndarray, " parts"]) -> Int64[np.ndarray, " parts"]:
    """Where each part has its largest value, the first of equal ones."""
    largest = np.repeat(np.maximum.reduceat(values, first), np.diff(first, append=len(values)))
    where = np.flatnonzero(values == largest)
    return where[np.searchsorted(where, first)]


def _digest(arrays: dict[str, np.ndarray], tokens: list[str]) -> str:
    digest = hashlib.sha256(to_json(tokens))
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()
