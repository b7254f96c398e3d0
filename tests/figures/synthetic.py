"""Sweep folders as `topkapi sweep` leaves them, made of known laws and distributions instead of training."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from topkapi import published
from topkapi.config import TrainConfig, to_dict
from topkapi.files import write_json
from topkapi.model import Autoencoder
from topkapi.recipes import demo
from topkapi.statistics.laws import GPT4, JointLaw
from topkapi.sweep import POINTS, SETTINGS, Point
from topkapi.sweep.grid import Grid, Variant, shared

D_MODEL, N_TOKENS, L0_OF_L1 = 200, 20_000, {0.01: 60.0, 0.03: 30.0, 0.1: 12.0}
FREE_NORMS = 1.02  # their error over that with unit norm
L1, MODIFIED_L1 = 1.3, 1.2  # the baselines' error over TopK's at the same L0


def error(variant: Variant, law: JointLaw, noise: float) -> float:
    """The error of a variant: TopK's by the law at its L0, times what its kind costs, times noise."""
    l0 = l0_of(variant)
    loss = float(law.loss(np.array([float(variant.n_latents)]), np.array([l0]))[0])
    kind = {"none": 1.0 if variant.decoder_norm else FREE_NORMS, "l1": L1, "l1_decoder_norm": MODIFIED_L1}
    random = np.random.default_rng([variant.n_latents, int(l0), variant.seed])
    return loss * kind[variant.sparsity] * math.exp(noise * random.standard_normal())


def l0_of(variant: Variant) -> float:
    """k, or what the penalty makes it."""
    return float(variant.k) if variant.k is not None else L0_OF_L1[variant.l1_coefficient]


def write_sweep(
    folder: Path,
    grids: list[Grid],
    *,
    law: JointLaw = GPT4,
    noise: float = 0.0,
    base: TrainConfig | None = None,
    unmeasured: int = 0,
    weights: bool = False,
    counts: bool = True,
    metrics: bool = True,
) -> list[Variant]:
    """Write a sweep of these grids; its variants. The last `unmeasured` of them have a training curve alone."""
    base = demo() if base is None else base
    variants = list({variant.name: variant for grid in grids for variant in grid.variants()}.values())
    lines = []
    for number, variant in enumerate(variants):
        config = variant.config(base)
        run, mse = folder / variant.name, error(variant, law, noise)
        _write_run(run, config, mse, weights, metrics)
        if number < len(variants) - unmeasured:
            lines.append(json.dumps(asdict(_point(variant, config, mse))) + "\n")
            if counts:
                write_counts(run, variant.n_latents, l0_of(variant), variant.seed)
    (folder / POINTS).write_text("".join(lines))
    write_json(
        folder / SETTINGS,
        {
            "shared": to_dict(shared(base)),
            "identity": {},
            "variants": {variant.name: asdict(variant) for variant in variants},
            "topkapi_version": "0",
        },
    )
    return variants


def _write_run(run: Path, config: TrainConfig, mse: float, weights: bool, metrics: bool) -> None:
    run.mkdir(parents=True)
    config = replace(config, optim=replace(config.optim, lr=1e-3 if config.optim.lr == "auto" else config.optim.lr))
    model = config.model
    sizes = {"d_model": D_MODEL, "n_latents": model.n_latents, "k": model.k, "activation": model.activation}
    ae = Autoencoder(**sizes, seed=model.seed, training=to_dict(config))
    if weights:
        tensors = {name: tensor.detach().clone() for name, tensor in ae.state_dict().items()}
        published.write_published(run, tensors, ae.description())
    else:
        published.write_config(run, ae.description())
    if metrics:
        random = np.random.default_rng(config.model.n_latents)  # of the batches: the same for all that read them
        for i, noise in enumerate(random.standard_normal(50)):
            tokens = (i + 1) * 20_480
            line = {"step": 10 * (i + 1), "tokens": tokens, "dead_fraction": 0.0, "l0": 1.0}
            line["normalized_mse"] = mse * (1 + 3 / (i + 1)) * math.exp(0.02 * noise)
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def _point(variant: Variant, config: TrainConfig, mse: float) -> Point:
    return Point(
        name=variant.name,
        n_latents=variant.n_latents,
        k=variant.k,
        sparsity=variant.sparsity,
        l1_coefficient=variant.l1_coefficient,
        lr=1e-3 if variant.lr == "auto" else variant.lr,
        decoder_norm=variant.decoder_norm,
        seed=variant.seed,
        d_model=D_MODEL,
        tokens=config.tokens,
        n_parameters=1,
        flops=1.0,
        normalized_mse=mse,
        l0=l0_of(variant),
        dead_fraction=0.0,
        n_tokens=N_TOKENS,
        ce_clean=3.0,
        ce_spliced=3.0 + mse**2,
        ce_zero_ablation=12.0,
        ce_mean_ablation=9.0,
        kl=1.1 * mse**2,
        loss_recovered=1 - mse**2 / 9,
    )


def write_counts(run: Path, n_latents: int, l0: float, seed: int) -> None:
    """held_out.npz with log-normal densities and log-Laplace importances; one latent in fifty is dead."""
    random = np.random.default_rng([n_latents, seed])
    density = np.exp(0.8 * random.standard_normal(n_latents))
    density[::50] = 0
    density = np.minimum(density / density.sum() * l0, 1.0)
    importance = np.exp(random.laplace(0, 0.5, n_latents)) * (density > 0) * l0 / n_latents
    n_fired = random.binomial(N_TOKENS, density)
    np.savez(
        run / "held_out.npz",
        n_fired=n_fired.astype(np.int64),
        sum_squares=importance * (n_fired > 0) * N_TOKENS,
        n_tokens=np.int64(N_TOKENS),
    )


def write_evaluation(run: Path, variant: Variant, mse: float) -> None:
    """eval.json with progressive recovery (flat beyond k), thresholds, and refinement (L1's values 20 % too small)."""
    interval = {"low": 0.98, "high": 1.02}
    found: dict = {"normalized_mse": mse, "l0": l0_of(variant), "n_tokens": N_TOKENS}
    if variant.k is not None:
        ks = sorted({1, 2, 4, variant.k // 2, variant.k, 2 * variant.k, 4 * variant.k} - {0})
        curve = [mse * (variant.k / min(k, variant.k)) ** 0.5 for k in ks]
        columns = {name: [by * value for value in curve] for name, by in interval.items()}
        found["progressive"] = {"k": ks, "l0": [float(k) for k in ks], "normalized_mse": curve, **columns}
        found["threshold"] = {**found["progressive"], "threshold": [1 / k for k in ks]}
    ratio = 1.0 if variant.sparsity == "none" else 1.2

    def of(value: float) -> dict:
        return {"value": value, **{name: by * value for name, by in interval.items()}, "n": 100}

    found["refinement"] = {
        "normalized_mse": of(mse), "normalized_mse_refined": of(0.95 * mse), "total_ratio": of(ratio),
        "mean_ratio": of(ratio),
    }  # fmt: skip
    (run / "eval.json").write_text(json.dumps(found))


def rotated_seeds(folder: Path, names: list[str], shared_rows: int) -> None:
    """Give runs with weights the same first rows of W_dec, so that they share exactly these latents."""
    first: torch.Tensor | None = None
    for name in names:
        ae = Autoencoder.from_pretrained(folder / name)
        with torch.no_grad():
            first = ae.W_dec[:shared_rows].clone() if first is None else first
            ae.W_dec[:shared_rows] = first
        tensors = {key: tensor.detach().clone() for key, tensor in ae.state_dict().items()}
        published.write_published(folder / name, tensors, ae.description())
