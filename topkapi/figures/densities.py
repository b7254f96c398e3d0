"""How often and how strongly latents fire: distributions (the paper's Figure 19) and dense solutions (Figure 20)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from topkapi.errors import TopkapiError
from topkapi.figures.canvas import PALETTE, Canvas, Panel, colours
from topkapi.figures.figure import Claim, Figure, LeftOut, Verdict, counted, listed, said, spanned
from topkapi.figures.sources import Firings, Run, grouped, of_one_stream
from topkapi.statistics.densities import (
    Comparison,
    compare,
    count_latents,
    cumulative_share,
    dense_mass,
    dense_measure,
)
from topkapi.statistics.intervals import CONFIDENCE
from topkapi.statistics.modes import count_modes

DENSE_FROM = 0.1  # density from which a latent counts as dense
MOST_DETAILS = 4
STEP, WIDE_STEP, FEW_LATENTS = 0.1, 0.2, 1_000  # decades of a bin, for many and for few latents
FEW = 10  # firings: a density of fewer is blurred by more than a third
# k / d_model at which the paper's dense solutions begin, and are plain (256, 512 of 768), and that in words
ONSET, ONSET_WORDS = 1 / 3, "a third"
STRONG, STRONG_WORDS = 2 / 3, "two thirds"
RISE = 1.1  # of the dense mass, that counts
SUPPLY = "topkapi eval RUN, topkapi study RUN, or a sweep"


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """Distributions over latents: in detail for a few runs, against n_latents, and how dense solutions are."""
    counted_runs = [run for run in runs if run.firings is not None]
    if not counted_runs:
        yield LeftOut("densities and dense solutions", f"no run has counts of firings: {SUPPLY}", "densities")
        return
    described = {run.name: _describe(run.firings) for run in counted_runs}
    for run in _for_detail(counted_runs):
        found = _describe(run.most_firings)
        if isinstance(found["density"], str):
            yield LeftOut(f"densities of {run.name}", found["density"])
        else:
            yield _detail(run, found)
    topk = [run for run in counted_runs if run.family == "topk"]
    topk = of_one_stream(topk)
    groups = [
        group
        for group in grouped(topk, lambda run: (run.k, run.seed)).values()
        if len({run.n_latents for run in group}) > 1
    ]
    if groups:
        yield _by_size(_first_seeds(groups), described)
    else:
        yield LeftOut(
            "densities against n_latents", f"no k has counts at two n_latents: {SUPPLY}, of several sizes", "densities"
        )
    yield _dense(topk)


def _describe(firings: Firings) -> dict[str, Any]:
    """Fits and counts of one run; in place of a comparison the reason why there is none."""

    def fitted(values: np.ndarray) -> Comparison | str:
        try:
            return compare(values)
        except TopkapiError as error:
            return str(error)

    often = firings.density[firings.n_fired >= FEW]
    return {
        "n_modes": len(count_modes(np.log10(often))) if len(often) >= 4 else None,
        "density": fitted(firings.density),
        "importance": fitted(firings.importance),
        "counts": count_latents(firings.density, DENSE_FROM),
        "n_tokens": firings.n_tokens,
    }


def _for_detail(runs: Sequence[Run]) -> list[Run]:
    """Runs that were named themselves, and of sweeps the largest TopK autoencoder; a few in all."""
    named = [run for run in runs if not run.is_point]
    points = sorted((run for run in runs if run.is_point), key=lambda run: (run.family != "topk", -run.n_latents))
    ordinary = sorted(points, key=lambda run: (run.family != "topk", abs(math.log2((run.k or 1) / 32)), -run.n_latents))
    return (named + ordinary[:1])[:MOST_DETAILS]


def _detail(run: Run, found: dict[str, Any]) -> Figure:
    firings, counts = run.most_firings, found["counts"]
    canvas = Canvas(3)
    density = canvas.panel("Density", "log10 fraction of tokens", "latents a decade")
    _histogram(density, *_histogram_of(firings, "density"), found["density"])
    density.upright(f"{FEW} firings", math.log10(FEW / firings.n_tokens), f" {FEW} firings")
    importance = canvas.panel("Importance", "log10 E[a²], a at unit norm of x", "latents a decade")
    if isinstance(found["importance"], Comparison):
        _histogram(importance, *_histogram_of(firings, "importance"), found["importance"])
    share = canvas.panel("Cumulative importance", "share of latents, most important first", "share of all E[a²]")
    sums = cumulative_share(firings.importance)
    at = np.unique(np.linspace(0, len(sums) - 1, 400).astype(int))
    share.line("cumulative", [0, *(at + 1) / len(sums)], [0, *sums[at]], colour=colours(1)[0])
    share.axes.set(xlim=(0, 1), ylim=(0, 1.02))
    half = (int(np.searchsorted(sums, 0.5)) + 1) / len(sums)
    most = (int(np.searchsorted(sums, 0.9)) + 1) / len(sums)
    share.upright("half of all importance", half, f" {half:.1%} of latents: half of it")
    return Figure(
        name=f"densities-{run.name.replace('/', '-')}",
        title=f"Densities and importances, {run.name}",
        source="Figure 19",
        caption=f"{run.n_latents:,} latents of {run.name} on {_text_of([firings])}. "
        "Density: fraction of "
        "tokens on which a latent fires. Importance: mean squared activation over all tokens, with activations of unit "
        "norm. Curves: maximum likelihood fits to the latents that fired, "
        f"{counts.n_latents - counts.n_dead:,}; {counts.n_dead:,} that never did are not drawn. Densities left of the "
        f"dashed line come from fewer than {FEW} firings.",
        statement=f"{_preference('log density', found['density'])} "
        f"{_preference('log importance', found['importance'])} "
        f"{counts.n_dead:,} of {counts.n_latents:,} latents never fired, {counts.n_dense:,} fire on at least "
        f"{DENSE_FROM:.0%} of tokens. {half:.1%} of the latents have half of all importance, {most:.1%} have 90 %.",
        canvas=canvas,
        runs=[run.name],
        claims=_shape_claims([found]),
        numbers=_numbers(run, found),
    )


def _text_of(firings: Iterable[Firings]) -> str:
    """How many tokens, and of which text."""
    given = list(firings)
    tokens, texts = sorted({one.n_tokens for one in given}), sorted({one.text for one in given})
    return f"{' to '.join(f'{n:,}' for n in tokens[:: max(1, len(tokens) - 1)])} {' and '.join(texts)} tokens"


def _histogram_of(firings: Firings, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Edges in log10 of density or importance, and the latents a decade in each bin, of those that fired.

    Bins of densities have their edges halfway between counts and hold at least one: few firings make no comb.
    """
    values = getattr(firings, what)
    values = values[values > 0]
    step = STEP if len(values) >= FEW_LATENTS else WIDE_STEP
    if what == "density":
        counts = [float(math.floor(values.min() * firings.n_tokens + 0.5)) - 0.5]
        while counts[-1] < values.max() * firings.n_tokens:
            counts.append(max(counts[-1] + 1, math.floor(counts[-1] * 10**step) + 0.5))
        edges = np.log10(np.array(counts) / firings.n_tokens)
    else:
        first, last = math.floor(np.log10(values.min()) / step), math.floor(np.log10(values.max()) / step) + 1
        edges = step * np.arange(first, last + 1)
    numbers, _ = np.histogram(np.log10(values), edges)
    return edges, numbers / np.diff(edges)


