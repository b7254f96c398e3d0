"""Writes a study: encode text in blocks, then invert the code, then describe what was written.

1. Contexts evenly spaced over a split are harvested as training harvests them, a block of BLOCK_TOKENS at a time, and
   encoded. Active latents, ascending, are appended to the files of the code by token; how often each latent fires, its
   sums and its maximum are counted on the way.
2. Every SAVE_SECONDS files are flushed and progress.json says how much of them counts. A process that goes on from
   there cuts off what came later, and writes the same bytes as one that was never interrupted: blocks are the same, so
   forward passes are, and sums go on from the saved ones in the same order.
3. `topkapi.study.invert` sorts the code by latent; each range of latents that is done is noted too.
4. study.json, with a checksum of each file, makes the study complete.

Several processes take turns: of the next blocks (and ranges of latents) each has one, and rank 0, which alone writes,
takes them in their order. So what is on the disk is always that of the first blocks, whoever computed them: any number
of processes can go on from there, and the files have the same bytes.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
from topkapi.files import lock, read_json, remove_leftovers, require_shape, sync, write_arrays, write_atomic, write_json
from topkapi.model import Autoencoder
from topkapi.parallel import ALONE, Arrays, Mesh
from topkapi.study.invert import candidates, invert, offsets_of, thin, write_array
from topkapi.study.layout import (
    BY_TOKEN,
    CANDIDATES,
    DTYPES,
    FORMAT,
    NAMES,
    PROGRESS,
    STUDY,
    WHAT,
    continued,
    damaged,
    facts_of,
    path_of,
    read_header,
    require_same,
    verify,
)

BLOCK_TOKENS = 65_536  # harvested and encoded at once: 17 MB of code at k 32
PIECE_ENTRIES = 2**22  # of the code, appended at once: all of a block unless it is that of a ReLU autoencoder
SAVE_SECONDS = 10.0
MOST_TOKENS = 2**32  # rows and positions are uint32
MOMENTS = ("n_fired", "sums", "sum_squares", "maxima")
DONE = ("n_contexts", "n_rows", "n_written", "inverted")
PROGRESS_SHAPE = {"identity": dict, "state": str, "sha256": str, **dict.fromkeys(DONE, int)}


class Code(NamedTuple):
    """The active latents of some tokens, those of each token after those of the one before it."""

    counts: Int64[np.ndarray, " rows"]
    """How many each token has."""
    indices: UInt32[np.ndarray, " entries"]
    values: Float32[np.ndarray, " entries"]

    def of(self, kept: Bool[np.ndarray, " entries"]) -> "Code":
        """The code without entries that are not kept."""
        rows = np.repeat(np.arange(len(self.counts)), self.counts)[kept]
        return Code(np.bincount(rows, minlength=len(self.counts)), self.indices[kept], self.values[kept])


class Tally(NamedTuple):
    """What is counted of the latents that fire in some code."""

    latents: Int64[np.ndarray, " fired"]
    n_fired: Int64[np.ndarray, " fired"]
    sums: Float64[np.ndarray, " fired"]
    sum_squares: Float64[np.ndarray, " fired"]
    maxima: Float32[np.ndarray, " fired"]

    @classmethod
    def of(cls, code: Code, n_latents: int) -> "Tally":
        """That of a code."""
        wide, maxima = code.values.astype(np.float64), np.zeros(n_latents, np.float32)
        n_fired = np.bincount(code.indices, minlength=n_latents)
        sums, squares = (np.bincount(code.indices, of, n_latents) for of in (wide, wide * wide))
        np.maximum.at(maxima, code.indices, code.values)
        latents = np.flatnonzero(n_fired)
        return cls(latents, *(of_all[latents] for of_all in (n_fired, sums, squares, maxima)))


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

    def add_(self, tally: Tally) -> None:
        """Count some firings more."""
        latents = tally.latents
        self.n_fired[latents] += tally.n_fired
        self.sums[latents] += tally.sums
        self.sum_squares[latents] += tally.sum_squares
        self.maxima[latents] = np.maximum(self.maxima[latents], tally.maxima)


def encoded(ae: Autoencoder, raw: Tensor) -> Iterator[Code]:
    """The code of raw activations, in parts of bounded memory."""
    dense = ae.activation == "relu"
    rows = max(1, CHUNK_ELEMENTS // ((8 if dense else 1) * ae.n_latents))  # all its values, and several int64 for each
    if raw.is_cuda and not dense:
        rows = 8_192  # the kernels keep no pre-activations
    for part in raw.split(rows):
        yield _encoded(ae, part)


def joined(parts: Iterable[Code], n_entries: int) -> Iterator[Code]:
    """The same code in fewer parts: consecutive ones together until they have `n_entries`."""
    held: list[Code] = []
    for part in parts:
        held.append(part)
        if sum(len(code.indices) for code in held) >= n_entries:
            yield Code(*map(np.concatenate, zip(*held, strict=True)))
            held.clear()
    if held:
        yield Code(*map(np.concatenate, zip(*held, strict=True)))


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
    mesh: Mesh = ALONE,
) -> None:
    """Write the study of the run's autoencoder on `token_file`, its split `config.split`, into `folder`.

    One that was interrupted there goes on, and one that is finished is read once to see that it is sound. Tokens that
    training leaves out (first positions, special tokens, outlier norms, these against the median of a block of
    BLOCK_TOKENS tokens) are not encoded. The processes of a mesh all call it; they see the same folder, which rank 0
    alone writes. Memory of each: a block with its code, a range of latents, and 36 bytes a latent; disk: 16 bytes for
    each active latent of each token.

    Raises:
        TopkapiError: fewer tokens than asked for; none is kept; the folder holds a study of something else, or files
            of others with names of a study's; damage; processes that read other text or another language model.
    """
    context_ids = _contexts(token_file, data, config)
    identity = _identity(run, ae, lm, token_file, data, config, len(context_ids))
    require_agreement(identity, mesh)
    if mesh.on_first(lambda: _is_finished(folder, identity)):
        say(f"{folder}: finished before, its files are sound.")
        return
    with ExitStack() as stack:
        writer = _Writer(folder, identity, ae.n_latents)
        done = mesh.on_first(lambda: writer.begin(stack))
        _encode(writer, done, ae.to(lm.device), lm, token_file, data, context_ids, mesh)
        mesh.on_first(lambda: writer.end(config.split))
        _invert(writer, mesh)
        mesh.on_first(lambda: _finish(writer, run, token_file, data, context_ids, ae))


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this study, whole; what only its writing needed is removed."""
    if not (folder / STUDY).exists():
        return False
    header = read_header(folder)
    require_same(folder, identity, header["identity"])
    verify(folder, header)
    clear(folder, header["files"])
    return True


