"""The plan's model against steps measured on several GPUs: a markdown table, with the median and the worst error.

    torchrun --nproc-per-node 2 benchmarks/scaling.py > runs/scaling.jsonl
    python benchmarks/planned.py runs/scaling.jsonl

Reads the JSON lines that benchmarks/scaling.py prints, and plans the same steps on the same mesh (`batch` is of one
GPU; 1x1 is one GPU alone). The next batch is left out of both time and memory, as the benchmark makes none ahead. An
error above 0 is a plan that is too slow, or holds too much.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from topkapi.scaling.hardware import Hardware, load
from topkapi.scaling.memory import NEXT_BATCH, memory, total
from topkapi.scaling.shapes import Job, Layout
from topkapi.scaling.step_time import step_time
from topkapi.scaling.volumes import ACTIVATIONS

GIB = 2**30
K = 32  # of benchmarks/scaling.py
HEAD = ["mesh", "exchange", "latents", "d_model", "tokens a GPU", "precision", "ms", "planned", "error", "GiB",
        "planned", "error"]  # fmt: skip


def planned(case: dict, gpu: Hardware) -> tuple[float, float]:
    """Milliseconds of a step and GiB of a GPU."""
    n_replicas, n_shards = map(int, case["mesh"].split("x"))
    job = Job(
        n_latents=case["n_latents"],
        d_model=case["d_model"],
        k=K,
        batch_tokens=case["batch"] * n_replicas * n_shards,
        precision=case["precision"],
        ema=False,
    )
    layout = Layout(
        n_replicas=n_replicas,
        n_shards=n_shards,
        exchange="auto" if case["exchange"] == "none" else case["exchange"],
        micro_batch_tokens=case.get("micro", 0),
    )
    held, step = memory(job, layout), step_time(job, layout, gpu)
    parts = [part for part in step.parts if part.name != ACTIVATIONS]
    return 1e3 * replace(step, parts=parts).seconds, (total(held) - held[NEXT_BATCH]) / GIB


def row(case: dict, gpu: Hardware) -> tuple[list[str], float, float]:
    """A line of the table, and the relative errors of time and memory."""
    ms, gib = planned(case, gpu)
    errors = ms / case["ms"] - 1, gib / case["peak_gib"] - 1
    exchange = f"micro-batches of {case['micro']:,}" if case.get("micro") else case["exchange"]
    cells = [case["mesh"], exchange, f"{case['n_latents']:,}", f"{case['d_model']:,}", f"{case['batch']:,}",
             case["precision"], f"{case['ms']:.2f}", f"{ms:.2f}", f"{100 * errors[0]:+.1f} %",
             f"{case['peak_gib']:.2f}", f"{gib:.2f}", f"{100 * errors[1]:+.1f} %"]  # fmt: skip
    return cells, *errors


def summary(what: str, errors: Sequence[float]) -> str:
    """The median and the worst of the absolute errors."""
    off = [abs(error) for error in errors]
    return f"{what}: median error {100 * statistics.median(off):.1f} %, worst {100 * max(off):.1f} % of {len(off)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--gpu", default="h200", help="as --gpu of topkapi plan")
    options = parser.parse_args()
    gpu = load(options.gpu)
    rows = [row(json.loads(line), gpu) for line in options.lines.read_text().splitlines() if line.startswith("{")]
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * 6}{'---:|' * 6}")
    for cells, *_ in rows:
        print(f"| {' | '.join(cells)} |")
    print()
    for is_alone, name in ((True, "One GPU alone"), (False, "Meshes")):
        found = [errors for cells, *errors in rows if (cells[0] == "1x1") == is_alone]
        for what, off in zip(("time", "memory"), zip(*found, strict=True), strict=False):
            print(summary(f"{name}, {what}", off))


if __name__ == "__main__":
    main()
