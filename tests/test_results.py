"""Readers of a run's result files say what is wrong with them, in one line with the file's name and a remedy.

Seen to fail when: a damaged line in the middle is passed over; true counts as a number; a curve with columns of
different length is let through; whole numbers of thousands of digits are not caught.
"""

import json

import numpy as np
import pytest

from topkapi.errors import TopkapiError
from topkapi.results import read_counts, read_evaluation, read_metrics

LINES = [{"step": step, "tokens": 10 * step, "normalized_mse": None if step == 2 else 0.5} for step in (1, 2, 3)]


def write_lines(run, *texts):
    (run / "metrics.jsonl").write_text("\n".join(texts))
    return run


def test_what_is_not_there_is_nothing(tmp_path):
    assert (read_metrics(tmp_path), read_evaluation(tmp_path), read_counts(tmp_path, 3)) == ([], None, None)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    texts = [json.dumps(line) for line in LINES]
    assert read_metrics(write_lines(tmp_path, *texts)) == LINES
    for end in range(1, len(texts[-1])):
        assert read_metrics(write_lines(tmp_path, *texts[:2], texts[-1][:end])) == LINES[:2]


@pytest.mark.parametrize(
    "damaged",
    [
        "", "5", "[]", "{", '{"step": 1}', '{"step": 1.5, "tokens": 1}', '{"step": 1, "tokens": null}',
        '{"step": true, "tokens": 1}', '{"step": 1, "tokens": 1, "l0": "3"}', '{"step": 1, "tokens": 1, "l0": [3]}',
        "[" * 10_000, '{"step": ' + "1" * 5_000 + ', "tokens": 1}', "\ufffd",
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_or_skipped(tmp_path, damaged):
    first, *rest = (json.dumps(line) for line in LINES)
    write_lines(tmp_path, first, damaged, *rest)
    with pytest.raises(TopkapiError, match=r"metrics\.jsonl, line 2: damaged\. Delete the line"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path, skip_damaged=True) == LINES


SOUND = {
    "normalized_mse": 0.25,
    "kl": None,
    "intervals": {"normalized_mse": [0.2, 0.3]},
    "gaps": {"kl": "why"},
    "refinement": {"mean_ratio": {"value": 1.0, "low": None, "high": None, "n": 3}, "histogram": [1, 2], "n_tokens": 5},
    "progressive": {"k": [1, 2], "l0": [1, 2], "normalized_mse": [0.5, None], "low": [1, 2], "high": [1, 2]},
    "probes": {"tasks": {"spam": {"value": 0.1, "prior": 0.7}}, "left_out": {"news": "why"}},
}


def test_a_sound_evaluation_is_read_as_it_is(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(SOUND))
    assert read_evaluation(tmp_path) == SOUND


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no JSON object"),
        (b"[1]", "holds no JSON object"),
        (b'{"kl": 1', "holds no JSON object"),
        (b'{"kl": "\xff"}', "holds no JSON object"),
        ({"normalized_mse": "small"}, "normalized_mse is neither a number nor an object"),
        ({"normalized_mse": True}, "normalized_mse is neither"),
        ({"intervals": {"kl": [0.1]}}, "intervals are not pairs"),
        ({"intervals": {"kl": ["a", "b"]}}, "intervals are not pairs"),
        ({"intervals": []}, "intervals is neither"),
        ({"intervals": 3}, "intervals is no object"),
        ({"progressive": 3}, "progressive is no object"),
        ({"refinement": {"total_ratio": 3}}, "refinement holds something else"),
        ({"refinement": {"mean_ratio": {"value": "1"}}}, "an estimate in refinement is no number"),
        ({"progressive": SOUND["progressive"] | {"k": [1]}}, "progressive has no columns"),
        ({"threshold": SOUND["progressive"] | {"low": 3}}, "threshold has no columns"),
        ({"threshold": SOUND["progressive"] | {"l0": ["a", "b"]}}, "threshold has no columns"),
    ],
)
def test_a_damaged_evaluation_is_one_line(tmp_path, content, problem):
    path = tmp_path / "eval.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(SOUND | content).encode())
    with pytest.raises(TopkapiError) as found:
        read_evaluation(tmp_path)
    assert all(text in str(found.value) for text in (str(path), problem, f"topkapi eval {tmp_path}"))


def test_counts_are_those_of_the_autoencoder(tmp_path):
    np.savez(tmp_path / "held_out.npz", n_fired=np.arange(3), sum_squares=np.ones(3), n_tokens=np.int64(7))
    found = read_counts(tmp_path, 3)
    assert (found.n_fired.tolist(), found.sum_squares.tolist(), found.n_tokens) == ([0, 1, 2], [1, 1, 1], 7)
    for change in ({"n_fired": [0, -1, 2]}, {"n_fired": [0, 1, 8]}, {"sum_squares": [1, np.nan, 1]}, {"n_tokens": -7}):
        np.savez(tmp_path / "other.npz", **(found._asdict() | change))
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other.npz").rename(tmp_path / "other" / "held_out.npz")
        with pytest.raises(TopkapiError, match=r"other/held_out\.npz is damaged: .* Delete it"):
            read_counts(tmp_path / "other", 3)
    with pytest.raises(TopkapiError, match=r"held_out\.npz is of another autoencoder: this run has 4 latents"):
        read_counts(tmp_path, 4)
