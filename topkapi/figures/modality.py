"""Whether activations of single latents have several modes, by layer (the paper's appendix E.3)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from topkapi.figures.canvas import Canvas, colours
from topkapi.figures.figure import Claim, Figure, LeftOut, Verdict, counted, said, share_interval, spanned
from topkapi.figures.sources import Run
from topkapi.statistics.modes import count_modes, dip_test

FIRINGS = 200  # of each latent, drawn at random: the same number for all, so that tests are equally sharp
LATENTS = 400  # of each run, drawn among those that fired as often
LEVEL = 0.05
SHOWN = 4  # latents, those with the largest dips


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """Dip tests and counted modes of the latents of each run that has a study."""
    studied = [run for run in runs if run.study is not None]
    if not studied:
        yield LeftOut("modes of activations", "no run has a study: topkapi study RUN --tokens N", "modality")
        return
    rows = [row for run in studied if (row := _tested(run)) is not None]
    if not rows:
        yield LeftOut(
            "modes of activations",
            f"no latent of a study fired {FIRINGS} times: study more tokens, topkapi study --tokens",
            "modality",
        )
        return
    yield _modality(sorted(rows, key=lambda row: (row["layer"], row["run"].name)))


def _tested(run: Run) -> dict[str, Any] | None:
    """Dips of latents of one run; None where none fired often enough."""
    study, random = run.study, np.random.default_rng(0)
    often = [int(i) for i in np.flatnonzero(np.asarray(study.n_fired) >= FIRINGS)]
    often = [i for i in often if len(study.latent(i).values) >= FIRINGS]
    if not often:
        return None
    chosen = np.sort(random.choice(often, min(LATENTS, len(often)), replace=False))
    dips, p_values, modes = [], [], []
    for i in chosen:
        sample = random.choice(np.asarray(study.latent(int(i)).values, np.float64), FIRINGS, replace=False)
        test = dip_test(sample)
        dips.append(test.dip)
        p_values.append(test.p_value)
        modes.append(len(count_modes(sample)))
    site = run.settings.get("language_model.site", "")
    layer = int(site.rpartition(".")[2]) if site.rpartition(".")[2].isdigit() else 0
    count = int(np.sum(np.array(p_values) < LEVEL))
    return {
        "run": run, "site": site, "layer": layer, "latents": chosen, "dips": np.array(dips), "modes": np.array(modes),
        "n": len(chosen), "n_often": len(often), "n_multimodal": count, "interval": share_interval(count, len(chosen)),
    }  # fmt: skip


def _modality(rows: list[dict[str, Any]]) -> Figure:
    canvas = Canvas(3, 2, width=2.9, height=2.3)
    shares = canvas.panel("Latents with several modes", "layer", f"share, dip test p < {LEVEL}")
    layers = [row["layer"] for row in rows]
    ends = [row["interval"] for row in rows]
    values = [row["n_multimodal"] / row["n"] for row in rows]
    bars = [one.low for one in ends], [one.high for one in ends]
    shares.points("share", layers, values, *bars, colour=colours(1)[0], joined="-" if len(set(layers)) > 1 else "")
    shares.across("by chance", LEVEL, "by chance, if all had one mode")
    shares.x_ticks(layers)
    shares.axes.set_ylim(0, min(1.0, 1.25 * max(*bars[1], 2 * LEVEL)))
    number = canvas.panel("Number of modes", "modes counted", "share of latents")
    for row, colour in zip(rows[:7], colours(min(7, len(rows))), strict=True):
        most = max(4, int(row["modes"].max()))
        counts = np.bincount(row["modes"], minlength=most + 1)[1:] / row["n"]
        number.points(
            row["run"].name, range(1, most + 1), counts, colour=colour, joined="-", label=f"layer {row['layer']}"
        )
    number.axes.xaxis.get_major_locator().set_params(integer=True)
    _examples(canvas, rows[0])
    tested = sum(row["n"] for row in rows)
    parts = [
        f"layer {row['layer']} ({row['run'].name}): {said(v, row['interval'])} of {row['n']:,} latents"
        for row, v in zip(rows, values, strict=True)
    ]
    return Figure(
        name="modality",
        title="Modes of activations",
        source="appendix E.3",
        caption=f"{counted(tested, 'latent')} that fired at least {FIRINGS} times in their study, {FIRINGS} firings of "
        "each drawn at random. Hartigans' dip test against the uniform: under a single mode at most "
        f"{LEVEL:.0%} would be "
        f"counted; intervals take latents as independent. Below: the latents of {rows[0]['run'].name} with the largest "
        "dips, all their firings.",
        statement=f"Share of latents with several modes: {'; '.join(parts)}.",
        canvas=canvas,
        runs=[row["run"].name for row in rows],
        claims=(_claim(rows, values),),
        numbers={"runs": [{k: v for k, v in row.items() if k != "run"} | {"run": row["run"].name} for row in rows]},
    )


def _examples(canvas: Canvas, row: dict[str, Any]) -> None:
    for at in np.argsort(-row["dips"], kind="stable")[:SHOWN]:
        latent = row["run"].study.latent(int(row["latents"][at]))
        panel = canvas.panel(f"Latent {latent.i}, dip {row['dips'][at]:.3f}", "activation", "firings")
        histogram = latent.histogram(40)
        panel.bins(f"latent {latent.i}", histogram.edges, histogram.counts, colour=colours(1)[0])


def _claim(rows: list[dict[str, Any]], values: list[float]) -> Claim:
    layers = sorted({row["layer"] for row in rows})
    verdict: Verdict = "undecided"
    if len(layers) > 1:
        first = [row["interval"] for row in rows if row["layer"] == layers[0]]
        last = [row["interval"] for row in rows if row["layer"] == layers[-1]]
        if min(one.low for one in first) > max(one.high for one in last):
            verdict = "agrees"
        elif max(one.high for one in first) < min(one.low for one in last):
            verdict = "disagrees"
    return Claim(
        "Activations are often multi-modal, more so in early layers.",
        verdict,
        f"{counted(len(layers), 'layer')} studied, shares {spanned(values, '.3f')}; the "
        "intervals of the first "
        "and the last layer decide",
    )
