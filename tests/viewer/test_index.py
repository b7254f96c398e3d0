"""The index: kept beside the study, made again where it is not of it, and of bounded time for each latent.

Seen to fail when: its file is trusted without its checksum; the identity leaves out the study's files; the strongest
firing of a range is looked for in the range before; the firings are kept while modes are counted; sums of
squares are not compared with those of the study; mapped files are not verified before it is kept.
"""

import json
import os
import shutil
from threading import Event

import numpy as np
import pytest

import topkapi.study
from topkapi.data.language_model import load_tokenizer
from topkapi.errors import TopkapiError
from topkapi.statistics.modes import count_modes
from topkapi.train import saved_config
from topkapi.viewer import index as index_module
from topkapi.viewer.binary import pack, unpack
from topkapi.viewer.columns import table
from topkapi.viewer.index import FILE, NO_TOKEN, Index
from topkapi.viewer.modes import FEWEST, MOST_FIRINGS, dip, find_modes
from topkapi.viewer.texts import Texts


@pytest.fixture(scope="module")
def texts(tiny_run):
    return Texts(load_tokenizer(saved_config(tiny_run).language_model.name))


def built(study, texts):
    index = Index(study)
    index.build(lambda: texts, Event())
    return index


def test_ranges_of_latents_give_the_same(study, texts, monkeypatch):
    monkeypatch.setattr(index_module, "ENTRIES_AT_ONCE", 50)
    index = built(study, texts)
    for i in range(study.n_latents):
        values = study.latent(i).values.astype(float)
        if len(values):
            example = study.latent(i).top(1)[0]
            assert index.tokens[index.arrays["top_token"][i]] == texts.alone(example.tokens[example.at])
            kurtosis = (values**4).mean() / (values**2).mean() ** 2
            assert index.arrays["kurtosis"][i] == pytest.approx(kurtosis, rel=1e-5)
        if len(values) >= FEWEST:
            assert index.arrays["modes"][i] == len(count_modes(values))


def test_it_is_read_again_without_being_made(study, texts, monkeypatch):
    first = built(study, texts)
    monkeypatch.setattr(index_module, "find_modes", None)
    again = built(study, texts)
    assert again.is_ready
    assert again.tokens == first.tokens
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


@pytest.mark.parametrize("damage", ["cut", "changed", "token", "empty", "folder", "other study"])
def test_one_that_is_not_whole_or_of_another_study_is_made_again(study, texts, damage):
    first = built(study, texts)
    path = study.folder / FILE
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "other study":
        study.header["files"]["values"]["sha256"] = "0" * 64
    else:
        token = next(token for token in first.tokens if token.isascii() and token.isalpha()).encode()
        damaged = {
            "cut": data[:-40],
            "changed": data[:-20] + b"x" + data[-19:],
            "token": data.replace(b'"%s"' % token, b'"%s"' % (b"#" * len(token)), 1),
            "empty": b"",
        }
        path.write_bytes(damaged[damage])
    assert not Index(study)._load()
    again = built(study, texts)
    np.testing.assert_array_equal(again.arrays["modes"], first.arrays["modes"])


