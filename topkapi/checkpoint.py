"""Checkpoints of a run: all a trainer needs to go on exactly where it was.

RUN/checkpoints/step-00000250/ holds state.safetensors and manifest.json (step, tokens, data order, checksum). A
checkpoint is written under another name, flushed, and renamed: it is there whole or not at all. One that is found
damaged is set aside, and the one before it is used; both are said.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.files import load_tensors, read_json, save_tensors, sha256, whole_folder, write_json

STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(run: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write the checkpoint of `step`. Raises OSError with older ones untouched."""
    target = run / "checkpoints" / f"step-{step:08d}"
    if target.exists():  # saved before, and whole: damaged ones are set aside when read
        return
    with whole_folder(target) as temporary:
        save_tensors(tensors, temporary / STATE)
        write_json(temporary / MANIFEST, {"step": step, "meta": meta, "sha256": sha256(temporary / STATE)})


def keep_newest(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints.

    With several runs side by side, call it when all of them have saved: they resume from a step they share.
    """
    for old in steps(run)[:-keep]:
        shutil.rmtree(run / "checkpoints" / f"step-{old:08d}")


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run has, ascending."""
    names = (path.name for path in (run / "checkpoints").glob("step-????????"))
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def load(run: Path, step: int) -> Checkpoint:
    """One checkpoint. Raises TopkapiError if a file is missing or damaged."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    manifest = read_json(folder / MANIFEST, "checkpoint")
    tensors = load_tensors(folder / STATE, manifest["sha256"], "checkpoint")
    return Checkpoint(manifest["step"], tensors, manifest["meta"])


def load_newest(runs: list[Path]) -> list[Checkpoint] | None:
    """The newest step of which every run has a sound checkpoint, one a run; None if there never was one.

    Raises:
        TopkapiError: there are checkpoints, but no step at which all runs have a sound one.
    """
    found_steps = [set(steps(run)) for run in runs]
    common = sorted(set.intersection(*found_steps), reverse=True)
    if not common and any(found_steps):
        raise TopkapiError(
            f"{', '.join(map(str, runs))} have no checkpoint of the same step, so they cannot go on side by side. "
            "Resume each by itself: topkapi train RUN --resume."
        )
    damaged = any(list((run / "checkpoints").glob("*.damaged")) for run in runs)
    for step in common:
        found = []
        for run in runs:
            try:
                found.append(load(run, step))
            except TopkapiError as error:
                say(f"warning: {error} Falling back to the checkpoint before it.")
                _set_aside(run, step)
                damaged = True
        if len(found) == len(runs):
            for run in runs:
                _forget_after(run, step)
            return found
    if damaged:
        raise TopkapiError(
            f"every checkpoint of {', '.join(map(str, runs))} is damaged; nothing to resume from. "
            "Start again with another --run."
        )
    return None


def _forget_after(run: Path, step: int) -> None:
    """Remove checkpoints beyond the step that a run goes back to: they belong to another course of it."""
    for later in [found for found in steps(run) if found > step]:
        shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")


def _set_aside(run: Path, step: int) -> None:
    source = run / "checkpoints" / f"step-{step:08d}"
    target = source.with_name(f"{source.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
