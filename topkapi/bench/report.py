"""The tables of `topkapi bench`, for a person and as bench.json."""

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import topkapi
from topkapi.bench.cases import Case
from topkapi.bench.pictures import peer_name
from topkapi.bench.timing import Timing
from topkapi.files import write_text_atomic

GIB = 2**30
KERNELS_SHOWN = 16
NOTE = """\
A step is normalisation, forward, AuxK, backward, projection, Adam, unit norm and dead counters, on random inputs; EMA
is left out, as no peer has it. Times are medians over rounds, with the first and ninth decile. "matmul" is the
encoder's matmul alone, by the library, in the step's precision and in the same rounds, its output written to memory.
"host" is what the host needs to queue a step. "memory" is the most that the step and all its state held, and one batch.
"recall" is the share of the exact k latents found: of the weights and activations as the step holds them, and of
float32 weights and activations. A part is timed alone, from caches swept clean; its ceiling is the time that its bytes
take at the speed of a large copy, or its operations at the speed of the encoder's matmul. Gathered rows count each
time they are gathered, so that a share can exceed 100 % where rows are found in a cache. Learning rates are 1e-7 for
all, so that what is dead stays dead; peers have AuxK on, with the same weight, whatever their default."""


def about(options: Any) -> dict[str, Any]:
    """The machine, the versions and the options of a run."""
    found = {
        "date": date.today().isoformat(),
        "topkapi": topkapi.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": _processor(),
        "threads": torch.get_num_threads(),
    }
    if options.device.type == "cuda":
        properties = torch.cuda.get_device_properties(options.device)
        found["device"] = properties.name
        found["cuda"] = torch.version.cuda
        found["device_memory"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
    return found | {"rounds": options.rounds, "seconds": options.seconds}


def write(found: dict[str, Any], out: Path) -> None:
    """Write OUT/bench.json and OUT/table.md of what is found so far."""
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "bench.json", json.dumps(found, default=_plain, indent=1) + "\n")
    tables = [_heading(found["about"]), NOTE, summary(found), *map(case_table, found["cases"])]
    tables += [profile_table(record) for record in found["cases"] if "profile" in record]
    write_text_atomic(out / "table.md", "\n\n".join(tables) + "\n")


def _heading(known: dict[str, Any]) -> str:
    software = [f"torch {known['torch']}", f"triton {known['triton']}", f"Python {known['python']}"]
    software += [f"CUDA {known['cuda']}"] if "cuda" in known else [f"{known['threads']} threads"]
    commit = f" at {known['commit']}" if known["commit"] else ""
    return f"# {known['device']}, {known['date']}\n\nTopkapi {known['topkapi']}{commit}, {', '.join(software)}."


def summary(found: dict[str, Any]) -> str:
    """Every case and peer in a line, a table for each shape."""
    tables = []
    for shape in dict.fromkeys(record["case"].shape for record in found["cases"]):
        rows = [_case_row(record) for record in found["cases"] if record["case"].shape == shape]
        for group in found["peers"]:
            if group["case"].shape == shape:
                rows += [_peer_row(record, group["case"]) for record in group["records"]]
        head = ["step", "ms", "10 to 90 %", "tokens/s", "x matmul", "host ms", "memory GiB", "recall"]
        tables.append(f"## {shape}\n\n{markdown(head, rows)}")
    return "\n\n".join(tables)


def _case_row(record: dict[str, Any]) -> list[str]:
    step: Timing = record["step"]
    recall = record["recall"]
    return [
        f"Topkapi, {record['case'].conditions}",
        _ms(step.ms),
        _spread(step),
        f"{record['tokens_per_second']:,.0f}",
        f"{record['against_matmul']:.2f}",
        f"{record['host_ms']:.2f}",
        _gib(record["peak_bytes"]),
        f"{recall['same_operands']:.5f} / {recall['float32']:.4f}",
    ]


def _peer_row(record: dict[str, Any], case: Case) -> list[str]:
    name = peer_name(record, case)
    if "failure" in record:
        return [name, "", "", "", "", "", "", ""]
    timing: Timing = record["timing"]
    rate = f"{record['tokens_per_second']:,.0f}"
    return [name, _ms(timing.ms), _spread(timing), rate, "", "", _gib(record["peak_bytes"]), ""]


