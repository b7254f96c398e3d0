"""Processes that train one autoencoder together, and the few collectives they need.

The mesh is replicas x shards. The n_shards processes of a replica hold the autoencoder together: each has a contiguous
range of latents to compute with, and all of them read the same tokens. Replicas read different tokens. What belongs to
a latent and is not computed with, the parameters that the optimiser changes and its state, exists once: the replicas of
a shard divide its latents among themselves, and each process is the owner of one part (`Mesh.owned`). Ranks count
through the shards first, so that a replica's processes are neighbours and, where they fit, on one node.

Every collective is the identity where the group has one member, so that one process and many run the same lines; it is
ordered with the work of the current stream before and after it. `topkapi` is launched as any PyTorch program is:

    torchrun --nproc-per-node 8 -m -- topkapi train ... --parallel.shards 4        # 2 replicas of 4 shards
"""

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from topkapi.console import console
from topkapi.errors import TopkapiError
from topkapi.launch import launched, speaks

T = TypeVar("T")
Arrays = tuple[np.ndarray, ...]
PATIENCE = timedelta(days=30)  # for a rank that tokenizes, say; one that is gone is noticed at once all the same
LOOK_FOR = 5.0  # seconds in which the rank that failed says so, or its process is seen to be gone

# Newer PyTorch has them under new names and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPENED = itertools.count()  # meshes opened by this process

