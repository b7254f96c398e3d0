"""A corpus as token ids on disk, memory-mapped, split into training and held-out documents.

1. Documents of all corpora are taken in turn, always from the corpus with the fewest tokens so far, so that
   `max_tokens` cuts every corpus alike; each is followed by the separator token.
2. Document i is held out where i * held_out passes a whole number: the share is exact, spread evenly over the
   corpus, and the same in every run.
3. Ids are written as they come (memory stays small) to tokens.bin, document starts to offsets.bin, and their
   checksums to tokens.json, in a folder that appears whole or not at all.

A context is a window of `context` consecutive tokens; it may span documents.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt
from torch import Tensor

from topkapi.config import DataConfig, cache_folder
from topkapi.console import progress, say
from topkapi.data.corpora import documents, texts, version
from topkapi.data.folders import new_folder
from topkapi.data.language_model import quiet
from topkapi.errors import TopkapiError
from topkapi.files import read_json, require_shape, sha256, sha256_json, write_json

FORMAT = 1  # raised when the layout or the rules above change, so that older caches are not mistaken
CHARACTERS_AT_ONCE = 250_000  # given to the tokenizer in one call: it encodes documents in parallel


@dataclass(frozen=True)
class TokenFile:
    """Token ids of one split, memory-mapped, with document boundaries."""

    tokens: UInt[np.ndarray, " n_tokens"]
    """uint16, or uint32 for a vocabulary above 65 536."""

    offsets: Int64[np.ndarray, " n_documents_plus_1"]
    """Document i is tokens[offsets[i]:offsets[i + 1]], its separator included."""

    fingerprint: str
    """SHA-256 that identifies the tokens and their document boundaries."""

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """The token file in `folder`; reads it once to verify its checksums.

        Raises:
            TopkapiError: missing, or changed since it was written.
        """
        path, what, remedy = folder / "tokens.json", "Token file", f"Delete {folder.parent} and run again."
        facts = read_json(path, what, remedy)
        require_shape(facts, {"dtype": str, "tokens": str, "offsets": str}, path, what, remedy)
        for name in ("tokens", "offsets"):
            path = folder / f"{name}.bin"
            if not path.is_file() or sha256(path) != facts[name]:
                state = "damaged" if path.is_file() else "missing"
                raise TopkapiError(f"Token file {path} is {state}: delete the folder {folder.parent} and run again.")
        return cls(
            tokens=np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r"),
            offsets=np.fromfile(folder / "offsets.bin", dtype="<i8"),
            fingerprint=sha256_json({name: facts[name] for name in ("tokens", "offsets", "dtype")}),
        )

    @property
    def n_tokens(self) -> int:
        """Token ids in the file, separators included."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Documents in the file."""
        return len(self.offsets) - 1

    def n_contexts(self, context: int) -> int:
        """Whole windows of `context` tokens; an incomplete last one is dropped."""
        return self.n_tokens // context

    def context_tokens(
        self, ids: Int[np.ndarray, " b"] | Int[Tensor, " b"], context: int
    ) -> Int64[Tensor, "b context"]:
        """Token ids of the contexts with these numbers; context i starts at token i * context."""
        windows = self.tokens[: self.n_contexts(context) * context].reshape(-1, context)
        return torch.from_numpy(windows[np.asarray(ids)].astype(np.int64))


class Splits(NamedTuple):
    """The two parts of a corpus."""

    train: TokenFile
    held_out: TokenFile


def tokenize(config: DataConfig, tokenizer: Any, tokenizer_name: str) -> Splits:
    """The corpora of `config` as token ids, from the cache where they have been tokenized before.

    The cache is under `cache_folder()/tokens`; its key covers the corpora with their files' sizes and times,
    max_tokens, held_out and the tokenizer's whole vocabulary.

    Raises:
        TopkapiError: a corpus cannot be read, or a split holds fewer tokens than one context.
    """
    if told := _doubled(config.corpora):
        say(f"warning: {told} What is measured on held-out text is better than on new text.")
    key = {
        "format": FORMAT,
        "corpora": [[corpus, version(corpus)] for corpus in config.corpora],
        "max_tokens": config.max_tokens,
        "held_out": config.held_out,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
    }
    folder = cache_folder() / "tokens" / sha256_json(key)[:24]
    if not folder.exists():
        with new_folder(folder) as temporary:
            _write_splits(temporary, config, tokenizer, tokenizer_name)
    splits = Splits(TokenFile.open(folder / "train"), TokenFile.open(folder / "held_out"))
    for name, split in splits._asdict().items():
        _require_a_context(name, split.n_tokens, config)
    return splits


