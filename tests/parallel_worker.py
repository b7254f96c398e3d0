"""Several processes on this machine that take the same steps as one, for tests.test_parallel.

    python -m tests.parallel_worker WORLD FOLDER CASE...     each rank leaves FOLDER/CASE-RANK.pt

The launcher imports everything once and forks; when a rank fails or time is up the others are killed.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from topkapi import exchange
from topkapi.config import AuxKConfig, LossConfig, OptimConfig, ParallelConfig
from topkapi.dead import DeadCounter
from topkapi.loss import mse_scale
from topkapi.model import OF_LATENTS, PARAMETERS, Autoencoder, Working
from topkapi.ops import kernels_only
from topkapi.optim import Optimizer
from topkapi.parallel import ALONE, Mesh, mesh_of, open_mesh
from topkapi.step import relu_step, topk_step

D_MODEL, BATCH, DEAD_AFTER = 24, 48, 100
AUXK = AuxKConfig(auxk=7, coefficient=1 / 4, dead_after=DEAD_AFTER)
RELU = LossConfig(sparsity="l1", l1_coefficient=0.01)
LIMIT = 240  # seconds


@dataclass(frozen=True)
class Case:
    """A course of training."""

    n_shards: int = 1
    n_latents: int = 100
    k: int = 6
    dtype: torch.dtype = torch.float64
    steps: int = 20
    batch: int = BATCH
    ties: bool = False
    """Activations and encoder of few distinct values, so that pre-activations are exact and often equal."""
    lists_ahead: bool = False
    kernels: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its shards are not read."""
    relu: bool = False
    together: bool = False
    """All pre-activations above 0 belong to the first latents, and so to one shard."""


