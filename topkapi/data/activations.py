"""Activations of a language model in shuffled blocks, computed when asked for or read from a cache on disk.

1. The contexts of a token file are permuted once by the seed and cut into groups of shuffle_tokens tokens.
2. A block is the activations of one group at the site, as bf16: context after context, without the positions
   that the config leaves out (`kept_positions`), then without norm outliers.
3. `LiveBlocks` computes block i when it is asked for; `CachedBlocks` reads the same bits from a file. Forward
   passes hold the same contexts in either case, so the two are bit-identical (on one machine, for one
   batch_contexts and number of threads).
4. Processes that train together compute a block together: each runs whole forward passes on its share of the contexts,
   the same passes as one process would, and the rows are then exchanged, so that every process holds the whole block.

`topkapi.data.batches` turns blocks into training batches.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float32, Int, Int64
from safetensors.torch import load, save
from torch import Tensor

from topkapi.config import DataConfig
from topkapi.console import progress
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.data.transfer import to_device, to_host
from topkapi.errors import TopkapiError
from topkapi.files import read_json, require_shape, sha256, write_atomic, write_json
from topkapi.parallel import ALONE, Mesh

FORMAT = 1  # of the cache; raised when blocks of an older one would differ
ROWS_AT_ONCE = 8_192  # bounds the float32 copies made to measure norms


class Block(NamedTuple):
    """Activations of some tokens and where those tokens are."""

    x: BFloat16[Tensor, "rows d_model"]
    """Raw, not normalised."""

    positions: Int64[Tensor, " rows"]
    """Indices into `TokenFile.tokens`."""


@dataclass(frozen=True)
class HarvestCounts:
    """Tokens kept and left out, each counted once, for the first reason that applies."""

    kept: int = 0
    first_position: int = 0
    special_tokens: int = 0
    outlier_norms: int = 0

    def __add__(self, other: "HarvestCounts") -> "HarvestCounts":
        return HarvestCounts(**{name: n + getattr(other, name) for name, n in asdict(self).items()})


@runtime_checkable
class Blocks(Protocol):
    """What `LiveBlocks` and `CachedBlocks` have in common."""

    identity: dict[str, Any]
    """All that the blocks' contents depend on."""

    d_model: int

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Block: ...

    def most_rows(self, i: int) -> int:
        """Rows of block i, known before it is computed; fewer if some are left out for their norms."""
        ...

    @property
    def counts(self) -> HarvestCounts: ...


def kept_positions(
    tokens: Int[Tensor, "b context"], config: DataConfig, special_ids: set[int]
) -> Bool[Tensor, "b context"]:
    """Which tokens are used: not the first position of a context, nor special tokens, as the config says."""
    kept = torch.ones_like(tokens, dtype=torch.bool)
    if config.drop_special_tokens:
        special = torch.tensor(sorted(special_ids), dtype=tokens.dtype, device=tokens.device)
        kept = ~torch.isin(tokens, special)
    if config.drop_first_position:
        kept[:, 0] = False
    return kept


def harvest(
    lm: LanguageModel,
    token_file: TokenFile,
    context_ids: Int[np.ndarray, " b"],
    config: DataConfig,
    advance: Callable[[int], object] = lambda _: None,
    mesh: Mesh = ALONE,
) -> tuple[Block, HarvestCounts]:
    """The block of these contexts, on the language model's device; `advance` hears of tokens as they are done.

    With a mesh all its processes call it, and what one of them raises is raised by all. Memory: the block in bf16 and
    one forward pass.

    Raises:
        TopkapiError: an activation is not finite.
    """
    tokens = token_file.context_tokens(context_ids, config.context)
    kept = kept_positions(tokens, config, lm.special_ids)
    x = torch.empty(int(kept.sum()), lm.d_model, dtype=torch.bfloat16, device=lm.device)
    shares = _shares(kept, lm.batch_contexts, mesh.n_ranks)
    failure, (contexts, rows) = None, shares[mesh.rank]
    try:
        _fill_(x[rows], lm, tokens[contexts], kept[contexts], advance)
    except Exception as error:
        failure = error
    mesh.raise_any(failure)
    for source, (_, theirs) in enumerate(shares):
        if theirs.stop > theirs.start:
            mesh.broadcast_(x[theirs], source)
    if mesh.n_ranks > 1:
        advance(tokens.numel() - tokens[contexts].numel())
    starts = torch.from_numpy(np.asarray(context_ids, dtype=np.int64)) * config.context
    positions = to_device((starts[:, None] + torch.arange(config.context))[kept], lm.device)
    block, n_outliers = _without_outliers(Block(x, positions), lm, config)
    n_first = len(tokens) if config.drop_first_position else 0
    counts = HarvestCounts(
        kept=len(block.x),
        first_position=n_first,
        special_tokens=tokens.numel() - n_first - len(x),
        outlier_norms=n_outliers,
    )
    return block, counts


