"""`topkapi plan --measure`: a description of the GPU at hand, and of its links where several processes were launched.

Parts of a step are timed at a few shapes by `topkapi.bench`, and `topkapi.scaling.calibration` turns them into rates.
Links: all-gather, reduce-scatter and all-reduce of a small and a large tensor, among the processes of a node and, if
there are several nodes, between them. Without several processes the links are those of the H200 preset.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from topkapi.bench.cases import Case
from topkapi.bench.running import BenchOptions, bench
from topkapi.bench.timing import measure
from topkapi.console import say
from topkapi.errors import command_line
from topkapi.parallel import Group, Mesh, open_mesh
from topkapi.scaling.calibration import copy_rate, errors, fit, measured_in
from topkapi.scaling.hardware import H200, Hardware, Link, save
from topkapi.scaling.shapes import Layout, rank_of
from topkapi.scaling.step_time import ONE_GPU, compute

SMALL_BYTES, LARGE_BYTES = 2**12, {"cuda": 2**28, "cpu": 2**24}
CASES = {
    "cuda": (
        Case(precision="bf16", batch_tokens=32_768),
        Case(precision="bf16", batch_tokens=32_768, n_latents=32_768),
        Case(precision="bf16", batch_tokens=8_192, d_model=4_096),
        Case(precision="bf16", batch_tokens=8_192, d_model=4_096, state="low_memory"),
        Case(precision="fp8", batch_tokens=32_768),
        Case(precision="fp8", batch_tokens=8_192, d_model=4_096),
    ),
    "cpu": (
        Case(n_latents=2_048, d_model=64, k=8, batch_tokens=512, precision="float32"),
        Case(n_latents=1_024, d_model=256, k=8, batch_tokens=512, precision="float32"),
    ),
}


def calibrate(path: Path, device: torch.device, seconds: float = 1.0) -> Hardware:
    """Measure, write PATH, and the tables it comes from into a folder beside it."""
    links = measure_links(device)
    known = H200 if links is None else replace(H200, **links[1])
    if links is not None and links[0] > 0:
        return known  # rank 0 measures its GPU and writes, with nobody else at work
    folder = path.parent / f"{path.stem}-bench"
    rounds = 10 if device.type == "cuda" else 3
    options = BenchOptions(device=device, rounds=rounds, seconds=seconds, peers=(), profile=False, out=folder)
    bench(CASES[device.type], options)
    found = described(json.loads((folder / "bench.json").read_text(encoding="utf-8")), known)
    save(found, path)
    say(f"{found.name}: {path}, from {folder / 'bench.json'}. Plan with it: {command_line('plan', '--gpu', path)} ...")
    return found


def described(measured: dict, known: Hardware) -> Hardware:
    """What a bench.json says of its GPU; links, and what it does not tell, as `known`."""
    rows, about = measured_in(measured), measured["about"]
    gpu = fit(rows, known, copy_rate(measured))
    hosts = [_host_of_reference(record) for record in measured["cases"]]
    on_cuda = "device_memory" in about
    gpu = replace(
        gpu,
        name=about["device"],
        source=f"measured on {about['date']} with torch {about['torch']}; links {_links_of(known)}",
        memory=about.get("device_memory") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        host=median(hosts) if on_cuda else 1e-6,  # a CPU's step is the host's own work
    )
    off = [abs(error.relative) for error in errors(rows, gpu)]
    say(f"{len(rows)} parts and steps explained: median error {100 * median(off):.0f} %, worst {100 * max(off):.0f} %")
    if not on_cuda:
        say("the model of a step is one of GPUs: what it says of a CPU shows that measuring works, and little else.")
    return gpu


def _host_of_reference(record: dict) -> float:
    """Seconds that the host would need to queue the step of `Hardware.host`, from a case's."""
    row = measured_in({"cases": [record]})[0]

    def launches(job: object) -> float:
        parts = compute(job, Layout(), rank_of(job, Layout()), 1)
        return sum(part.get("launches", 0.0) for part in parts.values())

    return record["host_ms"] / 1e3 * launches(ONE_GPU) / launches(row.job)


def _links_of(known: Hardware) -> str:
    return "measured" if known.inside is not H200.inside else "those of the H200"


def measure_links(device: torch.device) -> tuple[int, dict] | None:
    """This process's rank, and the fields of `Hardware` that collectives tell; None for a process alone."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1:
        return None
    with open_mesh(per_node, device.type) as mesh:
        found = {"gpus_per_node": per_node}
        if mesh.n_shards > 1:
            found["inside"], found["collective"] = _link(mesh, "shards", device, H200.inside.hop)
        if mesh.n_replicas > 1:
            found["between"], _ = _link(mesh, "replicas", device, H200.between.hop)
        return mesh.rank, found


def _link(mesh: Mesh, group: Group, device: torch.device, hop: float) -> tuple[Link, float]:
    """A link, with the hop that it is taken to have, and the seconds of the smallest collective besides hops."""
    members = mesh.size(group)

    def seconds(collective: Callable[[torch.Tensor, Group], object], size: int) -> float:
        x = torch.zeros(size // 4 // members * members, device=device)
        run = {"": lambda: collective(x, group)}
        return measure(run, device, rounds=5, seconds=1e9)[""].ms / 1e3  # all ranks take as many rounds

    small = {one: seconds(one, SMALL_BYTES) for one in (mesh.gather, mesh.scatter_sum, mesh.sum_)}
    large = LARGE_BYTES[device.type]
    moved = {
        mesh.gather: members - 1,
        mesh.scatter_sum: (members - 1) / members,
        mesh.sum_: 2 * (members - 1) / members,
    }
    gather, scatter, total = (
        share * large / max(seconds(one, large) - small[one], 1e-9) for one, share in moved.items()
    )
    hops = (members - 1) * hop
    return Link(gather=min(gather, scatter), sum=total, hop=hop), max(min(small.values()) - hops, 1e-6)
