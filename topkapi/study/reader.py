"""Opens a study: statistics of all latents, the code of a token, and the way to one latent (`topkapi.study.latent`)."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt32
from torch import Tensor

from topkapi import published
from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError
from topkapi.model import Autoencoder
from topkapi.study import directions
from topkapi.study.latent import Latent
from topkapi.study.layout import WHAT, Arrays, read_header, verify


class Entries(NamedTuple):
    """Active latents of one token, ascending, and their values."""

    indices: UInt32[np.ndarray, " entries"]
    values: Float32[np.ndarray, " entries"]


class Place(NamedTuple):
    """Where an encoded token stands."""

    context: int
    """Number of its context among those of the study, whose text begins at `context * Study.context` of `tokens`."""
    position: int
    """In its context, from 0."""
    source: int
    """In the tokens of the split."""
    document: int
    """Number of its document in the split."""


class Study:
    """A finished study. Large arrays are memory-mapped: opening is quick, and what is not asked for is not read."""

    def __init__(self, folder: Path, run: Path | None = None) -> None:
        self.folder = folder
        self.header = read_header(folder)
        self.identity: dict[str, Any] = self.header["identity"]
        self.run = (folder.resolve() / self.header["about"]["run"]).resolve() if run is None else run
        self.context: int = self.identity["context"]
        """Tokens of a context."""
        self.n_latents: int = self.identity["n_latents"]
        self.n_tokens: int = self.header["about"]["n_tokens"]
        """Tokens encoded: the rows of the code, less than the tokens of text."""
        self.reservoir: int = self.identity["reservoir"]
        """Firings kept of each latent at most; 0: all of them."""
        self.arrays = Arrays(folder, self.header["files"])

    def verify(self) -> None:
        """Read all files once. Raises TopkapiError for the first one that is not as it was written."""
        verify(self.folder, self.header)

    @property
    def n_fired(self) -> Int64[np.ndarray, " n_latents"]:
        """Tokens on which each latent has a value > 0."""
        return self.arrays["n_fired"]

    @property
    def density(self) -> Float64[np.ndarray, " n_latents"]:
        """Fraction of the encoded tokens on which each latent fires; 0 where it never did, of `n_tokens`."""
        return self.n_fired / self.n_tokens

    @property
    def importance(self) -> Float64[np.ndarray, " n_latents"]:
        """Mean squared value of each latent over all encoded tokens, those on which it does not fire included."""
        return self.arrays["sum_squares"] / self.n_tokens

    @cached_property
    def context_positions(self) -> Int64[np.ndarray, " context"]:
        """Encoded tokens at each position of a context."""
        found = np.zeros(self.context, np.int64)
        for start in range(0, self.n_tokens, 2**24):
            part = self.arrays["positions"][start : start + 2**24] % self.context
            found += np.bincount(part, minlength=self.context)
        return found

    def latent(self, i: int) -> Latent:
        """What the study says of latent i. Raises TopkapiError where there is none, or its entries are damaged."""
        if not 0 <= i < self.n_latents:
            raise TopkapiError(f"no latent {i}: {self.folder} has latents 0 to {self.n_latents - 1}.")
        return Latent(self, i)

    def code(self, row: int) -> Entries:
        """The active latents of an encoded token.

        Raises:
            TopkapiError: the study keeps a reservoir; there is no such row.
        """
        self.require_complete("the code of a token")
        if not 0 <= row < self.n_tokens:
            raise TopkapiError(f"no row {row}: {self.folder} has rows 0 to {self.n_tokens - 1}.")
        start, end = self.arrays["row_offsets"][row : row + 2]
        return Entries(self.arrays["indices"][start:end], self.arrays["values"][start:end])

    def place(self, row: int) -> Place:
        """Where the encoded token `row` stands."""
        number, position = divmod(int(self.arrays["positions"][row]), self.context)
        source = int(self.arrays["context_ids"][number]) * self.context + position
        document = int(np.searchsorted(self.arrays["document_offsets"], source, side="right")) - 1
        return Place(number, position, source, document)

    def require_complete(self, what: str) -> None:
        """Raise TopkapiError where the study keeps only a sample of the code."""
        if self.reservoir:
            raise TopkapiError(
                f"{what} needs the complete code, and {self.folder} keeps {self.reservoir} firings of each latent: "
                "study again without --reservoir, into another --out."
            )

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder studied, from its run. Raises TopkapiError as `require_run` does."""
        self.require_run()
        return Autoencoder.from_pretrained(self.run)

    def require_run(self) -> None:
        """Raise TopkapiError if the run holds another autoencoder than the one studied, or none."""
        if published.checksum_of(self.run) != self.identity["autoencoder"]:
            raise TopkapiError(
                f"{WHAT} {self.folder} is of another autoencoder than the one in {self.run}: "
                "run topkapi study on that one, or give the run that was studied."
            )

    def nearest(self, i: int, n: int = 10, by: str = "decoder") -> list[directions.Neighbour]:
        """The n other latents whose rows of W_dec (by "decoder") or W_enc ("encoder") have the largest cosines."""
        return self.nearest_of([i], n, by)[0]

    def nearest_of(self, latents: Sequence[int], n: int = 10, by: str = "decoder") -> list[list[directions.Neighbour]]:
        """`nearest` of several latents, in one pass over the autoencoder."""
        weight, norms = self._directions[by]
        return directions.nearest(weight, norms, latents, n)

    @cached_property
    def _directions(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The rows that latents are compared by, and their norms."""
        ae = self.autoencoder
        weights = {"decoder": ae.W_dec.detach(), "encoder": ae.W_enc.detach()}
        return {by: (weight, directions.lengths(weight)) for by, weight in weights.items()}

    def votes(self, i: int, lm: LanguageModel, n: int = 10) -> directions.Votes:
        """The tokens that latent i votes for and against, see `topkapi.study.directions.votes`.

        Raises:
            TopkapiError: not the language model that was studied.
        """
        return self.votes_of([i], lm, n)[0]

    def votes_of(self, latents: Sequence[int], lm: LanguageModel, n: int = 10) -> list[directions.Votes]:
        """`votes` of several latents, in one pass over the unembedding."""
        if lm.fingerprint != self.identity["language_model"]:
            raise TopkapiError(f"{WHAT} {self.folder} is of another language model than {lm.name}.")
        return directions.votes(self.autoencoder.W_dec.detach()[list(latents)], lm, n)


def open_study(folder: Path | str, run: Path | str | None = None) -> Study:
    """The finished study in a folder; `run` is where its autoencoder is now, if the two were moved apart.

    Files are seen to be there and of their right length, and those of up to `READ_BYTES` are read and verified;
    `Study.verify` reads the others too. A larger file that changes afterwards is noticed when its array is next taken,
    a TopkapiError too.

    Raises:
        TopkapiError: no finished study, damaged, or of another format.
    """
    return Study(Path(folder), None if run is None else Path(run))
