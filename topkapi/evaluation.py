"""Evaluating a run: its metrics, in RUN/eval.json and as a table.

1. What eval.json holds already of the same settings is kept.
2. `topkapi.evaluate` measures what is left: reconstruction and loss together, the others one by one.
3. The file is written after each, so that an evaluation that was stopped goes on where it was.

Called by `topkapi eval` and the demo; docs/metrics.md defines the metrics.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import topkapi
from topkapi.config import EvalConfig, TrainConfig, to_dict
from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.evaluate import METRICS, evaluate_all
from topkapi.evaluate.compute_equivalent import read_curve, resampled
from topkapi.evaluate.downstream import Losses
from topkapi.evaluate.labelled import has_changed
from topkapi.evaluate.measures import MEASURES, Subject, as_json, measure
from topkapi.evaluate.table import remarks, rows
from topkapi.files import require_writable, write_text_atomic
from topkapi.model import Autoencoder
from topkapi.published import checksum_of
from topkapi.results import EVALUATION, HELD_OUT, read_evaluation
from topkapi.train import Text, load_run, open_text, warn_if_changed

PREVIOUS = "eval-previous.json"  # the eval.json before, where it had metrics that the new one has not


@dataclass(frozen=True)
class Asked:
    """Which metrics beyond those of `topkapi.evaluate.evaluate` an evaluation has."""

    metrics: frozenset[str] = frozenset()
    """Among `MEASURES` and compute_equivalent."""
    reference: Path | None = None
    """File of a reference curve, for compute_equivalent."""
    fresh: bool = False
    """Measure anew what RUN/eval.json holds already."""


def evaluate_run(run: Path, settings: EvalConfig, asked: Asked = Asked()) -> dict[str, Any]:
    """The metrics of a finished run, also written to RUN/eval.json, as docs/metrics.md defines them.

    What eval.json holds already of the same autoencoder, text, settings and version is kept, metric by metric; those
    that could not be had are tried again. The run's own settings are `saved_config(run).eval`.
    """
    if asked.reference:
        read_curve(asked.reference)  # what is wrong with it is said before a language model is loaded
    ae, config = load_run(run)
    return evaluate_opened(run, ae, open_text(config), config, settings, asked)


def evaluate_opened(
    run: Path, ae: Autoencoder, text: Text, config: TrainConfig, settings: EvalConfig, asked: Asked = Asked()
) -> dict[str, Any]:
    """`evaluate_run` of a run that is open already."""
    warn_if_changed(run, ae, text.language_model)
    ae = ae.to(text.language_model.device)
    same = _identity(run, text, settings)
    before = _before(run)
    is_kept = not asked.fresh and before.get("settings") == same and before.keys() >= set(METRICS)
    results = before if is_kept else {}
    if not results:
        _set_aside(run, before, asked)
    results.pop("settings", None)
    gaps = results.pop("gaps", {})

    def keep() -> None:
        text = json.dumps(results | {"gaps": gaps, "settings": same}, indent=2, allow_nan=False)
        write_text_atomic(run / EVALUATION, text + "\n")

    left = [
        name for name in MEASURES if name in asked.metrics and (results.get(name) is None or has_changed(results[name]))
    ]
    is_base_wanted = not results or asked.reference or not (run / HELD_OUT).exists()
    if left or is_base_wanted:
        require_writable("Results go to", run / EVALUATION)
    losses = None
    if is_base_wanted:
        (found,) = evaluate_all([ae], text.language_model, text.splits.held_out, config.data, settings)
        found.write_latents(run)
        gaps = found.gaps | {name: why for name, why in gaps.items() if name not in found.metrics}
        results, losses = found.metrics | {"intervals": found.intervals} | results, found.losses
        keep()
    if "compute_equivalent" in asked.metrics and (asked.reference or not results.get("compute_equivalent")):
        _add(results, gaps, "compute_equivalent", lambda: _share(losses, asked.reference))
        keep()
    subject = Subject(ae, text.language_model, text.splits.held_out, config.data, settings)
    for name in left:
        started = time.monotonic()
        _add(results, gaps, name, lambda name=name: measure(name, subject))
        problem = f": not to be had, {gaps[name]}" if name in gaps else ""
        say(f"{name}, {time.monotonic() - started:.0f} s{problem}")
        keep()
    return results | {"gaps": gaps}


def _identity(run: Path, text: Text, settings: EvalConfig) -> dict[str, Any]:
    """What an evaluation depends on."""
    return {
        **to_dict(settings),
        "autoencoder": checksum_of(run),
        "language_model": text.language_model.fingerprint,
        "held_out": text.splits.held_out.fingerprint,
        "topkapi_version": topkapi.__version__,
    }


def _before(run: Path) -> dict[str, Any]:
    """What RUN/eval.json holds; nothing where it is missing or damaged."""
    try:
        return read_evaluation(run) or {}
    except TopkapiError:
        say(f"warning: {run / EVALUATION} is damaged: all that is asked for is measured anew.")
        return {}


def _set_aside(run: Path, before: dict[str, Any], asked: Asked) -> None:
    """Keep an eval.json with metrics that took long and are not asked for now beside the one that takes its place."""
    names = [name for name in (*MEASURES, "compute_equivalent") if before.get(name)]
    if lost := [name for name in names if name not in asked.metrics]:
        write_text_atomic(run / PREVIOUS, json.dumps(before, indent=2) + "\n")
        why = "--fresh" if asked.fresh else "other settings, weights, text or version"
        say(f"{why}: what was measured before of {', '.join(lost)} is kept in {run / PREVIOUS}")


def _add(results: dict[str, Any], gaps: dict[str, str], name: str, measured: Callable[[], dict[str, Any]]) -> None:
    """Put a metric into the results; None, with the reason among the gaps, where it cannot be had."""
    gaps.pop(name, None)
    try:
        results[name] = measured()
    except TopkapiError as error:
        results[name], gaps[name] = None, str(error)


def _share(losses: Losses | None, reference: Path | None) -> dict[str, Any]:
    """compute_equivalent, as values for eval.json."""
    if reference is None:
        raise TopkapiError("no curve of loss against compute was given: --reference FILE.")
    if losses is None:
        raise TopkapiError("it needs the language model's loss: set --downstream-tokens above 0.")
    curve, of = read_curve(reference), losses.replicates
    share = resampled(curve, of["ce_spliced"].tolist(), of["ce_clean"].tolist(), losses.n_contexts)
    return {"share": as_json(share), "reference": str(reference), "curve": curve}


def print_table(results: dict[str, Any]) -> None:
    """Print metrics as a table on stdout, with what is missing below it."""
    table = Table("metric", "value", "95 % interval", "", box=None, pad_edge=False)
    for row in rows(results):
        table.add_row(*row)
    out = Console(highlight=False)
    out.print(table)
    for line in remarks(results):
        out.print(line, markup=False)