def test_a_folder_that_cannot_be_written_keeps_no_index(study, texts, monkeypatch, capsys):
    def refuse(*_arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(index_module, "write_atomic", refuse)
    assert built(study, texts).is_ready
    assert "Read-only file system" in capsys.readouterr().err


@pytest.mark.usefixtures("all_mapped")
def test_nothing_is_made_or_kept_of_damaged_firings(study, texts, capsys):
    path = study.folder / "latent_values.bin"
    values = np.fromfile(path, "<f4")
    values[len(values) // 2] *= 0.9  # a value like others
    values.tofile(path)
    index = Index(topkapi.study.open(study.folder, study.run))
    with pytest.raises(TopkapiError, match=r"latent_values\.bin is damaged"):
        index.build(lambda: texts, Event())
    assert index.facts()["state"] == "failed"
    assert not (study.folder / FILE).exists()
    capsys.readouterr()


@pytest.mark.usefixtures("all_mapped")
@pytest.mark.parametrize(("name", "dtype"), [("tokens", "<u2"), ("latent_rows", "<u4")])
def test_no_index_is_kept_of_files_whose_damage_shows_in_no_sum(study, texts, capsys, name, dtype):
    path = study.folder / f"{name}.bin"
    np.fromfile(path, dtype)[::-1].tofile(path)
    index = Index(topkapi.study.open(study.folder, study.run))
    with pytest.raises(TopkapiError, match=rf"{name}\.bin is damaged"):
        index.build(lambda: texts, Event())
    assert index.facts()["state"] == "failed"
    assert not (study.folder / FILE).exists()
    capsys.readouterr()


@pytest.mark.usefixtures("all_mapped")
def test_a_study_that_changes_meanwhile_ends_it(study, texts, monkeypatch, capsys):
    path = study.folder / "latent_values.bin"

    def cut(values):
        os.truncate(path, path.stat().st_size - 1)  # within its last page: reading it ends no process in any case
        return find_modes(values)

    monkeypatch.setattr(index_module, "find_modes", cut)
    monkeypatch.setattr(index_module, "LATENTS_AT_ONCE", 8)
    index = Index(study)
    with pytest.raises(TopkapiError, match=r"latent_values\.bin has changed"):
        index.build(lambda: texts, Event())
    assert index.facts()["state"] == "failed"
    assert not (study.folder / FILE).exists()
    capsys.readouterr()


def test_it_stops_when_asked_to(study):
    stop = Event()
    stop.set()
    index = Index(study)
    index.build(lambda: pytest.fail("it read all firings"), stop)
    assert not index.is_ready
    assert not (study.folder / FILE).exists()


def test_one_that_cannot_be_made_says_so(study, capsys):
    def fail():
        raise TopkapiError("there is no tokenizer")

    index = Index(study)
    with pytest.raises(TopkapiError):
        index.build(fail, Event())
    assert index.facts()["state"] == "failed"
    assert "there is no tokenizer" in capsys.readouterr().err


def test_a_table_has_the_tokens_that_it_counts_from(study, texts):
    whole = built(study, texts)

    class Filling(Index):
        """Whoever asks for its tokens gets those before it was made, and finds it made at once."""

        @property
        def tokens(self):
            before, self.known = self.known, whole.tokens
            self.arrays["top_token"][:] = whole.arrays["top_token"]
            return before

        @tokens.setter
        def tokens(self, known):
            self.known = known

    index = Filling(study)
    for _ in range(2):
        header, found = unpack(table(study, index))
        counted = found["top_token"][found["top_token"] != NO_TOKEN]
        assert (counted < len(header["tokens"])).all()


def test_a_study_written_anew_has_its_own(run, study, texts):
    first = built(study, texts)
    moved = shutil.copytree(run, run.parent / "moved")
    assert Index(topkapi.study.open(moved / "study", moved))._load()
    assert first.is_ready


def test_packed_columns_come_back():
    arrays = {"a": np.arange(5, dtype="<f4"), "b": np.arange(5, dtype="u1"), "c": np.arange(5, dtype="<u4")}
    header, found = unpack(pack({"n_latents": 5, "tokens": ["</script>", "é"]}, arrays))
    assert header["tokens"] == ["</script>", "é"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    data = pack({"n_latents": 5}, arrays)
    offsets = [c["offset"] for c in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["columns"]]
    assert all(offset % 8 == 0 for offset in offsets)  # which typed arrays of a browser need
    for cut in (b"", b"1234", b"\xff" * 20):
        with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
            unpack(cut)


def test_two_modes_are_found_among_very_many_firings():
    random = np.random.default_rng(0)
    values = random.permutation(np.concatenate([random.normal(1, 0.1, 60_000), random.normal(3, 0.2, 40_000)]))
    values = values.astype("f4")
    assert len(values) > MOST_FIRINGS
    low, high = find_modes(values)
    assert (low.peak, high.peak) == pytest.approx((1, 3), abs=0.05)
    assert low.high == high.low
    assert low.share == pytest.approx(0.6, abs=0.01)
    assert values.max() < high.high
    found = dip(values)
    assert found.n == 1_000
    assert found.p == 0.01


def test_few_firings_are_one_mode():
    assert find_modes(np.array([], "f4")) == []
    assert dip(np.ones(9, "f4")) is None
    (mode,) = find_modes(np.array([1, 2, 9], "f4"))
    assert (mode.low, mode.peak, mode.share) == (0, 2, 1)
    assert mode.high > 9
    assert len(find_modes(np.full(50, 0.5, "f4"))) == 1


def test_tokenizers_that_begin_texts_with_a_space_are_understood():
    known = {"he": [3], " he": [1, 3], "a": [2], "a he": [2, 3], "ahe": [2, 5]}
    texts = Texts(lambda text, add_special_tokens: {"input_ids": known[text]})
    assert texts.ids_inside(" he") == texts.ids_inside("he") == [3]


def test_a_character_of_several_tokens_is_shown_once(texts):
    ids = texts.ids("The café €5 ☃!", whole=False)
    shown = texts.each(ids)
    assert "".join(shown).replace("\ufffd", "") == "The café €5 ☃!"
    assert "\ufffd" in shown  # its tokenizer has no token for the snowman
    assert len(shown) == len(ids)
    assert texts.each(texts.ids("a\n\x1b[31m<b>", whole=False))[-3:] != []
    assert "\x1b" not in "".join(texts.each(texts.ids("a\n\x1b[31m<b>", whole=False)))
    assert texts.alone(texts.tokenizer.eos_token_id) == "<|endoftext|>"
