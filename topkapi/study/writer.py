"""Writes a study: encode text in blocks, then invert the code, then describe what was written.

1. Contexts evenly spaced over a split are harvested as training harvests them, a block of BLOCK_TOKENS at a time, and
   encoded. Active latents, ascending, are appended to the files of the code by token; how often each latent fires, its
   sums and its maximum are counted on the way.
2. Every SAVE_SECONDS files are flushed and progress.json says how much of them counts. A process that goes on from
   there cuts off what came later, and writes the same bytes as one that was never interrupted: blocks are the same, so
   forward passes are, and sums go on from the saved ones in the same order.
3. `topkapi.study.invert` sorts the code by latent; each range of latents that is done is noted too.
4. study.json, with a checksum of each file, makes the study complete.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt32
from torch import Tensor

import topkapi
from topkapi import published
from topkapi.config import DataConfig, StudyConfig
from topkapi.console import progress, say
from topkapi.data.activations import harvest
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.errors import TopkapiError
from topkapi.evaluate import spread_contexts
from topkapi.evaluate.reconstruction import CHUNK_ELEMENTS
from topkapi.files import lock, read_json, remove_leftovers, sync, write_atomic, write_json
from topkapi.model import Autoencoder
from topkapi.study.invert import candidates, invert, thin, write_array
from topkapi.study.layout import (
    BY_TOKEN,
    DTYPES,
    FORMAT,
    PROGRESS,
    STUDY,
    WHAT,
    damaged,
    facts_of,
    path_of,
    read_header,
    require_same,
    verify,
)

BLOCK_TOKENS = 65_536  # harvested, encoded and appended at once: 17 MB of code at k 32
SAVE_SECONDS = 10.0
MOST_TOKENS = 2**32  # rows and positions are uint32
MOMENTS = ("n_fired", "sums", "sum_squares", "maxima")


@dataclass
class Moments:
    """What is counted of every latent, exact with a reservoir too."""

    n_fired: Int64[np.ndarray, " n_latents"]
    sums: Float64[np.ndarray, " n_latents"]
    sum_squares: Float64[np.ndarray, " n_latents"]
    maxima: Float32[np.ndarray, " n_latents"]

    @classmethod
    def zeros(cls, n_latents: int) -> "Moments":
        """Of no token."""
        return cls(*(np.zeros(n_latents, DTYPES[name]) for name in MOMENTS))

    def add_(self, latents: UInt32[np.ndarray, " n"], values: Float32[np.ndarray, " n"]) -> None:
        """Count some firings."""
        n, wide = len(self.n_fired), values.astype(np.float64)
        self.n_fired += np.bincount(latents, minlength=n)
        self.sums += np.bincount(latents, wide, n)
        self.sum_squares += np.bincount(latents, wide * wide, n)
        np.maximum.at(self.maxima, latents, values)


@dataclass(frozen=True)
class Code:
    """The active latents of some tokens: those of token i are entries offsets[i] to offsets[i + 1]."""

    counts: Int64[np.ndarray, " rows"]
    indices: UInt32[np.ndarray, " entries"]
    values: Float32[np.ndarray, " entries"]

    def of(self, kept: Bool[np.ndarray, " entries"]) -> "Code":
        """The code without entries that are not kept."""
        rows = np.repeat(np.arange(len(self.counts)), self.counts)[kept]
        return Code(np.bincount(rows, minlength=len(self.counts)), self.indices[kept], self.values[kept])


def encoded(ae: Autoencoder, raw: Tensor) -> Iterator[Code]:
    """The code of raw activations, in parts of bounded memory."""
    dense = ae.activation == "relu"
    rows = max(1, CHUNK_ELEMENTS // ((8 if dense else 1) * ae.n_latents))  # all its values, and several int64 for each
    if raw.is_cuda and not dense:
        rows = 8_192  # the kernels keep no pre-activations
    for part in raw.split(rows):
        yield _encoded(ae, part)


@torch.no_grad()
def _encoded(ae: Autoencoder, raw: Float[Tensor, "rows d_model"]) -> Code:
    """Latents with a value > 0, ascending in each token."""
    values, indices = ae.encode(ae.normalise(raw.to(ae.W_enc.device, torch.float32)).x)
    if ae.activation == "topk":
        indices, order = indices.long().sort(dim=1)
        values = values.gather(1, order)
    active = values > 0
    return Code(
        active.sum(1).cpu().numpy(),
        indices[active].cpu().numpy().astype("<u4"),
        values[active].float().cpu().numpy(),
    )


def write_study(
    run: Path,
    ae: Autoencoder,
    lm: LanguageModel,
    token_file: TokenFile,
    data: DataConfig,
    config: StudyConfig,
    folder: Path,
) -> None:
    """Write the study of the run's autoencoder on `token_file`, its split `config.split`, into `folder`.

    One that was interrupted there goes on, and one that is finished is read once to see that it is sound. Tokens that
    training leaves out (first positions, special tokens, outlier norms, these against the median of a block of
    BLOCK_TOKENS tokens) are not encoded. Memory: a block and 36 bytes a latent; disk: 16 bytes for each
    active latent of each token.

    Raises:
        TopkapiError: fewer tokens than asked for; none is kept; the folder holds a study of something else; damage.
    """
    context_ids = _contexts(token_file, data, config)
    identity = _identity(run, ae, lm, token_file, data, config, len(context_ids))
    if (folder / STUDY).exists():
        header = read_header(folder)
        require_same(folder, identity, header["identity"])
        verify(folder, header)
        clear(folder, header["files"])
        say(f"{folder}: finished before, its files are sound.")
        return

    def busy() -> None:
        raise TopkapiError(f"another process writes a study into {folder}; wait for it, or name another --out.")

    with lock(folder, busy):
        remove_leftovers(folder)
        writer = _Writer(folder, identity, ae.n_latents)
        _encode(writer, ae.to(lm.device), lm, token_file, data, config, context_ids)
        if writer.n_rows == 0:
            raise TopkapiError(
                f"no token of the {config.split} text is kept, see DataConfig: there is nothing to study."
            )
        _invert(writer, config.reservoir)
        _finish(writer, run, token_file, data, context_ids, ae)


def _contexts(token_file: TokenFile, data: DataConfig, config: StudyConfig) -> Int64[np.ndarray, " contexts"]:
    available = token_file.n_contexts(data.context) * data.context
    if config.tokens > available:
        other = " or --split train" if config.split == "held_out" else ""
        raise TopkapiError(
            f"the {config.split} text has {available:,} tokens in contexts of {data.context}; --tokens asks for "
            f"{config.tokens:,}. Give at most that many{other}."
        )
    if config.tokens > MOST_TOKENS - data.context:
        raise TopkapiError(f"a study holds {MOST_TOKENS:,} tokens at most; --tokens asks for {config.tokens:,}.")
    return spread_contexts(token_file, data.context, config.tokens)


def _identity(
    run: Path,
    ae: Autoencoder,
    lm: LanguageModel,
    token_file: TokenFile,
    data: DataConfig,
    config: StudyConfig,
    n_contexts: int,
) -> dict[str, Any]:
    """All that a study's numbers depend on."""
    used = ("context", "drop_first_position", "drop_special_tokens", "max_norm_ratio")
    return {
        "autoencoder": published.read_config(run)["files"][published.WEIGHTS],
        "n_latents": ae.n_latents,
        "language_model": lm.fingerprint,
        "site": lm.site,
        "split": config.split,
        "text": token_file.fingerprint,
        "n_contexts": n_contexts,
        "reservoir": config.reservoir,
        **{name: getattr(data, name) for name in used},
    }


