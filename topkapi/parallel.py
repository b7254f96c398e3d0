"""Processes that train one autoencoder together, and the few collectives they need.

The mesh is replicas x shards. The n_shards processes of a replica hold the autoencoder together: each has a contiguous
range of latents with their rows of every latent-indexed tensor, and all of them read the same tokens. Replicas hold
the same weights and read different tokens. Ranks count through the shards first, so that a replica's processes are
neighbours and, where they fit, on one node.

Every collective is the identity where the group has one member, so that one process and many run the same lines; it is
ordered with the work of the current stream before and after it. `topkapi` is launched as any PyTorch program is:

    torchrun --nproc-per-node 8 -m topkapi train ... --parallel.shards 4        # 2 replicas of 4 shards
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from topkapi.errors import TopkapiError

Group = Literal["shards", "replicas", "all"]
"""The processes of this replica; those with this shard's latents; everyone."""

# torch 2.13 renamed both
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among those that train one autoencoder. `Mesh()` is a process alone."""

    n_replicas: int = 1
    n_shards: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    """With dimensions "replicas" and "shards"; None for a process alone."""

    @property
    def n_ranks(self) -> int:
        """Processes in all."""
        return self.n_replicas * self.n_shards

    @property
    def replica(self) -> int:
        """Number of this process's replica."""
        return self.rank // self.n_shards

    @property
    def shard(self) -> int:
        """Number of this process's shard."""
        return self.rank % self.n_shards

    def size(self, group: Group) -> int:
        """Members of a group."""
        return {"shards": self.n_shards, "replicas": self.n_replicas, "all": self.n_ranks}[group]

    def latents(self, n_latents: int, shard: int | None = None) -> slice:
        """The latents of this shard (or of another), cut as `torch.chunk` cuts: equal parts but for the last.

        Raises:
            TopkapiError: a shard would have none.
        """
        part = -(-n_latents // self.n_shards)
        if (self.n_shards - 1) * part >= n_latents:
            raise TopkapiError(f"{n_latents} latents do not fill {self.n_shards} shards: lower --parallel.shards.")
        start = (self.shard if shard is None else shard) * part
        return slice(start, min(start + part, n_latents))

    def sum_(self, x: Tensor, group: Group) -> Tensor:
        """`x` becomes the sum over the group's members."""
        if self.size(group) > 1:
            dist.all_reduce(x, group=self._group(group))
        return x

    def start_sum_(self, x: Tensor, group: Group) -> Callable[[], None]:
        """Start `sum_`, which goes on beside the work that follows; what comes back waits for it."""
        if self.size(group) == 1:
            return lambda: None
        return dist.all_reduce(x, group=self._group(group), async_op=True).wait

    def ordered_sum(self, x: Tensor, group: Group) -> Tensor:
        """The sum over the group's members, added up in their order, for small tensors.

        All members get the same bits, and so do groups whose members have the same bits: `sum_` may add up in another
        order elsewhere, and what is the same everywhere, as pre_bias is, must not drift apart.
        """
        return x if self.size(group) == 1 else self.gather(x[None], group).sum(0)

    def max_(self, x: Tensor, group: Group) -> Tensor:
        """`x` becomes the largest over the group's members."""
        if self.size(group) > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self._group(group))
        return x

    def gather(self, x: Tensor, group: Group) -> Tensor:
        """The members' tensors, of one shape, under each other: (members len(x), ...), by member."""
        if self.size(group) == 1:
            return x
        out = x.new_empty(self.size(group) * x.shape[0], *x.shape[1:])
        _all_gather(out, x.contiguous(), group=self._group(group))
        return out

    def scatter_sum(self, x: Tensor, group: Group) -> Tensor:
        """This member's part of the rows of the sum; len(x) is a multiple of the members."""
        if self.size(group) == 1:
            return x
        out = x.new_empty(len(x) // self.size(group), *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), group=self._group(group))
        return out

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """`x` becomes that of rank `source`."""
        if self.n_ranks > 1:
            dist.broadcast(x, source)
        return x

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, by rank."""
        if self.n_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.n_ranks
        dist.all_gather_object(values, value)
        return values

    def _group(self, group: Group) -> dist.ProcessGroup:
        return dist.group.WORLD if group == "all" else self.device_mesh.get_group(group)


ALONE = Mesh()


def launched() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def open_mesh(n_shards: int, device_type: str, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Mesh]:
    """The mesh of the processes that were launched together, for as long as the block lasts.

    On CUDA a process takes the device of its LOCAL_RANK. A process that was not launched is alone.

    Raises:
        TopkapiError: the processes cannot be divided into replicas of `n_shards`.
    """
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks % n_shards:
        raise TopkapiError(
            f"{n_ranks} process{'es' * (n_ranks > 1)} cannot hold replicas of {n_shards} shards: launch a multiple of "
            f"them (torchrun --nproc-per-node {n_shards} -m topkapi ...), or set --parallel.shards."
        )
    if n_ranks == 1:
        yield Mesh()
        return
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout)
    try:
        shape = (n_ranks // n_shards, n_shards)
        device_mesh = dist.init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "shards"))
        yield Mesh(*shape, dist.get_rank(), device_mesh)
    finally:
        dist.destroy_process_group()
