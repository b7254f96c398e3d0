"""Panels that remember what is drawn on them, so that the data beside a picture are exactly those in it; one style.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; more than seven series are taken from
viridis. Series are labelled where they end, in their colour, and differ in marker or dash besides.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

INK, FAINT, GRID, PAPER = "#1b1b1f", "#73767d", "#dddfe3", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.hashsalt": "topkapi",  # the same file for the same data
    "text.parse_math": False,  # names of runs are no formulas
}
TICKS = ((0.3, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)), (1.0, (1, 1.5, 2, 3, 4, 6, 8)), (1.8, (1, 2, 5)))
"""Digits of ticks on logarithmic axes of fewer than so many decades."""
MOST_LABELS = 14
WIDTH, HEIGHT = 3.3, 2.9  # inches of a panel
DPI = 160

Kind = Literal["line", "points", "bins", "reference"]
Values = Sequence[float | int | None] | np.ndarray | range


@dataclass(frozen=True)
class Row:
    """One plotted thing: a vertex of a line, a point, or a bin of a histogram; None where there is nothing."""

    panel: str
    kind: Kind
    series: str
    x: float | None
    x_end: float | None
    """The right edge of a bin."""
    y: float | None
    low: float | None
    high: float | None


def colours(n: int) -> list[str]:
    """n colours that can be told apart; for many, ordered ones."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.05 + 0.8 * i / (n - 1))) for i in range(n)]