class _Writer:
    """The files of an unfinished study, and how much of them counts."""

    def __init__(self, folder: Path, identity: dict[str, Any], n_latents: int) -> None:
        self.folder, self.identity = folder, identity
        self.moments = Moments.zeros(n_latents)
        self.n_entries = np.zeros(n_latents, np.int64)
        self.n_contexts = self.n_rows = self.n_written = self.inverted = 0
        if (folder / PROGRESS).exists():
            self._load()
        else:
            write_array(path_of(folder, "row_offsets"), np.zeros(1, "<i8"))
        self.saved = time.monotonic()

    @property
    def lengths(self) -> dict[str, int]:
        """Bytes of each growing file that count."""
        entries = 4 * self.n_written
        return {
            "positions": 4 * self.n_rows,
            "row_offsets": 8 * (self.n_rows + 1),
            "indices": entries,
            "values": entries,
        }

    def append(self, positions: UInt32[np.ndarray, " rows"], code: Code) -> None:
        """Append some tokens; they count from the next `save` on."""
        ends = self.n_written + np.cumsum(code.counts)
        parts = {
            "positions": positions,
            "row_offsets": ends.astype("<i8"),
            "indices": code.indices,
            "values": code.values,
        }
        for name, array in parts.items():
            self.files[name].write(array.tobytes())
        self.n_entries += np.bincount(code.indices, minlength=len(self.n_entries))
        self.n_rows, self.n_written = self.n_rows + len(positions), self.n_written + len(code.indices)

    def __enter__(self) -> "_Writer":
        with ExitStack() as stack:
            self.files = {}
            for name, length in self.lengths.items():
                path = path_of(self.folder, name)
                self.files[name] = file = stack.enter_context(path.open("ab"))
                if file.tell() < length:
                    raise damaged(path, "damaged: shorter than it was")
                file.truncate(length)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def save(self) -> None:
        """Make everything appended so far, or inverted, count."""
        if self.inverted == 0:
            for name, file in self.files.items():
                file.flush()
                sync(path_of(self.folder, name))
        state = f"state-{self.n_contexts}.npz"
        kept = vars(self.moments) | {"n_entries": self.n_entries}
        if self.inverted == 0 or not (self.folder / state).exists():
            write_atomic(self.folder / state, lambda path: _save_arrays(path, kept))
        digest = hashlib.sha256((self.folder / state).read_bytes()).hexdigest()
        facts = {name: getattr(self, name) for name in ("n_contexts", "n_rows", "n_written", "inverted")}
        write_json(self.folder / PROGRESS, {"identity": self.identity, "state": state, "sha256": digest, **facts})
        for path in self.folder.glob("state-*.npz"):
            if path.name != state:
                path.unlink()
        self.saved = time.monotonic()

    def _load(self) -> None:
        facts = read_json(self.folder / PROGRESS, WHAT, f"Delete {self.folder} and run again.")
        require_same(self.folder, self.identity, facts["identity"])
        path = self.folder / facts["state"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
            raise damaged(path, "damaged or missing")
        with np.load(path) as arrays:
            self.moments = Moments(*(arrays[name] for name in MOMENTS))
            self.n_entries = arrays["n_entries"]
        for name in ("n_contexts", "n_rows", "n_written", "inverted"):
            setattr(self, name, facts[name])
        say(f"{self.folder}: going on after {self.n_rows:,} tokens.")


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a path, numpy would add a suffix
        np.savez(file, **arrays)


def _encode(
    writer: _Writer,
    ae: Autoencoder,
    lm: LanguageModel,
    token_file: TokenFile,
    data: DataConfig,
    config: StudyConfig,
    context_ids: Int64[np.ndarray, " contexts"],
) -> None:
    """Append the code of all contexts that are not there yet."""
    if writer.n_contexts == len(context_ids):
        return
    if lm.device.type == "cuda":
        lm.compile_(data.context)
    step = max(1, BLOCK_TOKENS // data.context)
    total, done = len(context_ids) * data.context, writer.n_contexts * data.context
    with writer, progress("encode", total, done=done) as meter:
        for start in range(writer.n_contexts, len(context_ids), step):
            group = context_ids[start : start + step]
            block, _ = harvest(lm, token_file, group, data, meter.advance)
            where = block.positions.cpu().numpy()
            slot = start + np.searchsorted(group, where // data.context)
            positions = (slot * data.context + where % data.context).astype("<u4")
            for code in encoded(ae, block.x):
                part, positions = np.split(positions, [len(code.counts)])
                writer.append(part, _counted(writer, code, config.reservoir))
            writer.n_contexts = start + len(group)
            if time.monotonic() - writer.saved >= SAVE_SECONDS or writer.n_contexts == len(context_ids):
                writer.save()


def _counted(writer: _Writer, code: Code, reservoir: int) -> Code:
    """Count the firings; with a reservoir, only the candidates for it are to be kept."""
    writer.moments.add_(code.indices, code.values)
    if not reservoir:
        return code
    rows = writer.n_rows + np.repeat(np.arange(len(code.counts)), code.counts)
    return code.of(candidates(code.indices, rows, writer.moments.n_fired, reservoir))


def _invert(writer: _Writer, reservoir: int) -> None:
    def save(latents: int) -> None:
        writer.inverted = latents
        writer.save()

    kind = "candidate" if reservoir else "latent"
    with progress("invert", writer.n_written, unit="firings") as meter:
        invert(writer.folder, writer.n_entries, kind, writer.inverted, save, meter.advance)
    if reservoir:
        thin(writer.folder, writer.moments.n_fired, reservoir)


def _finish(
    writer: _Writer,
    run: Path,
    token_file: TokenFile,
    data: DataConfig,
    context_ids: Int64[np.ndarray, " contexts"],
    ae: Autoencoder,
) -> None:
    """Write what is left, then study.json; remove what only the writing needed."""
    folder = writer.folder
    for name in MOMENTS:
        write_array(path_of(folder, name), getattr(writer.moments, name))
    write_array(path_of(folder, "context_ids"), context_ids.astype("<i8"))
    write_array(path_of(folder, "document_offsets"), token_file.offsets.astype("<i8"))
    windows = token_file.tokens[: token_file.n_contexts(data.context) * data.context].reshape(-1, data.context)
    dtype = windows.dtype.newbyteorder("<").str

    def write_tokens(path: Path) -> None:
        with path.open("wb") as file:
            for part in np.array_split(context_ids, math.ceil(context_ids.size * data.context / 2**22)):
                file.write(windows[part].astype(dtype).tobytes())

    write_atomic(path_of(folder, "tokens"), write_tokens)
    dtypes = {"tokens": dtype} | DTYPES
    left_out = BY_TOKEN if writer.identity["reservoir"] else ()
    files = {name: facts_of(folder, name, kind) for name, kind in dtypes.items() if name not in left_out}
    for name in files:
        sync(path_of(folder, name))
    about = {"run": os.path.relpath(run.resolve(), folder.resolve())}  # so that the two can be moved together
    about |= {"d_model": ae.d_model, "k": ae.k, "activation": ae.activation}
    about |= {"language_model": ae.language_model, "corpora": list(data.corpora), "n_tokens": writer.n_rows}
    about |= {"topkapi_version": topkapi.__version__}
    header = {"format": FORMAT, "identity": writer.identity, "about": about, "files": files}
    write_json(folder / STUDY, header)
    clear(folder, files)


def clear(folder: Path, files: dict[str, Any]) -> None:
    """Remove what a finished study does not need."""
    for path in [folder / PROGRESS, *folder.glob("state-*.npz"), *folder.glob("*.bin")]:
        if path.suffix != ".bin" or path.stem not in files:
            path.unlink(missing_ok=True)
