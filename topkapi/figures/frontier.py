"""Error against L0 for TopK and the ReLU baselines (the paper's Figures 2 and 5), and the language model's loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from topkapi.figures.canvas import MARKERS, PALETTE, Canvas, Panel
from topkapi.figures.figure import Claim, Figure, LeftOut, Verdict, counted, said
from topkapi.figures.sources import FAMILIES, LR, SEED, Run, alike, at_best_rate, grouped, held_out, of_one_stream

MOST_PANELS = 4
COLOUR = dict(zip(FAMILIES, PALETTE, strict=False))
MARKER = dict(zip(FAMILIES, MARKERS, strict=False))
Quantity = Callable[[Run], float | None]


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """Normalized MSE over L0, and cross-entropy and KL of the spliced language model over both."""
    measured = [run for run in at_best_rate(runs) if (run.metric("l0") or 0) > 0]
    if not measured:
        yield LeftOut(
            "error against L0", "no run is measured: topkapi eval RUN, or topkapi sweep to its end", "error-l0"
        )
        return
    largest = of_one_stream(measured)
    if n_left := len(measured) - len(largest):
        yield LeftOut(
            "error against L0 for all runs",
            f"{counted(n_left, 'run')} of another language model, text or number of tokens: draw them by themselves",
        )
    yield _error(largest)
    downstream = [run for run in largest if _loss_increase(run) is not None and run.metric("kl") is not None]
    if downstream:
        yield _downstream(downstream)
    else:
        yield LeftOut(
            "downstream loss",
            "no run has the language model's loss: topkapi eval RUN, or topkapi sweep with --eval.downstream-tokens N",
            "downstream",
        )


def _loss_increase(run: Run) -> float | None:
    spliced, clean = run.metric("ce_spliced"), run.metric("ce_clean")
    return None if spliced is None or clean is None else spliced - clean


def _l0(run: Run) -> float | None:
    return run.metric("l0")


def _mse(run: Run) -> float | None:
    return run.metric("normalized_mse")


def _kl(run: Run) -> float | None:
    return run.metric("kl")


WITH_INTERVAL: dict[Quantity, str] = {_mse: "normalized_mse", _kl: "kl"}


def _error(runs: list[Run]) -> Figure:
    """A panel for each n_latents, those with baselines before the others."""
    by_size = grouped(sorted(runs, key=lambda run: run.n_latents), lambda run: run.n_latents)
    ranked = sorted(by_size, key=lambda n: (-len({run.family for run in by_size[n]}), -len(by_size[n])))
    shown = sorted(ranked[:MOST_PANELS])
    columns = 2 if len(shown) > 3 else len(shown)
    canvas = Canvas(columns, math.ceil(len(shown) / columns), width=3.6)
    ratios = []
    for n in shown:
        panel = canvas.panel(f"n_latents = {n:,}", "L0, active latents per token", "normalized MSE", "xy")
        _series(panel, by_size[n], _l0, _mse, FAMILIES)
        ratios += _ratios(by_size[n], _mse)
        _limits(panel)
    left = f" Of {len(by_size)} sizes, those with most kinds are shown." if len(by_size) > len(shown) else ""
    spread = _seed_spread(runs, _mse)
    return Figure(
        name="error-l0",
        title="Normalized MSE against L0",
        source="Figures 2 and 5",
        caption=f"Held-out text, {held_out(runs)} tokens; {counted(len(runs), 'run')} of "
        f"{runs[0].tokens:,} training tokens each, the best learning rate where there are several. A point is a run; "
        "lines join means over seeds; bars: 95 % where eval.json has intervals. L1: ReLU with an L1 "
        "penalty and unit norm of the decoder; "
        "modified L1: the penalty "
        f"weighs each value with its decoder row's norm.{left}",
        statement=_compared(ratios, "normalized MSE") + _spread_text(spread),
        canvas=canvas,
        runs=[run.name for n in shown for run in by_size[n]],
        claims=(_advantage(ratios, spread),),
        numbers={"baselines_over_topk": ratios, "seed_spread": spread},
    )


def _downstream(runs: list[Run]) -> Figure:
    canvas = Canvas(2, 2, width=3.7, height=2.7)
    quantities: list[tuple[str, str, Quantity]] = [
        ("Cross-entropy", "increase, nats per token", _loss_increase),
        ("KL divergence", "KL(clean || spliced), nats per token", _kl),
    ]
    across: list[tuple[str, str, Quantity]] = [
        ("against L0", "L0, active latents per token", _l0),
        ("against normalized MSE", "normalized MSE", _mse),
    ]
    for title, unit, y in quantities:
        for versus, name, x in across:
            panel = canvas.panel(f"{title} {versus}", name, unit, "xy")
            for n, group in grouped(sorted(runs, key=lambda run: run.n_latents), lambda run: run.n_latents).items():
                _series(panel, group, x, y, {"topk": f"n {n:,}"} if x is _l0 else {})
            if x is _mse:
                _keys(panel, runs)
            _limits(panel)
    ratios = [r for group in grouped(runs, lambda run: run.n_latents).values() for r in _ratios(group, _loss_increase)]
    errors = {r["run"]: r["ratio"] for g in grouped(runs, lambda r: r.n_latents).values() for r in _ratios(g, _mse)}
    for one in ratios:
        one["error_ratio"] = errors.get(one["run"])
    increases = [v for run in runs if (v := _loss_increase(run)) is not None]
    recovered = [v for run in runs if (v := run.metric("loss_recovered")) is not None]
    parts = [f"Splicing raises the cross-entropy by {min(increases):.3f} to {max(increases):.3f} nats per token"]
    n_free = sum(increase <= 0 for increase in increases)
    parts += [f"loss recovered {min(recovered):.1%} to {max(recovered):.1%}"] if recovered else []
    return Figure(
        name="downstream",
        title="The language model's loss with the autoencoder spliced in",
        source="Figure 5",
        caption="Increase of next-token cross-entropy, and KL divergence from the untouched model, on held-out text, "
        f"against L0 and normalized MSE. {counted(len(runs), 'run')}; seeds are single points, lines join means."
        f"{f' Gaps: {n_free} whose cross-entropy is not raised.' if n_free else ''}",
        statement=f"{'; '.join(parts)}. {_compared(ratios, 'increase of the cross-entropy')}",
        canvas=canvas,
        runs=[run.name for run in runs],
        claims=(_larger_downstream(ratios),),
        numbers={"baselines_over_topk": ratios},
    )


def _keys(panel: Panel, runs: list[Run]) -> None:
    """A legend of the families that are there."""
    for family in FAMILIES:
        if any(run.family == family for run in runs):
            panel.axes.plot([], [], MARKER[family], color=COLOUR[family], label=FAMILIES[family])
    panel.legend(loc="best")


def _series(panel: Panel, runs: list[Run], x: Quantity, y: Quantity, labels: dict[str, str]) -> None:
    """Points of each family, and lines through means over seeds, by rising x; `labels` of families where they end."""
    for family, mine in sorted(grouped(runs, lambda run: run.family).items()):
        mine = [run for run in mine if x(run) is not None and y(run) is not None]
        if not mine:
            continue
        colour, name = COLOUR[family], FAMILIES[family]
        series = f"{name}, n = {mine[0].n_latents}"
        means = [
            (float(np.mean([x(run) for run in seeds])), float(np.mean([y(run) for run in seeds])))
            for seeds in grouped(mine, lambda run: alike(run, SEED, LR)).values()
        ]
        means.sort()
        panel.line(
            f"{series}, means", *zip(*means, strict=True), colour=colour, width=1.0, label=labels.get(family, "")
        )
        mine.sort(key=lambda run: (x(run), run.name))
        bars = zip(*(run.interval(WITH_INTERVAL.get(y, "")) for run in mine), strict=True)
        panel.points(series, [x(r) for r in mine], [y(r) for r in mine], *bars, colour=colour, marker=MARKER[family])


def _limits(panel: Panel) -> None:
    """Room around points that lie close together or alone."""
    for name, scale in (("x", panel.axes.set_xlim), ("y", panel.axes.set_ylim)):
        values = [getattr(row, name) for row in panel.rows if row.kind == "points" and (getattr(row, name) or 0) > 0]
        if values:
            low, high = min(values), max(values)
            margin = max(1.15, (high / low) ** 0.08)
            scale(low / margin, high * margin)


def _ratios(runs: list[Run], quantity: Quantity) -> list[dict[str, Any]]:
    """For each baseline its quantity over TopK's at the same L0, between neighbouring k on straight log-log lines.

    Baselines whose L0 is outside TopK's range have none.
    """
    topk = grouped((run for run in runs if run.family == "topk" and (quantity(run) or 0) > 0), lambda run: run.k)
    points = sorted(
        (float(np.mean([_l0(r) for r in g])), float(np.mean([quantity(r) for r in g]))) for g in topk.values()
    )
    found = []
    for run in runs:
        value = quantity(run)
        if run.family not in ("l1", "l1_decoder_norm") or value is None or value <= 0 or len(points) < 2:
            continue
        l0 = _l0(run)
        if points[0][0] <= l0 <= points[-1][0]:
            at = math.exp(np.interp(math.log(l0), *np.log(np.array(points)).T))
            found.append(
                {"run": run.name, "family": run.family, "l0": l0, "value": value, "topk": at, "ratio": value / at}
            )
    return found


def _compared(ratios: list[dict[str, Any]], what: str) -> str:
    if not ratios:
        return f"No baseline has an L0 within TopK's, so there is no {what} to compare at equal L0."
    parts = []
    for family, mine in grouped(ratios, lambda one: one["family"]).items():
        values = sorted(one["ratio"] for one in mine)
        spans = f"{values[0]:.2f}" if len(values) == 1 else f"{values[0]:.2f} to {values[-1]:.2f}"
        l0s = sorted(one["l0"] for one in mine)
        at = f"L0 {l0s[0]:.0f}" if len(l0s) == 1 else f"L0 {l0s[0]:.0f} to {l0s[-1]:.0f}"
        parts.append(f"{FAMILIES[family]} has {spans} times TopK's {what} ({counted(len(mine), 'run')}, {at})")
    return f"At equal L0, {' and '.join(parts)}."


def _seed_spread(runs: list[Run], quantity: Quantity) -> dict[str, Any] | None:
    """The largest relative standard deviation between seeds, of those groups that have several."""
    spreads = []
    for group in grouped(runs, lambda run: alike(run, SEED)).values():
        values = [quantity(run) for run in group]
        if len(values) > 1:
            deviation = float(np.std(values, ddof=1) / np.mean(values))
            spreads.append({"runs": [run.name for run in group], "relative_deviation": deviation})
    return max(spreads, key=lambda one: one["relative_deviation"], default=None)


def _spread_text(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return " No point has several seeds."
    return f" Seeds differ by {spread['relative_deviation']:.2%} (standard deviation of {len(spread['runs'])})."


def _advantage(ratios: list[dict[str, Any]], spread: dict[str, Any] | None) -> Claim:
    """Every baseline must be above, or below, by three standard deviations between seeds; by 1 % where unknown."""
    margin = 3 * spread["relative_deviation"] if spread else 0.01
    values = [one["ratio"] for one in ratios]
    verdict: Verdict = "undecided"
    if values and min(values) > 1 + margin:
        verdict = "agrees"
    elif values and max(values) < 1 - margin:
        verdict = "disagrees"
    span = f"ratios {said(min(values))} to {said(max(values))}" if values else "no baseline within TopK's L0"
    return Claim(
        "At equal L0 TopK has a lower error than ReLU with an L1 penalty.",
        verdict,
        f"{span}; beyond {margin:.1%} from 1 counts",
    )


def _larger_downstream(ratios: list[dict[str, Any]]) -> Claim:
    pairs = [(one["ratio"], one["error_ratio"]) for one in ratios if one.get("error_ratio")]
    larger = sum(a > b for a, b in pairs)
    verdict: Verdict = "undecided"
    if len(pairs) >= 3 and larger in (0, len(pairs)):
        verdict = "agrees" if larger else "disagrees"
    return Claim(
        "TopK's advantage over ReLU is larger in the language model's loss than in the error.",
        verdict,
        f"the ratio to TopK is larger for the loss in {larger} of {counted(len(pairs), 'baseline run')}",
    )
