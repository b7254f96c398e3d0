"""Fifty steps of a dictionary of 16 777 216 latents a GPU, with low-memory state: loss, tokens/s and memory.

    python benchmarks/largest.py --out runs/largest
    torchrun --nproc-per-node 2 benchmarks/largest.py --n-latents 33554432        # shards of one dictionary

Data is planted: sums of a few directions, with noise. The decoder's rows start at random on the GPU itself.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from topkapi import Autoencoder
from topkapi.config import AuxKConfig, OptimConfig
from topkapi.dead import DeadCounter
from topkapi.loss import mse_scale
from topkapi.model import Working
from topkapi.ops.normalise import normalise
from topkapi.optim import Optimizer
from topkapi.parallel import Mesh, open_mesh
from topkapi.step import topk_step


def random_autoencoder(n_latents: int, d_model: int, k: int, encoder_scale: float, mesh: Mesh) -> Autoencoder:
    """This shard of one with bf16 weights, made a part of the rows at a time: float32 weights would not fit."""
    ae, part = Autoencoder(d_model=d_model, n_latents=k, k=k).cuda(), mesh.owned(n_latents)
    W_dec = torch.empty(part.stop - part.start, d_model, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1 + mesh.rank)
    for rows in W_dec.split(2**18):
        rows.copy_(nn.functional.normalize(torch.randn(rows.shape, device="cuda", generator=generator), dim=1))
    ae.n_latents = n_latents
    ae.W_dec = nn.Parameter(W_dec)
    ae.W_enc = nn.Parameter(W_dec * encoder_scale)
    ae.latent_bias = nn.Parameter(torch.zeros(len(W_dec), device="cuda"))
    return ae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-latents", type=int, default=2**24)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8_192)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--out", type=Path, default=Path("runs/largest"))
    options = parser.parse_args()
    with open_mesh(int(os.environ.get("WORLD_SIZE", "1")), "cuda") as mesh:
        train(options, mesh)


def train(options: argparse.Namespace, mesh: Mesh) -> None:
    """Take the steps, and report them."""
    torch.manual_seed(0)  # all shards read the same
    ae = random_autoencoder(options.n_latents, options.d_model, options.k, 0.1, mesh)
    working = Working(ae, options.precision, mesh)
    optimizer = Optimizer(ae, OptimConfig(lr=options.lr, ema_decay=0.0, state="low_memory"), working, mesh)
    counter, auxk = DeadCounter(len(working.latent_bias), "cuda", mesh), AuxKConfig(auxk=512)
    directions = torch.randn(20_000, options.d_model, device="cuda")
    losses, times, scale = [], [], 1.0
    for _ in range(options.steps):
        which = torch.randint(len(directions), (options.batch, 16), device="cuda")
        raw = (torch.rand(options.batch, 16, 1, device="cuda") * directions[which]).sum(1)
        x = normalise(raw, torch.bfloat16)
        torch.cuda.synchronize()
        started = time.perf_counter()
        scale = mse_scale(x.float()) if not losses else scale
        found = topk_step(ae, x, scale, counter.subset(auxk.dead_after, len(x)), auxk, working, mesh)
        optimizer.step_(ae, found.gradients, options.lr)
        counter.count_(found.fired, len(x))
        losses.append(float(found.terms.normalized_mse))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    median = sorted(times)[len(times) // 2]
    report = {
        "gpu": torch.cuda.get_device_name(),
        "gpus": mesh.n_ranks,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "losses": [round(loss, 5) for loss in losses],
        "milliseconds": round(median * 1e3, 1),
        "tokens_per_second": round(options.batch / median),
        "peak_GiB": max(mesh.gather_objects(round(torch.cuda.max_memory_allocated() / 2**30, 1))),
    }
    if mesh.rank:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "largest.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
