"""Training batches: rows of activation blocks in an order that depends on the seed alone.

Epoch e visits the blocks in an order drawn from (seed, e), and the rows of a block in an order drawn from
(seed, e, block). The place in that order is three integers, so that a run resumes exactly without saving any
activations: only the block in use is read again.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from topkapi.data.activations import Blocks
from topkapi.errors import TopkapiError


class _Open(NamedTuple):
    """The block in memory."""

    number: int
    x: Tensor


class ShuffledBatches:
    """Iterator without end over float32 (batch_tokens, d_model) batches of raw activations.

    A batch may span blocks and epochs. In memory: one block and the batch. Batches are on the blocks' device.
    """

    def __init__(self, blocks: Blocks, batch_tokens: int, seed: int) -> None:
        self.blocks, self.batch_tokens, self.seed = blocks, batch_tokens, seed
        self._epoch = self._place = self._row = 0
        self._open: _Open | None = None

    def __iter__(self) -> "ShuffledBatches":
        return self

    def __next__(self) -> Float32[Tensor, "batch_tokens d_model"]:
        pieces: list[Tensor] = []
        missing, empty = self.batch_tokens, 0
        while missing:
            x, order = self._block(self._epoch, self._place)
            rows = order[self._row : self._row + missing]
            pieces.append(x[rows].float())
            missing -= len(rows)
            self._row += len(rows)
            if self._row >= len(order):
                self._next_block()
            empty = 0 if len(rows) else empty + 1
            if empty == 2 * len(self.blocks):  # so one epoch was empty, wherever it began
                raise TopkapiError(
                    "No token of the corpus is kept: relax --data.max-norm-ratio, or set --data.no-drop-special-tokens."
                )
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

    def sample(self, rows: int) -> Float32[Tensor, "rows_or_fewer d_model"]:
        """Up to `rows` rows from the beginning of epoch 0's first block, without moving on.

        That block stays in memory, so that a run which starts there computes it once.
        """
        x, order = self._block(0, 0)
        return x[order[:rows]].float()

    def _next_block(self) -> None:
        self._row, self._place = 0, self._place + 1
        if self._place == len(self.blocks):
            self._epoch, self._place = self._epoch + 1, 0

    def _block(self, epoch: int, place: int) -> tuple[Tensor, Int64[Tensor, " rows"]]:
        """The block at a place of an epoch's order, and the order of its rows."""
        order_of_blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        number = int(order_of_blocks[place])
        if self._open is None or self._open.number != number:
            self._open = None  # frees the memory before the next block takes as much
            self._open = _Open(number, self.blocks[number].x)
        x = self._open.x
        order = np.random.default_rng([self.seed, epoch, number]).permutation(len(x))
        return x, torch.from_numpy(order).to(x.device)
