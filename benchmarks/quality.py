"""Held-out quality of Topkapi against three peers, all on one cache of language-model activations.

    python benchmarks/quality.py                          # this machine; --device cuda where there is one
    python benchmarks/quality.py --raw                    # raw activations for all instead of normalised ones

Everybody sees the same rows in the same order, with the same n_latents, k, tokens and batch. By default the rows are
what the paper trains on: each token's mean over d_model removed, then scaled to one norm, here sqrt(d_model) since
the peers' learning rates assume it; so all minimise the same error. With --raw each gets raw activations, applies
whatever normalisation is its own, and the error is measured on the raw activations.

Each peer is trained with its documented defaults (Topkapi: the optimiser of its recipes for short runs), and again
with each learning rate of --lr, which Topkapi is given too. Measured on held-out documents: normalized MSE about the
held-out mean, L0 and the share of latents that never fire there. Writes a table and JSON.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkapi import Autoencoder
from topkapi.bench.peers import PEERS, PeerConfig, make_peers
from topkapi.config import AuxKConfig, DataConfig, LanguageModelConfig, ModelConfig, OptimConfig, TrainConfig
from topkapi.console import progress, say
from topkapi.data.activations import harvest
from topkapi.loss import normalized_mse
from topkapi.recipes import SHORT_RUN
from topkapi.train import Source, Trainer, open_source


@dataclass
class Data:
    """Activations on the device, normalised to norm sqrt(d_model) unless raw, in the order all train on."""

    train: Tensor
    held_out: Tensor
    source: Source

    def batches(self, batch_tokens: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
        """Batches of shuffled rows, epoch after epoch."""
        step = epoch = 0
        while True:
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(self.train)))
            for start in range(0, len(order) - batch_tokens + 1, batch_tokens):
                if step == steps:
                    return
                yield self.train[order[start : start + batch_tokens].to(self.train.device)].float()
                step += 1
            epoch += 1


def load(options: argparse.Namespace) -> Data:
    """Harvest, or read from the activation cache."""
    config = TrainConfig(
        language_model=LanguageModelConfig(site=options.site),
        data=DataConfig(max_tokens=options.text_tokens, context=128, source="cache", shuffle_tokens=65_536),
        device=options.device,
    )
    source = open_source(config)
    device = source.language_model.device
    held_out = source.splits.held_out
    ids = np.arange(min(held_out.n_contexts(128), options.held_out_tokens // 128))
    test = harvest(source.language_model, held_out, ids, config.data)[0].x
    train = torch.cat([source.blocks[i].x.to(device) for i in range(len(source.blocks))])
    if not options.raw:
        scale = train.shape[1] ** 0.5
        train, test = ((Autoencoder.normalise(x.float()).x * scale).bfloat16() for x in (train, test))
    say(f"{len(train):,} tokens to train on, {len(test):,} held out, d_model {train.shape[1]}")
    return Data(train, test.float(), source)


def measure(data: Data, encode: Callable, reconstruct: Callable, n_latents: int) -> dict[str, float]:
    """Held-out normalized MSE, L0 and dead fraction."""
    x = data.held_out
    fired = torch.zeros(n_latents, dtype=torch.bool, device=x.device)
    recon, active = [], 0
    with torch.no_grad():
        for part in x.split(2048):
            values, indices = encode(part)
            fired[indices[values > 0]] = True
            active += int((values > 0).sum())
            recon.append(reconstruct(part).float())
    error = normalized_mse(x.double(), torch.cat(recon).double(), x.double().mean(0))
    return {"normalized_mse": float(error), "dead_fraction": float(1 - fired.float().mean()), "l0": active / len(x)}


def ours(data: Data, options: argparse.Namespace, optim: OptimConfig, dead_after: int) -> dict[str, Any]:
    """Train Topkapi on the shared batches and measure it."""
    d_model = data.train.shape[1]
    config = TrainConfig(
        model=ModelConfig(n_latents=options.n_latents, k=options.k, encoder_scale=options.encoder_scale),
        auxk=AuxKConfig(dead_after=dead_after),
        optim=optim,
        tokens=options.tokens,
        batch_tokens=options.batch,
    ).resolved(d_model)

    batches = list(data.batches(options.batch, 8))
    trainer = Trainer(config, Path("unused"), data.source, torch.cat(batches)[:32_768])
    started = time.perf_counter()
    with progress("topkapi", options.tokens) as meter:
        for step, x in enumerate(data.batches(options.batch, config.n_steps)):
            trainer.step_(trainer.ae.normalise(x).x, step)
            meter.advance(options.batch)
    seconds = time.perf_counter() - started
    ae = trainer.ae
    ae.load_state_dict(trainer.optimizer.averaged(ae))
    found = measure(data, lambda x: ae.encode(ae.normalise(x).x), ae, options.n_latents)
    return {"project": "topkapi", "lr": config.optim.lr, **found, "seconds": round(seconds, 1)}


def theirs(data: Data, options: argparse.Namespace, name: str, lr: float | None) -> dict[str, Any] | None:
    """Train one peer on the shared batches and measure it; None if its package is missing."""
    steps = -(-options.tokens // options.batch)
    config = PeerConfig(
        d_model=data.train.shape[1],
        n_latents=options.n_latents,
        k=options.k,
        device=data.train.device,
        total_steps=steps,
        batch_tokens=options.batch,
        sample=torch.cat(list(data.batches(options.batch, 8))),
        lr=lr,
        dead_after_tokens=options.dead_after,
        bf16=False,
    )
    made = make_peers([name], config)
    if not made:
        return None
    (peer,) = made
    started = time.perf_counter()
    with progress(f"{name} {lr or 'defaults'}", options.tokens) as meter:
        for x in data.batches(options.batch, steps):
            peer.step(x)
            meter.advance(options.batch)
    seconds = time.perf_counter() - started
    found = measure(data, peer.encode, peer.reconstruct, options.n_latents)
    about = {"project": name, "version": peer.version, "lr": peer.settings["lr"], "defaults": lr is None}
    return {**about, **found, "seconds": round(seconds, 1), "settings": peer.settings}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, best first."""
    lines = [
        "| project | setting | lr | normalized MSE | dead fraction | L0 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["normalized_mse"]):
        lines.append(
            f"| {row['project']} {row.get('version', '')} | {'defaults' if row['defaults'] else 'matched lr'} "
            f"| {row['lr']:.2g} | {row['normalized_mse']:.4f} | {row['dead_fraction']:.4f} | {row['l0']:.1f} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--site", default="resid_post.10")
    parser.add_argument("--text-tokens", type=int, default=600_000, help="of text, training and held-out together")
    parser.add_argument("--held-out-tokens", type=int, default=25_000)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="trained on, in several epochs")
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--n-latents", type=int, default=4_096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead-after", type=int, default=50_000, help="tokens; the same for all")
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-4, 1e-3])
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--encoder-scale", type=float, default=0.5, help="Topkapi's, as in its recipes")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/quality.json"))
    options = parser.parse_args()

    data, rows = load(options), []
    default = SHORT_RUN
    for lr in [None, *options.lr]:
        optim = default if lr is None else replace(default, lr=lr)
        rows.append({**ours(data, options, optim, options.dead_after), "defaults": lr is None})
        print(json.dumps(rows[-1]), flush=True)
        for name in options.peers:
            if row := theirs(data, options, name, lr):
                rows.append(row)
                print(json.dumps(row), flush=True)
    about = {"device": platform.processor() if data.train.device.type == "cpu" else torch.cuda.get_device_name()}
    about |= {"torch": torch.__version__, "train_rows": len(data.train), "held_out_rows": len(data.held_out)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({"about": about, "options": settings, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