def _histogram(panel: Panel, edges: np.ndarray, heights: np.ndarray, fits: Comparison) -> None:
    """Latents a decade, with both fits on that scale."""
    panel.bins("latents", edges, heights, colour=colours(1)[0])
    at = np.linspace(edges[0], edges[-1], 200)
    for fit, colour, dash in ((fits.gaussian, PALETTE[1], "-"), (fits.laplace, PALETTE[2], "--")):
        expected = np.exp(fit.log_density(at * math.log(10))) * math.log(10) * fit.n
        name = "Gaussian" if fit.family == "gaussian" else "Laplace"
        panel.line(f"{name} fit", at, expected, colour=colour, dash=dash, legend=name)
    panel.axes.set_ylim(0, 1.25 * max(heights))
    panel.legend(loc="upper right", handlelength=1.6)


def _preference(what: str, found: Comparison | str) -> str:
    if isinstance(found, str):
        return f"The {what} has no fit: {found}"
    ratio = said(found.log_likelihood_ratio, found.interval, "+.0f")
    which = {"gaussian": "Gaussian is the likelier fit", "laplace": "Laplace is the likelier fit"}
    text = which.get(found.preferred, "neither fit is surely the likelier")
    return f"Of the {what} the {text}: Gaussian less Laplace {ratio} nats."


