"""Milliseconds of pieces of work, timed in rounds: in each round every piece once, so that a slow moment hits all.

On a GPU the clock is device events, and the host queues rounds ahead, as a training loop does: what is timed is the
device, with its idle time where the host is too slow. On a CPU it is the wall clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Written before pieces that must not find their inputs in a cache; on a GPU long enough for the piece to be queued.
COLD_BYTES = {"cuda": 2**30, "cpu": 2**26}
Work = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one piece of work over the rounds."""

    rounds: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and ninth decile: what most rounds lie between."""
        if len(self.rounds) < 3:
            return min(self.rounds), max(self.rounds)
        deciles = statistics.quantiles(self.rounds, n=10, method="inclusive")
        return deciles[0], deciles[-1]

    def over(self, other: "Timing") -> float:
        """Median over rounds of the ratio to another piece timed in the same rounds."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))

    def to_dict(self) -> dict[str, object]:
        """For bench.json."""
        return {"ms": self.ms, "p10": self.spread[0], "p90": self.spread[1], "rounds": list(self.rounds)}


def measure(
    work: Work, device: torch.device, *, rounds: int, seconds: float, warmup: int = 2, cold: bool = False
) -> dict[str, Timing]:
    """Time each piece of `work`: at most `rounds` rounds, fewer where they would take more than `seconds`, at least 3.

    `cold` overwrites the caches before each piece; without it, what the piece before left there is found.
    """
    for _ in range(max(warmup, 1)):
        started = time.perf_counter()
        for run in work.values():
            run()
        synchronize(device)
        once = time.perf_counter() - started
    rounds = max(3, min(rounds, int(seconds / max(once, 1e-9))))
    timed = _device_rounds if device.type == "cuda" else _host_rounds
    found = timed(work, device, rounds, cold)
    return {name: Timing(tuple(times)) for name, times in found.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_rounds(work: Work, device: torch.device, rounds: int, cold: bool) -> dict[str, list[float]]:
    junk = torch.empty(COLD_BYTES[device.type] if cold else 0, dtype=torch.int8, device=device)
    events = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cold:
                junk.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _host_rounds(work: Work, device: torch.device, rounds: int, cold: bool) -> dict[str, list[float]]:
    junk = torch.empty(COLD_BYTES[device.type] if cold else 0, dtype=torch.int8, device=device)
    found = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            if cold:
                junk.zero_()
            started = time.perf_counter()
            run()
            found[name].append((time.perf_counter() - started) * 1e3)
    return found


def host_time(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Milliseconds the host needs to queue the work: far below the device's where nothing waits for it."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    synchronize(device)
    return statistics.median(times)


class PeakMemory:
    """Bytes of device memory: `reset` marks now as nothing, `bytes` is the most that was held since, None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start again from what is held now."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    @property
    def bytes(self) -> int | None:
        """The most held since, beyond what was held then."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.before
