"""Which latents are dead: silent for so many tokens.

A step needs the dead latents as a list whose length the host knows, and a GPU that is asked for one stands still while
the answer travels and the next work is prepared. So on a GPU lists are made ahead. After each batch the device lists
the latents that can be dead one batch later, and sends their number on its way; a step uses the list of the batch
before the last, which has long arrived, and leaves out on the device those that have fired since. The set is exact,
and which list serves a step depends on the calls alone, not on timing.

Shards have lists of one length, the longest that any of them needs, so that all of them decide alike what a step does.
"""

from collections import deque
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from topkapi.gradients import PADDING, DeadSubset
from topkapi.parallel import ALONE, Mesh


@dataclass(frozen=True)
class _Candidates:
    """The latents that can be silent for `dead_after` tokens until the clock shows `valid_until`."""

    dead_after: int
    valid_until: int
    latents: Int[Tensor, " buffer"]
    """Ascending, then n_latents."""
    count: Int[Tensor, ""] | None
    """How many of them are latents, on the shard with most, on the host once `arrived`; None for none."""
    arrived: torch.cuda.Event | None

    def padded(self) -> Int[Tensor, " m"]:
        """The latents, padded to a multiple of PADDING."""
        if self.count is None:
            return self.latents[:0]
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.latents[: -(-int(self.count) // PADDING) * PADDING]


class DeadCounter:
    """Tokens since each latent last fired (had a value > 0), counted in tokens whatever the batch size.

    `silent_for` is the whole state, and may be written to from outside; on a mesh by all processes at the same time.
    There `n_latents` are this shard's, `fired` and the tokens those of the whole batch.
    """

    def __init__(self, n_latents: int, device: torch.device | str = "cpu", mesh: Mesh = ALONE) -> None:
        self.silent_for: Int[Tensor, " n_latents"] = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.mesh = mesh
        self._largest_shard = int(mesh.max_(torch.tensor(n_latents, device=device), "shards"))
        self.lists_ahead = self.silent_for.is_cuda
        self._clock = 0  # tokens counted
        self._longest = 0  # no latent has been silent for longer
        self._wanted: tuple[int, int] | None = None  # dead_after and batch size of the last call of `subset`
        self._lists: deque[_Candidates] = deque(maxlen=2)  # of the batch before the last, and of the last
        self._seen = (self.silent_for, self.silent_for._version)

    def dead(self, dead_after: int) -> Bool[Tensor, " n_latents"]:
        """Latents silent for at least `dead_after` tokens."""
        return self.silent_for >= dead_after

    def count_(self, fired: Bool[Tensor, " n_latents"], n_tokens: int) -> None:
        """Add a batch of `n_tokens`, in which the latents `fired` fired."""
        self._notice_changes()
        self.silent_for.add_(n_tokens).masked_fill_(fired, 0)
        self._clock, self._longest = self._clock + n_tokens, self._longest + n_tokens
        self._seen = (self.silent_for, self.silent_for._version)
        if self.lists_ahead and self._wanted is not None:
            self._lists.append(self._candidates(*self._wanted))

    def subset(self, dead_after: int, n_tokens: int) -> DeadSubset:
        """The dead latents as the next step wants them; its batch and those to come have `n_tokens`.

        Waits for the device the first time, and after `silent_for` was written to or the batch grew.
        """
        if not self.lists_ahead:
            return DeadSubset.of(self.dead(dead_after), mesh=self.mesh)
        self._notice_changes()
        self._wanted = (dead_after, n_tokens)
        if self._lists and (self._lists[0].dead_after != dead_after or self._lists[0].valid_until < self._clock):
            self._lists.clear()
        if not self._lists:
            self._lists.append(self._candidates(dead_after, n_tokens))
        latents = self._lists[0].padded()
        n_latents = len(self.silent_for)
        silent_for = self.silent_for[latents.clamp(max=n_latents - 1)]
        return DeadSubset(latents, (silent_for >= dead_after) & (latents < n_latents))

    def _candidates(self, dead_after: int, n_tokens: int) -> _Candidates:
        """The latents that can be dead now, or when another batch of `n_tokens` has passed."""
        valid_until, n_latents = self._clock + n_tokens, len(self.silent_for)
        if self._longest + n_tokens < dead_after:
            return _Candidates(dead_after, valid_until, self.silent_for[:0], None, None)
        near = self.silent_for >= dead_after - n_tokens
        size = -(-self._largest_shard // PADDING) * PADDING
        latents = torch.nonzero_static(near, size=size, fill_value=n_latents).flatten()
        most = self.mesh.max_(near.sum(), "shards")
        if not near.is_cuda:
            return _Candidates(dead_after, valid_until, latents, most, None)
        count = torch.empty((), dtype=torch.int64, pin_memory=True)
        count.copy_(most, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Candidates(dead_after, valid_until, latents, count, arrived)

    def _notice_changes(self) -> None:
        """Forget what was known of `silent_for` if it was written to, or replaced, from outside."""
        tensor, version = self._seen
        if tensor is self.silent_for and tensor._version == version:
            return
        self._lists.clear()
        longest = self.silent_for.max() if len(self.silent_for) else torch.zeros((), dtype=torch.int64)
        self._longest = int(self.mesh.max_(longest.clone(), "shards"))
        self._seen = (self.silent_for, self.silent_for._version)