def separator_id(tokenizer: Any) -> int | None:
    """The token between documents: <|endoftext|> where the vocabulary has it, else the end-of-sequence token.

    Instruction-tuned models change their end-of-sequence token to the one that ends a turn, although their
    pre-training separated documents by <|endoftext|> (SmolLM2: 2 against 0). None where there is neither.
    """
    return tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)


def require_apart(corpora: tuple[str, ...]) -> None:
    """Raise TopkapiError where two corpora are of the same text: ask before a run begins. Those that have begun go on
    and are read, with a warning."""
    if told := _doubled(corpora):
        raise TopkapiError(f"{told} Give each text once.")


def _doubled(corpora: tuple[str, ...]) -> str:
    """Which two corpora are of the same text, in a sentence; "" where none are."""
    found: dict[str, list[tuple[str, str]]] = {}  # of each text, the fields that corpora take, and which corpora
    for corpus in corpora:
        for text, field in texts(corpus):
            for theirs, other in found.get(text, ()):
                if field == theirs or "" in (field, theirs):
                    return (
                        f"Corpora {other!r} and {corpus!r} both have {text}, so that documents are held out and "
                        "trained on too."
                    )
            found.setdefault(text, []).append((field, corpus))
    return ""


def _require_a_context(name: str, n_tokens: int, config: DataConfig) -> None:
    if n_tokens < config.context:
        raise TopkapiError(
            f"Corpora {', '.join(config.corpora)} give {n_tokens} {name} tokens, fewer than one context of "
            f"{config.context}: give more documents (whole documents are held out, so at least two), raise "
            "--data.max-tokens, or change --data.held-out."
        )


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if hasattr(backend, "to_str") else sorted(tokenizer.get_vocab().items())
    return sha256_json([type(tokenizer).__name__, whole, separator_id(tokenizer)])


def _write_splits(folder: Path, config: DataConfig, tokenizer: Any, tokenizer_name: str) -> None:
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4"
    about = {"tokenizer": tokenizer_name, "corpora": list(config.corpora), "format": FORMAT}
    n_tokens = 0
    with (
        _Writer(folder / "train", dtype) as train,
        _Writer(folder / "held_out", dtype) as held_out,
        progress("Tokenizing", config.max_tokens) as meter,
    ):
        for i, ids in enumerate(_in_turn(config.corpora, tokenizer)):
            ids = ids[: config.max_tokens - n_tokens]
            (held_out if _is_held_out(i, config.held_out) else train).add(ids)
            n_tokens += len(ids)
            meter.advance(len(ids))
            if n_tokens == config.max_tokens:
                break
    for name, writer in (("train", train), ("held_out", held_out)):
        _require_a_context(name, writer.offsets[-1], config)
        write_json(folder / name / "tokens.json", about | writer.facts)


def _is_held_out(i: int, share: float) -> bool:
    """Whether document i is held out: the first is, then one each time i * share passes a whole number."""
    return math.ceil((i + 1) * share) > math.ceil(i * share)


def _in_turn(corpora: tuple[str, ...], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of documents, the next always from the corpus that has given the fewest tokens (ties: the first)."""
    streams = [_encoded(documents(corpus), tokenizer) for corpus in corpora]
    given = [0] * len(streams)
    while streams:
        i = given.index(min(given))
        ids = next(streams[i], None)
        if ids is None:
            del streams[i], given[i]
        else:
            given[i] += len(ids)
            yield ids


def _encoded(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    separator = separator_id(tokenizer)
    end = [] if separator is None else [separator]
    for batch in _batched(text for text in texts if text.strip()):
        with quiet():  # or it warns of documents longer than the model's context
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False)
        for ids in encoded["input_ids"]:
            yield ids + end


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to tokens.bin; offsets.bin follows on closing."""

    def __init__(self, folder: Path, dtype: str) -> None:
        folder.mkdir()
        self.folder, self.dtype = folder, dtype
        self.offsets = array("q", [0])
        self.hash = hashlib.sha256()

    def __enter__(self) -> "_Writer":
        self.file = (self.folder / "tokens.bin").open("wb")
        return self

    def add(self, ids: list[int]) -> None:
        written = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(written)
        self.hash.update(written)
        self.offsets.append(self.offsets[-1] + len(ids))

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        np.asarray(self.offsets, dtype="<i8").tofile(self.folder / "offsets.bin")

    @property
    def facts(self) -> dict[str, str]:
        """What tokens.json says of the two files."""
        offsets = sha256(self.folder / "offsets.bin")
        return {"dtype": self.dtype, "tokens": self.hash.hexdigest(), "offsets": offsets}
