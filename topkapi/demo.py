"""The demo, the whole story on one screen: train on a real language model, evaluate on held-out text, show the
contexts in which a few latents fire. Every step is skipped when its result is there already.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from topkapi.config import StudyConfig, TrainConfig
from topkapi.console import say
from topkapi.errors import command_line
from topkapi.evaluate.contexts import Strongest, choose_latents, format_contexts, strongest_contexts
from topkapi.evaluation import evaluate_opened, print_table
from topkapi.figures.overview import draw_run
from topkapi.model import Autoencoder
from topkapi.plotting import require_matplotlib
from topkapi.published import CONFIG
from topkapi.study import write_study
from topkapi.study.layout import STUDY
from topkapi.train import Source, Text, load_run, open_source, train

STUDY_TOKENS = 16_000  # held-out tokens studied


def demo(config: TrainConfig, run: Path) -> None:
    """Train, evaluate and show; everything lands in `run`."""
    require_matplotlib()
    started = time.monotonic()
    train([config], [run], resume=(run / CONFIG).exists())
    ae, config = load_run(run)
    source = open_source(config)
    results = evaluate_opened(run, ae, source, config, config.eval)

    found = strongest_contexts(ae, (source.blocks[i] for i in range(len(source.blocks))), config.data.context)
    width = None if sys.stdout.isatty() else 140  # piped, rich would break lines at 80
    _show(Console(highlight=False, width=width), source, found, results)
    _write_study(run, ae, source, config)
    title = f"{ae.n_latents:,} latents, k={ae.k}, on {ae.site} of {ae.language_model}"
    picture = draw_run(run, found.density, title)
    minutes, gigabytes = (time.monotonic() - started) / 60, peak_memory() / 2**30
    say(f"{minutes:.1f} minutes, peak memory {gigabytes:.1f} GiB. Picture: {picture}. Everything is in {run}.")
    wider = command_line("train", "demo", "--run", run.parent / "wider", "--model.n-latents", 8192)
    say(
        f"Next: {wider}   (reuses the cached activations)\n"
        "      topkapi train --help                                     (other recipes, your own model and text)"
    )
    say(f"Look at its latents in a browser: {command_line('view', run)}, and open http://127.0.0.1:8000/")


def _write_study(run: Path, ae: Autoencoder, text: Text, config: TrainConfig) -> None:
    """What `topkapi view` shows: the code of held-out text, unless somebody has studied the run already."""
    held_out = text.splits.held_out
    tokens = min(STUDY_TOKENS, held_out.n_contexts(config.data.context) * config.data.context)
    if tokens and not (run / "study" / STUDY).exists():
        settings = StudyConfig(tokens=tokens)
        write_study(run, ae, text.language_model, held_out, config.data, settings, run / "study")


def _show(out: Console, source: Source, found: Strongest, results: dict[str, Any]) -> None:
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
