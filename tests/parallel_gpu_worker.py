"""Two GPUs that take the same steps as one, for tests.test_parallel_gpu.

torchrun --nproc-per-node 2 -m tests.parallel_gpu_worker FILE     rank 0 leaves what it found, by case
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from topkapi.config import AuxKConfig, OptimConfig, ParallelConfig
from topkapi.dead import DeadCounter
from topkapi.loss import mse_scale
from topkapi.model import OF_LATENTS, Autoencoder, Working
from topkapi.ops.normalise import normalise
from topkapi.optim import Optimizer
from topkapi.parallel import ALONE, Mesh, mesh_of, open_mesh
from topkapi.step import topk_step

D_MODEL, N_LATENTS, K, BATCH, STEPS, DEAD_AFTER = 128, 16_384, 16, 8_192, 8, 30_000


@dataclass(frozen=True)
class Case:
    """A course of training."""

    n_shards: int
    precision: str
    parallel: ParallelConfig
    state: str = "float32"

    @property
    def alone(self) -> tuple[str, str]:
        """Cases of which this is the same take the same steps alone."""
        return self.precision, self.state


def cases() -> dict[str, Case]:
    """All of them, by name."""
    found = {}
    ways = {
        "1x2": (2, ParallelConfig()),
        "1x2 capacity": (2, ParallelConfig(selection="capacity")),  # of two shards: all k of them, none lost
        "2x1 sparse": (1, ParallelConfig(exchange="sparse")),
        "2x1 dense": (1, ParallelConfig(exchange="dense")),
        "2x1 micro-batches": (1, ParallelConfig(micro_batch_tokens=BATCH // 8)),
    }
    for name, (n_shards, parallel) in ways.items():
        for precision in ("float32", "bf16", "fp8"):
            found[f"{name} {precision}"] = Case(n_shards, precision, parallel)
        found[f"{name} low_memory"] = replace(found[f"{name} bf16"], state="low_memory")
    return found


def course(case: Case, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Losses of some steps, and the weights after them, whole on rank 0."""
    generator = torch.Generator("cuda").manual_seed(0)
    directions = torch.randn(64, D_MODEL, device="cuda", generator=generator)
    raw = [
        torch.randn(BATCH, 64, device="cuda", generator=generator).relu() @ directions
        + 0.3 * torch.randn(BATCH, D_MODEL, device="cuda", generator=generator)
        for _ in range(STEPS)
    ]
    sample = normalise(raw[0], torch.float32)
    ae = Autoencoder(d_model=D_MODEL, n_latents=N_LATENTS, k=K, latents=mesh.owned(N_LATENTS)).cuda()
    if case.state == "low_memory":
        for name in ("W_enc", "W_dec"):
            getattr(ae, name).data = getattr(ae, name).data.bfloat16()
    ae.initialise_(sample, 1.0, mesh)
    working = Working(ae, case.precision, mesh)
    config = OptimConfig(lr=1e-3, clip_norm=0.5, ema_decay=0.9, state=case.state)
    optimizer = Optimizer(ae, config, working, mesh)
    counter, auxk = DeadCounter(len(working.latent_bias), "cuda", mesh), AuxKConfig(auxk=64, dead_after=DEAD_AFTER)
    rows, scale = BATCH // mesh.n_replicas, mse_scale(sample)
    losses, terms = [], []
    for x in raw:
        x = normalise(x[rows * mesh.replica : rows * (mesh.replica + 1)], working.W_enc.dtype)
        found = topk_step(ae, x, scale, counter.subset(DEAD_AFTER, BATCH), auxk, working, mesh, case.parallel)
        norm = optimizer.step_(ae, found.gradients, 1e-3)
        counter.count_(found.fired, BATCH)
        losses.append(found.terms.normalized_mse.double())
        terms.append(torch.stack([norm.double(), found.terms.auxk.double(), found.l0.double()]))
    working.finish(*OF_LATENTS)
    parts = {"losses": torch.stack(losses), "terms": torch.stack(terms)}
    for name in ("W_enc", "W_dec", "latent_bias"):
        parts[name] = mesh.rows_on_first(getattr(ae, name).detach(), N_LATENTS)
    return {name: part.cpu().double() for name, part in parts.items() if part is not None}


def main(out: Path) -> None:
    """Every case on the mesh, twice, and alone; what is furthest apart, relative to the largest number."""
    found, alone = {}, {}
    with open_mesh(2, "cuda") as world:
        for name, case in cases().items():
            mesh = mesh_of(case.n_shards, world.rank, world.n_ranks, "cuda")
            first, again = course(case, mesh), course(case, mesh)
            if world.rank == 0:
                if case.alone not in alone:
                    alone[case.alone] = course(replace(case, n_shards=1, parallel=ParallelConfig()), ALONE)
                wanted = alone[case.alone]
                apart = {part: float((first[part] - x).abs().max() / x.abs().max()) for part, x in wanted.items()}
                repeats = all(torch.equal(first[part], again[part]) for part in first)
                auxk = float(wanted["terms"][:, 1].max())
                found[name] = {"apart": apart, "repeats": repeats, "auxk": auxk}
                print(json.dumps({name: found[name]}), flush=True)
    if world.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
