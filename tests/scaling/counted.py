"""Counts what real steps of several processes hand to their collectives, in a process of its own.

python -m tests.scaling.counted     prints, for each case, bytes by "group kind" as JSON
"""

import json
import os
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from topkapi.config import AuxKConfig, OptimConfig, ParallelConfig
from topkapi.dead import DeadCounter
from topkapi.model import Autoencoder, Working
from topkapi.optim import Optimizer
from topkapi.parallel import Mesh, open_mesh
from topkapi.step import topk_step

SIZES = {"n_latents": 90, "d_model": 16, "k": 6, "batch_tokens": 44}
AUXK, N_DEAD = 5, 12
MESHES = ((1, 2), (2, 1), (2, 2))  # replicas, shards
CASES = [
    {"mesh": mesh, "exchange": exchange, "selection": selection, "dead": dead, "precision": precision}
    for mesh in MESHES
    for exchange in (("sparse", "dense") if mesh[0] > 1 else ("auto",))
    for selection in (("exact", "capacity") if mesh[1] > 1 else ("exact",))
    for dead, precision in ((False, "float32"), (True, "float32"), (True, "bf16"))
]
KINDS = {"sum_": "sum", "max_": "sum", "start_gather": "gather", "start_scatter_sum": "scatter_sum"}


def counted(counts: Counter) -> None:
    """From now on a mesh's collectives count their payloads, those of groups of one left out."""
    for name, kind in KINDS.items():
        original = getattr(Mesh, name)

        def count(mesh: Mesh, x: torch.Tensor, group: str, *rest: object, original=original, kind=kind) -> object:
            if mesh.size(group) > 1:
                counts[f"{group} {kind}"] += x.nbytes
            return original(mesh, x, group, *rest)

        setattr(Mesh, name, count)


def bytes_of_a_step(mesh: Mesh, case: dict, counts: Counter) -> dict[str, int]:
    """One step as `topkapi.train` takes it, after a first one."""
    n_latents, d_model, k, batch_tokens = SIZES.values()
    ae = Autoencoder(d_model=d_model, n_latents=n_latents, k=k, latents=mesh.owned(n_latents))
    working = Working(ae, case["precision"], mesh)
    optimizer = Optimizer(ae, OptimConfig(lr=1e-4, ema_decay=0.0), working, mesh)
    counter, config = DeadCounter(len(working.latent_bias), mesh=mesh), AuxKConfig(auxk=AUXK, dead_after=10**6)
    parallel = ParallelConfig(shards=mesh.n_shards, selection=case["selection"], exchange=case["exchange"])
    rows = batch_tokens // mesh.n_replicas
    x = torch.randn(batch_tokens, d_model, generator=torch.Generator().manual_seed(0)) / 4
    x = x[mesh.replica * rows : (mesh.replica + 1) * rows].to(working.W_enc.dtype)
    for _ in range(2):
        if case["dead"]:  # the first of every shard
            counter.silent_for[: N_DEAD // mesh.n_shards] = 10**6
        counts.clear()
        found = topk_step(ae, x, 1.0, counter.subset(10**6, batch_tokens), config, working, mesh, parallel)
        optimizer.step_(ae, found.gradients, 1e-4)
        counter.count_(found.fired, batch_tokens)
        assert bool(found.terms.auxk > 0) == case["dead"]
    return dict(counts)


def world(rank: int, mesh: tuple[int, int], port: int, out: Path) -> None:
    """One process of a mesh: all cases of it."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": mesh[0] * mesh[1], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"})
    counts: Counter = Counter()
    counted(counts)
    with open_mesh(mesh[1], "cpu") as joined:
        found = [bytes_of_a_step(joined, case, counts) for case in CASES if case["mesh"] == mesh]
    if rank == mesh[0] * mesh[1] - 1:
        out.write_text(json.dumps(found))


def main() -> None:
    """Fork the processes of one mesh after the other."""
    torch.set_num_threads(1)
    found = []
    for mesh in MESHES:
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port, out = free.getsockname()[1], Path(folder) / "out"
            free.close()
            children = []
            for rank in range(mesh[0] * mesh[1]):
                if not (child := os.fork()):
                    status = 1
                    try:
                        world(rank, mesh, port, out)
                        status = 0
                    finally:
                        sys.stdout.flush()
                        os._exit(status)
                children.append(child)
            assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)
            found += json.loads(out.read_text())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
