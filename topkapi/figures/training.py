"""Training curves: of all runs, and with and without unit norm of the decoder (the paper's Figure 18)."""

from collections.abc import Iterator, Sequence

import numpy as np

from topkapi.figures.canvas import Canvas, Panel, colours
from topkapi.figures.figure import Claim, Figure, LeftOut, counted, listed, mean_interval, said, spanned
from topkapi.figures.sources import UNIT_NORM, Run, alike, grouped, held_out

MOST_RUNS = 12
SMOOTHED = 20  # parts of a curve that one mean goes over
LAST = 0.1  # of the tokens, over which ends of curves are compared
NAMES = {True: "unit norm", False: "free norms"}


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """Training curves, and those of pairs that differ in the decoder's norm alone."""
    drawn = [run for run in runs if len(run.curve) > 1]
    if not drawn:
        yield LeftOut(
            "training curves",
            "no run has a metrics.jsonl with two lines: give run folders, not copied points",
            "training",
        )
        return
    yield _curves(drawn)
    pairs = [
        sorted(group, key=lambda run: not run.settings[UNIT_NORM])
        for group in grouped(drawn, lambda run: alike(run, UNIT_NORM)).values()
        if len(group) == 2 and group[0].k is not None
    ]
    pairs = [pair for pair in pairs if len(_relative(*pair)[0])]
    if not pairs:
        yield LeftOut(
            "decoder normalisation",
            "no two curves differ in the decoder's norm alone: topkapi sweep with --decoder-norm on off gives them",
            "decoder-norm",
        )
    else:
        yield _decoder_norm(pairs)


def _curves(runs: Sequence[Run]) -> Figure:
    """Normalized MSE and dead latents while training; of many runs, some that stand evenly among all."""
    last = {run: _column(run, "normalized_mse")[-1] for run in runs}
    order = sorted(runs, key=lambda run: (np.isnan(last[run]), last[run], run.name))
    shown = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, MOST_RUNS).astype(int))]
    canvas = Canvas(2, width=3.6)
    error = canvas.panel("Reconstruction", "training tokens", "normalized MSE", "xy")
    dead = canvas.panel("Dead latents", "training tokens", "share of latents")
    for run, colour in zip(shown, colours(len(shown)), strict=True):
        tokens = _column(run, "tokens")
        error.line(run.name, tokens, _smooth(_column(run, "normalized_mse")), colour=colour, label=run.name)
        dead.line(run.name, tokens, _column(run, "dead_fraction"), colour=colour)
    dead.axes.set_ylim(bottom=0)
    left = (
        f" Shown are {len(shown)} of {len(runs)}, evenly spaced in their last error." if len(runs) > len(shown) else ""
    )
    ends = [value for value in last.values() if not np.isnan(value)]
    return Figure(
        name="training",
        title="Training curves",
        caption=f"Normalized MSE of training batches, as means over {1 / SMOOTHED:.1%} of a curve, and the share of "
        f"latents that count as dead, of {counted(len(runs), 'run')}.{left}",
        statement=f"The last logged batch has a normalized MSE of {spanned(ends, '.4f')}." if ends else "",
        canvas=canvas,
        runs=[run.name for run in shown],
    )


def _decoder_norm(pairs: list[list[Run]]) -> Figure:
    canvas = Canvas(2, width=3.6)
    curves = canvas.panel("Training", "training tokens", "normalized MSE", "xy")
    ratios = canvas.panel("Unit norm against free norms", "training tokens", "relative difference, %", "x")
    ratios.across("no difference", 0)
    numbers, many = [], len(pairs) > 1
    for pair, colour in zip(pairs, colours(len(pairs)), strict=True):
        label = pair[0].name if many else ""
        for run, dash in zip(pair, ("-", "--"), strict=True):
            _curve(curves, run, colour, dash, f"{label} {NAMES[run.settings[UNIT_NORM]]}".strip())
        tokens, difference = _relative(*pair)
        smooth = 100 * _smooth(difference)
        ratios.line(pair[0].name, tokens, smooth, colour=colour, label=pair[0].name if many else "unit norm\nless free")
        numbers.append(_end(pair, tokens, difference))
    _limit_to_ends(ratios)
    return Figure(
        name="decoder-norm",
        title="With and without unit norm of the decoder",
        source="Figure 18",
        caption="Normalized MSE of training batches, as means over "
        f"{1 / SMOOTHED:.1%} of a curve, with decoder rows kept at unit norm (solid) and free (dashed); right, the "
        "relative difference batch by batch, below zero where unit norm is better: both read the same batches. "
        f"{counted(len(pairs), 'pair')} of runs: {listed([pair[0].name for pair in pairs])}. Dots: held-out text "
        f"({held_out([run for pair in pairs for run in pair])} tokens).",
        statement=" ".join(one["statement"] for one in numbers),
        canvas=canvas,
        runs=[run.name for pair in pairs for run in pair],
        claims=(_claim(numbers),),
        numbers={"pairs": numbers},
    )


