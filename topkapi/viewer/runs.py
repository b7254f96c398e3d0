"""The runs beside the opened one, and the points of sweeps beside it, with the metrics that were measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from topkapi import published, sweep
from topkapi.errors import TopkapiError
from topkapi.statistics.laws import fit_joint_law
from topkapi.study.layout import STUDY

EVALUATION = "eval.json"
METRICS = ("normalized_mse", "l0", "dead_fraction", "loss_recovered", "ce_spliced", "ce_clean")
MOST = 500  # runs looked at
N_BOOTSTRAP = 100


def beside(run: Path) -> dict[str, Any]:
    """Runs in the folder of `run`, points of sweeps there, and the law L(n, k) through those that were measured.

    A folder that holds no run, or a damaged one, is passed over.
    """
    home = run.resolve().parent
    folders = [path for path in sorted(home.iterdir()) if path.is_dir() and not path.name.startswith(".")][:MOST]
    points = {point["path_name"]: point for folder in [home, *folders] for point in _points(folder, home)}
    found = points | {folder.name: row for folder in folders if (row := _row(folder)) and folder.name not in points}
    rows = [found[name] for name in sorted(found)]
    return {"runs": rows, "fit": _fit(rows), "here": run.resolve().name}


def evaluation(run: Path) -> dict[str, Any] | None:
    """What topkapi eval measured, if it did."""
    try:
        found = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _row(folder: Path) -> dict[str, Any] | None:
    try:
        config = published.read_config(folder)
        ae, training, summary = config["autoencoder"], config["training"], config.get("summary", {})
        settings = {"seed": training["model"]["seed"], "lr": training["optim"]["lr"]}
    except (TopkapiError, OSError, KeyError, TypeError):
        return None
    measured = evaluation(folder) or {}
    return {
        "name": folder.name,
        "path_name": folder.name,
        "n_latents": ae["n_latents"],
        "k": ae["k"] if ae["activation"] == "topk" else None,
        "tokens": summary.get("tokens"),
        "activation": ae["activation"],
        "has_study": (folder / "study" / STUDY).is_file(),
        **settings,
        **{name: measured.get(name) for name in METRICS},
    }


def _points(folder: Path, home: Path) -> list[dict[str, Any]]:
    """The points of the sweep in a folder, if it holds one; named from `home` on."""
    try:
        points = sweep.read(folder)
    except (TopkapiError, OSError, UnicodeDecodeError):
        return []
    names = ("name", "n_latents", "k", "seed", "lr", "tokens", *METRICS)
    return [
        {name: getattr(point, name) for name in names}
        | {
            "path_name": (folder / point.name).relative_to(home).as_posix(),
            "activation": "topk" if point.sparsity == "none" else "relu",
            "has_study": (folder / point.name / "study" / STUDY).is_file(),
        }
        for point in points
    ]


def _fit(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The `JointLaw` through TopK runs that were evaluated; None where they are too few or too alike."""
    used = [row for row in rows if row["activation"] == "topk" and row["normalized_mse"]]
    n_latents, k, loss = (np.array([row[name] for row in used], float) for name in ("n_latents", "k", "normalized_mse"))
    for irreducible in (True, False):
        try:
            found = fit_joint_law(n_latents, k, loss, irreducible=irreducible, n_bootstrap=N_BOOTSTRAP)
        except TopkapiError:
            continue
        return {
            "law": vars(found.law),
            "intervals": {name: list(interval) for name, interval in found.intervals.items()},
            "rms": found.rms,
            "n_points": len(used),
        }
    return None
