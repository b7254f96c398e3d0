"""Steps on meshes of replicas and shards against one GPU alone, on random activations, in one run.

    torchrun --nproc-per-node 2 benchmarks/scaling.py --out runs/scaling
    torchrun --nproc-per-node 2 benchmarks/scaling.py --tiny             # processes on a CPU: a check, no measurement

Each GPU has the same share of the work whatever the mesh: `batch` tokens a GPU in all, so that a replica of S shards
reads S times as many. A step is normalisation, forward, AuxK (armed, no latent dead), backward, projection, Adam, unit
norm and dead counters. "Alone" is every process training by itself at the same time: the slowest counts. "Speed-up" is
tokens/s of the mesh over those of one GPU alone. Prints a JSON line for each case; with --out also the kernels of a
step of each mesh, as they lay in time on rank 0, and a picture of them.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from topkapi import Autoencoder
from topkapi.config import AuxKConfig, OptimConfig, ParallelConfig
from topkapi.dead import DeadCounter
from topkapi.model import Working
from topkapi.ops.normalise import normalise
from topkapi.optim import Optimizer
from topkapi.parallel import ALONE, Mesh, mesh_of, open_mesh
from topkapi.plotting import pyplot
from topkapi.step import topk_step

CASES = [  # n_latents, d_model, tokens a GPU, precision
    (131_072, 768, 65_536, "bf16"),
    (524_288, 768, 65_536, "bf16"),
    (131_072, 768, 65_536, "fp8"),
]
TINY = [(96, 16, 64, "float32")]


class Stepper:
    """An autoencoder on a mesh and a batch of activations that it is trained on again and again."""

    def __init__(self, case: tuple[int, int, int, str], mesh: Mesh, device: torch.device, exchange: str) -> None:
        n_latents, d_model, batch, precision = case
        self.mesh, self.parallel = mesh, ParallelConfig(shards=mesh.n_shards, exchange=exchange)
        k, part = 32 if n_latents > 96 else 4, mesh.owned(n_latents)
        self.ae = Autoencoder(d_model=d_model, n_latents=n_latents, k=k, latents=part).to(device)
        self.working = Working(self.ae, precision, mesh)
        self.optimizer = Optimizer(self.ae, OptimConfig(lr=1e-7, ema_decay=0.0), self.working, mesh)
        self.dead = DeadCounter(len(self.working.latent_bias), device, mesh)
        generator = torch.Generator(device).manual_seed(mesh.replica)  # a replica's shards read the same
        n = batch * mesh.n_shards
        self.raw = torch.randn(n, d_model, generator=generator, device=device)
        self.raw = self.raw.to(torch.bfloat16 if precision != "float32" else torch.float32)

    def step(self) -> None:
        x = normalise(self.raw, self.working.W_enc.dtype)
        dead = self.dead.subset(10**12, len(x) * self.mesh.n_replicas)
        auxk = AuxKConfig(auxk=512)
        found = topk_step(self.ae, x, 1.0, dead, auxk, self.working, self.mesh, self.parallel)
        self.optimizer.step_(self.ae, found.gradients, 1e-7)
        self.dead.count_(found.fired, len(x) * self.mesh.n_replicas)


def milliseconds(stepper: Stepper, device: torch.device, rounds: int) -> list[float]:
    """Of single steps, queued one behind the other."""
    for _ in range(3):
        stepper.step()
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            stepper.step()
            times.append((time.perf_counter() - started) * 1e3)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        stepper.step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def timeline(stepper: Stepper) -> list[dict[str, Any]]:
    """Kernels of two steps: name, stream, start and length in microseconds."""
    stepper.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        stepper.mesh.gather_objects(None)  # so that no process waits for the other's profiler
        stepper.step()
        stepper.step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    first = min((e.time_range.start for e in events), default=0)
    return [
        {"name": e.name[:60], "stream": e.device_resource_id, "start": e.time_range.start - first,
         "us": e.time_range.elapsed_us()}
        for e in events
    ]  # fmt: skip


def draw(lines: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Each mesh's kernels as bars in time: two steps, and beside them the part of the second that communicates."""
    plt = pyplot()
    figure, axes = plt.subplots(len(lines), 2, figsize=(13, 1.5 * len(lines)), squeeze=False, layout="constrained")
    for (whole, part), (name, kernels) in zip(axes, lines.items(), strict=True):
        end = max(k["start"] + k["us"] for k in kernels) / 1e3
        talking = [k for k in kernels if k["name"].startswith("nccl")]
        for axis in (whole, part):
            for row, (talks, colour) in enumerate(((False, "tab:blue"), (True, "tab:red"))):
                bars = [(k["start"] / 1e3, k["us"] / 1e3) for k in kernels if (k in talking) == talks]
                axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour)
            axis.set_yticks([0, 1], ["computes", "communicates"])
        begin = min((k["start"] / 1e3 for k in talking if k["start"] / 1e3 > end * 0.85), default=0.0)
        part.set_xlim(begin - 0.5, end + 0.1)
        part.set_yticks([])
        whole.set_title(name, loc="left", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("milliseconds on rank 0")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measured(case: tuple, mesh: Mesh, device: torch.device, options: argparse.Namespace, exchange: str) -> dict:
    """One case on a mesh: the slowest process's median step, and the most memory that any held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stepper = Stepper(case, mesh, device, exchange)
    times = milliseconds(stepper, device, options.rounds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"ms": statistics.median(times), "peak": peak, "stepper": stepper}


def line(case: tuple, mesh: str, exchange: str, n_ranks: int, alone: float, ms: float, peak: float) -> dict[str, Any]:
    """What is printed of a case."""
    n_latents, d_model, batch, precision = case
    return {
        "mesh": mesh, "exchange": exchange, "n_latents": n_latents, "d_model": d_model, "batch": batch,
        "precision": precision, "alone_ms": round(alone, 2), "ms": round(ms, 2),
        "speed_up": round(n_ranks * alone / ms, 3), "peak_gib": round(peak, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--exchanges", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--cases", type=int, nargs="+")
    options = parser.parse_args()
    kind = "cpu" if options.tiny or not torch.cuda.is_available() else "cuda"
    cases = TINY if kind == "cpu" else CASES
    cases = [cases[i] for i in options.cases] if options.cases else cases
    alone, lines = {}, {}
    with open_mesh(1, kind) as world:
        device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        for case in cases:
            found = measured(case, ALONE, device, options, "auto")
            alone[case] = max(world.gather_objects(found["ms"]))
            peak = max(world.gather_objects(found["peak"]))
            del found
            if world.rank == 0:
                print(json.dumps(line(case, "1x1", "none", 1, alone[case], alone[case], peak)), flush=True)
        for shards in options.shards:
            mesh = mesh_of(shards, world.rank, world.n_ranks, kind)
            name = f"{mesh.n_replicas}x{mesh.n_shards}"
            for case in cases:
                for exchange in options.exchanges if mesh.n_replicas > 1 else ["none"]:
                    found = measured(case, mesh, device, options, "auto" if exchange == "none" else exchange)
                    ms, peak = max(mesh.gather_objects(found["ms"])), max(mesh.gather_objects(found["peak"]))
                    if kind == "cuda" and options.out:
                        lines[f"{name} {exchange} {case[0]} {case[3]}"] = timeline(found["stepper"])
                    del found
                    if mesh.rank == 0:
                        print(json.dumps(line(case, name, exchange, mesh.n_ranks, alone[case], ms, peak)), flush=True)
    if options.out and world.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "timeline.json").write_text(json.dumps(lines))
        if lines:
            draw(lines, options.out / "timeline.png")


if __name__ == "__main__":
    main()
