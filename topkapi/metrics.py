"""Where training metrics go: RUN/metrics.jsonl always; TensorBoard, wandb and trackio when asked."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from topkapi.config import Logger
from topkapi.errors import TopkapiError
from topkapi.files import write_text_atomic
from topkapi.results import METRICS, read_metrics


def require(loggers: tuple[Logger, ...]) -> None:
    """Raise TopkapiError if the package of a logger is missing."""
    for name in loggers:
        if importlib.util.find_spec(name) is None:
            raise TopkapiError(f"--loggers {name} needs the package {name}: pip install {name}.")


class MetricsLog:
    """One run's metrics, a dict of numbers a logged step."""

    def __init__(self, run: Path, loggers: tuple[Logger, ...], config: dict[str, Any], after_step: int = 0) -> None:
        """Opens the log for steps beyond `after_step`; later lines of an interrupted run are dropped.

        Raises:
            TopkapiError: the package of a logger is missing.
        """
        require(loggers)
        path = run / METRICS
        kept = [line for line in read_metrics(run, skip_damaged=True) if line["step"] <= after_step]
        write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")
        self.sinks = [_open(name, run, config, after_step) for name in loggers]

    def write(self, **metrics: float | int) -> None:
        """Append one line, with at least `step` and `tokens`; flushed, so that it can be followed."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.write(metrics)

    def sync(self) -> None:
        """Wait until the file is on the disk: a checkpoint of this step must not outlive its line."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file and every logger."""
        self.file.close()
        for sink in self.sinks:
            sink.close()


class NoLog:
    """In place of a `MetricsLog` on a process that is not the one to write."""

    def write(self, **metrics: float | int) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _TensorBoard:
    def __init__(self, run: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=after_step + 1)

    def write(self, metrics: dict[str, float | int]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self.writer.close()


class _Tracker:
    """wandb, or trackio, which has the same three calls."""

    def __init__(self, module: Any, run: Path, config: dict[str, Any]) -> None:
        self.module = module
        module.init(project="topkapi", name=run.name, config=config)

    def write(self, metrics: dict[str, float | int]) -> None:
        self.module.log(metrics, step=metrics["step"])

    def close(self) -> None:
        self.module.finish()


def _open(name: Logger, run: Path, config: dict[str, Any], after_step: int) -> _TensorBoard | _Tracker:
    if name == "tensorboard":
        return _TensorBoard(run, after_step)
    return _Tracker(importlib.import_module(name), run, config)
