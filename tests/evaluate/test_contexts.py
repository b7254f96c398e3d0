"""Strongest contexts against a search of everything; the choice of latents; what is printed.

Mutations seen caught: a window taken twice; ties decided by the order of blocks; firings of value 0 counted; markup
in the text obeyed; parts decoded alone; repeated text shown.
"""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.evaluate.stand_ins import D_MODEL, identity_autoencoder, random_autoencoder, token_file
from topkapi.evaluate import contexts
from topkapi.evaluate.contexts import (
    Strongest,
    choose_latents,
    decode_around,
    examples,
    format_contexts,
    strongest_contexts,
)

CONTEXT = 4


class Bytes:
    """A tokenizer whose tokens are bytes, as the smallest pieces of byte-level BPE are."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, ids):
        return f"<{ids}>"


class Pieces:
    """A word-piece tokenizer: a leading space is dropped when text is decoded."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, **options):
        return "".join(self.pieces[i] for i in ids).replace("_", " ").removeprefix(" ")

    def convert_ids_to_tokens(self, ids):
        return self.pieces[ids]


def rows(n, seed=0):
    """Activations of which a third repeat, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * n // 3, D_MODEL, generator=generator)[torch.randint(2 * n // 3, (n,), generator=generator)]


def search(ae, raw, positions, m):
    """(fired, [(value, position), ...]) of every latent, by looking at everything."""
    values, indices = ae.encode(ae.normalise(raw.float()).x)
    dense = torch.zeros(len(raw), ae.n_latents).scatter_(1, indices, values.detach())
    found = []
    for latent in dense.T.tolist():
        firings = sorted((-v, p) for v, p in zip(latent, positions.tolist(), strict=True) if v > 0)
        windows, kept = set(), []
        for value, position in firings:
            if position // CONTEXT not in windows and len(kept) < m:
                windows.add(position // CONTEXT)
                kept.append((-value, position))
        found.append((len(firings), kept))
    return found


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("seed", range(5))
def test_one_pass_finds_what_a_search_finds(seed, activation, monkeypatch):
    ae, raw, m = random_autoencoder(seed=seed, activation=activation), rows(90, seed), 3
    # rows computed in other batches differ in the last bit, which would untie ties
    monkeypatch.setattr(ae, "encode", rowwise(ae.encode))
    positions = torch.randperm(120, generator=torch.Generator().manual_seed(seed))[:90]
    cuts = np.random.default_rng(seed).integers(0, 90, 4)
    monkeypatch.setattr(contexts, "CHUNK_ELEMENTS", 13 * ae.n_latents)
    blocks = zip(raw.tensor_split(sorted(cuts)), positions.tensor_split(sorted(cuts)), strict=True)
    found = strongest_contexts(ae, blocks, CONTEXT, per_latent=m)
    assert found.n_tokens == 90
    for latent, (n_fired, kept) in enumerate(search(ae, raw, positions, m)):
        assert found.n_fired[latent] == n_fired
        there = found.positions[latent] >= 0
        assert found.positions[latent][there].tolist() == [position for _, position in kept]
        assert found.values[latent][there].tolist() == pytest.approx([value for value, _ in kept])
        assert (found.values[latent][~there] == 0).all()


def rowwise(encode):
    def one_by_one(x):
        values, indices = zip(*(encode(row[None]) for row in x), strict=True)
        return torch.cat(values), torch.cat(indices)

    return one_by_one


def test_density_is_the_share_of_tokens():
    raw = torch.tensor([[1.0, 0, 0, -1], [1, 0, 0, -1], [0, 1, 0, -1], [0, 0, 1, -1]])
    found = strongest_contexts(identity_autoencoder(), [(raw, torch.arange(4))], CONTEXT)
    assert found.density.tolist() == [0.5, 0.25, 0.25, 0, 0, 0, 0, 1]


def found_with(firings, n_latents=2, m=4, n_tokens=1000, context=64):
    """A `Strongest` in which latent i fires as listed: [(value, position), ...]."""
    values, positions = torch.zeros(n_latents, m), torch.full((n_latents, m), -1)
    for latent, pairs in firings.items():
        for j, (value, position) in enumerate(pairs):
            values[latent, j], positions[latent, j] = value, position
    n_fired = (positions >= 0).sum(1)
    return Strongest(context, n_tokens, n_fired, values, positions)


def test_chosen_latents_are_evenly_spaced_over_the_ranking():
    """Latents 0..9 pass, the strongest first; 10 fires too often, 11 in too few windows, 12 never."""
    firings = {i: [(10.0 - i, 64 * j) for j in range(4)] for i in range(11)} | {11: [(99.0, 0)]}
    found = found_with(firings, n_latents=13)
    found.n_fired[10] = 500
    chosen, rule = choose_latents(found, count=5)
    assert chosen == [1, 3, 5, 7, 9]
    assert rule.startswith("5 of the 10 latents that fire on 0.01% to 1.00% of tokens, in 4 contexts or more")


def test_too_few_latents_in_the_band_widen_the_choice_and_the_rule_says_so():
    found = found_with({0: [(1.0, 0)], 1: [(2.0, 0)]}, n_latents=3)
    chosen, rule = choose_latents(found)
    assert chosen == [1, 0]
    assert "2 of the 2 latents that fire at all (only 0 fire on" in rule


def test_nothing_fires_nothing_is_chosen():
    assert choose_latents(found_with({})).latents == []
    empty = strongest_contexts(random_autoencoder(), [], CONTEXT)
    assert choose_latents(empty).latents == []


def test_examples_stay_within_their_window_and_repeat_no_text():
    text = b"0123456789" * 5 + b"abcdefghij" * 5
    found = found_with({0: [(3.0, 55), (2.0, 65), (1.5, 52), (1.0, 3)]}, context=10)
    shown = examples(found, 0, token_file(np.frombuffer(text, np.uint8)), Bytes())
    assert shown == [(3.0, "abcde", "f", "ghij"), (1.5, "ab", "c", "defghi"), (1.0, "012", "3", "456789")]
    assert len(examples(found, 0, token_file(np.frombuffer(text, np.uint8)), Bytes(), 2)) == 2


def test_the_window_shows_twelve_tokens_before_and_six_after():
    found = found_with({0: [(1.0, 30)]})
    text = bytes(range(40, 104))
    ((_, before, token, after),) = examples(found, 0, token_file(np.frombuffer(text, np.uint8)), Bytes())
    assert (len(before), len(token), len(after)) == (12, 1, 6)
    assert before + token + after == text[18:37].decode()


@pytest.mark.parametrize("text", ["naïve — “déjà vu” 日本語 🎉!", "🎉🎉", "ascii"])
def test_parts_join_to_the_whole_text_wherever_the_token_cuts_a_character(text):
    ids = list(text.encode())
    for at in range(len(ids)):
        before, token, after = decode_around(Bytes(), ids, at)
        assert before + token + after == text
        assert ids[at] in token.encode()


def test_pieces_of_characters_at_the_ends_are_dropped():
    ids = list("é abc é".encode())[1:-1]
    assert decode_around(Bytes(), ids, 3) == (" a", "b", "c ")


def test_word_pieces_keep_the_spaces_between_them():
    pieces = Pieces("_the", "_quick", "_fox", "")
    assert decode_around(pieces, [0, 1, 2], 1) == ("the", " quick", " fox")
    assert decode_around(pieces, [0, 1, 2], 0) == ("", "the", " quick fox")


def test_control_characters_do_not_reach_the_terminal():
    assert decode_around(Bytes(), list(b"a\r\nb\x1b[1mc\td"), 3) == ("a⏎", "b", "·[1mc d")


def printed(found, latents, text, **options):
    view = format_contexts(found, latents, token_file(np.frombuffer(text, np.uint8)), Bytes())
    out = io.StringIO()
    Console(file=out, width=100, **options).print(view)
    return out.getvalue()


def test_piped_output_marks_the_token_with_brackets():
    found = found_with({1: [(0.25, 10)]})
    out = printed(found, [1], b"one [red]x[/red] two three four five" * 4)
    assert "latent 1   fires on 0.100% of tokens   strongest 0.250" in out
    assert "0.250 one [red]x[[[]]/red]" in out
    assert "\x1b" not in out


def test_a_terminal_shows_the_token_reversed():
    out = printed(found_with({0: [(1.0, 2)]}), [0], b"abcdef" * 20, force_terminal=True, color_system="standard")
    assert "ab\x1b[1;7mc\x1b[0mdef" in out
    assert "[[" not in out


def test_a_silent_latent_says_so():
    assert "latent 1   never fires on these 1,000 tokens" in printed(found_with({}), [1], b"a" * 64)
