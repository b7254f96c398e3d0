"""`topkapi bench`: a training step and its parts, timed on this machine against what the machine can do at best.

For each case: the whole step, the encoder's matmul by the library in the same rounds, peak memory, the parts of the
step with the bytes or operations that they cannot do without, and how many of the exact k latents are found. Then, if
asked, where a profiler sees the time, and the same steps by other projects. All of it is written to a folder as
table.md, bench.json and pictures; what is finished is written as it comes.
"""

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from topkapi.bench import pictures, report
from topkapi.bench.cases import Case
from topkapi.bench.ceilings import Ceilings, ceilings, matmul_work
from topkapi.bench.profile import by_part, profile_steps
from topkapi.bench.timing import PeakMemory, Timing, host_time, measure
from topkapi.bench.workload import Part, Workload
from topkapi.config import TrainConfig
from topkapi.console import say
from topkapi.errors import TopkapiError

RECALL_TOKENS = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How the cases are timed."""

    device: torch.device
    rounds: int
    seconds: float
    peers: tuple[str, ...]
    profile: bool
    out: Path


def bench(cases: Sequence[Case], options: BenchOptions) -> dict[str, Any]:
    """Time every case, then the peers; writes and returns what bench.json holds.

    Raises:
        TopkapiError: the device cannot do a case that is the only one.
    """
    started, known = time.monotonic(), {}
    found = {"about": report.about(options), "cases": [], "peers": []}
    for case in dict.fromkeys(_resolved(case, options.device) for case in cases):
        key = (case.shape, case.precision == "float32")
        try:
            if key not in known:
                known[key] = ceilings(case.batch_tokens, case.n_latents, case.d_model, case.precision, options.device)
            if case.precision not in known[key].matmul:
                if len(cases) == 1:
                    raise TopkapiError(f"--precision {case.precision}: this device has no such matmul at {case.shape}.")
                say(f"left out, as this device has no {case.precision} matmul at that shape: {case.shape}")
                continue
            record = time_case(case, known[key], options)
        except torch.cuda.OutOfMemoryError:
            if len(cases) == 1:
                raise TopkapiError(f"out of memory at {case.shape}: lower --batch-tokens or --n-latents.") from None
            say(f"left out, as it needs more memory than this device has: {case.shape}")
            continue
        found["cases"].append(record)
        report.write(found, options.out)
        _show(report.case_table(record))
        say(f"{time.monotonic() - started:.0f} s")
    for group in _peer_groups(found["cases"], options) if options.peers else ():
        found["peers"].append(group)
        report.write(found, options.out)
        say(f"{time.monotonic() - started:.0f} s")
    pictures.draw(found, options.out)
    _show(report.summary(found))
    say(f"{time.monotonic() - started:.0f} s. Everything is in {options.out}: table.md, bench.json and pictures.")
    return found


def time_case(case: Case, known: Ceilings, options: BenchOptions) -> dict[str, Any]:
    """The record of one case."""
    say(f"{case.conditions}: {case.shape}")
    device, limits = options.device, {"rounds": options.rounds, "seconds": options.seconds}
    memory = PeakMemory(device)
    workload = Workload(case, device)
    for _ in range(2):
        workload.step()
    peak = memory.bytes
    workload.rotate_()
    matmul = matmul_work(case.batch_tokens, case.n_latents, case.d_model, device, case.precision)
    steps = measure({"encoder matmul": matmul, "step": workload.step}, device, **limits)
    del matmul
    record = {
        "case": case,
        "step": steps["step"],
        "matmul": steps["encoder matmul"],
        "against_matmul": steps["step"].over(steps["encoder matmul"]),
        "tokens_per_second": case.batch_tokens / steps["step"].ms * 1e3,
        "host_ms": host_time(workload.step, device),
        "peak_bytes": peak,
        "recall": workload.recall(RECALL_TOKENS[device.type]),
        "checked": workload.check(),
        "ceilings": known,
        "parts": time_parts(workload, known, limits),
    }
    if options.profile:
        kernels = profile_steps(workload)
        record["profile"] = {"parts": by_part(kernels), "kernels": kernels}
    del workload
    gc.collect()
    return record


def time_parts(workload: Workload, known: Ceilings, limits: dict[str, Any]) -> list[dict[str, Any]]:
    """Each part's time and the time its bytes or operations would take at the ceilings, from caches swept clean."""
    parts: list[Part] = list(workload.parts())
    timings: dict[str, Timing] = measure({part.name: part.run for part in parts}, workload.device, cold=True, **limits)
    precision = workload.case.precision
    found = []
    for part in parts:
        seconds = max(part.flops / known.rate(part.precision or precision), part.n_bytes / known.bandwidth)
        found.append(
            {
                "name": part.name,
                "timing": timings[part.name],
                "bytes": part.n_bytes,
                "flops": part.flops,
                "ceiling_ms": seconds * 1e3,
                "share_of_ceiling": seconds * 1e3 / timings[part.name].ms,
            }
        )
    return found


def _show(table: str) -> None:
    sys.stdout.write(f"\n{table}\n")
    sys.stdout.flush()


def _resolved(case: Case, device: torch.device) -> Case:
    """The case with its precision made concrete."""
    precision = TrainConfig(precision=case.precision).resolved(case.d_model, device.type).precision
    return replace(case, precision=precision)


def _peer_groups(records: Sequence[dict[str, Any]], options: BenchOptions) -> Iterator[dict[str, Any]]:
    """The peers' records at every shape and share of dead latents, without what is Topkapi's own.

    A batch that was too large without dead latents is not tried again with them.
    """
    from topkapi.bench.peer_steps import time_peers

    cases = {replace(r["case"], precision="auto", state="float32", dense=0) for r in records}
    names, fitted = options.peers, {}
    for case in sorted(cases, key=lambda case: (case.shape, case.dead)):
        largest = {name: fitted.get((name, case.shape), case.batch_tokens) for name in names}
        say(f"other projects: {case.shape}, {100 * case.dead:g} % dead")
        found = time_peers(case, options.device, largest, options.rounds, options.seconds)
        names = tuple(record["name"] for record in found)  # what is not installed is named once
        fitted |= {(record["name"], case.shape): record["batch_tokens"] for record in found}
        yield {"case": case, "records": found}
