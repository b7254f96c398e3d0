"""What the given folders hold: runs with their settings, metrics, training curves and counts of firings.

A folder is a run, as `topkapi train` leaves it, or a sweep, whose points are runs. A sweep may be unfinished: points
that are not measured yet have their training curve alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float64, Int64

from topkapi.config import TrainConfig, from_file, to_dict
from topkapi.errors import TopkapiError
from topkapi.published import CONFIG, WEIGHTS, read_config
from topkapi.results import read_counts, read_evaluation, read_metrics
from topkapi.study.layout import PROGRESS, STUDY
from topkapi.study.reader import Study, open_study
from topkapi.sweep import SETTINGS, Point, read, read_settings, shared_config

# Settings that change nothing in what is learnt.
BESIDES = (
    "eval.", "log_every", "save_every", "keep_checkpoints", "loggers", "async_checkpoints", "device", "parallel.",
    "language_model.batch_contexts", "data.source",
)  # fmt: skip
STREAM = ("language_model.", "data.", "tokens", "batch_tokens")  # what is read, and how much of it
UNIT_NORM, LR, SEED = "optim.unit_norm_decoder", "optim.lr", "model.seed"
FAMILIES = {
    "topk": "TopK",
    "topk_free": "TopK, free norms",
    "l1": "L1",
    "l1_decoder_norm": "modified L1",
}
"""Kinds of autoencoders; modified L1 weighs each value with the norm of its decoder row (Conerly et al. 2024)."""


@dataclass(frozen=True)
class Firings:
    """How often each latent fired on a text, and how strongly."""

    n_fired: Int64[np.ndarray, " n_latents"]
    sum_squares: Float64[np.ndarray, " n_latents"]
    n_tokens: int
    text: str
    """Which it was: held-out, or training."""

    @property
    def density(self) -> Float64[np.ndarray, " n_latents"]:
        """Fraction of tokens on which each latent fires."""
        return self.n_fired / self.n_tokens

    @property
    def importance(self) -> Float64[np.ndarray, " n_latents"]:
        """Mean squared value over all tokens."""
        return self.sum_squares / self.n_tokens


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, or a point of a sweep whose folder may be elsewhere."""

    name: str
    folder: Path
    settings: dict[str, Any]
    """Of the training config, by dotted names; lists as tuples."""
    metrics: dict[str, Any]
    """As `topkapi.evaluate.evaluate` defines them; empty where the run is not measured."""
    is_point: bool
    """Whether it came with a sweep."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else config.json says: versions, commit, the autoencoder's sizes."""

    @property
    def n_latents(self) -> int:
        return self.settings["model.n_latents"]

    @property
    def family(self) -> str:
        """A key of `FAMILIES`."""
        if self.settings["loss.sparsity"] != "none":
            return self.settings["loss.sparsity"]
        return "topk" if self.settings[UNIT_NORM] else "topk_free"

    @property
    def k(self) -> int | None:
        """None for the ReLU baselines."""
        return self.settings["model.k"] if self.settings["loss.sparsity"] == "none" else None

    @property
    def seed(self) -> int:
        return self.settings[SEED]

    @property
    def tokens(self) -> int:
        """Trained on, as asked for."""
        return self.settings["tokens"]

    @property
    def d_model(self) -> int | None:
        return self.facts.get("d_model")

    def metric(self, name: str) -> float | None:
        """A metric, None where it was not measured or is undefined."""
        value = self.metrics.get(name)
        return float(value) if value is not None and np.isfinite(value) else None

    def interval(self, name: str) -> tuple[float | None, float | None]:
        """Of a metric, from eval.json, where it has the very value; else None and None."""
        low, high = self.evaluation.get("intervals", {}).get(name) or (None, None)
        return (low, high) if self.evaluation.get(name) == self.metrics.get(name) else (None, None)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """eval.json; empty where there is none."""
        return read_evaluation(self.folder) or {}

    @cached_property
    def curve(self) -> list[dict[str, float | int | None]]:
        """The lines of metrics.jsonl; the last one, if it is being written, is left out."""
        return read_metrics(self.folder)

    @cached_property
    def study(self) -> Study | None:
        """The finished study in RUN/study. Raises TopkapiError if it is of another autoencoder, or damaged."""
        folder = self.folder / "study"
        if not (folder / STUDY).exists() or (folder / PROGRESS).exists():
            return None
        study = open_study(folder, self.folder)
        study.require_run()
        return study

    @cached_property
    def firings(self) -> Firings | None:
        """From RUN/held_out.npz, which all points of a sweep have of the same text, else from RUN/study.

        None where there are neither, or no token was counted.
        """
        counts = read_counts(self.folder, self.n_latents)
        if counts is None or not counts.n_tokens:
            return self._studied_firings
        return Firings(*counts, "held-out")

    @property
    def most_firings(self) -> Firings | None:
        """From whichever of the two has seen more tokens."""
        found = [one for one in (self.firings, self._studied_firings) if one is not None]
        return max(found, key=lambda one: one.n_tokens, default=None)

    @cached_property
    def _studied_firings(self) -> Firings | None:
        if self.study is None or not self.study.n_tokens:
            return None
        arrays, text = self.study.arrays, {"train": "training"}.get(self.study.identity["split"], "held-out")
        return Firings(np.array(arrays["n_fired"]), np.array(arrays["sum_squares"]), self.study.n_tokens, text)

    @property
    def has_weights(self) -> bool:
        return (self.folder / WEIGHTS).exists()


