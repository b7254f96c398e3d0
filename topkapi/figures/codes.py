"""What the values of active latents are worth: progressive recovery, thresholds at test time, and refinement."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from topkapi.figures.canvas import MARKERS, PALETTE, Canvas, Panel, colours
from topkapi.figures.figure import Claim, Figure, LeftOut, Verdict, counted, said, spanned
from topkapi.figures.sources import FAMILIES, Run, grouped

MOST_CURVES = 7
FLAT = 0.01  # a change of the error by less than this share of it counts as none
SUPPLY = "topkapi eval RUN --all"


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """Progressive recovery of TopK runs, and refinement of all that have it in their eval.json."""
    recovered = [run for run in runs if _curve(run, "progressive")]
    if recovered:
        yield _progressive(_spread_out(recovered))
    else:
        yield LeftOut("progressive recovery", f"no eval.json has it: {SUPPLY}", "progressive")
    refined = [run for run in runs if _refinement(run)]
    if refined:
        yield _refined(refined)
    else:
        yield LeftOut("refinement", f"no eval.json has it: {SUPPLY}", "refinement")


def _curve(run: Run, section: str) -> list[dict[str, Any]]:
    """Points of a recovery: k (of the threshold, that which it was calibrated for), l0, mse and its interval."""
    found = run.evaluation.get(section) or {}
    columns = [found.get(name) or [] for name in ("k", "l0", "normalized_mse", "low", "high")]
    points = [dict(zip(("k", "l0", "mse", "low", "high"), row, strict=True)) for row in zip(*columns, strict=True)]
    return [point for point in points if point["mse"] is not None]


def _spread_out(runs: Sequence[Run]) -> list[Run]:
    """At most `MOST_CURVES`, evenly over k and n_latents."""
    first = min(run.seed for run in runs)
    plain = [run for run in runs if run.seed == first and run.family == "topk"] or list(runs)
    order = sorted(plain, key=lambda run: (run.n_latents, run.k or 0))
    return [order[i] for i in np.unique(np.linspace(0, len(order) - 1, MOST_CURVES).astype(int))]


def _progressive(runs: list[Run]) -> Figure:
    canvas = Canvas(2, width=3.9)
    by_k = canvas.panel("TopK with another k", "k' at test time", "normalized MSE", "xy")
    threshold = canvas.panel("One threshold for all latents", "L0", "normalized MSE", "xy")
    numbers = []
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        points = _curve(run, "progressive")
        _draw(by_k, run.name, points, "k", colour, "-", run.name)
        if (k := run.k) is not None:
            at = [point for point in points if point["k"] == k]
            by_k.points(f"{run.name}, trained k", [k] * len(at), [p["mse"] for p in at], colour=colour)
        if thresholds := _curve(run, "threshold"):
            _draw(threshold, f"{run.name}, TopK", points, "l0", colour, "-", run.name)
            _draw(threshold, f"{run.name}, threshold", thresholds, "l0", colour, "--")
        numbers.append(_beyond(run, points))
    told = [one for one in numbers if one["statement"]]
    return Figure(
        name="progressive",
        title="Progressive recovery",
        source="section 5.3, Figures 9 and 10",
        caption="Normalized MSE when the k' largest latents of each token are kept (solid; dot: k' = "
        "k of training), and "
        "when all above one threshold are (dashed), against L0. Bands: 95 %, held-out text.",
        statement=" ".join(one["statement"] for one in told) or "No curve goes to twice the k of training.",
        canvas=canvas,
        runs=[run.name for run in runs],
        claims=(_progressive_claim(told),),
        numbers={"runs": numbers},
    )


def _draw(
    panel: Panel, series: str, points: list[dict[str, Any]], x: str, colour: str, dash: str, label: str = ""
) -> None:
    points = sorted(points, key=lambda point: point[x])
    band = [point["low"] for point in points], [point["high"] for point in points]
    at, mse = [point[x] for point in points], [point["mse"] for point in points]
    panel.line(series, at, mse, *band, colour=colour, dash=dash, label=label)


def _beyond(run: Run, points: list[dict[str, Any]]) -> dict[str, Any]:
    """What a k' of twice the training k does to the error."""
    at = {point["k"]: point for point in points}
    k = run.k
    best = min(points, key=lambda point: point["mse"])
    found: dict[str, Any] = {
        "run": run.name,
        "k": k,
        "best_k": best["k"],
        "best_mse": best["mse"],
        "statement": "",
    }
    if k in at and 2 * k in at:
        found |= {"mse": at[k]["mse"], "mse_at_2k": at[2 * k]["mse"]}
        found["change"] = found["mse_at_2k"] / found["mse"] - 1
        found["statement"] = (
            f"{run.name}: {said(at[k]['mse'], _ends(at[k]))} at k' = k = {k}, "
            f"{said(at[2 * k]['mse'], _ends(at[2 * k]))} at "
            f"{2 * k} ({found['change']:+.1%}), lowest at {best['k']}."
        )
    return found


