"""One training step of Topkapi against its own parts, the bare encoder matmul and three peers, paired in one run.

    python benchmarks/step.py --device cpu

A round times each thing once, in turn, so that a slow moment of the machine hits all alike; reported are medians over
rounds and the median of the ratios within rounds. The step is normalisation, forward, AuxK (armed; nothing dead unless
--dead), backward, projection, Adam, unit norm and dead counters; EMA is left out, as no peer has it, and timed beside.
Inputs are random unit-scale rows. Peers are built and stepped by benchmarks/peers.py.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import PEERS, PeerConfig, make_peers

from topkapi import Autoencoder, ops
from topkapi.config import OptimConfig, TrainConfig
from topkapi.console import progress
from topkapi.dead import DeadCounter
from topkapi.gradients import topk_step
from topkapi.loss import mse_scale
from topkapi.ops import SparseRows, reference
from topkapi.optim import Optimizer

Timed = dict[str, Callable[[], object]]


class Ours:
    """Topkapi's step at one shape, and the same work piece by piece."""

    def __init__(self, options: argparse.Namespace, raw: torch.Tensor, ema_decay: float) -> None:
        self.ae = Autoencoder(d_model=options.d_model, n_latents=options.n_latents, k=options.k).to(raw.device)
        self.raw, x = raw, Autoencoder.normalise(raw).x
        self.x = x
        self.ae.initialise_(x)
        self.scale = mse_scale(x)
        self.auxk = TrainConfig().resolved(options.d_model).auxk  # the default
        self.optimizer = Optimizer(self.ae, OptimConfig(lr=1e-4, ema_decay=ema_decay))
        self.counter = DeadCounter(options.n_latents, x.device)
        self.n_dead = int(options.dead * options.n_latents)
        self.ae.latent_bias.data[: self.n_dead] = -1e4  # as the peers' are silenced

    def step(self) -> None:
        """A whole step on raw rows, with the first latents dead if asked."""
        self.counter.silent_for[: self.n_dead] = self.auxk.dead_after
        x = Autoencoder.normalise(self.raw).x
        found = topk_step(self.ae, x, self.scale, self.counter.dead(self.auxk.dead_after), self.auxk)
        self.optimizer.step_(self.ae, found.gradients, 1e-4)
        self.counter.count_(found.fired, len(x))

    def parts(self) -> Timed:
        """The step's parts, each on the same inputs."""
        ae, x = self.ae, self.x
        W_enc, W_dec, pre_bias = ae.W_enc.detach(), ae.W_dec.detach(), ae.pre_bias.detach()
        values, indices = reference.encode_topk(x, W_enc, ae.latent_bias.detach(), pre_bias, ae.k)
        order = ops.order_by_latent(indices, ae.n_latents)
        gradients = topk_step(ae, x, self.scale, torch.zeros(ae.n_latents, dtype=torch.bool), self.auxk).gradients

        def weight_gradients() -> None:
            for rows in (x, x):
                sparse = SparseRows(values, order, rows)
                for start in range(0, ae.n_latents, 1024):
                    sparse.block(start, min(start + 1024, ae.n_latents))

        return {
            "encode_topk": lambda: reference.encode_topk(x, W_enc, ae.latent_bias.detach(), pre_bias, ae.k),
            "decode": lambda: reference.dense_sparse_matmul(values, indices, W_dec),
            "latent gradient": lambda: reference.matmul_at_sparse_indices(x, W_dec, indices),
            "sort": lambda: ops.order_by_latent(indices, ae.n_latents),
            "weight gradients": weight_gradients,
            "weight gradients, projection, Adam, unit norm": lambda: self.optimizer.step_(ae, gradients, 1e-4),
        }


def measure(timed: Timed, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    with progress("timing", (rounds + 1) * len(timed), unit="runs") as meter:
        for i in range(rounds + 1):
            for name, run in timed.items():
                if device.type == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if i:
                    found[name].append((time.perf_counter() - started) * 1e3)
                meter.advance(1)
    return found


def table(found: dict[str, list[float]], batch: int) -> str:
    """Medians, spread and ratio to the bare matmul, as Markdown."""
    bare = found["bare encoder matmul"]
    lines = ["| what | median ms | min | max | against the bare matmul | tokens/s |", "|---|---|---|---|---|---|"]
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, bare, strict=True))
        middle = statistics.median(times)
        rate = f"{batch / middle * 1e3:,.0f}" if "step" in name else ""
        lines.append(f"| {name} | {middle:.1f} | {min(times):.1f} | {max(times):.1f} | {ratio:.3f} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n-latents", type=int, default=16_384)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents that are dead")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peers", nargs="*", default=[], choices=[*PEERS], help="none named: all of them")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/step.json"))
    options = parser.parse_args()
    device = torch.device(options.device)

    torch.manual_seed(0)
    raw = torch.randn(options.batch, options.d_model, device=device)
    x = Autoencoder.normalise(raw).x
    ours, averaged = Ours(options, raw, ema_decay=0.0), Ours(options, raw, ema_decay=0.999)
    out = torch.empty(options.batch, options.n_latents, device=device)
    weight = ours.ae.W_enc.detach()
    timed: Timed = {
        "bare encoder matmul": lambda: torch.mm(x, weight.T, out=out),
        "bare encoder matmul, new output": lambda: x @ weight.T,
        "topkapi step": ours.step,
        "topkapi step with EMA": averaged.step,
    }
    config = PeerConfig(
        d_model=options.d_model,
        n_latents=options.n_latents,
        k=options.k,
        device=device,
        total_steps=10_000,
        batch_tokens=options.batch,
        sample=raw,
        auxk_coefficient=1 / 32,
    )
    for peer in [] if options.no_peers else make_peers(options.peers or list(PEERS), config):
        if options.dead:
            peer.silence(torch.arange(ours.n_dead))
        timed[f"{peer.name} {peer.version} step"] = lambda peer=peer: peer.step(raw)
    found = measure(timed, options.rounds, device)
    parts = measure({"bare encoder matmul": timed["bare encoder matmul"], **ours.parts()}, options.rounds, device)
    about = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "options": {k: v for k, v in vars(options).items() if k != "out"}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "milliseconds": found, "parts": parts}, indent=1))
    print(json.dumps(about))
    print(table(found, options.batch), table(parts, options.batch), sep="\n\n")


if __name__ == "__main__":
    main()