Group = Literal["shards", "replicas", "all"]
"""The processes of this replica; those with this shard's latents; everyone."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among those that train one autoencoder. `Mesh()` is a process alone."""

    n_replicas: int = 1
    n_shards: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    """With dimensions "shards" and "replicas", so that owners come in the order of their latents; None for a process
    alone."""
    world: dist.ProcessGroup | None = None
    """The group of everyone; None for the default one."""

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
            raise TopkapiError(
                f"{n_latents:,} latents do not fill {self.n_shards} shards: take fewer shards, or more latents."
            )
        start = (self.shard if shard is None else shard) * part
        return slice(start, min(start + part, n_latents))

    def owned(self, n_latents: int, rank: int | None = None) -> slice:
        """The latents of which this process (or another) has parameters and optimiser state: this replica's part of
        the shard's, cut in the same way.

        Raises:
            TopkapiError: a process would have none.
        """
        replica, shard = divmod(self.rank if rank is None else rank, self.n_shards)
        whole = self.latents(n_latents, shard)
        part = self.largest_part(whole.stop - whole.start)
        if (self.n_replicas - 1) * part >= whole.stop - whole.start:
            raise TopkapiError(
                f"{n_latents:,} latents on {self.n_shards} shards do not fill {self.n_replicas} replicas: take fewer "
                "processes, or more latents."
            )
        start = whole.start + replica * part
        return slice(start, min(start + part, whole.stop))

    def largest_part(self, n_rows: int) -> int:
        """Rows that a replica owns of the `n_rows` of a shard, at most."""
        return -(-n_rows // self.n_replicas)

    def sum_(self, x: Tensor, group: Group) -> Tensor:
        """`x` becomes the sum over the group's members."""
        if self.size(group) > 1:
            dist.all_reduce(x, group=self._group(group))
        return x

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
        return self.start_gather(x, group)()

    def start_gather(self, x: Tensor, group: Group, out: Tensor | None = None) -> Callable[[], Tensor]:
        """Start `gather`, which goes on beside the work that follows; what comes back waits for it and returns it.

        `x` may be this member's part of `out`.
        """
        if self.size(group) == 1:
            return lambda: x
        if out is None:
            out = x.new_empty(self.size(group) * x.shape[0], *x.shape[1:])
        return _later(_all_gather(out, x.contiguous(), group=self._group(group), async_op=True), out)

    def gather_rows(self, owned: Tensor, n_rows: int) -> Tensor:
        """The `n_rows` rows of this shard, of which each replica has those that it owns."""
        if self.n_replicas == 1:
            return owned
        rows = owned.new_zeros(self.largest_part(n_rows), *owned.shape[1:])
        rows[: len(owned)] = owned
        return self.gather(rows, "replicas")[:n_rows]

    def scatter_sum(self, x: Tensor, group: Group) -> Tensor:
        """This member's part of the rows of the sum; len(x) is a multiple of the members."""
        return self.start_scatter_sum(x, group)()

    def start_scatter_sum(self, x: Tensor, group: Group) -> Callable[[], Tensor]:
        """Start `scatter_sum`, which goes on beside the work that follows; what comes back waits for it."""
        if self.size(group) == 1:
            return lambda: x
        out = x.new_empty(len(x) // self.size(group), *x.shape[1:])
        return _later(_reduce_scatter(out, x.contiguous(), group=self._group(group), async_op=True), out)

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """`x` becomes that of rank `source`."""
        if self.n_ranks > 1:
            dist.broadcast(x, source, group=self._group("all"))
        return x

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, by rank."""
        if self.n_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.n_ranks
        dist.all_gather_object(values, value, group=self._group("all"))
        return values

    def max_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to make `x`, on the CPU, the largest over all ranks; the function returned waits for it."""
        work = dist.all_reduce(x, dist.ReduceOp.MAX, group=self._group("all"), async_op=True)

        def found() -> Tensor:
            work.wait()
            return x

        return found

    def on_first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on every rank; an exception too. The value must be picklable."""
        if self.n_ranks == 1:
            return call()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = call()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group("all"))
        value, error = outcome
        if error is not None:
            error.is_common = True
            raise error
        return value

    def rows_on_first(self, owned: Tensor, n_latents: int) -> Tensor | None:
        """The rows of all owners on the CPU of rank 0, in the order of latents; None elsewhere."""
        owned = owned.cpu()
        if self.n_ranks == 1:
            return owned
        if self.rank > 0:
            dist.send(owned.contiguous(), 0, group=self._group("all"))
            return None
        rows = owned.new_empty(n_latents, *owned.shape[1:])
        rows[self.owned(n_latents)] = owned
        for rank in range(1, self.n_ranks):
            dist.recv(rows[self.owned(n_latents, rank)], rank, group=self._group("all"))
        return rows

    def in_order_on_first(self, items: Iterable[Arrays]) -> Iterator[Arrays]:
        """On rank 0 the items of every rank, in the order of ranks, each when it is asked for; elsewhere none.

        All ranks go through it, the others to send theirs: as rank 0 takes them, and computed while it is busy.
        """
        if self.rank > 0:
            for item in items:
                self._send_first(item)
            self._send_first(None)
            return
        yield from items
        for rank in range(1, self.n_ranks):
            while (item := self._received(rank)) is not None:
                yield item

    def _send_first(self, item: Arrays | None) -> None:
        group, shapes = self._group("all"), None if item is None else [(part.dtype.str, part.shape) for part in item]
        dist.send_object_list([shapes], 0, group=group)
        for part in item or ():
            if part.size:
                dist.send(torch.from_numpy(np.ascontiguousarray(part).view(np.uint8)), 0, group=group)

    def _received(self, rank: int) -> Arrays | None:
        group, shapes = self._group("all"), [None]
        dist.recv_object_list(shapes, rank, group=group)
        if shapes[0] is None:
            return None
        item = tuple(np.empty(shape, dtype) for dtype, shape in shapes[0])
        for part in item:
            if part.size:
                dist.recv(torch.from_numpy(part.view(np.uint8)), rank, group=group)
        return item

    def raise_any(self, failure: Exception | None) -> None:
        """Raise, on every rank, the exception of one that has any: its own where there is one."""
        found = [error for error in self.gather_objects(failure) if error is not None]
        if found:
            error = failure or found[0]
            error.is_common = True
            raise error

    def first_before_others(self, call: Callable[[], T]) -> T:
        """What `call` returns here; rank 0 is done with it before the others begin."""
        found: list[T] = []
        self.on_first(lambda: found.append(call()))
        return found[0] if found else call()

    def apart(self) -> "Mesh":
        """The same ranks with a group of their own for collectives over "all", for a thread beside training.

        It waits as long as it takes.
        """
        return self if self.n_ranks == 1 else replace(self, world=dist.new_group(timeout=PATIENCE))

    def _group(self, group: Group) -> dist.ProcessGroup:
        if group == "all":
            return self.world or dist.group.WORLD
        return self.device_mesh.get_group(group)


def _later(work: dist.Work, out: Tensor) -> Callable[[], Tensor]:
    """Wait for a collective, and return what it made."""

    def finish() -> Tensor:
        work.wait()
        return out

    return finish


ALONE = Mesh()


def device_of(device_type: str) -> torch.device:
    """The device of this process: on CUDA, where several were launched, that of its LOCAL_RANK.

    Raises:
        TopkapiError: there is none.
    """
    if device_type == "cuda" and launched():
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise TopkapiError(f"no GPU for process {number} of this machine, which has {count}: launch one a GPU.")
        return torch.device("cuda", number)
    return torch.device(device_type)


@contextmanager
def open_mesh(n_shards: int, device_type: str, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Mesh]:
    """The mesh of the processes that were launched together, for as long as the block lasts.

    On CUDA a process takes the device of its LOCAL_RANK. A process that was not launched is alone. Of several only
    rank 0 writes to the console, and when one fails, only the one that explains it: see `_Ending`.

    Raises:
        TopkapiError: the processes cannot be divided into replicas of `n_shards`.
    """
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks % n_shards:
        raise TopkapiError(
            f"{n_ranks} process{'es' * (n_ranks > 1)} cannot hold replicas of {n_shards} shards: launch a multiple of "
            f"them (torchrun --nproc-per-node {n_shards} -m -- topkapi ...), or set --parallel.shards to a divisor."
        )
    if n_ranks == 1:
        yield Mesh()
        return
    console.quiet = not speaks()
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"topkapi {next(_OPENED)}", store)  # where nothing of an earlier mesh is found
    ending = _Ending(store, rank, n_ranks)
    try:
        backend = "gloo"
        if device_type == "cuda":
            torch.cuda.set_device(device_of(device_type))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=timeout)
        mesh = mesh_of(n_shards, rank, n_ranks, device_type)
        ending.processes = mesh.gather_objects((socket.gethostname(), os.getpid()))
        yield mesh
    except BaseException as error:
        explained = ending.explained(error)
        if explained is error:
            raise
        raise explained from error
    dist.destroy_process_group()


def mesh_of(n_shards: int, rank: int, n_ranks: int, device_type: str) -> Mesh:
    """The mesh of processes that are connected already; all of them call it."""
    ranks = torch.arange(n_ranks).view(-1, n_shards)
    device_mesh = DeviceMesh(device_type, ranks.T.contiguous(), mesh_dim_names=("shards", "replicas"))
    return Mesh(*ranks.shape, rank, device_mesh)


class _Ending:
    """Finds one rank that says why all of them end, and makes the others silent.

    1. A rank with an exception of its own speaks, unless another one spoke before.
    2. A rank whose collective failed is not the cause: it is silent if another one has spoken.
    3. If none has, a process that is gone was killed; the first to see that speaks for it.

    Process groups are left as they are: to close one can take for ever when a member is gone.
    """

    def __init__(self, store: dist.Store, rank: int, n_ranks: int) -> None:
        self.store, self.rank, self.n_ranks = store, rank, n_ranks
        self.processes: list[tuple[str, int]] = []
        """Host and process id of each rank."""

    def explained(self, error: BaseException) -> BaseException:
        """The exception to raise here; the console is quiet if another rank explains it."""
        if getattr(error, "is_common", False):  # every rank has it, and rank 0 tells
            return error
        if not _is_broken_connection(error):
            console.quiet = not self._claims()
            if isinstance(error, Exception):
                error.add_note(f"rank {self.rank} of {self.n_ranks}")
            return error
        gone, until = [], time.monotonic() + LOOK_FOR
        while not gone and not self._is_claimed() and time.monotonic() < until:
            time.sleep(0.05)
            gone = self._gone()
        console.quiet = not self._claims()
        if not gone:
            return TopkapiError(f"rank {self.rank} of {self.n_ranks} lost another rank: {_first_line(error)}")
        (rank, process), *_ = gone
        return TopkapiError(
            f"rank {rank} of {self.n_ranks} is gone (process {process} was killed, or crashed without a word); "
            "the others end with it."
        )

    def _claims(self) -> bool:
        """Whether this rank is the first that wants to speak; True where nobody can be asked any more."""
        try:
            return self.store.add("speakers", 1) == 1
        except RuntimeError:
            return True

    def _is_claimed(self) -> bool:
        try:
            return self.store.check(["speakers"])
        except RuntimeError:
            return False

    def _gone(self) -> list[tuple[int, int]]:
        """Rank and process id of those on this host that no longer run."""
        here = socket.gethostname()
        return [(rank, pid) for rank, (host, pid) in enumerate(self.processes) if host == here and not _runs(pid)]


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed, which is another rank's fault, or the network's."""
    text = str(error).lower()
    is_broken = isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text or "connection" in text)
    return is_broken or isinstance(error, dist.DistError)


def _runs(process: int) -> bool:
    """Whether a process of this host runs; one that has ended and waits to be asked how does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self").exists()  # a system without /proc does not tell
    return state not in ("Z", "X")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