def styled() -> Any:
    """A block of code within which matplotlib draws in this style."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


class Canvas:
    """A picture of one or more panels in a grid."""

    def __init__(self, columns: int, rows: int = 1, width: float = WIDTH, height: float = HEIGHT) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(columns * width + 0.4, rows * height), layout="constrained")
        self.grid = self.figure.subplots(rows, columns, squeeze=False).ravel()
        self.panels: list[Panel] = []

    def panel(self, title: str, x: str, y: str, log: str = "") -> "Panel":
        """The next panel; `x` and `y` name quantity and unit, `log` is "", "x", "y" or "xy"."""
        panel = Panel(self.grid[len(self.panels)], title, x, y, log)
        self.panels.append(panel)
        return panel

    def legend(self) -> None:
        """Names of what the first panel shows, beside all panels."""
        self.figure.legend(*self.panels[0].axes.get_legend_handles_labels(), loc="outside right upper")

    @property
    def rows(self) -> list[Row]:
        """All that is drawn."""
        return [row for panel in self.panels for row in panel.rows]

    def picture(self, form: Literal["png", "svg"]) -> bytes:
        """The file, the same for the same data."""
        for axes in self.grid[len(self.panels) :]:
            axes.set_axis_off()
        self.panels = [panel.finished() for panel in self.panels]
        file = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        with styled():
            self.figure.savefig(file, format=form, dpi=DPI, metadata=metadata)
        self.figure.set_layout_engine("none")  # found; finding it anew for another format takes as long as drawing
        return file.getvalue()


class Panel:
    """Axes with a title, labelled axes and a record of what is drawn. Where y is None or NaN there is a gap, and on a
    logarithmic axis where it is not above 0; the record has it."""

    def __init__(self, axes: Any, title: str, x: str, y: str, log: str) -> None:
        self.axes, self.title, self.rows = axes, title, []
        self.ends: list[tuple[str, str, float, float]] = []
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.set_xscale("log" if "x" in log else "linear")
        axes.set_yscale("log" if "y" in log else "linear")

    def line(
        self,
        series: str,
        x: Values,
        y: Values,
        low: Values | None = None,
        high: Values | None = None,
        *,
        colour: str,
        dash: str = "-",
        width: float = 1.5,
        label: str = "",
        legend: str = "",
        kind: Kind = "line",
        opacity: float = 1.0,
    ) -> None:
        """A curve, with a band from low to high where these are given; `label` stands where it ends."""
        x, y = _numbers(x), _numbers(y)
        self._record(kind, series, x, y, low, high)
        y = self._on_axis(y)
        form = {"color": colour, "linewidth": width, "alpha": opacity, "zorder": 3 if kind == "line" else 2}
        self.axes.plot(x, y, dash, label=legend or None, **form)
        if low is not None and high is not None:
            self.axes.fill_between(x, _numbers(low), _numbers(high), color=colour, alpha=0.18, linewidth=0, zorder=1)
        self._end(label, colour, x, y)

    def points(
        self,
        series: str,
        x: Values,
        y: Values,
        low: Values | None = None,
        high: Values | None = None,
        *,
        colour: str,
        marker: str = "o",
        filled: bool = True,
        joined: str = "",
        label: str = "",
        legend: str = "",
    ) -> None:
        """Points, with bars from low to high where these are given, joined by a line of the style `joined`."""
        x, y = _numbers(x), _numbers(y)
        self._record("points", series, x, y, low, high)
        y = self._on_axis(y)
        face = colour if filled else PAPER
        form = {"color": colour, "markerfacecolor": face, "markeredgewidth": 1.1, "linewidth": 1.1, "zorder": 4}
        if low is not None and high is not None:
            down, up = y - _numbers(low), _numbers(high) - y
            bars = np.nan_to_num(np.clip([down, up], 0, None))
            self.axes.errorbar(x, y, bars, fmt="none", ecolor=colour, elinewidth=0.9, capsize=1.8, zorder=3)
        self.axes.plot(x, y, marker=marker, linestyle=joined or "none", label=legend or None, **form)
        self._end(label, colour, x, y)

    def bins(
        self, series: str, edges: Values, counts: Values, *, colour: str, filled: bool = True, label: str = ""
    ) -> None:
        """A histogram: counts[i] between edges[i] and edges[i + 1]."""
        edges, counts = _numbers(edges), _numbers(counts)
        self.axes.stairs(counts, edges, color=colour, fill=filled, alpha=0.35 if filled else 1, linewidth=1.2)
        if filled:
            self.axes.stairs(counts, edges, color=colour, linewidth=0.9)
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
            self.rows.append(Row(self.title, "bins", series, float(left), float(right), float(count), None, None))
        if label:
            width, opacity = (4, 0.5) if filled else (1.2, 1)  # an outline's name has its very colour
            self.axes.plot([], [], color=colour, linewidth=width, alpha=opacity, label=label)

    def across(self, series: str, y: float | int, label: str = "") -> None:
        """A thin horizontal line: a bound, or what would be if nothing mattered."""
        self.axes.axhline(y, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        self.rows.append(Row(self.title, "reference", series, None, None, float(y), None, None))
        if label:
            place = {"xy": (0.01, y), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            self.axes.annotate(label, xytext=(0, 2), color=FAINT, fontsize=7, va="bottom", **place)

    def upright(self, series: str, x: float | int, label: str = "") -> None:
        """A thin vertical line."""
        self.axes.axvline(x, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        self.rows.append(Row(self.title, "reference", series, float(x), None, None, None, None))
        if label:
            place = {"xy": (x, 0.99), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            self.axes.annotate(label, xytext=(2, 0), color=FAINT, fontsize=7, va="top", **place)

    def x_ticks(self, values: Sequence[float | int]) -> None:
        """Ticks at these values of x alone, where they are few: sizes that were measured."""
        values = sorted(set(values))
        if 0 < len(values) <= 8:
            self.axes.set_xticks(values, [f"{value:,}" for value in values])
            self.axes.xaxis.set_minor_locator(self.axes.xaxis.get_major_locator())

    def legend(self, **options: Any) -> None:
        """Names of what has a `legend`, or of histograms; for what cannot be named where it ends."""
        self.axes.legend(**options)

    def finished(self) -> "Panel":
        """With labels where lines end and plain numbers on short logarithmic axes; itself."""
        _plain_ticks(self.axes)
        if self.ends:
            self._place_labels()
            self.ends = []
        return self

    def _on_axis(self, y: np.ndarray) -> np.ndarray:
        """y, with a gap where a logarithmic axis has no place for it: matplotlib would draw to far below the panel."""
        return np.where(y > 0, y, np.nan) if self.axes.get_yscale() == "log" else y

    def _record(self, kind: Kind, series: str, x: np.ndarray, y: np.ndarray, low: Any, high: Any) -> None:
        low = [None] * len(x) if low is None else _numbers(low)
        high = [None] * len(x) if high is None else _numbers(high)
        for a, b, c, d in zip(x, y, low, high, strict=True):
            self.rows.append(Row(self.title, kind, series, _finite(a), None, _finite(b), _finite(c), _finite(d)))

    def _end(self, label: str, colour: str, x: np.ndarray, y: np.ndarray) -> None:
        shown = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if label and len(shown):
            last = shown[np.argmax(x[shown])]
            self.ends.append((label, colour, float(x[last]), float(y[last])))

    def _place_labels(self) -> None:
        """Beside the right edge, at the heights where series end, moved apart until none covers another."""
        axes = self.axes
        step = max(1, math.ceil(len(self.ends) / MOST_LABELS))
        ends = sorted(self.ends[::step], key=lambda end: end[3])
        to_axes = axes.transData + axes.transAxes.inverted()
        wanted = [float(to_axes.transform((x, y))[1]) for _, _, x, y in ends]
        lines = [label.count("\n") + 1 for label, *_ in ends]
        gap = 9.5 / 72 / (0.72 * self.axes.figure.get_figheight() / max(1, axes.get_gridspec().nrows))
        for (label, colour, _, _), height in zip(ends, _apart(wanted, [gap * n for n in lines]), strict=True):
            axes.text(1.02, height, label, transform=axes.transAxes, color=colour, va="center", fontsize=7.5)


def _apart(wanted: list[float], sizes: list[float]) -> list[float]:
    """Heights near the wanted ones, which rise, each half of both sizes away from the next: pooled as in isotonic
    regression."""
    pools: list[tuple[float, float, list[int]]] = []  # middle, size, members
    for i, height in enumerate(wanted):
        pool = (height, sizes[i], [i])
        while pools and pools[-1][0] + pools[-1][1] / 2 > pool[0] - pool[1] / 2:
            before = pools.pop()
            members = [*before[2], *pool[2]]
            middle = (before[0] * len(before[2]) + pool[0] * len(pool[2])) / len(members)
            pool = (middle, before[1] + pool[1], members)
        pools.append(pool)
    found = [0.0] * len(wanted)
    for middle, size, members in pools:
        at = middle - size / 2
        for i in members:
            found[i] = at + sizes[i] / 2
            at += sizes[i]
    return found


def _plain_ticks(axes: Any) -> None:
    """Numbers as people write them on logarithmic axes, with some between the powers of ten on short ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if isinstance(axis.get_major_locator(), FixedLocator):
            continue
        if axis.get_scale() != "log":
            if max(map(abs, limits)) >= 1e4:
                axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            continue
        decades = math.log10(limits[1] / limits[0])
        finest = next((subs for most, subs in TICKS if decades < most), (1,))
        axis.set_major_locator(LogLocator(subs=finest, numticks=12))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float | int) -> str:
    """A number in few characters: 0.15, 2k, 1.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def _numbers(values: Any) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