def cases(world: int) -> dict[str, Case]:
    """What `world` processes go through, by name."""
    found, sparse, dense = {}, ParallelConfig(exchange="sparse"), ParallelConfig(exchange="dense")
    for n_shards in (n for n in (1, 2, 4, 8) if world % n == 0):
        name = f"{world // n_shards}x{n_shards}"
        base = Case(n_shards, n_latents=101 if n_shards > 1 else 100)
        found[f"{name} sparse"] = replace(base, parallel=sparse)
        found[f"{name} ties"] = replace(base, ties=True, parallel=sparse)
        found[f"{name} float32"] = replace(base, dtype=torch.float32, lists_ahead=True)
        if n_shards < world:
            found[f"{name} dense"] = replace(base, n_latents=100, lists_ahead=True, parallel=dense)
        if n_shards in (1, 2):
            small = ParallelConfig(micro_batch_tokens=max(BATCH * n_shards // world // 3, 1))
            found[f"{name} micro"] = replace(base, parallel=small)
        if n_shards == 1:
            found[f"{name} relu"] = replace(base, relu=True, steps=5)
        if n_shards > 1:
            few = ParallelConfig(selection="capacity", candidates=max(6 // n_shards, 1))
            found[f"{name} capacity"] = replace(base, steps=3, parallel=few)
            found[f"{name} together"] = replace(base, steps=3, together=True)
    return found


def kernel_cases() -> dict[str, Case]:
    """Small ones for two processes in Triton's interpreter."""
    small = {"n_latents": 19, "k": 3, "steps": 2, "batch": 6, "kernels": True}
    return {f"{shape} kernels": replace(cases(2)[f"{shape} float32"], **small) for shape in ("1x2", "2x1")}


def batches(case: Case) -> Iterator[torch.Tensor]:
    """The sample, then the whole batch of each step: few directions and some noise, so that latents die."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(5, D_MODEL, generator=generator, dtype=torch.float64)
    for size in (256, *[case.batch] * case.steps):
        code = torch.randn(size, 5, generator=generator, dtype=torch.float64).relu()
        x = code @ directions + 0.3 * torch.randn(size, D_MODEL, generator=generator, dtype=torch.float64)
        if case.ties:
            x = x.round().clamp(-2, 2) / 4
        yield x / (1 if case.ties else x.norm(dim=1, keepdim=True))


def round_(ae: Autoencoder) -> None:
    """Make pre-activations of rounded activations exact, whatever the order of their sums."""
    for name, step in (("W_enc", 8), ("latent_bias", 8), ("pre_bias", 4)):
        parameter = getattr(ae, name).data
        parameter.copy_((parameter * step).round() / step)


def made(case: Case, sample: torch.Tensor, mesh: Mesh) -> Autoencoder:
    latents = mesh.owned(case.n_latents)
    ae = Autoencoder(d_model=D_MODEL, n_latents=case.n_latents, k=case.k, latents=latents).to(case.dtype)
    ae.activation = "relu" if case.relu else "topk"
    ae.initialise_(sample, 1.5 if case.ties else 1.0, mesh)
    offsets = torch.zeros(case.n_latents, dtype=case.dtype)
    offsets[-case.n_latents // 9 :] = -0.4
    if case.together:
        offsets[:], offsets[:10] = -10.0, 3.0
    ae.latent_bias.data += offsets[latents]
    if case.ties:
        round_(ae)
    return ae


def course(case: Case, mesh: Mesh = ALONE) -> dict[str, Any]:
    """Train, and everything that must not depend on the mesh, by name.

    What has a row for each latent of a shard is under `shard`, what has one for each that the process owns under
    `own`, the rest under `whole`.
    """
    sample, *steps = (x.to(case.dtype) for x in batches(case))
    ae = made(case, sample, mesh)
    config = OptimConfig(lr=3e-3, eps=1e-6, clip_norm=0.05, ema_decay=0.9)
    optimizer = Optimizer(ae, config, Working(ae, mesh=mesh), mesh)
    counter = DeadCounter(len(optimizer.working.latent_bias), mesh=mesh)
    counter.lists_ahead = case.lists_ahead
    optimizer.working.finish("latent_bias")
    counter.silent_for[optimizer.working.latent_bias < 0] = DEAD_AFTER  # in the last shards alone, to begin with
    whole, shard = {"pre_bias at first": ae.pre_bias.detach().clone()}, {}
    own = {f"{name} at first": getattr(ae, name).detach().clone() for name in ("W_enc", "W_dec")}
    part = slice(case.batch // mesh.n_replicas * mesh.replica, case.batch // mesh.n_replicas * (mesh.replica + 1))
    with ExitStack() as stack:
        if case.kernels:
            stack.enter_context(kernels_only())
        for number, x in enumerate(steps):
            subset = counter.subset(DEAD_AFTER, case.batch)
            shard[f"dead {number}"] = counter.dead(DEAD_AFTER)
            x, parallel = x[part], case.parallel
            if case.relu:
                step = relu_step(ae, x, mse_scale(sample), RELU, optimizer.working, mesh)
            else:
                given = (subset, AUXK, optimizer.working, mesh, parallel)
                step = topk_step(ae, x, mse_scale(sample), *given, count_lost=True)
            found = step.gradients
            whole[f"loss {number}"], whole[f"auxk {number}"] = step.terms.normalized_mse, step.terms.auxk
            whole[f"l0 {number}"], whole[f"pre_bias gradient {number}"] = step.l0, found.pre_bias
            if step.lost is not None:
                whole[f"lost {number}"] = step.lost
            own[f"W_enc gradient {number}"], own[f"W_dec gradient {number}"] = found.W_enc.all(), found.W_dec.all()
            own[f"latent_bias gradient {number}"] = found.latent_bias.clone()
            shard[f"fired {number}"] = step.fired
            whole[f"norm {number}"] = optimizer.step_(ae, found, 3e-3)
            counter.count_(step.fired, case.batch)
            if case.ties:
                optimizer.working.finish(*OF_LATENTS)  # rows that travel must not change
                round_(ae)
                optimizer.working.read(ae)
            shard[f"silent_for {number}"] = counter.silent_for.clone()
    averaged = optimizer.averaged(ae)
    for name in PARAMETERS:
        where = whole if name == "pre_bias" else own
        where[name], where[f"{name} averaged"] = getattr(ae, name).detach(), averaged[name]
    return {"whole": whole, "shard": shard, "own": own}


def work(world: int, rank: int, folder: Path, names: list[str]) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    exchange.PIECES["cpu"], exchange.FEWEST = 3, 4
    with open_mesh(world, "cpu", timedelta(seconds=LIMIT)) as mesh:
        assert (mesh.n_replicas, mesh.n_shards, mesh.rank) == (1, world, rank)
        for name in names:
            case = (cases(world) | kernel_cases())[name]
            found = course(case, mesh_of(case.n_shards, rank, world, "cpu"))
            torch.save(found, folder / f"{name}-{rank}.pt")


def launch(world: int, folder: Path, names: list[str]) -> int:
    """Fork the ranks; 0 if all succeed. They find each other as they would under torchrun."""
    reader, writer = os.pipe()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                port = os.read(reader, 5).decode()  # all ports have five digits here
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
                work(world, rank, folder, names)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, f"{store.port:05d}".encode() * world)
    return _wait(pids)


def _wait(pids: list[int]) -> int:
    """0 once all have succeeded; 1 as soon as one has failed or time is up, when the rest is killed."""
    left, end = set(pids), time.monotonic() + LIMIT
    while left and time.monotonic() < end:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                end = end if status == 0 else 0.0
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return 1 if left or end == 0.0 else 0


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
