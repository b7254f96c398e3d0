"""Names and notes that people give to latents, in RUN/labels.json."""

import json
from pathlib import Path
from typing import Any

from topkapi.errors import TopkapiError
from topkapi.files import lock, read_file, write_text_atomic

LABELS = "labels.json"
LOCK = ".labels.lock"  # not the run's own, which training holds
LABEL_CHARACTERS, NOTE_CHARACTERS = 200, 10_000

Label = dict[str, str]


class Labels:
    """The labels of one autoencoder. The file is read again whenever it has changed, and written whole."""

    def __init__(self, run: Path, autoencoder: str, n_latents: int) -> None:
        self.path, self.autoencoder, self.n_latents = run / LABELS, autoencoder, n_latents
        self._read: tuple[tuple[int, ...], dict[int, Label]] = ((), {})
        self.all()

    def all(self) -> dict[int, Label]:
        """Each labelled latent's {"label", "note"}, by number.

        Raises:
            TopkapiError: the file is damaged, or of another autoencoder.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return {}
        version = (found.st_mtime_ns, found.st_size, found.st_ino)  # clocks of file systems tick every few ms
        if version != self._read[0]:
            self._read = (version, self._parsed(self._text()))
        return self._read[1]

    def set(self, labels: dict[int, Label]) -> dict[int, Label]:
        """Add or replace some labels; one with neither label nor note is removed. Those that were there of the same.

        Others who set labels meanwhile, of another viewer as well, wait.
        """
        with lock(self.path.parent, lambda: None, LOCK):
            before = self.all()
            merged = before | labels
            kept = {str(i): merged[i] for i in sorted(merged) if any(merged[i].values())}
            text = json.dumps({"autoencoder": self.autoencoder, "labels": kept}, indent=1, ensure_ascii=False)
            write_text_atomic(self.path, text + "\n")
        return {i: before[i] for i in labels if i in before}

    def _text(self) -> str:
        try:
            return read_file(self.path).decode("utf-8", "replace")
        except OSError as error:
            raise TopkapiError(f"{self.path} cannot be read: {error.strerror}.") from None

    def _parsed(self, text: str) -> dict[int, Label]:
        try:
            content = json.loads(text)
            labels = {int(i): checked(label) for i, label in content["labels"].items()}
            autoencoder = content["autoencoder"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TopkapiError(f"{self.path} is damaged: it holds no labels. Mend it, or move it away.") from None
        if autoencoder != self.autoencoder:
            raise TopkapiError(
                f"{self.path} has labels of another autoencoder than the run's: move it away; its labels can be "
                "imported in the viewer where they still apply."
            )
        return {i: label for i, label in labels.items() if 0 <= i < self.n_latents}


def checked(value: Any) -> Label:
    """A label with its note. Raises ValueError, with what is wrong, for anything else."""
    if not isinstance(value, dict) or not value.keys() <= {"label", "note"}:
        raise ValueError("a label must be an object with label and note")
    label, note = value.get("label", ""), value.get("note", "")
    for text, name, most in ((label, "label", LABEL_CHARACTERS), (note, "note", NOTE_CHARACTERS)):
        if not isinstance(text, str) or len(text) > most:
            raise ValueError(f"{name} must be a text of at most {most:,} characters")
    return {"label": label.strip(), "note": note.strip()}
