"""Training batches: rows of activation blocks in an order that depends on the seed alone.

Epoch e visits the blocks in an order drawn from (seed, e), and the rows of a block in an order drawn from
(seed, e, block). The place in that order is three integers, so that a run resumes exactly without saving any
activations: only the block in use is read again.

Each replica of a mesh takes its part of every batch, so that all of them together train on the batches of one process,
in the same order.

`topkapi.data.pipeline` makes the same batches ready ahead of time for a CUDA device.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import BFloat16, Int64
from torch import Tensor

from topkapi.data.activations import Blocks
from topkapi.errors import TopkapiError
from topkapi.parallel import ALONE, Mesh


@lru_cache(maxsize=4)
def _order_of_blocks(seed: int, epoch: int, n_blocks: int) -> Int64[np.ndarray, " n_blocks"]:
    return np.random.default_rng([seed, epoch]).permutation(n_blocks)


def part_of_batch(batch_tokens: int, mesh: Mesh) -> slice:
    """The places in a batch that are this replica's."""
    if batch_tokens % mesh.n_replicas:
        below = batch_tokens - batch_tokens % mesh.n_replicas
        raise TopkapiError(
            f"--batch-tokens {batch_tokens} cannot be divided among {mesh.n_replicas} replicas: take "
            f"{below or mesh.n_replicas}, or fewer processes."
        )
    n = batch_tokens // mesh.n_replicas
    return slice(mesh.replica * n, (mesh.replica + 1) * n)


class Opened(NamedTuple):
    """A block in memory, and its rows in the order of an epoch."""

    epoch: int
    number: int
    x: BFloat16[Tensor, "rows d_model"]
    order: Int64[Tensor, " rows"]


class ShuffledBatches:
    """Iterator without end over batches of raw activations: of each batch_tokens rows those of this replica.

    A batch may span blocks and epochs. In memory: one block and the batch. Batches are on the blocks' device.

    Raises:
        TopkapiError: batch_tokens cannot be divided among the replicas.
    """

    def __init__(self, blocks: Blocks, batch_tokens: int, seed: int, mesh: Mesh = ALONE) -> None:
        self.blocks, self.batch_tokens, self.seed, self.mesh = blocks, batch_tokens, seed, mesh
        self._bounds = part_of_batch(batch_tokens, self.mesh)
        self._epoch = self._place = self._row = self._n_empty = 0
        self._open: Opened | None = None

    def __iter__(self) -> "ShuffledBatches":
        return self

    def __next__(self) -> BFloat16[Tensor, "rows d_model"]:
        pieces: list[Tensor] = []
        done = 0
        while done < self.batch_tokens:
            x, rows = self._take(self.batch_tokens - done)
            pieces.append(x[self._mine(rows, done)])
            done += len(rows)
        return torch.cat(pieces)

    def state(self) -> dict[str, int]:
        """Where the next batch starts: epoch, place in its order of blocks, row in that block's order."""
        return {"epoch": self._epoch, "place": self._place, "row": self._row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            TopkapiError: it was taken from another stream of batches.
        """
        if set(state) != {"epoch", "place", "row"} or not (
            min(state.values()) >= 0 and state["place"] < len(self.blocks)
        ):
            raise TopkapiError(
                f"State {state} does not fit these activations of {len(self.blocks)} blocks: it was saved for others."
            )
        self._epoch, self._place, self._row = state["epoch"], state["place"], state["row"]

    def sample(self, rows: int) -> BFloat16[Tensor, "rows_or_fewer d_model"]:
        """Up to `rows` rows from the beginning of epoch 0's first block, without moving on.

        That block stays in memory, so that a run which starts there computes it once.
        """
        opened = self._opened(0, 0)
        return opened.x[opened.order[:rows]]

    def close(self) -> None:
        """Let go of what is in memory; no batch can be had after that. All processes of a mesh close together."""
        self._open = None

    def abandon(self) -> None:
        """`close` where a process has failed: nothing is waited for."""
        self._open = None

    def _mine(self, rows: Int64[Tensor, " n"], done: int) -> Int64[Tensor, " m"]:
        """Of rows that fill a batch from place `done` on, those of this replica."""
        start, stop = (min(max(bound - done, 0), len(rows)) for bound in (self._bounds.start, self._bounds.stop))
        return rows[start:stop]

    def _take(self, most: int) -> tuple[BFloat16[Tensor, "rows d_model"], Int64[Tensor, " n"]]:
        """A block and the numbers of its rows that come next, at most `most` and perhaps none; moves on behind them."""
        _, _, x, order = self._opened(self._epoch, self._place)
        rows = order[self._row : self._row + most]
        self._row += len(rows)
        if self._row >= len(order):
            self._row, (self._epoch, self._place) = 0, self._following(self._epoch, self._place)
        self._n_empty = 0 if len(rows) else self._n_empty + 1
        if self._n_empty >= 2 * len(self.blocks):  # so one epoch was empty, wherever it began
            raise TopkapiError(
                "No token of the corpus is kept: relax --data.max-norm-ratio, or set --data.no-drop-special-tokens."
            )
        return x, rows

    def _following(self, epoch: int, place: int) -> tuple[int, int]:
        return (epoch, place + 1) if place + 1 < len(self.blocks) else (epoch + 1, 0)

    def _number(self, epoch: int, place: int) -> int:
        """The block at a place of an epoch's order."""
        return int(_order_of_blocks(self.seed, epoch, len(self.blocks))[place])

    def _order(self, epoch: int, number: int, rows: int) -> Int64[Tensor, " rows"]:
        """The order of a block's rows in an epoch, on the CPU."""
        return torch.from_numpy(np.random.default_rng([self.seed, epoch, number]).permutation(rows))

    def _opened(self, epoch: int, place: int) -> Opened:
        """The block at a place of an epoch's order, read unless it is the one in memory."""
        number, last = self._number(epoch, place), self._open
        if last is None or (last.epoch, last.number) != (epoch, number):
            self._open = None  # frees the memory before the next block takes as much
            x = last.x if last is not None and last.number == number else None
            del last
            x = self.blocks[number].x if x is None else x
            self._open = Opened(epoch, number, x, self._order(epoch, number, len(x)).to(x.device))
        return self._open
