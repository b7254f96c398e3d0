"""Batches made ready on a CUDA device while the steps before them are computed.

1. A thread reads or computes the next block, on a lane (stream) of its own, while batches are cut from the one in use.
   It begins when the block before that one is no longer read: there are two in memory at most.
2. Batches are gathered on a second lane into two buffers in turn, each as soon as its rows are there and the training
   stream has been given the last work that reads what the buffer held.
3. The training loop waits for a batch only where the language model or the disk is slower than training; nothing
   stalls the device. An exception of the thread is raised where the batch that needs its block is asked for.

Batches and their order are those of `topkapi.data.batches.ShuffledBatches`, and so is the state that is saved: it
belongs to the batch handed out, not to those gathered since.

Several processes compute blocks together, each in its thread, with process groups of their own, in the order that is
the same everywhere. How far the threads have come differs, so closing is an agreement too: who has begun fewer blocks
than another says that he declines the rest, and no thread waits for one that will not come.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

import torch
from jaxtyping import BFloat16
from torch import Tensor

from topkapi.data.activations import Blocks, LiveBlocks
from topkapi.data.batches import Opened, ShuffledBatches
from topkapi.data.transfer import Lane, Moment, follow, now, to_device, wait
from topkapi.parallel import ALONE, Mesh


class _Closed(Exception):
    """Ends the reading of a block that nobody needs any more."""


class _Coming(NamedTuple):
    """A block that the thread works on, or has ready."""

    epoch: int
    place: int
    block: Future[Opened]


@dataclass
class _Buffer:
    """A batch that is being gathered."""

    x: Tensor
    n_rows: int = 0
    """Rows gathered so far, those of other replicas counted."""
    following: dict[str, int] = field(default_factory=dict)
    """Where the batch after this one starts; set with `gathered`, when all rows are there."""
    gathered: Moment = None


class BatchesAhead(ShuffledBatches):
    """The batches of `ShuffledBatches`, made ready ahead of time on `device`.

    A batch may be read by work given to the current stream before the next batch is asked for, and by no other: its
    memory is used again. In memory: two blocks and two batches. `close` ends the thread.
    """

    def __init__(self, blocks: Blocks, batch_tokens: int, seed: int, device: torch.device, mesh: Mesh = ALONE) -> None:
        super().__init__(blocks, batch_tokens, seed, mesh)
        self.device = device
        self._reading, self._gathering = Lane(device), Lane(device, urgent=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="topkapi-blocks")
        self._closed = Event()
        self._coming: _Coming | None = None
        self._n_harvests = 0  # given to the thread
        shape = self._bounds.stop - self._bounds.start, blocks.d_model
        self._buffers = [_Buffer(torch.empty(shape, dtype=torch.bfloat16, device=device)) for _ in range(2)]
        self._handed_out = super().state()

    def __next__(self) -> BFloat16[Tensor, "rows d_model"]:
        self._gathering.after(now(self.device))  # what reads the batch handed out last is behind this
        batch, other = self._buffers
        self._gather_(batch, may_wait=True)
        follow(batch.gathered, self.device)
        self._handed_out, batch.n_rows = batch.following, 0
        self._buffers = [other, batch]
        self._gather_(other, may_wait=False)
        return batch.x

    def state(self) -> dict[str, int]:
        """Where the batch after the one handed out last starts."""
        return self._handed_out

    def load_state(self, state: dict[str, int]) -> None:
        """Go on exactly where `state` was taken; raises as `ShuffledBatches.load_state` does."""
        super().load_state(state)
        self._handed_out = super().state()
        for buffer in self._buffers:
            buffer.n_rows = 0

    def sample(self, rows: int) -> BFloat16[Tensor, "rows_or_fewer d_model"]:
        """As `ShuffledBatches.sample`; the next block is begun meanwhile."""
        found = super().sample(rows)
        self._gathering.after(now(self.device))  # the current stream read the block, which no one may free before
        return found

    def abandon(self) -> None:
        """`close` where a process has failed: the thread may wait for it for ever, and is left behind."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the thread, soon even in the middle of a block, and free the device's memory."""
        self._closed.set()
        most = max(self.mesh.gather_objects(self._n_harvests))
        for _ in range(most - self._n_harvests):
            self._thread.submit(self.blocks.mesh.raise_any, _Closed())
        self._thread.shutdown(cancel_futures=self.mesh.n_ranks == 1)
        wait(self._gathering.now())
        wait(now(self.device))
        self._coming, self._buffers = None, []
        super().close()

    def _gather_(self, batch: _Buffer, may_wait: bool) -> None:
        """Gather what is missing of a batch; without `may_wait` only from blocks that are ready."""
        if batch.n_rows == self.batch_tokens:
            return
        with self._gathering.in_use():
            while batch.n_rows < self.batch_tokens:
                if not (may_wait or self._is_ready()):
                    return
                x, rows = self._take(self.batch_tokens - batch.n_rows)
                mine = self._mine(rows, batch.n_rows)
                place = max(batch.n_rows - self._bounds.start, 0)
                torch.index_select(x, 0, mine, out=batch.x[place : place + len(mine)])
                batch.n_rows += len(rows)
                del x, rows, mine  # or a block that was left lives on until the next is gathered from
        batch.following, batch.gathered = super().state(), self._gathering.now()

    def _is_ready(self) -> bool:
        """Whether the next rows can be had at once; not where there is an exception to raise in due time."""
        epoch, place = self._epoch, self._place
        if self._is_open(epoch, place):
            return True
        coming = self._coming
        if coming is None or (coming.epoch, coming.place) != (epoch, place) or not coming.block.done():
            return False
        return coming.block.exception() is None

    def _is_open(self, epoch: int, place: int) -> bool:
        return self._open is not None and (self._open.epoch, self._open.number) == (epoch, self._number(epoch, place))

    def _opened(self, epoch: int, place: int) -> Opened:
        """The block at a place of an epoch's order, made ready by the thread, which goes on to the one after it."""
        if self._is_open(epoch, place):
            return self._open
        coming = self._coming
        if coming is None or (coming.epoch, coming.place) != (epoch, place):
            coming = self._begin(epoch, place)
        opened = coming.block.result()
        # The old block's memory goes back to the reading lane, and may be asked for by its thread alone, which waits
        # in `_begin` for all that was gathered from it.
        self._open = opened
        self._begin(*self._following(epoch, place))
        return opened

    def _begin(self, epoch: int, place: int) -> _Coming:
        """Let the thread make a block ready after what has been gathered so far."""
        number, last = self._number(epoch, place), self._open
        x = last.x if last is not None and last.number == number else None
        self._n_harvests += x is None and isinstance(self.blocks, LiveBlocks)
        block = self._thread.submit(self._make_ready, epoch, number, x, self._gathering.now())
        self._coming = _Coming(epoch, place, block)
        return self._coming

    def _make_ready(self, epoch: int, number: int, x: Tensor | None, after: Moment) -> Opened:
        """In the thread: a block and its order on the device; `x` where that block is in memory already."""
        wait(after)
        with self._reading.in_use():
            # before the block, while the device works off the steps behind: drawing it takes milliseconds of the CPU
            order = self._order(epoch, number, self.blocks.most_rows(number) if x is None else len(x))
            x = to_device(self._read(number), self.device) if x is None else x
            if len(order) != len(x):
                order = self._order(epoch, number, len(x))
            order = to_device(order, self.device)
        wait(self._reading.now())
        return Opened(epoch, number, x, order)

    def _read(self, number: int) -> Tensor:
        if isinstance(self.blocks, LiveBlocks):
            return self.blocks.harvest(number, self._stop_if_closed)[0].x
        return self.blocks[number].x

    def _stop_if_closed(self, _: int) -> None:
        if self._closed.is_set():
            raise _Closed


def open_batches(
    blocks: Blocks, batch_tokens: int, seed: int, device: torch.device, mesh: Mesh = ALONE
) -> ShuffledBatches:
    """The batches of a run that trains on `device`: ahead of time on a CUDA device, one after another on a CPU."""
    if device.type == "cuda":
        return BatchesAhead(blocks, batch_tokens, seed, device, mesh)
    return ShuffledBatches(blocks, batch_tokens, seed, mesh)
