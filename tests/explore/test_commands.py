"""topkapi find and topkapi steer from the command line, on a tiny trained run.

Mutations seen caught: predictions printed in place of measurements; a study of another autoencoder taken; two edits of
one latent taken; a run's path with a space advised without quotes; a checksum that is missing read all the same.
"""

import json
import shutil
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import topkapi.explore
from topkapi.cli import main
from topkapi.errors import TopkapiError, command_line
from topkapi.evaluate.contexts import visible
from topkapi.explore import Edit, attribute, measure, rank_correlation
from topkapi.explore.finding import find, study_of
from topkapi.explore.prompts import encode, single_token, texts
from topkapi.explore.writing import pattern_of
from topkapi.published import read_config, write_config

PROMPT = "The old river finds the quiet garden. Every captain"
FIND = ["--prompt", PROMPT, "--positive", " the", "--negative", " a", " some"]


@pytest.fixture(scope="module")
def spliced(run):
    return topkapi.explore.open(run)


@pytest.fixture
def bare(run, tmp_path):
    """The run without its study, in a folder whose name a shell would take for two."""
    return shutil.copytree(run, tmp_path / "bare run", ignore=shutil.ignore_patterns("study", "checkpoints"))


def test_find_ranks_and_measures(run, spliced, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert main(["find", str(run), *FIND, "--top", "6", "--verify", "4", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    tokens = spliced.tokens(PROMPT)
    up, down = [single_token(spliced.lm, " the")], [single_token(spliced.lm, text) for text in (" a", " some")]
    wanted = attribute(spliced, tokens, up, down)
    assert [row["latent"] for row in found["latents"]] == wanted.latents[:6].tolist()
    np.testing.assert_allclose([row["attribution"] for row in found["latents"]], wanted.total[:6], rtol=1e-5)
    measured = measure(spliced, tokens, wanted.latents[:4].tolist(), up, down)
    np.testing.assert_allclose([row["measured"] for row in found["latents"][:4]], measured, rtol=1e-3, atol=1e-6)
    assert [row["measured"] for row in found["latents"][4:]] == [None, None]
    assert found["metric"] == pytest.approx(wanted.metric, rel=1e-5)
    correlation = rank_correlation(wanted.total[:4], measured)
    assert found["rank_correlation"] == pytest.approx(correlation._asdict())
    assert "".join(found["tokens"]) == PROMPT
    for row in found["latents"]:
        assert str(row["latent"]) in shown
        assert len(row["by_position"]) == len(row["values"]) == tokens.shape[1]
        for context in row["contexts"]:
            assert f"[[{context['token']}]]" in shown
    assert any(row["contexts"] for row in found["latents"])
    assert f"{measured[0]:+.3f}" in shown


def test_more_measurements_than_rows_show_the_largest_measured(run, spliced):
    found = find(spliced, PROMPT, [" the"], [" a"], top=3, verify=500)
    tokens, up, down = spliced.tokens(PROMPT), [single_token(spliced.lm, " the")], [single_token(spliced.lm, " a")]
    attribution = attribute(spliced, tokens, up, down)
    measured = measure(spliced, tokens, attribution.latents.tolist(), up, down)
    largest = np.argsort(-np.abs(measured), kind="stable")[:3]
    assert [row.latent for row in found.latents] == attribution.latents[largest].tolist()
    assert [row.measured for row in found.latents] == pytest.approx(measured[largest].tolist(), rel=1e-4)
    assert [row.attribution for row in found.latents] == pytest.approx(attribution.total[largest].tolist(), rel=1e-4)
    assert found.rank_correlation.n == found.n_active == len(measured)


def test_find_integrates_and_does_without_a_study(bare, capsys):
    assert main(["find", str(bare), *FIND, "--top", "3", "--verify", "0", "--steps", "4"]) == 0
    said = capsys.readouterr()
    assert "4 steps of integrated gradients" in said.out
    assert "No rank correlation" in said.out
    assert f"{command_line('study', bare, '--tokens', 100_000)}, then find again" in said.err


def test_steer_shows_both_texts(run, spliced, tmp_path, capsys):
    study = topkapi.study.open(run / "study")
    latent = int(np.argmax(study.n_fired))
    file = tmp_path / "steered.json"
    more = ["--samples", "2", "--tokens", "5", "--seed", "7", "--json", str(file)]
    assert main(["steer", str(run), "--prompt", PROMPT, "--clamp", f"{latent}=-3x", *more]) == 0
    found = json.loads(file.read_text())
    edit = Edit(latent, "clamp", -3 * study.latent(latent).maximum)
    wanted = topkapi.explore.sample(spliced, spliced.tokens(PROMPT), [edit], 2, 5, seed=7)
    assert [row["kl"] for row in found["samples"]] == [
        pytest.approx(row[:n].tolist(), rel=1e-3, abs=1e-6)
        for row, n in zip(wanted.kl, wanted.steered_lengths, strict=True)
    ]
    shown = capsys.readouterr().out
    assert f"clamp latent {latent} {edit.value:g}" in shown
    for row in found["samples"]:
        assert visible(row["clean"]).split()[0] in shown
        assert visible(row["steered"]).split()[0] in shown


def test_steer_counts(run, tmp_path, capsys):
    file, words = tmp_path / "counted.json", tmp_path / "words.txt"
    words.write_text("the\n\n quiet \n")
    latent = int(np.argmax(topkapi.study.open(run / "study").n_fired))
    small = ["--samples", "3", "--tokens", "4", "--controls", "2", "--json", str(file)]
    for what in (["--count", "[aeiou]"], ["--words", str(words)]):
        assert main(["steer", str(run), "--prompt", PROMPT, "--ablate", str(latent), *what, *small]) == 0
        found = json.loads(file.read_text())
        assert found["steered"]["of"] == found["clean"]["of"] == 3
        assert found["controls"]["of"] == 6
        assert len(found["each_control"]) == 2
        shown = capsys.readouterr().out
        assert "2 other latents" in shown
        assert "includes 0" in shown or "excludes 0" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["find", "RUN", "--prompt", "", "--positive", "a", "--negative", "b"], "the prompt is empty"),
        (["find", "RUN", "--prompt", "T", *FIND[2:]], "no latent is active in 'T'"),
        (["find", "RUN", *FIND[:3], " theatre compass", *FIND[4:]], "must be one token"),
        (["find", "RUN", *FIND, "--top", "0"], "--top 1"),
        (["find", "RUN", "--prompt", "a " * 200, *FIND[2:]], "sees at most 128"),
        (["find", "RUN", *FIND[:4], "--negative", " the"], "are both positive and negative"),
        (["find", "RUN", *FIND[:4]], "--negative"),
        (["find", "/nowhere", *FIND], "no run /nowhere"),
        (["find", *FIND], "needs a run first"),
        (["find", "RUN", *FIND, "--study", "/nowhere"], "/nowhere"),
        (["steer", "RUN", "--prompt", PROMPT], "nothing to steer with"),
        (["steer", "RUN", "--prompt", PROMPT, "--clamp", "3"], "write LATENT=VALUE"),
        (["steer", "RUN", "--prompt", PROMPT, "--clamp", "999=1"], "no latent 999"),
        (["steer", "RUN", "--prompt", PROMPT, "--clamp", "999=1x"], "no latent 999"),
        (
            ["steer", "RUN", "--prompt", PROMPT, "--clamp", "4=1", "1=2", "--ablate", "1"],
            "latent 1 is given 2 edits, clamp latent 1 2 and ablate latent 1, and options have no order: give it one.",
        ),
        (["steer", "RUN", "--prompt", PROMPT, "--scale", "3=2", "3=2"], "latent 3 is given 2 edits"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--where", "x"], "write all, active, or positions"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--where", "0,99"], "positions are 0 to"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--seed", "-1"], "--seed must be 0 or more"),
        (
            ["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--count", "a", "--controls", "0"],
            "--controls must be 1 or more",
        ),
        (
            ["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--temperature", "0"],
            "temperature must be more than 0",
        ),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--tokens", "500"], "and 500 new ones"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--count", "("], "no regular expression"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--count", "a{99999999999}"], "no regular expression"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--seed", "-1"], "seed must be 0 or more"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--count", "a", "--words", "b"], "give one"),
        (["steer", "RUN", "--prompt", PROMPT, "--ablate", "3", "--words", "/nowhere"], "cannot be read"),
        (["steer", "BARE", "--prompt", PROMPT, "--clamp", "3=5x"], "multiple of latent 3's maximum needs a study"),
        (["steer", "BARE", "--prompt", PROMPT, "--ablate", "3", "--count", "a"], "which a study says"),
    ],
)
def test_each_mistake_gives_one_line(run, bare, capsys, arguments, expected):
    named = {"RUN": str(run), "BARE": str(bare)}
    assert main([named.get(word, word) for word in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    *before, last = said.err.splitlines()
    assert last.startswith("topkapi: ")
    assert expected in last
    assert "BARE" not in arguments or command_line("study", bare, "--tokens", 100_000) in last
    assert all(line.startswith(("loading", "attribution")) for line in before)


def test_a_study_of_another_autoencoder_is_refused(run, bare, capsys):
    from topkapi.model import Autoencoder

    other = Autoencoder.from_pretrained(bare)
    with torch.no_grad():
        other.W_enc.mul_(2)
    other.save_pretrained(bare)
    assert load_file(bare / "model.safetensors")
    assert main(["find", str(bare), *FIND, "--study", str(run / "study")]) == 2
    assert "is of another autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(("weights", "expected"), [(None, "no finished autoencoder"), (b"damaged", "is damaged")])
def test_a_run_without_its_weights_is_refused(bare, capsys, weights, expected):
    (bare / "model.safetensors").unlink()
    if weights:
        (bare / "model.safetensors").write_bytes(weights)
    assert main(["find", str(bare), *FIND]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_a_study_of_a_run_without_a_checksum_is_refused(run, bare, spliced):
    write_config(bare, read_config(bare) | {"files": None})
    with pytest.raises(TopkapiError, match="is of another autoencoder than the one in"):
        study_of(bare, str(run / "study"), spliced)


def test_pieces_of_a_word_are_named(spliced):
    with pytest.raises(TopkapiError) as raised:
        single_token(spliced.lm, " theatre compass")
    pieces = texts(spliced.lm, spliced.lm.tokenizer(" theatre compass")["input_ids"])
    assert len(pieces) > 1
    assert ", ".join(map(repr, pieces)) in str(raised.value)
    with pytest.raises(TopkapiError, match="makes 0 of it"):
        single_token(spliced.lm, "")
    assert encode(spliced.lm, "the").shape == (1, len(spliced.lm.tokenizer("the")["input_ids"]))


def test_bytes_that_are_no_text_are_told(spliced):
    for read in (encode, single_token):
        with pytest.raises(TopkapiError, match=r"'a\\udcff' is no text: it has bytes that are not UTF-8"):
            read(spliced.lm, "a\udcff")


def test_tokenizers_that_begin_texts_with_a_space_are_understood(spliced):
    """As those of SentencePiece do: 'he' and ' he' are one token, and so is 'he' behind a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "\u2581", "\u2581a", "\u2581he", "\u2581she", "he", "\u00e9"]
    tokenizer = Tokenizer(
        models.BPE(dict(zip(words, range(7), strict=True)), [], unk_token="<unk>", ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    lm = copy(spliced.lm)
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert texts(lm, [3, 5, 3]) == [" he", "he", " he"]
    assert single_token(lm, "he") == single_token(lm, " he") == 3


def test_words_are_whole_words_in_any_case(tmp_path):
    file = Path(tmp_path / "words")
    file.write_text("he\nC++\n")
    pattern = pattern_of("", str(file))
    assert [bool(pattern.search(text)) for text in ("He said", "the", "in C++.", "C+")] == [True, False, True, False]
    assert pattern_of("", "") is None
    file.write_text(" \n")
    with pytest.raises(TopkapiError, match="no words"):
        pattern_of("", str(file))
