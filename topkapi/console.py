"""What a person sees while work runs: single lines and progress, on a terminal or piped to a file.

Everything goes to stderr, so that a command's result alone is on stdout.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_EVERY = 10.0  # seconds between lines of progress when stderr is not a terminal


def say(text: str) -> None:
    """Print one line for the person, without markup."""
    console.print(text, markup=False)


class Meter(Protocol):
    """What `progress` hands out."""

    def advance(self, amount: int, **values: float | str) -> None:
        """Count `amount` more units done; `values` are shown beside, under their names."""


@contextmanager
def progress(description: str, total: int, unit: str = "tokens", done: int = 0) -> Iterator[Meter]:
    """Show progress of `total` units, from `done`: count, rate, time left and the latest values.

    A live bar on a terminal; otherwise a plain line at most every 10 seconds, and one at the end.
    """
    meter = _Bar(description, total, unit, done) if console.is_terminal else _Lines(description, total, unit, done)
    with meter:
        yield meter


def _format(values: dict[str, float | str]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


class _Bar:
    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[values]}", markup=False),
        )
        self.progress = Progress(*columns, console=console, transient=False)
        self.unit, self.started, self.done = unit, time.monotonic(), 0
        self.task = self.progress.add_task(description, total=total, completed=done, unit=unit, rate="", values="")

    def __enter__(self) -> "_Bar":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.__exit__(*exception)

    def advance(self, amount: int, **values: float | str) -> None:
        self.done += amount
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        shown = {"values": _format(values)} if values else {}
        self.progress.update(self.task, advance=amount, rate=f"{rate:,.0f} {self.unit}/s", **shown)


class _Lines:
    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self.description, self.total, self.unit, self.done, self.first = description, total, unit, done, done
        self.started = self.printed = time.monotonic()
        self.values: dict[str, float | str] = {}

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.done > self.first:
            self._print()

    def advance(self, amount: int, **values: float | str) -> None:
        self.done += amount
        self.values = values or self.values
        if time.monotonic() - self.printed >= PLAIN_EVERY and self.done < self.total:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        rate = (self.done - self.first) / max(self.printed - self.started, 1e-9)
        left = max(self.total - self.done, 0) / max(rate, 1e-9)
        say(
            f"{self.description}: {self.done:,}/{self.total:,} {self.unit}  {rate:,.0f} {self.unit}/s  "
            f"{left:,.0f} s left  {_format(self.values)}".rstrip()
        )
