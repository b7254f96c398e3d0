"""TopK against the two L1 baselines at equal L0, and L1 gamed by a decoder with free norms: a plot and its data.

    python benchmarks/sparsity.py --out benchmarks/results/sparsity

All autoencoders have the same n_latents, tokens, batch and learning rate, and see the same activations of the demo's
site in the same order (benchmarks/quality.py loads them). TopK is trained for several k; the baselines for several
L1 coefficients. Writes OUT.png and OUT.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from quality import Data, load, measure

from topkapi.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from topkapi.train import Trainer

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator

KINDS = {
    "TopK": {"activation": "topk", "sparsity": "none", "unit_norm": True},
    "ReLU + L1, unit-norm decoder": {"activation": "relu", "sparsity": "l1", "unit_norm": True},
    "ReLU + L1 weighted by decoder norms": {"activation": "relu", "sparsity": "l1_decoder_norm", "unit_norm": False},
    "ReLU + L1, free norms": {"activation": "relu", "sparsity": "l1", "unit_norm": False},
}


def train_one(data: Data, options: argparse.Namespace, kind: str, k: int, coefficient: float) -> dict[str, Any]:
    """One autoencoder's held-out measures, and its L1 and decoder norms along training."""
    choice = KINDS[kind]
    config = TrainConfig(
        model=ModelConfig(n_latents=options.n_latents, k=k, activation=choice["activation"]),
        loss=LossConfig(sparsity=choice["sparsity"], l1_coefficient=coefficient),
        optim=OptimConfig(lr=options.lr, lr_decay=0.2, ema_decay=0.0, unit_norm_decoder=choice["unit_norm"]),
        tokens=options.tokens,
        batch_tokens=options.batch,
    ).resolved(data.train.shape[1])

    sample = next(data.batches(min(32_768, len(data.train)), 1))
    trainer, curve = Trainer(config, Path("unused"), data.source, sample), []
    every = max(1, config.n_steps // 40)
    for step, x in enumerate(data.batches(options.batch, config.n_steps)):
        trainer.step_(trainer.ae.normalise(x).x, step)
        if step % every == 0 or step == config.n_steps - 1:
            norms = trainer.ae.W_dec.detach().norm(dim=1)
            l1 = trainer.metrics()["l1"] / coefficient if coefficient else 0.0
            curve.append({"tokens": (step + 1) * options.batch, "l1": l1, "mean_norm": float(norms.mean())})
    ae = trainer.ae
    found = measure(data, lambda x: ae.encode(ae.normalise(x).x), ae, options.n_latents)
    return {"kind": kind, "k": k, "l1_coefficient": coefficient, **found, "curve": curve}


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """nMSE against L0, and how L1 and norms move with and without unit norm."""
    figure, (front, l1, norms) = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=(1.5, 1, 1), layout="constrained")
    for kind in list(KINDS)[:3]:
        points = sorted((r["l0"], r["normalized_mse"]) for r in rows if r["kind"] == kind)
        front.plot(*zip(*points, strict=True), "o-", label=kind)
    front.set(xscale="log", yscale="log", xlabel="L0 (active latents per token)", ylabel="held-out normalized MSE")
    front.legend()
    front.grid(alpha=0.3, which="both")
    coefficient = min(r["l1_coefficient"] for r in rows if r["kind"] == "ReLU + L1, free norms")
    for row in rows:
        if row["kind"].startswith("ReLU") and row["l1_coefficient"] == coefficient:
            tokens = [point["tokens"] for point in row["curve"]]
            l1.plot(tokens, [point["l1"] for point in row["curve"]], label=row["kind"])
            norms.plot(tokens, [point["mean_norm"] for point in row["curve"]])
    l1.set(xlabel="tokens", ylabel="penalty / coefficient", title=f"coefficient {coefficient:g}", ylim=(0, 3))
    l1.legend(fontsize=7)
    norms.set(xlabel="tokens", ylabel="mean norm of decoder rows", ylim=(0, None))
    for axis, ticks in ((front.xaxis, (5, 10, 20, 50, 100)), (front.yaxis, (0.1, 0.15, 0.2, 0.3, 0.4))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--site", default="resid_post.10")
    parser.add_argument("--text-tokens", type=int, default=320_000)
    parser.add_argument("--held-out-tokens", type=int, default=16_000)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--n-latents", type=int, default=4_096)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--k", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--l1", type=float, nargs="*", default=[0.01, 0.02, 0.04, 0.08, 0.16])
    parser.add_argument("--out", type=Path, default=Path("runs/sparsity"))
    parser.add_argument("--redraw", action="store_true", help="only draw OUT.json again")
    options = parser.parse_args()
    options.raw = False
    title = f"{options.site} of SmolLM2-135M, {options.n_latents:,} latents, {options.tokens:,} tokens"
    if options.redraw:
        draw(json.loads(Path(f"{options.out}.json").read_text())["rows"], Path(f"{options.out}.png"), title)
        return

    data = load(options)
    plan = [("TopK", k, 0.0) for k in options.k]
    plan += [(kind, 1, coefficient) for kind in list(KINDS)[1:] for coefficient in options.l1]
    rows = []
    for kind, k, coefficient in plan:
        rows.append(train_one(data, options, kind, k, coefficient))
        shown = {name: value for name, value in rows[-1].items() if name != "curve"}
        print(json.dumps(shown | {"first": rows[-1]["curve"][0], "last": rows[-1]["curve"][-1]}), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    Path(f"{options.out}.json").write_text(json.dumps({"options": settings, "rows": rows}) + "\n")
    draw(rows, Path(f"{options.out}.png"), title)


if __name__ == "__main__":
    main()
