"""Steps on meshes of replicas and shards against one GPU alone, on random activations, in one run.

    torchrun --nproc-per-node 2 benchmarks/scaling.py --out runs/scaling
    torchrun --nproc-per-node 8 benchmarks/scaling.py --out runs/scaling --shards 8 4 2 1 --exchanges auto \\
        --cases 131072,768,65536,bf16 1048576,768,65536,bf16 131072,4096,16384,bf16     # again with --strong
    torchrun --nproc-per-node 2 benchmarks/scaling.py --tiny             # processes on a CPU: a check, no measurement

Each GPU has the same share of the work whatever the mesh: `batch` tokens a GPU in all, so that a replica of S shards
reads S times as many. With --strong `batch` is of all GPUs together, on one GPU as on many. A step is normalisation,
forward, AuxK (armed, no latent dead), backward, projection, Adam, unit norm and dead counters. "Alone" is every process
training by itself at the same time: the slowest counts. "Speed-up" is tokens/s of the mesh over those of one GPU alone,
"efficiency" that over the number of GPUs. Prints a JSON line for each case, which benchmarks/planned.py sets beside the
plan; with --out also the kernels of a step of each mesh, as they lay in time on rank 0, and pictures of them and of
the time by part.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from topkapi import Autoencoder
from topkapi.bench.profile import DECODE, ENCODER, PART_OF_KERNEL, SORT, SUMS, UPDATE
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
PARTS = {
    "encoder": ("tab:blue", ENCODER),
    "decode, latent gradient": ("tab:cyan", (DECODE,)),
    "weight gradients, Adam": ("tab:green", (SORT, SUMS, UPDATE)),
    "the rest": ("tab:gray", ()),
    "communicates alone": ("tab:red", ()),
    "waits": ("whitesmoke", ()),
}


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
        stepper.step()  # the first under a profiler takes longer, and not as much longer for each process
        torch.cuda.synchronize()
        stepper.mesh.gather_objects(None)
        stepper.step()
        stepper.step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted(events, key=lambda e: e.time_range.start)[len(events) // 3 :]
    first = min((e.time_range.start for e in events), default=0)
    return [
        {"name": e.name[:60], "stream": e.device_resource_id, "start": e.time_range.start - first,
         "us": e.time_range.elapsed_us()}
        for e in events
    ]  # fmt: skip


def length(spans: list[tuple[float, float]]) -> float:
    """Of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def by_part(kernels: list[dict[str, Any]], steps: int = 2) -> dict[str, float]:
    """Milliseconds a step of each of PARTS; what is communicated while the device computes is in none."""
    found = dict.fromkeys(PARTS, 0.0)
    spans = {talks: [] for talks in (False, True)}
    for kernel in kernels:
        start, end = kernel["start"], kernel["start"] + kernel["us"]
        talks = kernel["name"].startswith("nccl")
        spans[talks].append((start, end))
        if not talks:
            part = PART_OF_KERNEL.get(kernel["name"])
            found[next((name for name, (_, parts) in PARTS.items() if part in parts), "the rest")] += kernel["us"]
    busy, computing = length(spans[False] + spans[True]), length(spans[False])
    found["communicates alone"] = busy - computing
    found["waits"] = max(end for both in spans.values() for _, end in both) - busy
    return {name: us / steps / 1e3 for name, us in found.items()}


def draw_parts(lines: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A bar for each mesh, cut into the parts of a step."""
    plt = pyplot()
    found = {name: by_part(kernels) for name, kernels in lines.items()}
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.32 * len(found)), layout="constrained")
    reached = [0.0] * len(found)
    for part, (colour, _) in PARTS.items():
        ms = [parts[part] for parts in found.values()]
        axis.barh(list(found), ms, left=reached, color=colour, edgecolor="black", linewidth=0.4, label=part)
        reached = [a + b for a, b in zip(reached, ms, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds of a step on rank 0; what travels beside computing is not drawn")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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


def line(case: tuple, mesh: str, exchange: str, speed_up: float, n_ranks: int, found: dict[str, float]) -> str:
    """What is printed of a case; `batch` is of one GPU."""
    n_latents, d_model, batch, precision = case
    rate = n_ranks * batch / found["ms"] * 1e3
    return json.dumps({
        "mesh": mesh, "exchange": exchange, "n_latents": n_latents, "d_model": d_model, "batch": batch,
        "precision": precision, "ms": round(found["ms"], 2), "tokens_per_second": round(rate),
        "speed_up": round(speed_up, 3), "efficiency": round(speed_up / n_ranks, 3), "peak_gib": round(found["peak"], 2),
    })  # fmt: skip


def parse() -> argparse.Namespace:
    """The options; cases as tuples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--exchanges", nargs="+", default=["sparse", "dense"], help="of replicas; or auto")
    parser.add_argument("--cases", nargs="+", type=case_of, help="n_latents,d_model,tokens,precision each")
    parser.add_argument("--strong", action="store_true", help="a case's tokens are of all GPUs together")
    return parser.parse_args()


def case_of(text: str) -> tuple[int, int, int, str]:
    """A case as it is written on the command line."""
    n_latents, d_model, batch, precision = text.split(",")
    return int(n_latents), int(d_model), int(batch), precision


def slowest(case: tuple, mesh: Mesh, device: torch.device, options: argparse.Namespace, exchange: str) -> dict:
    """One case on a mesh: its worst process's time and memory, and the timeline of a step where one is wanted."""
    found = measured(case, mesh, device, options, exchange)
    kernels = timeline(found["stepper"]) if device.type == "cuda" and options.out and mesh.n_ranks > 1 else []
    return {name: max(mesh.gather_objects(found[name])) for name in ("ms", "peak")} | {"kernels": kernels}


def main() -> None:
    options = parse()
    kind = "cpu" if options.tiny or not torch.cuda.is_available() else "cuda"
    cases = options.cases or (TINY if kind == "cpu" else CASES)
    lines = {}
    with open_mesh(1, kind) as world:
        device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        alone = {case: slowest(case, ALONE, device, options, "auto") for case in cases}
        for case, found in alone.items():
            found |= {name: max(world.gather_objects(found[name])) for name in ("ms", "peak")}
            if world.rank == 0:
                print(line(case, "1x1", "none", 1.0, 1, found), flush=True)
        for shards in options.shards:
            mesh = mesh_of(shards, world.rank, world.n_ranks, kind)
            name = f"{mesh.n_replicas}x{mesh.n_shards}"
            for case, exchange in product(cases, options.exchanges if mesh.n_replicas > 1 else ["none"]):
                share = (*case[:2], case[2] // world.n_ranks, case[3]) if options.strong else case
                found = slowest(share, mesh, device, options, "auto" if exchange == "none" else exchange)
                speed_up = alone[case]["ms"] / found["ms"] * share[2] * world.n_ranks / case[2]
                if world.rank == 0:
                    print(line(share, name, exchange, speed_up, world.n_ranks, found), flush=True)
                if found["kernels"]:
                    lines[f"{name} {exchange} {case[0]:,} x {case[1]:,} {case[3]}"] = found["kernels"]
    if lines and world.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "timeline.json").write_text(json.dumps(lines))
        draw(lines, options.out / "timeline.png")
        draw_parts(lines, options.out / "parts.png")


if __name__ == "__main__":
    main()
