"""Where the time of a step goes: the device's kernels by torch.profiler, grouped into the parts of a step.

A kernel of Topkapi's is known by its name, and so are sorts and matrix products, which only one part has. Other kernels
of PyTorch are known by the span of the step that launched them: the profiler's trace gives each kernel the number of
its launch, and each launch its moment on the host. On a CPU, operators are listed by the time they take themselves.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from topkapi.bench.timing import synchronize
from topkapi.bench.workload import Workload

SCREEN, SAMPLE, SELECT, RESCORE = "encoder: screen", "encoder: sample and bound", "encoder: select", "encoder: re-score"
REDONE, TO_FP8, DECODE = "encoder: rows redone", "encoder: to fp8", "decode, error, latent gradient"
SORT, UPDATE, AUXK, SUMS = "sort by latent", "weight gradients and Adam", "AuxK", "bias gradients, latents that fired"
SAMPLE_KERNEL, BOUND_KERNEL = "screen", "bound_rows"
PART_OF_KERNEL = {
    "screen": SCREEN,
    "bound_rows": SAMPLE,
    "select_candidates": SELECT,
    "rescore": RESCORE,
    "copy_rows": REDONE,
    "encode_single_rows": REDONE,
    "_to_fp8": TO_FP8,
    "_rows_to_fp8": TO_FP8,
    "_decode_step": DECODE,
    "_block_sums": UPDATE,
    "_update": UPDATE,
    "_squares": UPDATE,
    "_bias_sums": SUMS,
    "_column_sums": SUMS,
    "_mark": SUMS,
    "_select": AUXK,
    "_mask": AUXK,
    "_error_gradient": AUXK,
    "_normalise": "normalise",
    "_centre": "normalise",
}
PART_OF_PATTERN = {r"radix_?sort|searchsorted|bucketize": SORT, r"nvjet|gemm|cutlass|xmma": AUXK}
ENCODER = (SCREEN, SAMPLE, SELECT, RESCORE)
PART_OF_SPAN = {
    "normalise": "normalise",
    "forward and backward": "rest of forward and backward",
    "optimiser": UPDATE,
    "dead counters": "dead counters",
}
REST = "rest"


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel within one part, in microseconds a step."""

    name: str
    part: str
    us: float
    launches: float
    """A step."""


def profile_steps(workload: Workload, steps: int = 3) -> list[Kernel]:
    """Kernels (on a CPU: operators) of some steps, the longest first."""
    on_cuda = workload.device.type == "cuda"
    workload.step()
    synchronize(workload.device)
    workload.span = record_function
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    try:
        with profile(activities=activities, acc_events=True) as found:
            for _ in range(steps):
                workload.step()
            synchronize(workload.device)
    finally:
        del workload.span
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    kernels = device_kernels(events) if on_cuda else host_operators(events)
    return _summed(kernels, steps)


def device_kernels(events: Iterable[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(name, part, microseconds) of each kernel, copy and fill in a trace, in the order in which they ran."""
    events = [event for event in events if event.get("ph") == "X"]
    spans = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in PART_OF_SPAN]
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    ran.sort(key=lambda event: event["ts"])
    encoder = [event["name"] for event in ran if PART_OF_KERNEL.get(event["name"]) in ENCODER]
    found, seen = [], 0
    for event in ran:
        name = event["name"]
        part = _part_of_name(name) or _part_of_launch(launches.get(event.get("args", {}).get("correlation")), spans)
        if part in ENCODER:
            seen += 1
            if name == SAMPLE_KERNEL and encoder[seen : seen + 1] == [BOUND_KERNEL]:
                part = SAMPLE
        found.append((name, part, event["dur"]))
    return found


def _part_of_name(name: str) -> str | None:
    patterns = (part for pattern, part in PART_OF_PATTERN.items() if re.search(pattern, name, re.IGNORECASE))
    return PART_OF_KERNEL.get(name) or next(patterns, None)


def _part_of_launch(moment: float | None, spans: list[dict[str, Any]]) -> str:
    if moment is None:
        return REST
    around = (span for span in spans if span["ts"] <= moment <= span["ts"] + span["dur"])
    innermost = min(around, key=lambda span: span["dur"], default=None)
    return REST if innermost is None else PART_OF_SPAN[innermost["name"]]


def host_operators(events: Iterable[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(name, part, microseconds) of each operator in a trace, without the operators that it called."""
    chosen = [event for event in events if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")]
    chosen.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    own, open_, spans = [event["dur"] for event in chosen], [], []
    parts = [REST] * len(chosen)
    for i, event in enumerate(chosen):
        while open_ and not _inside(event, chosen[open_[-1]]):
            open_.pop()
        if open_:
            own[open_[-1]] -= event["dur"]
        open_.append(i)
        spans = [chosen[j]["name"] for j in open_ if chosen[j]["name"] in PART_OF_SPAN]
        parts[i] = PART_OF_SPAN[spans[-1]] if spans else REST
    return [
        (event["name"], part, us)
        for event, part, us in zip(chosen, parts, own, strict=True)
        if event["cat"] == "cpu_op" and part != REST
    ]


def _inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    return event["tid"] == outer["tid"] and event["ts"] < outer["ts"] + outer["dur"]


def _summed(events: list[tuple[str, str, float]], steps: int) -> list[Kernel]:
    us, launches = defaultdict(float), defaultdict(int)
    for name, part, duration in events:
        us[name, part] += duration
        launches[name, part] += 1
    kernels = [Kernel(name, part, us[name, part] / steps, launches[name, part] / steps) for name, part in us]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def by_part(kernels: list[Kernel]) -> dict[str, float]:
    """Microseconds a step of each part, the longest first."""
    parts = defaultdict(float)
    for kernel in kernels:
        parts[kernel.part] += kernel.us
    return dict(sorted(parts.items(), key=lambda item: -item[1]))
