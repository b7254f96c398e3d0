"""The result files of a run folder, in one place: their names, and readers that notice damage.

    metrics.jsonl    training, a line a logged step                               written by `topkapi.metrics`
    eval.json        what `topkapi eval` measured                                 `topkapi.evaluation`
    held_out.npz     how often and how strongly each latent fires, held out       `topkapi.evaluate`

They are for people and their tools too, who may write NaN, edit them, or copy them while they grow; so they have no
checksums, and what is read is looked at instead.
"""

import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float64, Int64

from topkapi.errors import TopkapiError, command_line
from topkapi.files import read_file

METRICS, EVALUATION, HELD_OUT = "metrics.jsonl", "eval.json", "held_out.npz"
OBJECTS = ("intervals", "gaps", "settings")  # of eval.json, besides its sections
CURVES = ("progressive", "threshold")  # sections that are columns of equal length
COLUMNS = ("k", "l0", "normalized_mse", "low", "high")
ESTIMATES = ("normalized_mse", "normalized_mse_refined", "mean_ratio", "total_ratio")  # of the section refinement


class Counts(NamedTuple):
    """What held_out.npz holds."""

    n_fired: Int64[np.ndarray, " n_latents"]
    sum_squares: Float64[np.ndarray, " n_latents"]
    n_tokens: int


def read_metrics(run: Path, skip_damaged: bool = False) -> list[dict[str, float | int | None]]:
    """The lines of RUN/metrics.jsonl: numbers by name, `step` and `tokens` among them; [] where there is no file.

    A last line that is no line yet is being written, or was when its process was killed: it is left out.

    Raises:
        TopkapiError: another line is damaged, unless these are skipped.
    """
    path, found = run / METRICS, []
    texts = read_file(path).decode("utf-8", "replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        line = parsed(text)
        if _is_line(line):
            found.append(line)
        elif not skip_damaged and number < len(texts):
            raise TopkapiError(f"{path}, line {number}: damaged. Delete the line: the others are read.")
    return found


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """RUN/eval.json as docs/metrics.md describes it; None where there is no file. Metrics may be missing from it.

    Raises:
        TopkapiError: damaged, or something in it is not what it should be.
    """
    path = run / EVALUATION
    if not path.exists():
        return None
    found = parsed(read_file(path))
    if problem := _problem(found) if isinstance(found, dict) else "it holds no JSON object":
        raise TopkapiError(f"{path} is damaged: {problem}. Delete it and run {command_line('eval', run)} again.")
    return found


def read_counts(run: Path, n_latents: int) -> Counts | None:
    """RUN/held_out.npz of an autoencoder with so many latents; None where there is no file.

    Raises:
        TopkapiError: damaged, or of another autoencoder.
    """
    path, remedy = run / HELD_OUT, f"Delete it and evaluate the run again: {command_line('eval', run)}."
    if not path.exists():
        return None
    try:
        with BytesIO(read_file(path)) as file, np.load(file, allow_pickle=False) as arrays:
            n_fired, sum_squares = arrays["n_fired"].astype(np.int64), arrays["sum_squares"].astype(np.float64)
            n_tokens = int(arrays["n_tokens"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise TopkapiError(f"{path} is damaged ({error}). {remedy}") from None
    if not n_fired.shape == sum_squares.shape == (n_latents,):
        raise TopkapiError(f"{path} is of another autoencoder: this run has {n_latents:,} latents. {remedy}")
    is_count = n_fired.min(initial=0) >= 0 and n_fired.max(initial=0) <= n_tokens
    if not (is_count and np.isfinite(sum_squares).all() and sum_squares.min(initial=0) >= 0):
        raise TopkapiError(f"{path} is damaged: its numbers are no counts and sums of squares. {remedy}")
    return Counts(n_fired, sum_squares, n_tokens)


def parsed(text: str | bytes) -> Any:
    """The JSON value that a text is; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of UTF-8, of JSON, of whole numbers with thousands of digits
        return None


def _is_line(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and _is_number(line.get("tokens"))
        and _are_numbers(line.values())
    )


def _problem(found: dict[str, Any]) -> str:
    """What in an eval.json is not of its type, if anything."""
    objects = {name: value for name, value in found.items() if isinstance(value, dict)}
    if wrong := [name for name, value in found.items() if name not in objects and not _are_numbers([value])]:
        return f"{wrong[0]} is neither a number nor an object"
    if wrong := [name for name in (*OBJECTS, *CURVES, "refinement") if _is_number(found.get(name))]:
        return f"{wrong[0]} is no object"
    if not all(isinstance(objects.get("refinement", {}).get(name, {}), dict) for name in ESTIMATES):
        return "refinement holds something else than estimates"
    for name, value in objects.items():
        estimates = (it for it in value.values() if isinstance(it, dict))
        if not all(_are_numbers(it.get(part) for part in ("value", "low", "high")) for it in estimates):
            return f"an estimate in {name} is no number"
    pairs = objects.get("intervals", {}).values()
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs):
        return "intervals are not pairs of numbers"
    for name in CURVES:
        columns = [objects.get(name, {}).get(column, []) for column in COLUMNS]
        if not all(isinstance(it, list) and len(it) == len(columns[0]) and _are_numbers(it) for it in columns):
            return f"{name} has no columns of as many numbers each"
    return ""


def _are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are numbers, or null, which stands for undefined."""
    return all(value is None or _is_number(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
