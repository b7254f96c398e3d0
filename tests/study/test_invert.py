"""The counting sort against numpy's, whatever the ranges and chunks; the reservoir's sample against chance.

Seen to fail when: ranks within a chunk do not restart at each latent; thresholds rise again; ranges are cut anew from
latent 0 where inverting goes on.
"""

import numpy as np
import pytest

from topkapi.study import invert
from topkapi.study.invert import candidates, offsets_of, priorities, ranges, thin, write_array
from topkapi.study.layout import mapped, path_of


def write(folder, latents, rows, values, n_rows):
    """The code by token of entries in the order of rows."""
    offsets_of(np.bincount(rows, minlength=n_rows)).tofile(path_of(folder, "row_offsets"))
    latents.astype("<u4").tofile(path_of(folder, "indices"))
    values.astype("<f4").tofile(path_of(folder, "values"))


def entries(seed, n_latents=40, n_rows=90):
    """Latents of which some never fire and one fires on all rows."""
    generator = np.random.default_rng(seed)
    fires = generator.random((n_rows, n_latents)) < generator.random(n_latents) ** 4
    fires[:, 7], fires[:, 11], fires[5] = True, False, False
    rows, latents = np.nonzero(fires)
    return latents, rows, generator.random(len(rows)).astype(np.float32)


@pytest.mark.parametrize(("at_once", "chunk"), [(1, 1), (30, 17), (100, 10**6), (10**6, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_inverting_is_a_stable_sort_by_latent(tmp_path, monkeypatch, seed, at_once, chunk):
    monkeypatch.setattr(invert, "ENTRIES_AT_ONCE", at_once)
    monkeypatch.setattr(invert, "CHUNK_ENTRIES", chunk)
    latents, rows, values = entries(seed)
    write(tmp_path, latents, rows, values, 90)
    saved, advanced = [], []
    counts = np.bincount(latents, minlength=40)
    write_array(path_of(tmp_path, "latent_offsets"), offsets_of(counts))
    invert.invert(tmp_path, "latent", 0, saved.append, advanced.append)
    order = np.argsort(latents, kind="stable")
    assert mapped(tmp_path, "latent_rows", "<u4").tolist() == rows[order].tolist()
    assert mapped(tmp_path, "latent_values", "<f4").tolist() == values[order].tolist()
    assert sum(advanced) == len(rows)
    assert saved[-1] == 40


def test_inverting_goes_on_in_other_ranges(tmp_path, monkeypatch):
    latents, rows, values = entries(0)
    write(tmp_path, latents, rows, values, 90)
    offsets = offsets_of(np.bincount(latents, minlength=40))
    write_array(path_of(tmp_path, "latent_offsets"), offsets)
    monkeypatch.setattr(invert, "ENTRIES_AT_ONCE", 100)
    invert.invert(tmp_path, "latent", 0, lambda _: None, lambda _: None)
    wanted = [path_of(tmp_path, f"latent_{name}").read_bytes() for name in ("rows", "values")]
    monkeypatch.setattr(invert, "ENTRIES_AT_ONCE", 70)
    for done in (3, 20):
        invert.invert(tmp_path, "latent", done, lambda _: None, lambda _: None)
        assert [path_of(tmp_path, f"latent_{name}").read_bytes() for name in ("rows", "values")] == wanted


def test_ranges_are_bounded_and_cover_all_latents():
    counts = np.random.default_rng(0).integers(0, 50, 200)
    found = ranges(offsets_of(counts), 60)
    assert [start for start, _ in found[1:]] == [end for _, end in found[:-1]]
    assert (found[0][0], found[-1][1]) == (0, 200)
    assert all(counts[a:b].sum() <= 60 or b == a + 1 for a, b in found)
    assert ranges(offsets_of(np.zeros(5, np.int64)), 60) == [(0, 5)]


@pytest.mark.parametrize("n_rows", [20, 1_500])
def test_a_reservoir_is_a_uniform_sample(tmp_path, n_rows):
    n_latents, reservoir, block = 100, 5, 50
    n_fired, kept = np.zeros(n_latents, np.int64), []
    for start in range(0, n_rows, block):  # every latent fires on every row
        rows, latents = np.divmod(np.arange(min(block, n_rows - start) * n_latents), n_latents)
        rows += start
        n_fired += np.bincount(latents, minlength=n_latents)
        chosen = candidates(latents, rows, n_fired, reservoir)
        kept.append((latents[chosen], rows[chosen]))
    latents, rows = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    expected = (2 * reservoir + 32) * (1 + np.log(max(n_rows / 42, 1))) + block  # a latent, in the middle
    assert len(rows) <= n_latents * min(n_rows, expected)
    write(tmp_path, latents, rows, priorities(latents, rows), n_rows)
    write_array(path_of(tmp_path, "candidate_offsets"), offsets_of(np.bincount(latents, minlength=n_latents)))
    invert.invert(tmp_path, "candidate", 0, lambda _: None, lambda _: None)
    thin(tmp_path, n_fired, reservoir)
    offsets = mapped(tmp_path, "latent_offsets", "<i8")
    sample = np.asarray(mapped(tmp_path, "latent_rows", "<u4")).reshape(n_latents, reservoir)
    assert offsets.tolist() == list(range(0, n_latents * reservoir + 1, reservoir))
    for latent, chosen in enumerate(sample):
        priority = priorities(np.full(n_rows, latent), np.arange(n_rows))
        assert chosen.tolist() == sorted(np.argsort(priority)[:reservoir].tolist())
    drawn = np.histogram(sample, 10, (0, n_rows))[0]  # as often from each tenth of the rows
    assert abs(drawn - sample.size / 10).max() < 5 * np.sqrt(sample.size * 0.09)
