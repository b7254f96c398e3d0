"""The rates of a GPU, from what `topkapi bench` measured of it.

Every measured part is a sum of amounts over rates (`topkapi.scaling.step_time`), so the inverse rates solve a linear
least-squares problem: relative errors of all parts and whole steps, with each inverse rate drawn a little towards that
of a known GPU, all of them made slower or faster by one factor. So two or three cases are enough, and a rate that no
case depends on is still a sensible one. The speed of a copy is taken as measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from topkapi.errors import TopkapiError
from topkapi.scaling.hardware import Hardware, Rates
from topkapi.scaling.shapes import Job, Layout, rank_of
from topkapi.scaling.step_time import Amounts, added, compute, step_time

DRAWN = 0.1  # weight of the known GPU against one measured part
STEP = "whole step"
RATES = tuple(f.name for f in fields(Rates))


@dataclass(frozen=True)
class Measured:
    """One part of a step, or a whole one, as timed on one GPU."""

    job: Job
    part: str
    seconds: float


@dataclass(frozen=True)
class Error:
    """How far the model is from one measurement."""

    measured: Measured
    predicted: float

    @property
    def relative(self) -> float:
        """Above 0 where the model is too slow."""
        return self.predicted / self.measured.seconds - 1


def measured_in(bench: Mapping[str, Any]) -> list[Measured]:
    """All parts and steps of a bench.json.

    Raises:
        TopkapiError: it is none.
    """
    try:
        rows = [row for record in bench["cases"] for row in _rows(record)]
    except (KeyError, TypeError) as error:
        raise TopkapiError(f"this is no bench.json of topkapi bench: it lacks {error}. Run topkapi bench.") from None
    if not rows:
        raise TopkapiError("this bench.json of topkapi bench has no finished case. Run topkapi bench.")
    return rows


def _rows(record: Mapping[str, Any]) -> Iterable[Measured]:
    case = record["case"]
    names = ("n_latents", "d_model", "k", "batch_tokens", "precision", "state", "dead")
    job = Job(**{name: case[name] for name in names}, ema=False)
    yield Measured(job, STEP, record["step"]["ms"] / 1e3)
    for part in record["parts"]:
        yield Measured(job, part["name"].split(",")[0] if part["name"].startswith("AuxK") else part["name"],
                       part["timing"]["ms"] / 1e3)  # fmt: skip


def copy_rate(bench: Mapping[str, Any]) -> float:
    """Bytes a second of the copies in a bench.json, the median case's."""
    found = [record["ceilings"] for record in bench["cases"]]
    return float(np.median([known["copy_bytes"] / known["copy"]["ms"] * 1e3 for known in found]))


def fit(rows: Sequence[Measured], known: Hardware, bytes_per_second: float) -> Hardware:
    """`known` with the rates that explain `rows` best."""
    seconds = np.array([row.seconds for row in rows])
    amounts = np.array([[amounts_of(row, known).get(name, 0.0) for name in RATES] for row in rows])
    start = np.array([1 / getattr(known.rates, name) for name in RATES])
    shares = amounts * start / seconds[:, None]  # of each measurement, if the GPU were the known one
    common = shares.sum(1) @ np.ones(len(rows)) / (shares.sum(1) @ shares.sum(1))
    copied = RATES.index("bytes")
    slower = np.full(len(RATES), common)
    slower[copied] = 1 / bytes_per_second / start[copied]
    free = np.arange(len(RATES)) != copied
    # weights of the known GPU: relative to `common`, so that they mean the same on a slow machine
    matrix = np.vstack([shares[:, free] * common, DRAWN * np.eye(free.sum())])
    wanted = np.concatenate([1 - shares[:, copied] * slower[copied], np.full(free.sum(), DRAWN)])
    slower[free] = common * _positive_least_squares(matrix, wanted)
    rates = {name: float(1 / (start[i] * slower[i])) for i, name in enumerate(RATES)}
    return replace(known, rates=Rates(**rates))


def amounts_of(row: Measured, gpu: Hardware) -> Amounts:
    """What the model says a measured part, or step, consists of."""
    parts = compute(row.job, Layout(), rank_of(row.job, Layout()), gpu.cache)
    if row.part == STEP:
        return added(*parts.values())
    if row.part not in parts:
        raise TopkapiError(f"the model of a step has no part {row.part!r}; it has {', '.join(parts)}.")
    return parts[row.part]


def errors(rows: Sequence[Measured], gpu: Hardware) -> list[Error]:
    """The model against measurements."""
    found = []
    for row in rows:
        step = step_time(row.job, Layout(), gpu)
        times = {part.name: part.seconds for part in step.parts} | {STEP: step.seconds}
        found.append(Error(row, times[row.part]))
    return found


def _positive_least_squares(matrix: np.ndarray, wanted: np.ndarray, sweeps: int = 3000) -> np.ndarray:
    """The x >= 1e-3 with the least |matrix x - wanted|, by going through the coordinates again and again."""
    gram, target = matrix.T @ matrix, matrix.T @ wanted
    x = np.ones(len(target))
    for _ in range(sweeps):
        for i in range(len(x)):
            x[i] = max(1e-3, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
    return x
