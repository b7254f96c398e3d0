"""Seen to fail when: the separator is left out; offsets start late; max_tokens cuts a token late; corpora take
turns by documents instead of tokens; the tokenizer is left out of the cache key."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny import make_corpus
from topkapi.config import DataConfig
from topkapi.data.corpora import documents
from topkapi.data.tokens import TokenFile, _is_held_out, separator_id, tokenize
from topkapi.errors import TopkapiError


def pieces(file: TokenFile) -> list[list[int]]:
    return [file.tokens[a:b].tolist() for a, b in zip(file.offsets[:-1], file.offsets[1:], strict=True)]


def test_documents_come_back_whole_each_with_a_separator(config, splits, lm):
    parts = {True: iter(pieces(splits.held_out)), False: iter(pieces(splits.train))}
    for i, text in enumerate(documents(config.corpora[0])):
        *ids, end = next(parts[_is_held_out(i, config.held_out)])
        assert lm.tokenizer.decode(ids) == text
        assert end == lm.tokenizer.eos_token_id
    assert [next(rest, None) for rest in parts.values()] == [None, None]
    assert splits.train.n_documents + splits.held_out.n_documents == 60


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.001, 0.999), n=st.integers(2, 300))
def test_held_out_share_is_exact(share, n):
    held_out = sum(_is_held_out(i, share) for i in range(n))
    assert abs(held_out - share * n) <= 1
    assert _is_held_out(0, share)


def test_contexts_are_consecutive_windows(numbers):
    assert numbers.n_contexts(30) == 3
    tokens = numbers.context_tokens(np.array([2, 0]), 30)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [list(range(60, 90)), list(range(30))]
    with pytest.raises(IndexError):
        numbers.context_tokens(np.array([3]), 30)


def test_max_tokens_cuts_every_corpus_alike(tmp_path, lm):
    corpora = tuple(make_corpus(tmp_path / f"{n}.jsonl", n) for n in (40, 50))
    whole = tokenize(DataConfig(corpora=corpora, context=16), lm.tokenizer, "tiny")
    some = tokenize(DataConfig(corpora=corpora, context=16, max_tokens=1000), lm.tokenizer, "tiny")
    assert whole.train.n_tokens + whole.held_out.n_tokens > 5000
    assert some.train.n_tokens + some.held_out.n_tokens == 1000
    first, second = (next(documents(corpus)) for corpus in corpora)
    assert lm.tokenizer.decode(pieces(some.held_out)[0][:-1]) == first
    assert lm.tokenizer.decode(pieces(some.train)[0][:-1]) == second


def test_corpora_take_turns_by_tokens(tmp_path, lm):
    lines = {"short": ["a red house. "] * 400, "long": ["a red house. " * 50] * 8}
    for name, texts in lines.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpora = tuple(f"jsonl:{tmp_path}/{name}" for name in lines)
    splits = tokenize(DataConfig(corpora=corpora, context=16, max_tokens=2000), lm.tokenizer, "tiny")
    lengths = [len(ids) for split in splits for ids in pieces(split)]
    of_long = sum(length for length in lengths if length > 20)
    assert abs(of_long - 1000) < 2 * max(lengths)


def test_the_second_time_the_cache_is_read(config, splits, lm, monkeypatch):
    monkeypatch.setattr("topkapi.data.tokens.documents", lambda corpus: pytest.fail("read again"))
    again = tokenize(config, lm.tokenizer, "another name")
    assert (again.train.tokens == splits.train.tokens).all()
    assert again.train.fingerprint == splits.train.fingerprint != again.held_out.fingerprint


def test_a_changed_file_or_tokenizer_is_tokenized_again(tmp_path, lm):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "a.jsonl"
    config = DataConfig(corpora=(make_corpus(path, 9),), context=16)
    before = tokenize(config, lm.tokenizer, "tiny")
    make_corpus(path, 10)
    after = tokenize(config, lm.tokenizer, "tiny")
    assert after.train.n_tokens > before.train.n_tokens
    plain = PreTrainedTokenizerFast(tokenizer_object=lm.tokenizer.backend_tokenizer)  # has no end of text
    plain.backend_tokenizer.normalizer = None
    assert separator_id(plain) == separator_id(lm.tokenizer) == 0
    from tokenizers.normalizers import Lowercase

    plain.backend_tokenizer.normalizer = Lowercase()
    assert tokenize(config, plain, "tiny").train.fingerprint != after.train.fingerprint


def test_nothing_is_left_behind_by_a_failure(tmp_path, lm):
    path = tmp_path / "a.jsonl"
    make_corpus(path, 5)
    path.write_text(path.read_text() + "not JSON\n")
    with pytest.raises(TopkapiError, match="line 6 is not JSON"):
        tokenize(DataConfig(corpora=(f"jsonl:{path}",), context=16), lm.tokenizer, "tiny")
    assert [p.name for p in (tmp_path / "cache/topkapi/tokens").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "give 0 train tokens"),
        (["", "  \n"], "give 0 train tokens"),
        (["A document on its own."], "give 0 train tokens"),
        (["A document.", "Another."], r"give \d+ train tokens, fewer than one context of 16"),
    ],
)
def test_too_little_text_is_told(tmp_path, lm, texts, said):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(TopkapiError, match=said):
        tokenize(DataConfig(corpora=(f"jsonl:{path}",), context=16), lm.tokenizer, "tiny")


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "tokens.json"])
def test_damage_is_noticed(tmp_path, config, splits, lm, name):
    path = next((tmp_path / "cache/topkapi/tokens").rglob(f"train/{name}"))
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        path.write_bytes(damaged)
        with pytest.raises(TopkapiError, match=f"{name} is damaged"):
            tokenize(config, lm.tokenizer, lm.name)
    path.unlink()
    with pytest.raises(TopkapiError, match=name):
        TokenFile.open(path.parent)


def test_a_large_vocabulary_takes_32_bits(tmp_path, config, lm, monkeypatch):
    monkeypatch.setattr(type(lm.tokenizer), "get_vocab", lambda self: {"last": 65_536})
    assert tokenize(config, lm.tokenizer, lm.name).train.tokens.dtype == np.uint32


def test_documents_are_separated_by_end_of_text_before_end_of_turn():
    class Tokenizer:
        eos_token_id = 2

        def __init__(self, vocabulary):
            self.get_vocab = lambda: vocabulary

    assert separator_id(Tokenizer({"<|endoftext|>": 0, "<|im_end|>": 2})) == 0
    assert separator_id(Tokenizer({"</s>": 2})) == 2