def _shape_claims(found: list[dict[str, Any]]) -> tuple[Claim, ...]:
    claims = []
    for what, family, text in (
        ("density", "gaussian", "Log densities are close to Gaussian."),
        ("importance", "laplace", "Log importances are closer to Laplace."),
    ):
        preferred = [one[what].preferred for one in found if isinstance(one[what], Comparison)]
        n_for, n_against = (
            preferred.count(family),
            len(preferred) - preferred.count(family) - preferred.count("neither"),
        )
        verdict: Verdict = "undecided"
        if n_for + n_against and max(n_for, n_against) > 0.8 * len(preferred):
            verdict = "agrees" if n_for > n_against else "disagrees"
        evidence = f"{family} is the likelier of the two fits in {n_for} of {counted(len(preferred), 'run')}"
        claims.append(Claim(text, verdict, f"{evidence}, the other one in {n_against}, neither surely in the rest"))
    modes = [one["n_modes"] for one in found if one["n_modes"] is not None]
    single = modes.count(1)
    verdict = "undecided" if not modes else "agrees" if single > 0.8 * len(modes) else "disagrees"
    evidence = f"one mode in {single} of {counted(len(modes), 'run')}, of latents with at least {FEW} firings"
    return (*claims, Claim("Log densities have no second mode.", verdict, evidence))


def _numbers(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"run": run.name, **{name: found[name] for name in ("n_tokens", "n_modes")}}
    values |= asdict(found["counts"])
    for what in ("density", "importance"):
        fits = found[what]
        if isinstance(fits, Comparison):
            values[what] = {**asdict(fits), "preferred": fits.preferred}
    return values


def _first_seeds(groups: list[list[Run]]) -> list[list[Run]]:
    """One group for each k, that of the lowest seed; sizes rise."""
    best: dict[Any, list[Run]] = {}
    for group in sorted(groups, key=lambda group: (-len({run.n_latents for run in group}), group[0].seed)):
        best.setdefault(group[0].k, sorted({run.n_latents: run for run in group}.values(), key=lambda r: r.n_latents))
    return [best[k] for k in sorted(best)][:4]


def _by_size(groups: list[list[Run]], described: dict[str, dict[str, Any]]) -> Figure:
    """A row for densities and one for importances, a column for each k."""
    canvas = Canvas(len(groups), 2, width=3.0, height=2.4)
    falls: dict[str, list[bool]] = {"density": [], "importance": []}
    sizes = sorted({run.n_latents for group in groups for run in group})
    colour_of = dict(zip(sizes, colours(len(sizes)), strict=True))
    lines = []
    for what, unit in (("density", "log10 fraction of tokens"), ("importance", "log10 E[a²]")):
        for group in groups:
            panel = canvas.panel(f"{what.capitalize()}, k = {group[0].k}", unit, "share of latents a decade")
            medians = []
            for run in group:
                values = getattr(run.firings, what)
                if not values.any():
                    continue
                edges, heights = _histogram_of(run.firings, what)
                n_fired, name = int((values > 0).sum()), f"n = {run.n_latents:,}"
                panel.bins(name, edges, heights / n_fired, colour=colour_of[run.n_latents], filled=False, label=name)
                medians.append(float(np.median(np.log10(values[values > 0]))))
            falls[what] += [b < a for a, b in pairwise(medians)]
            lines.append(f"k = {group[0].k}: median {what} 10^{', 10^'.join(f'{m:.2f}' for m in medians)}")
    canvas.legend()
    steps = falls["density"] + falls["importance"]
    found = [described[run.name] for group in groups for run in group]
    return Figure(
        name="densities",
        title="Densities and importances against n_latents",
        source="Figure 19",
        caption="Distributions over the latents that fired, TopK, one seed, "
        f"{_text_of(run.firings for group in groups for run in group)}: density (top) and "
        "importance E[a²] (bottom), a column for each k, outlines of histograms of unit area.",
        statement=f"n_latents {listed(sizes)}. {'; '.join(lines)}.",
        canvas=canvas,
        runs=[run.name for group in groups for run in group],
        claims=(
            *_shape_claims(found),
            Claim(
                "At fixed k densities and importances fall as n_latents grows.",
                "agrees" if all(steps) else "disagrees" if not any(steps) else "undecided",
                f"the median falls in {sum(steps)} of {len(steps)} steps from one n_latents to the next",
            ),
        ),
        numbers={"runs": [_numbers(run, described[run.name]) for group in groups for run in group]},
    )


def _dense(runs: Sequence[Run]) -> Figure | LeftOut:
    """Measure and mass over n_latents, a line for each k, with their bounds."""
    rows, too_small = [], []
    for run in runs:
        if run.d_model is None or run.n_latents < run.d_model:
            too_small.append(run.name)
            continue
        density = run.firings.density
        total = float(density.sum())
        if total == 0:
            continue
        measure, mass = dense_measure(density, run.d_model, total), dense_mass(density, run.d_model, total)
        low, high = _sampling(mass, int(run.firings.n_fired.sum()))
        rows.append({"run": run, "measure": measure, "mass": mass, "low": low, "high": high})
    if not rows:
        return LeftOut(
            "dense solutions", f"no TopK run with counts has n_latents of at least d_model: {SUPPLY}", "dense"
        )
    return _draw_dense(rows, too_small)