def read_folders(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each once, in the order given; those of a sweep in the order of its points.

    Raises:
        TopkapiError: a folder is neither a run nor a sweep, or one of its files is damaged.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        for run in _read_folder(folder):
            runs.setdefault(run.folder.resolve(), run)
    return told_apart(list(runs.values()))


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same runs, each named by its folder alone, or by two of them where runs of several sweeps have one name."""
    names = [run.name.rpartition("/")[2] for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.folder.parent.name}/{name}" for run, name in zip(runs, names, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _read_folder(folder: Path) -> list[Run]:
    if not folder.is_dir():
        raise TopkapiError(f"no folder {folder}: give run folders of topkapi train and --out folders of topkapi sweep.")
    if (folder / SETTINGS).exists():
        return _read_sweep(folder)
    if (folder / CONFIG).exists():
        return [_read_run(folder, None)]
    raise TopkapiError(
        f"{folder} is neither a run nor a sweep: it has no {CONFIG} and no {SETTINGS}. Give run folders of topkapi "
        "train and --out folders of topkapi sweep."
    )


def _read_sweep(folder: Path) -> list[Run]:
    points = {point.name: point for point in read(folder)}
    settings = read_settings(folder)
    runs = []
    for name in [*points, *(name for name in settings["variants"] if name not in points)]:
        point = points.get(name)
        if (folder / name / CONFIG).exists():
            runs.append(_read_run(folder / name, point))
        elif point is not None:
            shared = _flat(to_dict(shared_config(folder)))
            runs.append(Run(name, folder / name, shared | _settings_of(point), asdict(point), True, _facts(point)))
    return runs


def _read_run(folder: Path, point: Point | None) -> Run:
    config = read_config(folder)
    if config.get("training") is None:
        raise TopkapiError(f"{folder} holds an autoencoder, but not the settings of its training: it is no run folder.")
    metrics = asdict(point) if point else read_evaluation(folder) or {}
    metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    settings = _flat(to_dict(from_file(TrainConfig, config["training"], folder / CONFIG)))
    sizes = config.get("autoencoder", config)
    facts = {"d_model": sizes.get("d_model")} | {name: config.get(name) for name in ("topkapi_version", "commit")}
    return Run(folder.resolve().name, folder, settings, metrics, point is not None, facts)


def _settings_of(point: Point) -> dict[str, Any]:
    """The settings that a point's line holds."""
    return {
        "model.n_latents": point.n_latents,
        "model.k": point.k,
        "model.seed": point.seed,
        "model.activation": "topk" if point.sparsity == "none" else "relu",
        "loss.sparsity": point.sparsity,
        "loss.l1_coefficient": point.l1_coefficient,
        "optim.lr": point.lr,
        "optim.unit_norm_decoder": point.decoder_norm,
    }


def _facts(point: Point) -> dict[str, Any]:
    return {"d_model": point.d_model}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = tuple(value) if isinstance(value, list) else value
    return found


def alike(run: Run, *but: str) -> tuple:
    """All settings that matter, except those named: equal for runs that differ in these alone."""
    left_out = (*BESIDES, *but)
    return tuple(sorted((k, str(v)) for k, v in run.settings.items() if not k.startswith(left_out)))


def stream(run: Run) -> tuple:
    """Language model, site, text and tokens: only runs of one stream are compared in numbers."""
    return tuple(
        sorted(
            (k, str(v)) for k, v in run.settings.items() if k.startswith(STREAM) and not k.startswith(BESIDES)
        )
    )  # fmt: skip


Item, Key = TypeVar("Item"), TypeVar("Key")


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Runs, or rows of numbers, by key; keys in the order of their first one."""
    found: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def held_out(runs: Iterable[Run]) -> str:
    """On how many tokens they are measured, as text: several numbers where they differ."""
    numbers = sorted({int(run.metrics["n_tokens"]) for run in runs if run.metrics.get("n_tokens")})
    return " and ".join(f"{n:,}" for n in numbers) or "no"


def of_one_stream(runs: Sequence[Run]) -> list[Run]:
    """The largest group of runs of one stream; the first of equally large ones."""
    return max(grouped(runs, stream).values(), key=len, default=[])


def at_best_rate(runs: Iterable[Run]) -> list[Run]:
    """Of runs that differ in learning rate alone the one with the lowest held-out error; those without one go."""
    measured = [run for run in runs if run.metric("normalized_mse") is not None]
    return [
        min(group, key=lambda run: run.metrics["normalized_mse"])
        for group in grouped(measured, lambda run: alike(run, LR)).values()
    ]
