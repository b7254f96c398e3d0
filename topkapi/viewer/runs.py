"""The runs beside the opened one, and the points of sweeps beside it, with the metrics that were measured.

Anything may lie there: a folder without a whole run is passed over, what is no number is a gap, and files whose numbers
could not be read are named.
"""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topkapi import published, sweep
from topkapi.errors import TopkapiError
from topkapi.results import read_evaluation
from topkapi.statistics.laws import fit_joint_law
from topkapi.study.layout import STUDY
from topkapi.viewer.answers import finite

METRICS = ("normalized_mse", "l0", "dead_fraction", "loss_recovered", "ce_spliced", "ce_clean")
MOST = 500  # folders looked at
N_BOOTSTRAP = 100

Row = dict[str, Any]


class Measured(NamedTuple):
    """What an eval.json says, and why it says nothing where it is damaged."""

    metrics: dict[str, Any] | None
    """Numbers by name, and `intervals`: pairs by name. None where there is no sound file."""
    problem: str


def beside(run: Path) -> dict[str, Any]:
    """Runs in the folder of `run`, points of sweeps there, and the law L(n, k) through those that were measured.

    Of more than MOST folders those that changed last are looked at, and `n_left_out` counts the others. `problems`:
    path_name and `why` of runs and sweeps with a damaged file.
    """
    here = run.resolve()
    folders = _folders(here)
    problems: dict[str, str] = {}
    points = {
        row["path_name"]: row for folder in [here.parent, *folders[:MOST]] for row in _points(folder, here, problems)
    }
    others = [folder for folder in folders[:MOST] if folder.name not in points]
    found = points | {folder.name: row for folder in others if (row := _row(folder, problems))}
    rows = [found[name] for name in sorted(found)]
    return {
        "runs": rows,
        "fit": _fit(rows),
        "here": here.name,
        "n_left_out": sum(folder.name not in points for folder in folders[MOST:]),
        "problems": [{"path_name": name, "why": why} for name, why in problems.items()],
    }


def evaluation(run: Path) -> Measured:
    """What topkapi eval measured, if it did."""
    try:
        found = read_evaluation(run)
    except (TopkapiError, OSError) as error:
        return Measured(None, str(error))
    if found is None:
        return Measured(None, "")
    numbers = {name: finite(value) for name, value in found.items() if not isinstance(value, dict)}
    return Measured(numbers | {"intervals": found.get("intervals") or {}}, "")


def _folders(here: Path) -> list[Path]:
    """The folders beside `here`, itself first and then those that changed last."""
    changed: dict[Path, float] = {}
    with suppress(OSError), os.scandir(here.parent) as entries:  # a folder may be entered that cannot be listed
        for entry in entries:
            with suppress(OSError):  # gone meanwhile
                if entry.is_dir() and not entry.name.startswith("."):
                    changed[here.parent / entry.name] = entry.stat().st_mtime
    changed[here] = math.inf
    return sorted(changed, key=lambda folder: (-changed[folder], folder.name))


def _row(folder: Path, problems: dict[str, str]) -> Row | None:
    try:
        config = published.read_config(folder)
        ae, training, summary = config["autoencoder"], config["training"], config.get("summary", {})
        numbers = {
            "n_latents": ae["n_latents"],
            "k": ae["k"] if ae["activation"] == "topk" else None,
            "tokens": summary.get("tokens"),
            "seed": training["model"]["seed"],
            "lr": training["optim"]["lr"],
        }
        activation, has_study = str(ae["activation"]), (folder / "study" / STUDY).is_file()
    except (TopkapiError, OSError, LookupError, TypeError, AttributeError):
        return None
    measured = evaluation(folder)
    if measured.problem:
        problems[folder.name] = measured.problem
    names = {"name": folder.name, "path_name": folder.name, "activation": activation, "has_study": has_study}
    return names | _numbers(numbers | {name: (measured.metrics or {}).get(name) for name in METRICS})


def _points(folder: Path, here: Path, problems: dict[str, str]) -> list[Row]:
    """The points of the sweep in a folder, if it holds one; named from the folder of `here` on."""
    names = ("n_latents", "k", "seed", "lr", "tokens", *METRICS)
    try:
        if not (folder / sweep.SETTINGS).exists():
            return []
        return [
            _numbers({name: getattr(point, name) for name in names})
            | {
                "name": point.name,
                "path_name": (folder / point.name).relative_to(here.parent).as_posix(),
                "activation": "topk" if point.sparsity == "none" else "relu",
                "has_study": (folder / point.name / "study" / STUDY).is_file(),
            }
            for point in sweep.read(folder)
        ]
    except (TopkapiError, OSError, ValueError, TypeError, RecursionError) as error:
        problems[folder.name] = str(error)
        return []


def _numbers(values: Row) -> Row:
    return {name: finite(value) for name, value in values.items()}


def _fit(rows: list[Row]) -> dict[str, Any] | None:
    """The `JointLaw` through TopK runs that were evaluated; None where they are too few or too alike."""
    names = ("n_latents", "k", "normalized_mse")
    used = [row for row in rows if row["activation"] == "topk" and all((row[name] or 0) > 0 for name in names)]
    n_latents, k, loss = (np.array([row[name] for row in used], float) for name in names)
    for irreducible in (True, False):
        try:
            found = fit_joint_law(n_latents, k, loss, irreducible=irreducible, n_bootstrap=N_BOOTSTRAP)
        except (TopkapiError, ArithmeticError, ValueError):
            continue
        return {
            "law": vars(found.law),
            "intervals": {name: list(interval) for name, interval in found.intervals.items()},
            "rms": found.rms,
            "n_points": len(used),
        }
    return None