def _shares(kept: Bool[Tensor, "b context"], batch_contexts: int, n_ranks: int) -> list[tuple[slice, slice]]:
    """Each process's contexts, whole forward passes of them, and the rows that they become."""
    n_passes = -(-len(kept) // batch_contexts)
    step = -(-n_passes // n_ranks) * batch_contexts
    bounds = [min(rank * step, len(kept)) for rank in range(n_ranks + 1)]
    rows = [int(kept[:bound].sum()) for bound in bounds]
    return [(slice(*bounds[i : i + 2]), slice(*rows[i : i + 2])) for i in range(n_ranks)]


def _fill_(
    x: BFloat16[Tensor, "rows d_model"],
    lm: LanguageModel,
    tokens: Int[Tensor, "b context"],
    kept: Bool[Tensor, "b context"],
    advance: Callable[[int], object],
) -> None:
    """Compute the rows of some contexts into `x`."""
    row, on_device = 0, to_device(tokens, lm.device)
    for start in range(0, len(tokens), lm.batch_contexts):
        some, used = (of[start : start + lm.batch_contexts] for of in (on_device, kept))
        where = used.flatten().nonzero().flatten()  # found on the CPU: a mask on the device would have to be waited for
        x[row : row + len(where)] = lm.activations(some).flatten(0, 1)[to_device(where, lm.device)]
        row += len(where)
        advance(some.numel())


def _without_outliers(block: Block, lm: LanguageModel, config: DataConfig) -> tuple[Block, int]:
    """The block without rows of a norm above max_norm_ratio times its median norm, and how many those were."""
    norms = _norms(block.x)
    if not bool(to_host(norms.isfinite().all())):
        position = int(block.positions[~norms.isfinite()][0])
        raise TopkapiError(
            f"{lm.name} gives activations that are not finite at {lm.site}, context {position // config.context}, "
            f"position {position % config.context}: its weights may be damaged, or the site overflows."
        )
    if config.max_norm_ratio == 0 or len(norms) == 0:
        return block, 0
    usual = to_host(norms <= config.max_norm_ratio * norms.median())
    rows = to_device(usual.nonzero().flatten(), lm.device)
    return Block(block.x[rows], block.positions[rows]), len(usual) - len(rows)


def _norms(x: BFloat16[Tensor, "rows d_model"]) -> Float32[Tensor, " rows"]:
    """Euclidean norm of each row, without a float32 copy of the whole block."""
    norms = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = x[start : start + ROWS_AT_ONCE].float()
        norms[start : start + ROWS_AT_ONCE] = torch.linalg.vector_norm(part, dim=1)
    return norms


class LiveBlocks:
    """Blocks computed each time they are asked for; block i always holds the same contexts."""

    def __init__(self, lm: LanguageModel, token_file: TokenFile, config: DataConfig, mesh: Mesh = ALONE) -> None:
        """With a mesh its processes compute blocks together: all ask for the same ones in the same order."""
        self.lm, self.token_file, self.config, self.mesh = lm, token_file, config, mesh
        self.d_model = lm.d_model
        n_contexts = token_file.n_contexts(config.context)
        if n_contexts == 0:
            raise TopkapiError(
                f"The corpus has {token_file.n_tokens} tokens, fewer than one context of {config.context}."
            )
        order = np.random.default_rng([config.seed, 0]).permutation(n_contexts)
        step = -(-config.shuffle_tokens // config.context)
        self.groups = [order[start : start + step] for start in range(0, n_contexts, step)]
        self.identity = {
            "format": FORMAT,
            "language_model": lm.fingerprint,
            "site": lm.site,
            "d_model": lm.d_model,
            "tokens": token_file.fingerprint,
            "context": config.context,
            "seed": config.seed,
            "shuffle_tokens": config.shuffle_tokens,
            "drop_first_position": config.drop_first_position,
            "drop_special_tokens": config.drop_special_tokens,
            "max_norm_ratio": config.max_norm_ratio,
        }
        self._counts: dict[int, HarvestCounts] = {}
        self._is_prepared = lm.device.type != "cuda"

    def prepare(self) -> None:
        """Have the language model compiled on a CUDA device, for those who are going to compute many blocks."""
        if not self._is_prepared:
            self.lm.compile_(self.config.context)
            self._is_prepared = True

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> Block:
        return self.harvest(i)[0]

    def most_rows(self, i: int) -> int:
        """Rows of block i but for those that will be left out for their norms."""
        tokens = self.token_file.context_tokens(self.groups[i], self.config.context)
        return int(kept_positions(tokens, self.config, self.lm.special_ids).sum())

    def harvest(self, i: int, advance: Callable[[int], object] = lambda _: None) -> tuple[Block, HarvestCounts]:
        """Block i and what was left out of it."""
        block, counts = harvest(self.lm, self.token_file, self.groups[i], self.config, advance, self.mesh)
        self._counts[i] = counts
        return block, counts

    @property
    def counts(self) -> HarvestCounts:
        """Tokens kept and left out in the blocks computed so far, each block counted once."""
        return sum(self._counts.values(), HarvestCounts())


class CachedBlocks:
    """Blocks read from a folder: a safetensors file each, and manifest.json with their checksums."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.d_model: int = self.identity["d_model"]
        self._blocks: list[dict[str, Any]] = manifest["blocks"]

    @classmethod
    def open(cls, folder: Path, expected: dict[str, Any]) -> "CachedBlocks":
        """The cache in `folder`; `expected` is the `identity` that it must have.

        Raises:
            TopkapiError: missing, half built, or made for something else (names the first field that differs).
        """
        manifest = _manifest(folder, expected)
        ready = sum(entry is not None for entry in manifest["blocks"])
        if ready < len(manifest["blocks"]):
            raise TopkapiError(
                f"Activation cache {folder} is half built: {ready} of {len(manifest['blocks'])} blocks. "
                "Build it again; the blocks that are there are kept."
            )
        return cls(folder, manifest)

    @classmethod
    def build(cls, live: LiveBlocks, folder: Path) -> "CachedBlocks":
        """Compute every block of `live` into `folder`; blocks already there and undamaged are kept.

        The processes of a mesh all call it: they compute together, and rank 0 writes.

        Raises:
            TopkapiError: the folder holds a cache made for something else.
            OSError: the disk is full or the folder read-only; what was finished stays and is used next time.
        """
        mesh, entries = live.mesh, live.mesh.on_first(lambda: _entries(live, folder))
        total = live.config.context * sum(map(len, live.groups))
        with progress("Caching activations", total) as meter:
            for i in range(len(live)):
                if mesh.on_first(lambda i=i: _is_sound(folder, i, entries[i])):
                    meter.advance(live.config.context * len(live.groups[i]))
                    continue
                live.prepare()
                block, counts = live.harvest(i, meter.advance)

                def write(i: int = i, block: Block = block, counts: HarvestCounts = counts) -> None:
                    entries[i] = _write_block(_block_path(folder, i), block) | {"counts": asdict(counts)}
                    manifest = {"name": live.lm.name, "identity": live.identity, "blocks": entries}
                    write_json(folder / "manifest.json", manifest)

                mesh.on_first(write)
        return cls.open(folder, live.identity)

    def __len__(self) -> int:
        return len(self._blocks)

    def most_rows(self, i: int) -> int:
        """Rows of block i."""
        return self._blocks[i]["rows"]

    def __getitem__(self, i: int) -> Block:
        """Block i, on the CPU. Its bytes are read once, so what was verified is what is used."""
        expected = self._blocks[i]["sha256"]
        path = _block_path(self.folder, i)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != expected:
            state = "damaged" if path.is_file() else "missing"
            raise TopkapiError(
                f"Block {i} of the activation cache is {state}: {path}. Build the cache again; the other blocks "
                "are kept."
            )
        tensors = load(data)
        return Block(tensors["x"], tensors["positions"])

    @property
    def counts(self) -> HarvestCounts:
        """Tokens kept and left out in the whole cache."""
        return sum((HarvestCounts(**entry["counts"]) for entry in self._blocks), HarvestCounts())


def _entries(live: LiveBlocks, folder: Path) -> list[dict[str, Any] | None]:
    """What the manifest of a cache that is being built says of each block; None for one that is not there yet."""
    if not (folder / "manifest.json").exists():
        return [None] * len(live)
    entries = _manifest(folder, live.identity)["blocks"]
    if len(entries) != len(live):
        raise TopkapiError(f"Activation cache {folder} has another number of blocks. Delete {folder} and run again.")
    return entries


def _manifest(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """manifest.json of a cache that is made for `expected`. Raises TopkapiError as `CachedBlocks.open`."""
    path, what, remedy = folder / "manifest.json", "Activation cache", f"Delete {folder} and run again."
    found = read_json(path, what, remedy)
    require_shape(found, {"name": str, "identity": dict, "blocks": list}, path, what, remedy)
    _require_same(folder, found, expected)
    counts = dict.fromkeys(asdict(HarvestCounts()), int)
    entry_shape = {"rows": int, "sha256": str, "counts": counts}
    for i, entry in enumerate(found["blocks"]):
        if entry is not None:
            require_shape({f"block {i}": entry}, {f"block {i}": entry_shape}, path, what, remedy)
    return found


def _is_sound(folder: Path, i: int, entry: dict[str, Any] | None) -> bool:
    path = _block_path(folder, i)
    return entry is not None and path.exists() and sha256(path) == entry["sha256"]


def _block_path(folder: Path, i: int) -> Path:
    return folder / f"block-{i:06d}.safetensors"


def _write_block(path: Path, block: Block) -> dict[str, Any]:
    # Bytes first, then an ordinary write: safetensors' own would report a full disk as a SafetensorError.
    data = save({"x": block.x.cpu(), "positions": block.positions.cpu()})
    write_atomic(path, lambda temporary: temporary.write_bytes(data))
    return {"rows": len(block.x), "sha256": hashlib.sha256(data).hexdigest()}


def _require_same(folder: Path, manifest: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        theirs = manifest["identity"].get(name)
        if theirs != value:
            raise TopkapiError(
                f"Activation cache {folder} was made with another {name} ({theirs!r} of {manifest['name']!r}, "
                f"wanted {value!r}): use another folder, or delete this one."
            )
