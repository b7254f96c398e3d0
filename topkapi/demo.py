"""Commands' bodies that end in something to read: evaluating a run, and the demo.

The demo is the whole story on one screen: train on a real language model, evaluate on held-out text, show the
contexts in which a few latents fire. Every step is skipped when its result is there already.
"""

import json
import resource
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from topkapi.config import EvalConfig, TrainConfig
from topkapi.console import say
from topkapi.evaluate import evaluate
from topkapi.evaluate.contexts import Strongest, choose_latents, format_contexts, strongest_contexts
from topkapi.figures.overview import draw_run
from topkapi.files import write_text_atomic
from topkapi.model import Autoencoder
from topkapi.plotting import require_matplotlib
from topkapi.published import CONFIG
from topkapi.train import Source, Text, load_run, open_source, open_text, train


def evaluate_run(run: Path, settings: EvalConfig) -> dict[str, float | int | None]:
    """The metrics of `topkapi.evaluate.evaluate` for a finished run, also written to RUN/eval.json.

    The run's own settings are `saved_config(run).eval`.
    """
    ae, config = load_run(run)
    return _evaluate(run, ae, open_text(config), config, settings)


def _evaluate(
    run: Path, ae: Autoencoder, text: Text, config: TrainConfig, settings: EvalConfig
) -> dict[str, float | int | None]:
    ae = ae.to(text.language_model.device)
    results = evaluate(ae, text.language_model, text.splits.held_out, config.data, settings)
    write_text_atomic(run / "eval.json", json.dumps(results, indent=2) + "\n")
    return results


def print_table(results: dict[str, float | int | None]) -> None:
    """Print metrics as a table on stdout."""
    table = Table("metric", "held-out", box=None)
    for name, value in results.items():
        table.add_row(
            name, "undefined" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        )
    Console(highlight=False).print(table)


def demo(config: TrainConfig, run: Path) -> None:
    """Train, evaluate and show; everything lands in `run`."""
    require_matplotlib()
    started = time.monotonic()
    train([config], [run], resume=(run / CONFIG).exists())
    ae, config = load_run(run)
    source = open_source(config)
    results = _evaluate(run, ae, source, config, config.eval)

    found = strongest_contexts(ae, (source.blocks[i] for i in range(len(source.blocks))), config.data.context)
    width = None if sys.stdout.isatty() else 140  # piped, rich would break lines at 80
    _show(Console(highlight=False, width=width), source, found, results)
    title = f"{ae.n_latents:,} latents, k={ae.k}, on {ae.site} of {ae.language_model}"
    picture = draw_run(run, found.density, title)
    minutes, gigabytes = (time.monotonic() - started) / 60, peak_memory() / 2**30
    say(f"{minutes:.1f} minutes, peak memory {gigabytes:.1f} GiB. Picture: {picture}. Everything is in {run}.")
    say(
        f"Next: topkapi train demo --run {run.parent}/wider --model.n-latents 8192   (reuses the cached activations)\n"
        "      topkapi train --help                                     (other recipes, your own model and text)"
    )


def _show(out: Console, source: Source, found: Strongest, results: dict[str, float | int | None]) -> None:
    """Print what a few latents fire on, what was read, and the metrics."""
    choice, counts = choose_latents(found), source.blocks.counts
    out.print(f"\nStrongest contexts in the training text. {choice.rule}\n", markup=False)
    out.print(format_contexts(found, choice.latents, source.splits.train, source.language_model.tokenizer))
    out.print(
        f"{counts.kept:,} tokens harvested; left out: {counts.first_position:,} first positions, "
        f"{counts.special_tokens:,} special tokens, {counts.outlier_norms:,} outlier norms.\n",
        markup=False,
    )
    print_table(results)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
