"""How many latents two seeds share, by the cosines of their decoder rows."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from topkapi.figures.canvas import Canvas, colours
from topkapi.figures.figure import Figure, LeftOut, counted, listed, said, share_interval
from topkapi.figures.sources import SEED, Run, alike, grouped
from topkapi.model import Autoencoder
from topkapi.statistics.matching import Matching, match

SAME = 0.7  # cosine from which Paulo and Belrose 2025 count latents as shared
THRESHOLDS = np.linspace(0, 1, 101)
MOST_PAIRS, MOST_GROUPS = 6, 5
DENSITY_BINS = 10


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """Match rates between runs that differ in their seed alone."""
    groups = [g for g in grouped((run for run in runs if run.has_weights), lambda run: alike(run, SEED)).values()]
    groups = [group for group in groups if len({run.seed for run in group}) > 1][:MOST_GROUPS]
    if not groups:
        yield LeftOut(
            "latents shared by seeds",
            "no two finished runs with weights differ in their seed alone: topkapi sweep with --seeds 0 1",
            "seeds",
        )
        return
    yield _seeds(groups)


def _seeds(groups: list[list[Run]]) -> Figure:
    canvas = Canvas(2, width=3.7)
    rates = canvas.panel("Latents found again", "least cosine of decoder rows", "share of latents")
    rates.upright("shared", SAME)
    by_density = canvas.panel(f"By density, cosine of at least {SAME}", "fraction of tokens", "share of latents", "x")
    numbers = []
    for group, colour in zip(groups, colours(len(groups)), strict=True):
        name, found = _name(group), _matchings(group)
        curves = np.array([[pair.rate_a(t) for t in THRESHOLDS] for _, _, pair in found])
        spread = (curves.min(0), curves.max(0)) if len(found) > 1 else (None, None)
        rates.line(f"{name}, nearest", THRESHOLDS, curves.mean(0), *spread, colour=colour, legend=name)
        mutual = np.mean([[pair.mutual_rate(t) for t in THRESHOLDS] for _, _, pair in found], 0)
        rates.line(f"{name}, mutual", THRESHOLDS, mutual, colour=colour, dash="--")
        numbers.append(_numbers(name, group, found))
        _by_density(by_density, name, found, colour)
    rates.axes.set(xlim=(0, 1), ylim=(0, 1.02))
    rates.legend(loc="lower left")
    by_density.axes.set_ylim(0, 1.02)
    if not by_density.rows:
        by_density.axes.text(0.5, 0.5, "no counts of firings", transform=by_density.axes.transAxes, ha="center")
    pairs = sum(one["n_pairs"] for one in numbers)
    return Figure(
        name="seeds",
        title="Latents that two seeds share",
        source="no figure of the paper; Paulo and Belrose 2025",
        caption="Share of latents whose nearest latent of another seed has at least a cosine (solid), and of pairs "
        f"that choose each other (dashed), by decoder rows; means over {counted(pairs, 'pair')} of "
        "seeds, bands from the "
        "lowest to the highest. The order of the data is the same for all seeds. Right: by density, in tenths of the "
        "latents that fired; bars: 95 % for latents taken as independent, though one counts in each of its pairs.",
        statement=" ".join(one["statement"] for one in numbers),
        canvas=canvas,
        runs=[run.name for group in groups for run in group],
        numbers={"groups": numbers, "cosine": SAME},
    )


def _name(group: list[Run]) -> str:
    run = group[0]
    return f"n {run.n_latents:,}, " + (f"k {run.k}" if run.k is not None else f"{run.family} {_weight(run)}")


def _weight(run: Run) -> str:
    return f"{run.settings['loss.l1_coefficient']:g}"


def _matchings(group: list[Run]) -> list[tuple[Run, Run, Matching]]:
    rows = {run.name: Autoencoder.from_pretrained(run.folder).W_dec.detach() for run in group[: MOST_PAIRS + 1]}
    pairs = list(combinations([run for run in group if run.name in rows], 2))[:MOST_PAIRS]
    with torch.no_grad():
        return [(a, b, match(rows[a.name], rows[b.name])) for a, b in pairs]


def _numbers(name: str, group: list[Run], found: list[tuple[Run, Run, Matching]]) -> dict[str, Any]:
    nearest = [pair.rate_a(SAME) for _, _, pair in found] + [pair.rate_b(SAME) for _, _, pair in found]
    mutual = [pair.mutual_rate(SAME) for _, _, pair in found]
    ends = f" ({min(mutual):.3f} to {max(mutual):.3f})" if len(mutual) > 1 else ""
    return {
        "name": name,
        "n_pairs": len(found),
        "seeds": [run.seed for run in group],
        "nearest": nearest,
        "mutual": mutual,
        "statement": f"{name}: {said(float(np.mean(nearest)))} of the latents have a nearest one with a cosine of at "
        f"least {SAME}, {said(float(np.mean(mutual)))}{ends} in pairs that choose each other; seeds "
        f"{listed([run.seed for run in group])}.",
    }


def _by_density(panel: Any, name: str, found: list[tuple[Run, Run, Matching]], colour: str) -> None:
    """Match rate in tenths of density, of the first run of each pair that has counts."""
    density, matched = [], []
    for a, _, pair in found:
        if a.firings is not None:
            fired = a.firings.n_fired > 0
            density.append(a.firings.density[fired])
            matched.append((pair.cosine_a >= SAME).numpy()[fired])
    if not density:
        return
    density, matched = np.concatenate(density), np.concatenate(matched)
    parts = np.array_split(np.argsort(density, kind="stable"), DENSITY_BINS)
    parts = [part for part in parts if len(part)]
    middle = [float(np.median(density[part])) for part in parts]
    ends = [share_interval(int(matched[part].sum()), len(part)) for part in parts]
    shares = [float(matched[part].mean()) for part in parts]
    bars = [one.low for one in ends], [one.high for one in ends]
    panel.points(name, middle, shares, *bars, colour=colour, joined="-", label=name)