def require_agreement(identity: dict[str, Any], mesh: Mesh) -> None:
    """Raise TopkapiError, on all processes, if one would study something else than rank 0: nodes may differ."""
    failure, theirs = None, mesh.on_first(lambda: identity)
    if changed := [name for name in identity if identity[name] != theirs[name]]:
        failure = TopkapiError(
            f"rank {mesh.rank} of {mesh.n_ranks} has another {', '.join(changed)} than rank 0: give all machines the "
            "same run, language model and corpora."
        )
    mesh.raise_any(failure)


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
        "autoencoder": published.checksum_of(run),
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
    """The files of an unfinished study, and how much of them counts. Rank 0 has them; the others' stays empty."""

    def __init__(self, folder: Path, identity: dict[str, Any], n_latents: int) -> None:
        self.folder, self.identity = folder, identity
        self.moments = Moments.zeros(n_latents)
        self.n_entries = np.zeros(n_latents, np.int64)
        self.n_contexts = self.n_rows = self.n_written = self.inverted = 0
        self.files: dict[str, BinaryIO] = {}

    def begin(self, stack: ExitStack) -> int:
        """Lock the folder and open the growing files, for as long as the stack lasts; the contexts that are there."""

        def busy() -> None:
            raise TopkapiError(
                f"another process writes a study into {self.folder}; wait for it, or name another --out."
            )

        stack.enter_context(lock(self.folder, busy))
        remove_leftovers(self.folder)
        if (self.folder / PROGRESS).exists():
            self._load()
        else:
            self._require_free()
            self._write_progress("", "")  # before any other file: those that are found beside it are of this study
        if not self.n_contexts:
            write_array(path_of(self.folder, "row_offsets"), np.zeros(1, "<i8"))
        for name, length in self.lengths.items():
            self.files[name] = stack.enter_context(continued(path_of(self.folder, name), length))
        self.saved = time.monotonic()
        return self.n_contexts

    @property
    def reservoir(self) -> int:
        """Firings of each latent that are to be kept; 0: all."""
        return self.identity["reservoir"]

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

    def append(self, positions: UInt32[np.ndarray, " rows"], code: Code, tally: Tally) -> None:
        """Append some tokens, with a reservoir only candidates for it; they count from the next `save` on."""
        self.moments.add_(tally)
        if self.reservoir:
            rows = self.n_rows + np.repeat(np.arange(len(code.counts)), code.counts)
            code = code.of(candidates(code.indices, rows, self.moments.n_fired, self.reservoir))
        parts = {
            "positions": positions,
            "row_offsets": (self.n_written + np.cumsum(code.counts)).astype("<i8"),
            "indices": code.indices,
            "values": code.values,
        }
        for name, array in parts.items():
            self.files[name].write(np.ascontiguousarray(array))
        self.n_entries += np.bincount(code.indices, minlength=len(self.n_entries))
        self.n_rows, self.n_written = self.n_rows + len(positions), self.n_written + len(code.indices)

    def reached(self, n_contexts: int, is_last: bool) -> None:
        """So many contexts are appended; save that if it is time to."""
        self.n_contexts = n_contexts
        if is_last or time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save()

    def end(self, split: str) -> None:
        """Close the growing files. Raises TopkapiError if there is nothing in them."""
        for file in self.files.values():
            file.close()
        if self.n_rows == 0:
            raise TopkapiError(f"no token of the {split} text is kept, see DataConfig: there is nothing to study.")

    def save(self) -> None:
        """Make everything appended so far, or inverted, count."""
        if self.inverted == 0:
            for name, file in self.files.items():
                file.flush()
                sync(path_of(self.folder, name))
        state = f"state-{self.n_contexts}.npz"
        kept = vars(self.moments) | {"n_entries": self.n_entries}
        if self.inverted == 0 or not (self.folder / state).exists():
            write_arrays(self.folder / state, kept)
        self._write_progress(state, hashlib.sha256((self.folder / state).read_bytes()).hexdigest())
        for path in self.folder.glob("state-*.npz"):
            if path.name != state:
                path.unlink()
        self.saved = time.monotonic()

    def _write_progress(self, state: str, checksum: str) -> None:
        facts = {name: getattr(self, name) for name in DONE}
        write_json(self.folder / PROGRESS, {"identity": self.identity, "state": state, "sha256": checksum, **facts})

    def _require_free(self) -> None:
        """Refuse a folder in which somebody else's file has the name of a study's."""
        for path in [*self.folder.glob("state-*.npz"), *(path_of(self.folder, name) for name in NAMES)]:
            if path.exists():
                raise TopkapiError(
                    f"{path} is not of a study that goes on here, and would be written over. Delete it, or name "
                    "another folder with --out."
                )

    def _load(self) -> None:
        remedy = f"Delete {self.folder} and run again."
        facts = read_json(self.folder / PROGRESS, WHAT, remedy)
        require_shape(facts, PROGRESS_SHAPE, self.folder / PROGRESS, WHAT, remedy)
        require_same(self.folder, self.identity, facts["identity"])
        if not facts["n_contexts"]:
            return
        path = self.folder / facts["state"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
            raise damaged(path, "damaged or missing")
        with np.load(path) as arrays:
            self.moments = Moments(*(arrays[name] for name in MOMENTS))
            self.n_entries = arrays["n_entries"]
        for name in DONE:
            setattr(self, name, facts[name])
        say(f"{self.folder}: going on after {self.n_rows:,} tokens.")


def _encode(
    writer: _Writer,
    done: int,
    ae: Autoencoder,
    lm: LanguageModel,
    token_file: TokenFile,
    data: DataConfig,
    context_ids: Int64[np.ndarray, " contexts"],
    mesh: Mesh,
) -> None:
    """Append the code of all contexts but the first `done`, which is there."""
    if done == len(context_ids):
        return
    if lm.device.type == "cuda":
        lm.compile_(data.context)
    step, end = max(1, BLOCK_TOKENS // data.context), len(context_ids)
    with progress("encode", end * data.context, done=done * data.context) as meter:

        def pieces(start: int) -> Iterator[Arrays]:
            group = context_ids[start : start + step]
            block, _ = harvest(lm, token_file, group, data, meter.advance)
            where = block.positions.cpu().numpy()
            slot = start + np.searchsorted(group, where // data.context)
            positions = (slot * data.context + where % data.context).astype("<u4")
            for code in joined(encoded(ae, block.x), PIECE_ENTRIES):
                part, positions = np.split(positions, [len(code.counts)])
                yield part, *code, *Tally.of(code, ae.n_latents)

        for start in range(done, end, step * mesh.n_ranks):
            mine, reached = start + mesh.rank * step, min(start + step * mesh.n_ranks, end)
            for piece in mesh.in_order_on_first(pieces(mine) if mine < end else ()):
                writer.append(piece[0], Code(*piece[1:4]), Tally(*piece[4:]))
            if mesh.rank == 0:
                writer.reached(reached, is_last=reached == end)
            meter.advance((reached - min(start + step, reached)) * data.context)  # of the others


def _invert(writer: _Writer, mesh: Mesh) -> None:
    """From the code by token to the code by latent."""
    kind = "candidate" if writer.reservoir else "latent"

    def begin() -> tuple[int, int]:
        write_array(path_of(writer.folder, f"{kind}_offsets"), offsets_of(writer.n_entries))
        return writer.inverted, writer.n_written

    def save(latents: int) -> None:
        writer.inverted = latents
        writer.save()

    done, n_written = mesh.on_first(begin)
    with progress("invert", n_written, unit="firings") as meter:
        invert(writer.folder, kind, done, save, meter.advance, mesh)
    if writer.reservoir:
        mesh.on_first(lambda: thin(writer.folder, writer.moments.n_fired, writer.reservoir))


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
    """Remove what a finished study does not need; files of others in its folder stay."""
    unneeded = [path_of(folder, name) for name in (*BY_TOKEN, *CANDIDATES) if name not in files]
    for path in [folder / PROGRESS, *folder.glob("state-*.npz"), *unneeded]:
        path.unlink(missing_ok=True)
