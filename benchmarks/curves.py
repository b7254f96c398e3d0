"""Training curves of every precision and optimiser state against plain PyTorch in float32, from the same start.

    python benchmarks/curves.py --out runs/curves                                   # a GPU
    python benchmarks/curves.py --n-latents 512 --d-model 32 --k 4 --batch 64 --directions 200 --steps 20 --device cpu

Data is planted: tokens are sums of a few of many directions, with noise, so that there is something to learn. Prints,
for each, the loss at a few steps and its largest relative distance from the reference's over windows of ten steps;
writes curves.json and curves.png. Two runs of each must agree bit for bit.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from topkapi import Autoencoder
from topkapi.config import AuxKConfig, OptimConfig
from topkapi.dead import DeadCounter
from topkapi.loss import mse_scale
from topkapi.model import PARAMETERS, Working
from topkapi.ops import reference_only
from topkapi.ops.normalise import normalise
from topkapi.optim import Optimizer
from topkapi.step import topk_step

VARIANTS = {
    "plain PyTorch, float32": ("float32", "float32"),
    "kernels, float32": ("float32", "float32"),
    "bf16": ("bf16", "float32"),
    "fp8": ("fp8", "float32"),
    "bf16, low memory": ("bf16", "low_memory"),
}
WINDOW = 10  # steps


def planted(options: argparse.Namespace) -> list[Tensor]:
    """Normalised batches of tokens that are sums of `active` directions."""
    generator = torch.Generator(options.device).manual_seed(0)
    directions = torch.randn(options.directions, options.d_model, generator=generator, device=options.device)
    found = []
    for _ in range(options.batches):
        shape = (options.batch, options.active)
        which = torch.randint(options.directions, shape, generator=generator, device=options.device)
        weights = torch.rand(shape, generator=generator, device=options.device)
        noise = torch.randn(options.batch, options.d_model, generator=generator, device=options.device)
        found.append(normalise((weights[:, :, None] * directions[which]).sum(1) + 0.1 * noise, torch.float32))
    return found


def train(options: argparse.Namespace, batches: list[Tensor], start: dict[str, Tensor], precision: str, state: str):
    """Losses of each step, and the weights after the last."""
    ae = Autoencoder(d_model=options.d_model, n_latents=options.n_latents, k=options.k).to(options.device)
    ae.load_state_dict(start)
    if state == "low_memory":
        ae.W_enc.data, ae.W_dec.data = ae.W_enc.data.bfloat16(), ae.W_dec.data.bfloat16()
    working = Working(ae, precision)
    optimizer = Optimizer(ae, OptimConfig(lr=options.lr, ema_decay=0.0, state=state), working)
    counter, auxk = DeadCounter(options.n_latents, options.device), AuxKConfig(auxk=64, dead_after=options.batch * 20)
    losses = []
    for step in range(options.steps):
        x = batches[step % len(batches)].to(working.W_enc.dtype)
        dead = counter.subset(auxk.dead_after, len(x))
        found = topk_step(ae, x, options.scale, dead, auxk, working)
        optimizer.step_(ae, found.gradients, options.lr)
        counter.count_(found.fired, len(x))
        losses.append(found.terms.normalized_mse)
    return torch.stack(losses).double().cpu(), [getattr(ae, name).detach().cpu() for name in PARAMETERS]


def draw(curves: dict[str, Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    reference = next(iter(curves.values()))
    for name, losses in curves.items():
        above.plot(losses, label=name, linewidth=1)
        below.plot(losses / reference - 1, label=name, linewidth=1)
    above.set(ylabel="normalized MSE", yscale="log")
    below.set(xlabel="step", ylabel="relative distance from plain PyTorch")
    above.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-latents", type=int, default=131_072)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--batches", type=int, default=50, help="different ones; then from the first again")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--directions", type=int, default=20_000)
    parser.add_argument("--active", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    options = parser.parse_args()

    batches = planted(options)
    options.scale = mse_scale(batches[0])
    ae = Autoencoder(d_model=options.d_model, n_latents=options.n_latents, k=options.k).to(options.device)
    ae.initialise_(batches[0], 0.5)
    start = {name: tensor.clone() for name, tensor in ae.state_dict().items()}
    del ae
    curves, report = {}, {}
    variants = VARIANTS if options.device == "cuda" else dict(list(VARIANTS.items())[:2])
    for name, settings in variants.items():
        if name.startswith("plain"):
            with reference_only():
                losses, weights = train(options, batches, start, *settings)
            repeated = None  # sums of plain PyTorch on a GPU come in no fixed order
        else:
            losses, weights = train(options, batches, start, *settings)
            again, weights_again = train(options, batches, start, *settings)
            same = all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
            repeated = bool(same and torch.equal(losses, again))
        curves[name] = losses
        reference = curves[next(iter(curves))]
        smooth, smooth_reference = (curve.unfold(0, WINDOW, WINDOW).mean(1) for curve in (losses, reference))
        report[name] = {
            "losses": [round(float(losses[i]), 6) for i in (0, len(losses) // 4, len(losses) // 2, -1)],
            "largest_distance": float((smooth / smooth_reference - 1).abs().max()),
            "repeats_bit_for_bit": repeated,
        }
        print(json.dumps({name: report[name]}), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    full = {"options": settings, "torch": torch.__version__, "report": report}
    full["curves"] = {name: losses.tolist() for name, losses in curves.items()}
    (options.out / "curves.json").write_text(json.dumps(full, indent=1))
    draw(curves, options.out / "curves.png")


if __name__ == "__main__":
    main()