def _ends(point: dict[str, Any]) -> tuple[float, float] | None:
    return None if point["low"] is None else (point["low"], point["high"])


def _progressive_claim(told: list[dict[str, Any]]) -> Claim:
    changes = [one["change"] for one in told]
    verdict: Verdict = "undecided"
    if changes and min(changes) > -FLAT:
        verdict = "agrees"
    elif changes and max(changes) < -FLAT:
        verdict = "disagrees"
    span = f"{min(changes):+.1%} to {max(changes):+.1%}" if changes else "no curve goes that far"
    return Claim(
        "TopK recovers progressively up to the k of training alone: beyond it the error is flat or grows.",
        verdict,
        f"from k' = k to 2 k the error changes by {span} in {counted(len(changes), 'run')}; less than "
        f"{FLAT:.0%} is flat",
    )


def _refinement(run: Run) -> dict[str, tuple[float, float | None, float | None]]:
    """Value and interval of both errors and of the ratio; empty where one of them is undefined."""
    section, found = run.evaluation.get("refinement") or {}, {}
    for name in ("normalized_mse", "normalized_mse_refined", "total_ratio"):
        given = section.get(name) or {}
        found[name] = tuple(given.get(part) for part in ("value", "low", "high"))
    return {} if any(value is None for value, _, _ in found.values()) else found


def _refined(runs: list[Run]) -> Figure:
    canvas = Canvas(2, width=3.7)
    ratio = canvas.panel("Values after refinement", "L0", "sum of refined / sum of values", "x")
    ratio.across("unchanged", 1, "unchanged")
    rows, sizes = [], grouped(runs, lambda run: run.n_latents)
    size = max(sizes, key=lambda n: (len({run.family for run in sizes[n]}), len(sizes[n])))
    error = canvas.panel(f"Error before (open) and after, n = {size:,}", "L0", "normalized MSE", "xy")
    for family, colour, marker in zip(FAMILIES, PALETTE, MARKERS, strict=False):
        mine = sorted((r for r in runs if r.family == family and r.metric("l0")), key=lambda run: run.metrics["l0"])
        if not mine:
            continue
        l0, found = [run.metrics["l0"] for run in mine], [_refinement(run) for run in mine]
        style = {"colour": colour, "marker": marker}
        columns = list(zip(*(one["total_ratio"] for one in found), strict=True))
        ratio.points(FAMILIES[family], l0, *columns, **style, legend=FAMILIES[family])
        same = [i for i, run in enumerate(mine) if run.n_latents == size]
        for name, filled in (("normalized_mse", False), ("normalized_mse_refined", True)):
            columns = [[found[i][name][part] for i in same] for part in range(3)]
            error.points(f"{FAMILIES[family]}, {name}", [l0[i] for i in same], *columns, **style, filled=filled)
        rows += [{"run": r.name, "family": family, "l0": x, **f} for r, x, f in zip(mine, l0, found, strict=True)]
    ratio.legend(loc="best")
    parts = []
    for family, mine in grouped(rows, lambda row: row["family"]).items():
        ratios = [row["total_ratio"][0] for row in mine]
        gains = [1 - row["normalized_mse_refined"][0] / row["normalized_mse"][0] for row in mine]
        parts.append(
            f"{FAMILIES[family]} ({counted(len(mine), 'run')}): values change by a factor of "
            f"{spanned(ratios, '.3f')}, the error "
            f"falls by {spanned(gains, '.1%')}"
        )
    return Figure(
        name="refinement",
        title="Shrinkage, by refinement",
        source="section 5.1, Figure 8",
        caption="For each token the active latents stay and their values are optimised anew, not "
        "below zero. Left, the sum "
        "of refined values over the sum of values: above 1 where values were too small. Right, the "
        "error before and after. "
        f"{counted(len(rows), 'run')}; bars: 95 %, held-out text.",
        statement=f"{'; '.join(parts)}.",
        canvas=canvas,
        runs=[row["run"] for row in rows],
        claims=(_shrinkage_claim(rows),),
        numbers={"runs": rows},
    )


def _shrinkage_claim(rows: list[dict[str, Any]]) -> Claim:
    """L1's ratios must all be surely above 1, and further from it than any of TopK's."""
    l1 = [row["total_ratio"] for row in rows if row["family"] in ("l1", "l1_decoder_norm")]
    topk = [abs(row["total_ratio"][0] - 1) for row in rows if row["family"] == "topk"]
    verdict: Verdict = "undecided"
    if l1 and topk:
        sure = all((one[0] if one[1] is None else one[1]) > 1 for one in l1)
        verdict = "agrees" if sure and min(one[0] - 1 for one in l1) > max(topk) else "disagrees"
    return Claim(
        "Refinement raises the values of L1 autoencoders, and leaves those of TopK where they are on the whole.",
        verdict,
        f"ratios of L1 {spanned([one[0] for one in l1], '.3f') if l1 else 'not measured'}; of TopK "
        f"{'at most ' + format(max(topk), '.3f') + ' from 1' if topk else 'not measured'}",
    )
