"""From the code by token to the code by latent, by an external counting sort.

1. How often each latent fires is known, hence where its entries begin: `latent_offsets`.
2. Latents are cut into ranges of at most ENTRIES_AT_ONCE entries (one latent, if it has more). For each range the
   code by token is streamed once, and the range's entries are put into their places: rows of a latent ascend,
   because they come in that order.
3. Ranges are appended to the files one after the other. Of several processes each has one of the next ranges, and rank
   0 takes and writes them in their order.
4. A range counts as done once it is on the disk. One that was interrupted is written again, with the same bytes.

Memory: a chunk of the code by token, and one range. With a reservoir what was sorted so are candidates, and `thin`
keeps a sample of them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt32

from topkapi.files import write_atomic
from topkapi.parallel import ALONE, Arrays, Mesh
from topkapi.study.layout import DTYPES, continued, mapped, path_of

ENTRIES_AT_ONCE = 2**26  # of a range: 512 MiB of rows and values
CHUNK_ENTRIES = 2**22  # of the code by token, read at once: a hundred MiB with what sorting it takes


def ranges(offsets: Int64[np.ndarray, " n_latents_plus_1"], at_once: int, start: int = 0) -> list[tuple[int, int]]:
    """Consecutive latents from `start` on, first and end, that have at most `at_once` entries together or are one."""
    found, n_latents = [], len(offsets) - 1
    while start < n_latents:
        end = int(np.searchsorted(offsets, offsets[start] + at_once, side="right")) - 1
        found.append((start, max(end, start + 1)))
        start = found[-1][1]
    return found


def offsets_of(counts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n_plus_1"]:
    """Where each of n parts begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def chunks(
    folder: Path, at_once: int
) -> Iterator[tuple[UInt32[np.ndarray, " n"], UInt32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
    """Rows, latents and values of the code by token, some `at_once` entries at a time, whole rows."""
    offsets, indices, values = (mapped(folder, name, DTYPES[name]) for name in ("row_offsets", "indices", "values"))
    row, n_rows = 0, len(offsets) - 1
    while row < n_rows:
        end = int(np.searchsorted(offsets, offsets[row] + at_once, side="right")) - 1
        end = min(max(end, row + 1), n_rows)
        rows = np.repeat(np.arange(row, end, dtype=np.uint32), np.diff(offsets[row : end + 1]))
        part = slice(int(offsets[row]), int(offsets[end]))
        yield rows, np.asarray(indices[part]), np.asarray(values[part])
        row = end


def invert(
    folder: Path,
    kind: str,
    done: int,
    save: Callable[[int], None],
    advance: Callable[[int], object],
    mesh: Mesh = ALONE,
) -> None:
    """Write KIND_rows and KIND_values; KIND_offsets is there, and so are latents before `done`.

    On rank 0 `save` hears of latents that are on the disk, and `advance` of entries.
    """
    offsets = np.asarray(_mapped(folder, kind, "offsets"))
    at_once = min(ENTRIES_AT_ONCE, max(1, -(-int(offsets[-1]) // mesh.n_ranks)))
    todo, paths = ranges(offsets, at_once, done), [path_of(folder, f"{kind}_{name}") for name in ("rows", "values")]
    with ExitStack() as stack:
        files = []
        if mesh.rank == 0:
            files = [stack.enter_context(continued(path, 4 * int(offsets[done]))) for path in paths]
            advance(int(offsets[done]))
        for first in range(0, len(todo), mesh.n_ranks):
            turn = todo[first : first + mesh.n_ranks]
            mine = range_of(folder, offsets, *turn[mesh.rank]) if mesh.rank < len(turn) else ()
            for piece in mesh.in_order_on_first(mine):
                for file, array in zip(files, piece, strict=True):
                    file.write(np.ascontiguousarray(array))
                advance(len(piece[0]))
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            if mesh.rank == 0:
                save(turn[-1][1])


def range_of(folder: Path, offsets: Int64[np.ndarray, " n_latents_plus_1"], start: int, end: int) -> Iterator[Arrays]:
    """Rows and values of the latents from start to end, in their order, a piece of at most CHUNK_ENTRIES at a time."""
    n = int(offsets[end] - offsets[start])
    if n > ENTRIES_AT_ONCE:  # one latent, whose entries come in their order
        for rows, latents, values in chunks(folder, CHUNK_ENTRIES):
            yield rows[latents == start], values[latents == start]
        return
    outputs = np.empty(n, np.uint32), np.empty(n, np.float32)
    free = offsets[start:end] - offsets[start]  # where each latent's next entry goes
    for chunk in chunks(folder, CHUNK_ENTRIES):
        _place_(outputs, free, *chunk, start, end)
    for i in range(0, n, CHUNK_ENTRIES):
        yield tuple(output[i : i + CHUNK_ENTRIES] for output in outputs)


def _mapped(folder: Path, kind: str, name: str) -> np.ndarray:
    return mapped(folder, f"{kind}_{name}", DTYPES[f"latent_{name}"])


def _place_(
    outputs: Arrays,
    free: Int64[np.ndarray, " latents"],
    rows: UInt32[np.ndarray, " n"],
    latents: UInt32[np.ndarray, " n"],
    values: Float32[np.ndarray, " n"],
    start: int,
    end: int,
) -> None:
    """Put the entries of latents start to end into their places."""
    ours = np.flatnonzero((latents >= start) & (latents < end))
    if not len(ours):
        return
    # latent and place in one number, each once: numpy sorts these with vector instructions, and argsort without
    keys = np.sort((latents[ours].astype(np.uint64) << np.uint64(32)) | ours.astype(np.uint64))
    order, sorted_latents = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.int64) - start
    first = np.flatnonzero(np.diff(sorted_latents, prepend=-1))  # of each latent's run
    length = np.diff(first, append=len(order))
    present = sorted_latents[first]
    places = np.repeat(free[present] - first, length) + np.arange(len(order))
    free[present] += length
    outputs[0][places], outputs[1][places] = rows[order], values[order]


def priorities(latents: np.ndarray, rows: np.ndarray) -> Float64[np.ndarray, " n"]:
    """A number in [0, 1) for each firing, as good as random and always the same (splitmix64 of latent and row).

    The firings of a latent with the smallest numbers are a uniform sample of them without replacement, whatever the
    order in which they are met.

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    z = (latents.astype(np.uint64) << np.uint64(32)) + rows.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def candidates(latents: np.ndarray, rows: np.ndarray, n_fired: np.ndarray, reservoir: int) -> Bool[np.ndarray, " n"]:
    """Which firings may be among the `reservoir` of their latent that are kept, of `n_fired` until now.

    A latent's threshold falls as it fires more, so that no firing below the last one is ever left out. Twice the
    reservoir and 32 are expected below it: that fewer than the reservoir are (and the sample smaller, but no less
    random) has a chance below 1e-8 for any reservoir.
    """
    return priorities(latents, rows) * n_fired[latents] < 2 * reservoir + 32


def thin(folder: Path, n_fired: Int64[np.ndarray, " n_latents"], reservoir: int) -> None:
    """Keep `reservoir` of each latent's candidates, those of the smallest priorities, as the code by latent.

    Not atomic: it is done again from the candidates where it was interrupted.
    """
    offsets, rows, values = (_mapped(folder, "candidate", name) for name in ("offsets", "rows", "values"))
    kept = np.zeros(len(n_fired), dtype=np.int64)
    with path_of(folder, "latent_rows").open("wb") as rows_file, path_of(folder, "latent_values").open("wb") as file:
        for start, end in ranges(offsets, CHUNK_ENTRIES):
            part = slice(int(offsets[start]), int(offsets[end]))
            latents = np.repeat(np.arange(start, end), np.diff(offsets[start : end + 1]))
            chosen = _smallest(latents, np.asarray(rows[part]), n_fired, reservoir)
            kept[start:end] = np.bincount(latents[chosen] - start, minlength=end - start)
            rows_file.write(rows[part][chosen].tobytes())
            file.write(values[part][chosen].tobytes())
    write_array(path_of(folder, "latent_offsets"), offsets_of(kept))


def _smallest(
    latents: np.ndarray, rows: np.ndarray, n_fired: np.ndarray, reservoir: int
) -> Int64[np.ndarray, " chosen"]:
    """Places, ascending, of each latent's `reservoir` smallest priorities among those below its last threshold."""
    among = np.flatnonzero(candidates(latents, rows, n_fired, reservoir))
    priority = priorities(latents[among], rows[among])
    among = among[np.lexsort((priority, latents[among]))]
    first = np.flatnonzero(np.diff(latents[among], prepend=-1))
    rank = np.arange(len(among)) - np.repeat(first, np.diff(first, append=len(among)))
    return np.sort(among[rank < reservoir])


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array's bytes, atomically."""
    write_atomic(path, lambda temporary: temporary.write_bytes(array.tobytes()))
