"""The picture at the end of the demo: one run at a glance."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from topkapi.files import write_atomic
from topkapi.plotting import pyplot
from topkapi.results import read_evaluation, read_metrics


def draw_run(run: Path, density: Float[Tensor, " n_latents"], title: str) -> Path:
    """Draw RUN/report.png: training curves, how often latents fire, and what splicing costs; returns its path.

    Reads metrics.jsonl and eval.json of the run; `density` is each latent's fraction of tokens.
    """
    plt = pyplot()
    metrics, results = read_metrics(run), read_evaluation(run)
    figure, (curves, densities, losses) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _training(curves, metrics, results)
    _densities(densities, density.cpu().numpy())
    _losses(losses, results)
    figure.suptitle(title)
    write_atomic(run / "report.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    plt.close(figure)
    return run / "report.png"


def _training(axes: Any, metrics: list[dict[str, float]], results: dict[str, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    tokens = [line["tokens"] for line in metrics]
    axes.plot(tokens, [line["normalized_mse"] for line in metrics], label="normalized MSE, training")
    if (held_out := results["normalized_mse"]) is not None:
        axes.plot(tokens[-1], held_out, "o", label=f"held out: {held_out:.3f}")
    axes.plot(tokens, [line["dead_fraction"] for line in metrics], label="dead fraction")
    axes.set(xlabel="tokens", ylim=(0, None), title="training")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.3)
    axes.legend()


def _densities(axes: Any, density: np.ndarray) -> None:
    alive = density[density > 0]
    axes.hist(np.log10(alive), bins=50)
    axes.set(xlabel="log10 fraction of tokens on which a latent fires", ylabel="latents")
    axes.set_title(f"density: {len(alive):,} latents fire, {len(density) - len(alive):,} never")


def _losses(axes: Any, results: dict[str, float | None]) -> None:
    names = {
        "ce_clean": "untouched",
        "ce_spliced": "autoencoder\nspliced in",
        "ce_mean_ablation": "mean\nactivation",
        "ce_zero_ablation": "zero",
    }
    shown = {label: results[name] for name, label in names.items() if results[name] is not None}
    bars = axes.bar(shown.keys(), shown.values())
    axes.margins(y=0.1)
    axes.bar_label(bars, fmt="%.2f")
    recovered = results["loss_recovered"]
    axes.set(ylabel="cross-entropy, nats per token")
    axes.set_title("next-token loss" if recovered is None else f"next-token loss: {recovered:.1%} recovered")
