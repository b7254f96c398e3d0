"""Pictures of a bench, drawn with matplotlib where it is installed: tokens a second, and parts of a profiled step."""

import importlib.util
from pathlib import Path
from typing import Any

from topkapi.bench.cases import Case
from topkapi.files import write_atomic

OURS, PEERS, CEILING = "#1f6fb4", "#b9b9b9", "#222222"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a number that a line would cross


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw OUT/bench.png, and OUT/profile.png of the cases that were profiled; without matplotlib nothing."""
    if importlib.util.find_spec("matplotlib") is None or not found["cases"]:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    _draw_rates(plt, found, out / "bench.png")
    profiled = [record for record in found["cases"] if "profile" in record]
    if profiled:
        _draw_profiles(plt, profiled, out / "profile.png")


def _draw_rates(plt: Any, found: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second for each shape, and a line where the encoder's matmul alone would be."""
    shapes = list(dict.fromkeys(record["case"].shape for record in found["cases"]))
    bars = [_bars(found, shape) for shape in shapes]
    figure, axes = plt.subplots(
        len(shapes),
        squeeze=False,
        figsize=(9, 0.9 * len(shapes) + 0.33 * sum(map(len, bars))),
        height_ratios=[len(rows) + 1 for rows in bars],
        layout="constrained",
    )
    for axis, shape, rows in zip(axes[:, 0], shapes, bars, strict=True):
        names, rates, ours, ceilings = zip(*rows, strict=True)
        places = range(len(rows))
        drawn = axis.barh(places, rates, color=[OURS if mine else PEERS for mine in ours])
        axis.bar_label(drawn, [f"{rate:,.0f}" if rate else "" for rate in rates], padding=5, zorder=3, bbox=PAPER)
        for place, ceiling in zip(places, ceilings, strict=True):
            if ceiling:
                axis.plot([ceiling, ceiling], [place - 0.4, place + 0.4], color=CEILING, linewidth=2)
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(shape, loc="left", fontsize=10)
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    axes[-1, 0].set_xlabel("tokens a second of a training step (black: the encoder's matmul alone)")
    _save(plt, figure, path, found["about"]["device"])


def _bars(found: dict[str, Any], shape: str) -> list[tuple[str, float, bool, float]]:
    """(name, tokens a second, whether it is Topkapi's, the matmul's tokens a second or 0)."""
    rows = []
    for record in found["cases"]:
        case = record["case"]
        if case.shape == shape:
            ceiling = case.batch_tokens / record["matmul"].ms * 1e3
            rows.append((f"Topkapi, {case.conditions}", record["tokens_per_second"], True, ceiling))
    for group in found["peers"]:
        for record in group["records"] if group["case"].shape == shape else ():
            rows.append((peer_name(record, group["case"]), record.get("tokens_per_second", 0.0), False, 0.0))
    return rows


def peer_name(record: dict[str, Any], case: Case) -> str:
    """A peer, what it did differently from the case, and why it failed if it did."""
    name = f"{record['name']} {record['version']}".strip()
    name += f", {100 * case.dead:g} % dead" if case.dead else ""
    name += f", {record['batch_tokens']:,} tokens" if record["batch_tokens"] != case.batch_tokens else ""
    return name + (f": {record['failure'][:80]}" if "failure" in record else "")


def _draw_profiles(plt: Any, records: list[dict[str, Any]], path: Path) -> None:
    """Bars of the parts of each profiled step."""
    counts = [len(record["profile"]["parts"]) for record in records]
    figure, axes = plt.subplots(
        len(records),
        squeeze=False,
        figsize=(9, 0.8 * len(records) + 0.33 * sum(counts)),
        height_ratios=[count + 1 for count in counts],
        layout="constrained",
    )
    for axis, record in zip(axes[:, 0], records, strict=True):
        parts = record["profile"]["parts"]
        total = sum(parts.values())
        drawn = axis.barh(list(parts), [us / 1e3 for us in parts.values()], color=OURS)
        axis.bar_label(drawn, [f"{us / 1e3:.2f} ms, {100 * us / total:.0f} %" for us in parts.values()], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set_title(f"{record['case'].conditions}: {record['case'].shape}", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("milliseconds of a training step")
    _save(plt, figure, path, "")


def _save(plt: Any, figure: Any, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)
