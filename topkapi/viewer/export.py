"""The command topkapi export: the page and its answers as files, for hosts that only serve files.

The files are those of docs/viewer.md: what the server answers to GET, with examples and votes inside latents' files,
LATENTS_A_FILE latents in each. They are written beside the folder and take its place when all are there.
"""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topkapi.console import progress, say
from topkapi.errors import TopkapiError
from topkapi.study import Study
from topkapi.viewer import examples, latents, runs
from topkapi.viewer.answers import to_json
from topkapi.viewer.app import OF_DAMAGE, STATIC
from topkapi.viewer.model_api import LIMITS
from topkapi.viewer.opened import Opened

LATENTS_A_FILE = 256
LIVE, EXPORTED = '<html lang="en">', '<html lang="en" data-backend="static">'  # an exported page asks no server first
WHY_OFF = "these are files without a server: start topkapi view for what the language model computes."


def export(run: Path, study: Study, out: Path, n_examples: int, votes: bool) -> None:
    """Write the page of a run's study into `out`, with `n_examples` of each kind for each latent.

    With `votes` the language model is loaded for the tokens that latents vote for. Memory: one file's latents.

    Raises:
        TopkapiError: `out` holds anything but an earlier export; no such run, a study of another one, or a damaged
            one; votes are wanted and the language model does not load.
    """
    _require_free(out)
    out = out.absolute()  # "." has no name to put another beside
    temporary = out.with_name(f".{out.name}.tmp")
    opened = Opened(run, study, model=votes)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    try:
        opened.start()
        shutil.copytree(STATIC, temporary)
        page = temporary / "index.html"
        page.write_text(page.read_text(encoding="utf-8").replace(LIVE, EXPORTED, 1), encoding="utf-8")
        try:
            _write(opened, temporary / "api", n_examples)
        except OF_DAMAGE:
            study.verify()
            raise
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        opened.close()
        shutil.rmtree(temporary, ignore_errors=True)
    words = ["python", "-m", "http.server", "-d", str(out)]
    say(f"{out}: {study.n_latents:,} latents as files. Look at them: {shlex.join(words)}")


def _require_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise TopkapiError(f"{out} is no folder. Name another.")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        is_export = json.loads((out / "api" / "about.json").read_text(encoding="utf-8"))["static"] is True
    except (OSError, ValueError, KeyError, TypeError):
        is_export = False
    if not is_export:
        raise TopkapiError(f"{out} holds something else than an export, which would be lost. Name another folder.")


def _write(opened: Opened, api: Path, n_examples: int) -> None:
    study = opened.study
    (api / "latents").mkdir(parents=True)
    lm = opened.worker.wait().lm if opened.worker.state != "off" else None
    with progress("export", study.n_latents, unit="latents") as meter:
        for number, start in enumerate(range(0, study.n_latents, LATENTS_A_FILE)):
            some = list(range(start, min(start + LATENTS_A_FILE, study.n_latents)))
            voted = latents.votes(study, some, lm, opened.texts) if lm else [None] * len(some)
            found = zip(latents.describe(study, some), voted, strict=True)
            rows = [
                numbers
                | {"label": opened.labels.all().get(numbers["i"]), "votes": vote}
                | {"examples": dict(_examples(opened, numbers["i"], n_examples))}
                for numbers, vote in found
            ]
            (api / "latents" / f"{number}.json").write_bytes(to_json(rows))
            meter.advance(len(some))
    opened.wait_for_index()
    about = opened.about() | {"static": True, "model": {"state": "off", "why": WHY_OFF}, "limits": LIMITS}
    answers = {
        "about": about,
        "global": opened.overview,
        "runs": runs.beside(opened.run),
        "labels": {"labels": opened.labels.all()},
    }
    for name, answer in answers.items():
        (api / f"{name}.json").write_bytes(to_json(answer))
    (api / "columns.bin").write_bytes(opened.table.current().plain)


def _examples(opened: Opened, i: int, n: int) -> Iterator[tuple[str, Any]]:
    """Of each kind, n examples, or as many as the groups of a kind share."""
    latent = opened.study.latent(i)
    for kind in examples.KINDS:
        of_each = -(-n // examples.GROUPS) if kind == "quantile" else n
        yield kind, examples.choose(latent, examples.Choice(kind, of_each), opened.texts)