def _curve(panel: Panel, run: Run, colour: str, dash: str, label: str) -> None:
    tokens, mse = _column(run, "tokens"), _column(run, "normalized_mse")
    name = f"{run.name} ({NAMES[run.settings[UNIT_NORM]]})"
    panel.line(f"{name}, batches", tokens, mse, colour=colour, width=0.5, opacity=0.25)
    panel.line(name, tokens, _smooth(mse), colour=colour, dash=dash, label=label)
    if (held_out := run.metric("normalized_mse")) is not None:
        filled = run.settings[UNIT_NORM]
        panel.points(f"{name}, held out", [tokens[-1]], [held_out], colour=colour, filled=filled)


def _relative(unit: Run, free: Run) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that both logged, and there (unit - free) / free of normalized MSE."""
    ours, theirs = ({line["tokens"]: line.get("normalized_mse") for line in run.curve} for run in (unit, free))
    tokens = np.array(sorted(ours.keys() & theirs.keys()), float)  # none where they logged at other steps
    a, b = (np.array([it[t] for t in tokens], float) for it in (ours, theirs))
    return tokens, (a - b) / b


def _end(pair: list[Run], tokens: np.ndarray, difference: np.ndarray) -> dict:
    last = difference[tokens >= (1 - LAST) * tokens[-1]]
    mean, interval = mean_interval(100 * last)
    held_out = [run.metric("normalized_mse") for run in pair]
    text = (
        f"{pair[0].name}: with unit norm the error over the last {LAST:.0%} of the tokens differs by "
        f"{said(mean, interval, '+.2f')} % from that with free norms ({len(last)} logged batches, paired)"
    )
    if None not in held_out:
        text += (
            f"; held out {held_out[0]:.4f} against {held_out[1]:.4f}, {100 * (held_out[0] / held_out[1] - 1):+.2f} %"
        )
    return {
        "name": pair[0].name,
        "percent": mean,
        "interval": interval,
        "n_batches": len(last),
        "held_out_unit": held_out[0],
        "held_out_free": held_out[1],
        "statement": text + ".",
    }


def _claim(numbers: list[dict]) -> Claim:
    """Each pair decides where its interval leaves out zero; with several, intervals are over pairs."""
    means = [one["percent"] for one in numbers]
    mean, interval = mean_interval(means) if len(means) > 1 else (means[0], numbers[0]["interval"])
    undecided = interval is None or interval[0] <= 0 <= interval[1]
    among = f"over {len(means)} pairs" if len(means) > 1 else "over batches of one pair, which leaves out seeds"
    return Claim(
        "Unit norm of the decoder lowers the error slightly.",
        "undecided" if undecided else "agrees" if mean < 0 else "disagrees",
        f"difference {said(mean, interval, '+.2f')} %, interval {among}",
    )


def _limit_to_ends(panel: Panel) -> None:
    """The vertical range of the latter nine tenths of the curves: differences of the first steps are wild."""
    shown = [row.y for row in panel.rows if row.kind == "line" and row.y is not None]
    ys = [y for y in shown[len(shown) // 10 :] if np.isfinite(y)]
    if ys:
        low, high = np.quantile(ys, [0.01, 0.99])
        margin = 0.25 * max(high - low, abs(low), abs(high), 1e-9)
        panel.axes.set_ylim(min(low - margin, -margin), max(high + margin, margin))


def _column(run: Run, name: str) -> np.ndarray:
    return np.array([np.nan if line.get(name) is None else line[name] for line in run.curve], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over 1 / SMOOTHED of the curve around each point, narrower at the ends; gaps stay gaps."""
    half = len(values) // SMOOTHED // 2
    return np.array(
        [
            np.nan if np.isnan(v) else np.nanmean(values[max(0, i - reach) : i + reach + 1])
            for i, v in enumerate(values)
            for reach in [min(half, i, len(values) - 1 - i)]
        ]
    )
