"""What a figure is beside its picture, how it is saved, and small numbers for its text."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

import topkapi
from topkapi.figures.canvas import Canvas, Row
from topkapi.files import write_atomic, write_text_atomic
from topkapi.published import commit
from topkapi.statistics.intervals import CONFIDENCE, Interval

Verdict = Literal["agrees", "disagrees", "undecided"]


class Claim(NamedTuple):
    """What the paper found, and whether the plotted runs show it, by a rule that the evidence states."""

    text: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Figure:
    """A picture and what a reader needs beside it."""

    name: str
    """Of its files, without suffix."""
    title: str
    caption: str
    """What is plotted, of which runs, on how many tokens, and what intervals are."""
    statement: str
    """What it shows, in numbers that were computed from what is plotted."""
    canvas: Canvas
    runs: list[str]
    source: str = ""
    """The paper's figure or section that it corresponds to."""
    claims: tuple[Claim, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)
    """Results that are not vertices of the picture: fits, tests, rates."""

    def as_dict(self) -> dict[str, Any]:
        """All but the picture and its data."""
        fields = ("name", "title", "source", "caption", "statement", "runs", "numbers")
        return {
            **{name: getattr(self, name) for name in fields},
            "claims": [claim._asdict() for claim in self.claims],
            "made_by": {"topkapi_version": topkapi.__version__, "commit": commit()},
        }


@dataclass(frozen=True)
class LeftOut:
    """A figure that the given folders do not allow."""

    name: str
    why: str
    """What is missing, and what would supply it."""
    figure: str = ""
    """The `Figure.name` of what is missing; empty where it is a part of a figure, or one run's detail."""


def save(figure: Figure, out: Path) -> str:
    """Write NAME.png, NAME.svg, NAME.csv (all that is plotted) and NAME.json (the rest) into `out`; the SVG's text."""
    svg = figure.canvas.picture("svg")
    png = figure.canvas.picture("png")
    for form, content in (("png", png), ("svg", svg)):
        write_atomic(out / f"{figure.name}.{form}", lambda path, content=content: path.write_bytes(content))
    text = io.StringIO()
    writer = csv.DictWriter(text, Row.__dataclass_fields__, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in figure.canvas.rows)
    write_text_atomic(out / f"{figure.name}.csv", text.getvalue())
    write_text_atomic(out / f"{figure.name}.json", json.dumps(plain(figure.as_dict()), indent=2) + "\n")
    return svg.decode()


def plain(value: Any) -> Any:
    """The value as JSON has it: arrays as lists, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, Interval | None]:
    """The mean of independent values, and its Student interval; None for a single value."""
    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return mean, Interval(mean - half, mean + half)


def share_interval(count: int, n: int) -> Interval:
    """Wilson's interval of a share count / n of independent cases."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    middle = (count + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(count * (n - count) / n + z**2 / 4)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def said(value: float | None, interval: Sequence[float] | None = None, form: str = ".3g") -> str:
    """A number with its interval, as `0.15 [0.14, 0.16]`."""
    if value is None:
        return "undefined"
    text = f"{value:{form}}"
    return text if interval is None else f"{text} [{interval[0]:{form}}, {interval[1]:{form}}]"


def spanned(values: Sequence[float], form: str) -> str:
    """`0.1 to 0.3`, or the one number that they are in this form."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def listed(words: Sequence[Any], most: int = 8) -> str:
    """`a, b and c`; of many the first ones and how many more."""
    words = [f"{word:,}" if isinstance(word, int) else str(word) for word in words]
    if len(words) > most:
        return f"{', '.join(words[: most - 1])} and {len(words) - most + 1} more"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(n: int, word: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")
