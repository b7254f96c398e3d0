"""Other projects' training steps, timed at a case's shape: the same, or the largest batch that fits in memory."""

import gc
from collections.abc import Mapping
from typing import Any

import torch

from topkapi.bench.cases import Case
from topkapi.bench.peers import Peer, PeerConfig, make_peers
from topkapi.bench.timing import PeakMemory, Timing, measure
from topkapi.bench.workload import LR, Planted

SMALLEST_BATCH = 256  # tokens; a peer for which even this is too much is reported as failed


def time_peers(
    case: Case,
    device: torch.device,
    largest: Mapping[str, int],
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A record for each peer that is installed: milliseconds, batch and memory of its step on the case's inputs.

    `largest` names the peers, each with the batch that is tried first at most. Dense latents are not planted in peers;
    dead ones are.
    """
    found = []
    for name, limit in largest.items():
        for batch in _halvings(case.batch_tokens, limit):
            try:
                record = _time_peer(name, case, batch, device, rounds, seconds)
            except RuntimeError as error:  # out of memory, or more elements than some operation of theirs can count
                record = {"name": name, "version": "", "batch_tokens": batch, "failure": _reason(error)}
            gc.collect()  # peers hold cycles, and an exception the frames of a failed attempt
            if record is None or "failure" not in record:
                break
        if record is not None:
            found.append(record)
    return found


def _reason(error: RuntimeError) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _halvings(batch: int, limit: int) -> list[int]:
    sizes = [batch]
    while sizes[-1] // 2 >= SMALLEST_BATCH:
        sizes.append(sizes[-1] // 2)
    return [size for size in sizes if size <= limit] or sizes[-1:]


def _time_peer(
    name: str, case: Case, batch: int, device: torch.device, rounds: int, seconds: float
) -> dict[str, Any] | None:
    """One peer's record at one batch size; None if its package is not installed."""
    planted = Planted(case, device)
    raw = planted.raw()[:batch].contiguous()
    memory = PeakMemory(device)
    config = PeerConfig(
        d_model=case.d_model,
        n_latents=case.n_latents,
        k=case.k,
        device=device,
        total_steps=10_000,
        batch_tokens=batch,
        sample=raw,
        lr=LR,
        auxk_coefficient=1 / 32,
    )
    made = make_peers([name], config)
    if not made:
        return None
    peer: Peer = made[0]
    if len(planted.dead):
        peer.silence(planted.dead)
    timing: Timing = measure({name: lambda: peer.step(raw)}, device, rounds=rounds, seconds=seconds)[name]
    return {
        "name": name,
        "version": peer.version,
        "batch_tokens": batch,
        "timing": timing,
        "tokens_per_second": batch / timing.ms * 1e3,
        "peak_bytes": memory.bytes,
        "dead": int(peer.dead().sum()),
        "settings": peer.settings,
    }
