"""The table of all latents that the page shows, sorts and filters."""

import gzip
import hashlib
from threading import Lock
from typing import NamedTuple

import numpy as np

from topkapi.study import Study
from topkapi.viewer.binary import pack
from topkapi.viewer.index import Index

GZIP_LEVEL = 1  # 131 072 latents: 4.1 MB become 2.6 MB in 0.1 s; level 6 takes 0.3 s for 2 % less


class Sent(NamedTuple):
    """The table as it is sent."""

    plain: bytes
    zipped: bytes
    tag: str
    """Of its content, in quotes."""


class Table:
    """The table of a study, made anew when its index has more to show."""

    def __init__(self, study: Study, index: Index) -> None:
        self.study, self.index = study, index
        self._sent, self._version = Sent(b"", b"", ""), -1
        self._lock = Lock()

    def current(self) -> Sent:
        """The table as far as it is known; others who ask wait while it is made."""
        with self._lock:
            version = self.index.version
            if version != self._version:
                data = table(self.study, self.index)
                tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
                self._sent, self._version = Sent(data, gzip.compress(data, GZIP_LEVEL), tag), version
            return self._sent


def table(study: Study, index: Index) -> bytes:
    """The table: a study's own columns, and those of its index as far as it is made.

    n_fired (u4); importance, and mean and maximum of firings (f4); kurtosis (f4); modes (u1, 255 where they are not
    counted yet, 0 where the latent never fired); top_token (u4, an index into the header's tokens, 2^32 - 1 for none).
    What a latent that never fired has none of is NaN.
    """
    n_fired = study.n_fired
    with np.errstate(invalid="ignore"):
        mean = np.where(n_fired > 0, study.arrays["sums"] / n_fired, np.nan)
    own = {
        "n_fired": n_fired.astype("<u4"),
        "importance": study.importance.astype("<f4"),
        "mean": mean.astype("<f4"),
        "maximum": np.where(n_fired > 0, study.arrays["maxima"], np.nan).astype("<f4"),
    }
    indexed = {name: array.copy() for name, array in index.arrays.items()}  # before their tokens, which come first
    header = {"n_latents": study.n_latents, "n_tokens": study.n_tokens, "tokens": index.tokens}
    return pack(header, own | indexed)
