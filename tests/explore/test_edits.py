"""Edits as a person writes them, and those that make no sense.

Mutations seen caught: the factor of scale taken as a multiple of the maximum; a sign lost; positions sorted away.
"""

import pytest

from topkapi.errors import TopkapiError
from topkapi.explore import Edit
from topkapi.explore.edits import parse_edit, parse_where


def maximum(latent):
    return latent / 10


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("clamp", "17=5x", Edit(17, "clamp", 8.5)),
        ("clamp", "20=-2x", Edit(20, "clamp", -4.0)),
        ("clamp", " 3=-.5 ", Edit(3, "clamp", -0.5)),
        ("clamp", "3=1e-1", Edit(3, "clamp", 0.1)),
        ("add", "10=+0.5X", Edit(10, "add", 0.5)),
        ("scale", "10=2", Edit(10, "scale", 2.0)),
        ("bound", "10=-1:0.5x", Edit(10, "bound", -1.0, 0.5)),
        ("ablate", "0", Edit(0, "ablate")),
    ],
)
def test_edits_as_written(kind, text, wanted):
    assert parse_edit(kind, text, "all", maximum) == wanted
    assert parse_edit(kind, text, (3, 1), maximum).where == (3, 1)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("clamp", "17"),
        ("clamp", "17=x"),
        ("clamp", "=5"),
        ("clamp", "a=5"),
        ("clamp", "-1=5"),
        ("clamp", "17=5y"),
        ("clamp", "17=5=6"),
        ("clamp", "17=nan"),
        ("clamp", ""),
        ("scale", "17=2x"),
        ("bound", "17=1"),
        ("ablate", "17=0"),
    ],
)
def test_a_malformed_edit_is_quoted_with_an_example(kind, text):
    with pytest.raises(TopkapiError, match=rf"--{kind} .*: write LATENT.*, as in --{kind} 17"):
        parse_edit(kind, text, "all", maximum)


def test_where():
    assert parse_where("all") == "all"
    assert parse_where("active") == "active"
    assert parse_where("3,0,12") == (3, 0, 12)
    for text in ("", "some", "1,", "-1", "1-3"):
        with pytest.raises(TopkapiError, match="write all, active, or positions"):
            parse_where(text)


def test_edits_without_sense():
    for wrong, match in [
        ((-1, "ablate"), "count from 0"),
        ((1, "clamp", float("nan")), "from -1e.06 to 1e.06; got nan"),
        ((1, "add", float("-inf")), "got -inf"),
        ((1, "scale", 1e300), r"got 1e\+300"),
        ((1, "bound", 0.0, 1e7), r"got 10000000\.0"),
        ((1, "clamp", 1000000.25), r"got 1000000\.25"),  # not "1e+06", which is in range
        ((1, "bound", 1.0), "goes with bound"),
        ((1, "clamp", 1.0, 2.0), "goes with bound"),
        ((1, "bound", 1.0, 0.5), "is empty"),
        ((1, "clamp", 1.0, None, ()), "one at least"),
        ((1, "clamp", 1.0, None, (-2,)), "count from 0"),
    ]:
        with pytest.raises(TopkapiError, match=match):
            Edit(*wrong)


def test_edits_in_words():
    assert str(Edit(3, "clamp", -1.5)) == "clamp latent 3 -1.5"
    assert str(Edit(3, "ablate", where="active")) == "ablate latent 3 where active"
    assert str(Edit(3, "bound", 0.0, 2.0, (1, 2))) == "bound latent 3 0 to 2 at (1, 2)"
