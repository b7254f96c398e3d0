"""From the code by token to the code by latent, by an external counting sort.

1. How often each latent fires is known, hence where its entries begin: `latent_offsets`.
2. Latents are cut into ranges of at most ENTRIES_AT_ONCE entries (one latent, if it has more). For each range the
   code by token is streamed once, and the range's entries are put into their places: rows of a latent ascend,
   because they come in that order.
3. A range counts as done once it is on the disk. One that was interrupted is written again, with the same bytes.

Memory: a chunk of the code by token, and the pages of one range, which the system may write out at any time.
With a reservoir what was sorted so are candidates, and `thin` keeps a sample of them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt32

from topkapi.files import sync, write_atomic
from topkapi.study.layout import DTYPES, mapped, path_of

ENTRIES_AT_ONCE = 2**26  # of a range: 512 MiB of rows and values
CHUNK_ENTRIES = 2**22  # of the code by token, read at once: a hundred MiB with what sorting it takes


def ranges(offsets: Int64[np.ndarray, " n_latents_plus_1"], at_once: int) -> list[tuple[int, int]]:
    """Consecutive latents, start and end, that have at most `at_once` entries together or are one."""
    found, start, n_latents = [], 0, len(offsets) - 1
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
    n_entries: Int64[np.ndarray, " n_latents"],
    kind: str,
    done: int,
    save: Callable[[int], None],
    advance: Callable[[int], object],
) -> None:
    """Write KIND_offsets, KIND_rows and KIND_values; latents before `done` are there already.

    `n_entries` is how many entries of each latent the code by token has. `save` hears of latents that are on the disk,
    and `advance` of entries.
    """
    offsets = offsets_of(n_entries)
    write_array(path_of(folder, f"{kind}_offsets"), offsets)
    paths = [path_of(folder, f"{kind}_{name}") for name in ("rows", "values")]
    for path in paths:
        with path.open("ab") as file:
            file.truncate(4 * int(offsets[-1]))
    outputs = [_mapped(folder, kind, name, "r+") for name in ("rows", "values")]
    for start, end in ranges(offsets, ENTRIES_AT_ONCE):
        if start < done:
            advance(int(offsets[end] - offsets[start]))
            continue
        free = offsets[start:end].copy()  # where each latent's next entry goes
        for rows, latents, values in chunks(folder, CHUNK_ENTRIES):
            advance(_place_(outputs, free, rows, latents, values, start, end))
        for path, output in zip(paths, outputs, strict=True):
            if isinstance(output, np.memmap):
                output.flush()
            sync(path)
        save(end)


def _mapped(folder: Path, kind: str, name: str, mode: str = "r") -> np.ndarray:
    return mapped(folder, f"{kind}_{name}", DTYPES[f"latent_{name}"], mode)


def _place_(
    outputs: list[np.ndarray],
    free: Int64[np.ndarray, " latents"],
    rows: UInt32[np.ndarray, " n"],
    latents: UInt32[np.ndarray, " n"],
    values: Float32[np.ndarray, " n"],
    start: int,
    end: int,
) -> int:
    """Put the entries of latents start to end into their places; how many there are."""
    ours = np.flatnonzero((latents >= start) & (latents < end))
    if not len(ours):
        return 0
    # latent and place in one number, each once: numpy sorts these with vector instructions, and argsort without
    keys = np.sort((latents[ours].astype(np.uint64) << np.uint64(32)) | ours.astype(np.uint64))
    order, sorted_latents = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.int64) - start
    first = np.flatnonzero(np.diff(sorted_latents, prepend=-1))  # of each latent's run
    length = np.diff(first, append=len(order))
    present = sorted_latents[first]
    places = np.repeat(free[present] - first, length) + np.arange(len(order))
    free[present] += length
    outputs[0][places], outputs[1][places] = rows[order], values[order]
    return len(order)


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