def case_table(record: dict[str, Any]) -> str:
    """A case's step and parts against their ceilings."""
    case, known, step = record["case"], record["ceilings"], record["step"]
    rows = []
    for part in record["parts"]:
        ceiling, share = f"{part['ceiling_ms']:.2f}", f"{100 * part['share_of_ceiling']:.0f} %"
        timing = part["timing"]
        of_step = f"{100 * timing.ms / step.ms:.0f} %"
        rows.append([part["name"], _ms(timing.ms), _spread(timing), of_step, _work(part), ceiling, share])
    total = sum(part["timing"].ms for part in record["parts"])
    floor = sum(part["ceiling_ms"] for part in record["parts"])
    rows.append(["all parts", _ms(total), "", f"{100 * total / step.ms:.0f} %", "", f"{floor:.2f}", ""])
    rows.append(["whole step", _ms(step.ms), _spread(step), "", "", f"{floor:.2f}", f"{100 * floor / step.ms:.0f} %"])
    rates = [f"copy {_scaled(known.bandwidth, 'B')}/s"]
    rates += [
        f"{name} matmul {_ms(t.ms)} ms, {_scaled(known.rate(name), 'flop')}/s" for name, t in known.matmul.items()
    ]
    text = [f"### {case.conditions}: {case.shape}", f"Ceilings: {'; '.join(rates)}."]
    checked = record["checked"]
    if checked.dense_densities:
        low, high = min(checked.dense_densities), max(checked.dense_densities)
        text.append(f"The dense latents fire on {low:.3f} to {high:.3f} of the tokens.")
    if checked.redone is not None:
        again, single = (100 * share for share in checked.redone)
        text.append(f"Of the tokens, {again:.3f} % were encoded a second time, and {single:.4f} % one by one.")
    head = ["part", "ms", "10 to 90 %", "of the step", "work", "ceiling ms", "of the ceiling"]
    return "\n\n".join([*text, markdown(head, rows)])


def profile_table(record: dict[str, Any]) -> str:
    """The kernels of a profiled case by their share of the time."""
    kernels = record["profile"]["kernels"]
    total = sum(kernel.us for kernel in kernels)
    rows = [
        [f"`{kernel.name[:70]}`", kernel.part, f"{kernel.us / 1e3:.3f}", f"{100 * kernel.us / total:.1f} %",
         f"{kernel.launches:g}"]
        for kernel in kernels[:KERNELS_SHOWN]
    ]  # fmt: skip
    if others := kernels[KERNELS_SHOWN:]:
        us, launches = sum(kernel.us for kernel in others), sum(kernel.launches for kernel in others)
        rows.append(["others", "", f"{us / 1e3:.3f}", f"{100 * us / total:.1f} %", f"{launches:g}"])
    parts = [[name, f"{us / 1e3:.3f}", f"{100 * us / total:.1f} %"] for name, us in record["profile"]["parts"].items()]
    heading = f"### Profile of {record['case'].conditions}: {record['case'].shape}"
    head = ["kernel", "part", "ms a step", "share", "launches a step"]
    return "\n\n".join([heading, markdown(["part", "ms a step", "share"], parts), markdown(head, rows)])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text, the first to the left and the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    rule[1:] = [dashes[:-1] + ":" for dashes in rule[1:]]
    return "\n".join(f"| {' | '.join(_padded(line, widths))} |" for line in [lines[0], rule, *lines[1:]])


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


def _work(part: dict[str, Any]) -> str:
    if part["flops"]:
        return _scaled(part["flops"], "flop")
    return _scaled(part["bytes"], "B") if part["bytes"] else ""


def _scaled(amount: int | float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if amount >= factor:
            return f"{amount / factor:.3g} {prefix}{unit}"
    return f"{amount / 1e3:.3g} k{unit}"


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def _spread(timing: Timing) -> str:
    return f"{_ms(timing.spread[0])} to {_ms(timing.spread[1])}"


def _gib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / GIB:.2f}"


def _plain(value: Any) -> Any:
    """What JSON can hold of our records."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value)


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit of the repository that this package lies in, with + if there are changes; nothing elsewhere."""
    folder = Path(topkapi.__file__).parent.parent
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