def _sampling(mass: float, n_firings: int) -> tuple[float, float]:
    """Interval of a share of firings, as if they were independent."""
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(mass * (1 - mass) / n_firings)
    return max(0.0, mass - half), min(1.0, mass + half)


def _draw_dense(rows: list[dict[str, Any]], too_small: list[str]) -> Figure:
    d_model = rows[0]["run"].d_model
    sizes = sorted({row["run"].n_latents for row in rows})
    canvas = Canvas(2, width=3.6)
    measure = canvas.panel("Dense measure", "n_latents", "mean density of d_model densest / L0", "xy")
    mass = canvas.panel("Dense mass", "n_latents", "share of firings of d_model densest", "xy")
    by_k = dict(sorted(grouped((row["run"] for row in rows), lambda run: run.k).items()))
    for (k, group), colour in zip(by_k.items(), colours(len(by_k)), strict=True):
        mine = sorted((row for row in rows if row["run"] in group), key=lambda row: row["run"].n_latents)
        n = [row["run"].n_latents for row in mine]
        for panel, what, scale in ((measure, "measure", 1 / d_model), (mass, "mass", 1)):
            bars = [[scale * row[side] for row in mine] for side in ("low", "high")]
            panel.points(f"k = {k}", n, [row[what] for row in mine], *bars, colour=colour, joined="-", label=f"k = {k}")
    span = np.geomspace(d_model, max(*sizes, 1.01 * d_model), 50)
    style = {"colour": "#73767d", "dash": ":", "width": 1.0, "kind": "reference"}
    measure.line("lower bound 1 / n_latents", span, 1 / span, label="1 / n", **style)
    mass.line("lower bound d_model / n_latents", span, d_model / span, label="d_model / n", **style)
    measure.across("upper bound 1 / d_model", 1 / d_model, f"1 / d_model = {1 / d_model:.2e}")
    mass.across("upper bound 1", 1)
    for panel in (measure, mass):
        panel.x_ticks(sizes)
    largest = max(row["run"].k for row in rows)
    cells = grouped((row["run"] for row in rows), lambda run: (run.n_latents, run.k))
    masses = {cell: sorted(row["mass"] for row in rows if row["run"] in mine) for cell, mine in cells.items()}
    shares = [f"n {n:,}, k {k}: {spanned(values, '.3f')}" for (n, k), values in sorted(masses.items())]
    left_out = f" Left out, with fewer latents than d_model: {listed(too_small)}." if too_small else ""
    return Figure(
        name="dense",
        title="How dense solutions are",
        source="Figure 20",
        caption=f"Left, mean density of the d_model = {d_model} densest latents over L0; right, the "
        "share of all firings "
        "that are theirs: d_model times as much. Dotted: lowest possible, where all latents fire "
        "equally often; dashed: "
        f"highest, where d_model latents do all the firing. {counted(len(rows), 'TopK run')}, "
        f"{_text_of(row['run'].firings for row in rows)}; bars, mostly smaller than the points, are of firings "
        f"taken as independent.{left_out}",
        statement=f"Dense mass: {listed(shares, 12)}.",
        canvas=canvas,
        runs=[row["run"].name for row in rows],
        claims=(_dense_claim(rows, largest / d_model),),
        numbers={
            "d_model": d_model,
            "runs": [{**row, "run": row["run"].name} for row in rows],
        },
    )


def _dense_claim(rows: list[dict[str, Any]], largest: float) -> Claim:
    """At each n_latents that has k on both sides of the onset: the mass, a mean over seeds, from it on against before.

    A mass that has no room for a rise, as the share of firings that it is, is not compared.
    """
    rises = []
    for group in grouped(rows, lambda row: row["run"].n_latents).values():
        by_k = sorted(grouped(group, lambda row: row["run"].k).items())
        onset = ONSET * group[0]["run"].d_model
        before, after = (
            [np.mean([row["mass"] for row in seeds]) for k, seeds in by_k if (k >= onset) == is_after]
            for is_after in (False, True)
        )
        if before and after and RISE * before[-1] < 1:
            rises.append(bool(max(after) > RISE * before[-1]))
    verdict: Verdict = "undecided"
    if rises and all(rises):
        verdict = "agrees"
    elif rises and not any(rises) and largest >= STRONG:
        verdict = "disagrees"
    return Claim(
        f"Solutions become dense from k of about {ONSET_WORDS} of d_model on (256 of 768), strongly at {STRONG_WORDS}.",
        verdict,
        f"the largest k measured is {largest:.2f} d_model; from {ONSET_WORDS} on the mass is more than {RISE} times "
        f"that at the largest k below it at {sum(rises)} of {len(rises)} sizes; only runs of {STRONG_WORDS} speak "
        "against it",
    )
