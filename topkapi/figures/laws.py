"""Normalized MSE against n_latents at each k, with the laws L(N) and L(N, K) fitted, and the paper's constants."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from topkapi.errors import TopkapiError
from topkapi.figures.canvas import FAINT, Canvas, Panel, colours
from topkapi.figures.densities import ONSET, ONSET_WORDS
from topkapi.figures.figure import Claim, Figure, LeftOut, Verdict, counted, said
from topkapi.figures.sources import Run, at_best_rate, grouped, held_out, of_one_stream
from topkapi.statistics.intervals import CONFIDENCE, percentile_interval
from topkapi.statistics.laws import GPT4, JointLaw, LawFit, PowerLaw, fit_joint_law, fit_power_law

DRAWS = 300  # of the bootstrap
N_PARAMETERS, ENOUGH = 6, 10  # of L(N, K) with its irreducible term; degrees of freedom that can speak against it
FITS = {"with": True, "without": False}  # the irreducible term
DENSE = (
    f"; L(N, K) leaves out k from {ONSET_WORDS} of d_model on, where solutions may be dense and the trend bends "
    "(appendix E.5)"
)


def figures(runs: Sequence[Run]) -> Iterator[Figure | LeftOut]:
    """The laws of TopK runs of one stream that kept unit norm; the largest such group is drawn."""
    topk = of_one_stream([run for run in at_best_rate(runs) if run.family == "topk"])
    if len({run.n_latents for run in topk}) < 2:
        yield LeftOut(
            "scaling laws",
            "TopK runs of at least two n_latents on the same text are needed: topkapi sweep with several --n-latents",
            "laws",
        )
        return
    yield _laws(sorted(topk, key=lambda run: (run.k, run.n_latents, run.seed)))


def _laws(runs: list[Run]) -> Figure:
    cells = grouped(runs, lambda run: (run.n_latents, run.k))
    n, k = np.array(list(cells), float).T
    loss = np.array([np.exp(np.mean(np.log([_mse(run) for run in seeds]))) for seeds in cells.values()])
    sparse = k < ONSET * (runs[0].d_model or np.inf)
    used = (n[sparse], k[sparse], loss[sparse])
    joint = {name: _fitted(fit_joint_law, *used, irreducible=term) for name, term in FITS.items()}
    single = {
        int(one): {name: _fitted(fit_power_law, n[k == one], loss[k == one], irreducible=t) for name, t in FITS.items()}
        for one in np.unique(k)
    }
    canvas = Canvas(2, width=3.9, height=3.3)
    fits = [name for name, fit in joint.items() if not isinstance(fit, str)]
    title = "Error and fitted L(N, K)" if fits else "Error and fitted L(N)"
    drawn = {one: joint for one in single if one in k[sparse]} if fits else single
    _draw_losses(canvas.panel(title, "n_latents", "normalized MSE", "xy"), runs, drawn)
    exponents = canvas.panel("Exponent of n_latents", "k", "d ln(reducible L) / d ln n", "x")
    _draw_exponents(exponents, k[sparse] if fits else k, joint, single)
    said_fits = [f"{name.capitalize()} the irreducible term: {_law_text(fit)}" for name, fit in joint.items()]
    if not fits:
        said_fits += [
            f"L(N) at k = {one}, {name} it: {_law_text(fit)}"
            for one, both in single.items()
            for name, fit in both.items()
        ]
    return Figure(
        name="laws",
        title="Scaling laws of the error",
        source="section 3.1.3 and Figure 1",
        caption=f"Normalized MSE on {held_out(runs)} held-out tokens of "
        f"{counted(len(runs), 'TopK run')}"
        f", each trained on {runs[0].tokens:,} tokens, whether or not it had converged by then. A point is a run; fits "
        "take the geometric mean of seeds, so that each n_latents and k counts once"
        f"{'' if sparse.all() else DENSE}. Solid: "
        f"{'L(N, K)' if fits else 'L(N) at each k,'} with an irreducible term; dashed: without; "
        "bands: 95 % by bootstrap of residuals. Dotted: the paper's "
        "L(N, K) of GPT-4 activations, moved to these points' mean at each k: other data, for its "
        "shape alone. Right: the "
        "exponent of n_latents in the reducible part; squares: L(N) fitted to each k by itself, without such a term; "
        "bands may end at the edge.",
        statement=f"L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k). "
        f"{' '.join(said_fits)} The paper's, of GPT-4: {_constants(GPT4)}.",
        canvas=canvas,
        runs=[run.name for run in runs],
        claims=_claims(joint, fits),
        numbers={
            "joint": {name: _as_dict(fit) for name, fit in joint.items()},
            "by_k": {one: {name: _as_dict(fit) for name, fit in both.items()} for one, both in single.items()},
            "gpt4": asdict(GPT4),
        },
    )


def _k(run: Run) -> int:
    return run.k


def _mse(run: Run) -> float:
    return run.metrics["normalized_mse"]


def _fitted(fit: Any, *measured: np.ndarray, irreducible: bool) -> LawFit | str:
    """The fit, or why there is none."""
    try:
        return fit(*measured, irreducible=irreducible, n_bootstrap=DRAWS)
    except TopkapiError as error:
        return str(error)


def _draw_losses(panel: Panel, runs: list[Run], fits: dict[int, dict[str, LawFit | str]]) -> None:
    """Points and laws of each k; one of them with its band."""
    by_k = grouped(runs, _k)
    sizes = [run.n_latents for run in runs]
    span = np.geomspace(min(sizes), max(sizes), 60)
    for (k, mine), colour in zip(by_k.items(), colours(len(by_k)), strict=True):
        n, loss = [run.n_latents for run in mine], [_mse(run) for run in mine]
        own = fits.get(k, dict.fromkeys(FITS, ""))
        panel.points(f"k = {k}", n, loss, colour=colour, label=f"k = {k}" if isinstance(own["with"], str) else "")
        for (name, fit), dash in zip(own.items(), ("-", "--"), strict=True):
            if isinstance(fit, str):
                continue
            band = _band(fit, span, k) if name == _preferred(own) else (None, None)
            label, series = f"k = {k}" if name == "with" else "", f"law {name} irreducible term, k = {k}"
            panel.line(series, span, _loss(fit.law, span, k), *band, colour=colour, dash=dash, label=label)
        gpt4 = GPT4.loss(np.array(n), np.full(len(n), k))
        moved = np.exp(np.mean(np.log(loss)) - np.mean(np.log(gpt4)))
        shape = moved * GPT4.loss(span, np.full(len(span), k))
        panel.line(
            f"GPT-4's law times {moved:.4g}, k = {k}", span, shape, colour=FAINT, dash=":", width=0.9, kind="reference"
        )
    panel.x_ticks(sizes)


def _preferred(joint: dict) -> str:
    return "with" if not isinstance(joint["with"], str) else "without"


def _loss(law: JointLaw | PowerLaw, span: np.ndarray, k: int) -> np.ndarray:
    return law.loss(span, np.full(len(span), k)) if isinstance(law, JointLaw) else law.loss(span)


def _band(fit: LawFit, span: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.array([_loss(law, span, k) for law in fit.draws])
    intervals = [percentile_interval(column) for column in draws.T]
    return np.array([one.low for one in intervals]), np.array([one.high for one in intervals])


def _draw_exponents(panel: Panel, k: np.ndarray, joint: dict, single: dict) -> None:
    span = np.geomspace(k.min(), max(k.max(), 1.01 * k.min()), 40)
    for (name, fit), dash, colour in zip(joint.items(), ("-", "--"), colours(2), strict=True):
        if isinstance(fit, str):
            continue
        ends = [percentile_interval(column) for column in np.array([law.exponent(span) for law in fit.draws]).T]
        low, high = [one.low for one in ends], [one.high for one in ends]
        label = f"{name}\nirreducible"
        panel.line(
            f"{name} irreducible", span, fit.law.exponent(span), low, high, colour=colour, dash=dash, label=label
        )
    panel.line("GPT-4", span, GPT4.exponent(span), colour=FAINT, dash=":", label="GPT-4\n(paper)", kind="reference")
    alone = {one: both["without"] for one, both in single.items() if not isinstance(both["without"], str)}
    if alone:
        ends = [fit.intervals["exponent"] for fit in alone.values()]
        values = [fit.law.exponent for fit in alone.values()]
        bars = [one.low for one in ends], [one.high for one in ends]
        panel.points("L(N) of each k", list(alone), values, *bars, colour="#5b5b5b", marker="s", filled=False)
    shown = [row.y for row in panel.rows if row.y is not None]
    margin = max(0.1, max(shown) - min(shown))  # bands may reach much farther where points are few
    panel.axes.set_ylim(min(shown) - margin, max(shown) + margin)
    panel.x_ticks(list(single))


def _law_text(fit: LawFit | str) -> str:
    if isinstance(fit, str):
        return f"no fit ({fit.rstrip('.')})."
    values = asdict(fit.law)
    parts = [f"{name} {said(values[name], interval)}" for name, interval in fit.intervals.items()]
    return f"{', '.join(parts)}; residuals {fit.rms:.2%}."


def _constants(law: JointLaw) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in asdict(law).items())


def _as_dict(fit: LawFit | str) -> dict[str, Any]:
    if isinstance(fit, str):
        return {"left_out": fit}
    law: JointLaw | PowerLaw = fit.law
    return {"parameters": asdict(law), "intervals": fit.intervals, "rms": fit.rms, "residuals": fit.residuals}


def _claims(joint: dict, fits: list[str]) -> tuple[Claim, ...]:
    if not fits:
        return (Claim("The error follows L(N, K), a power law in n_latents at each k.", "undecided", "no fit"),)
    fit: LawFit[JointLaw] = joint[_preferred(joint)]
    low, high = fit.intervals["gamma"]
    verdict: Verdict = "agrees" if high < 0 else "disagrees" if low > 0 else "undecided"
    claims = [
        Claim(
            "The error falls faster with n_latents at larger k: gamma is negative (-0.042 for GPT-4).",
            verdict,
            f"gamma {said(fit.law.gamma, (low, high))}, fit {_preferred(joint)} the irreducible term",
        )
    ]
    if len(fits) == 2:
        claims.append(_irreducible_claim(joint["with"].residuals, joint["without"].residuals))
    return tuple(claims)


def _irreducible_claim(with_it: np.ndarray, without: np.ndarray) -> Claim:
    """By an F test of the two further parameters. That they are of no use is said where many points would have shown
    it, and the two gain less than two of no use would on the whole."""
    free = len(with_it) - N_PARAMETERS
    gain = (float((without**2).sum()) - float((with_it**2).sum())) / 2
    p_value = float(stats.f.sf(max(gain, 0.0) / max(float((with_it**2).sum()) / free, 1e-30), 2, free))
    verdict: Verdict = "undecided"
    if p_value < 1 - CONFIDENCE:
        verdict = "agrees"
    elif free >= ENOUGH and p_value > 0.5:
        verdict = "disagrees"
    residuals = [f"{float(np.sqrt((one**2).mean())):.2%}" for one in (with_it, without)]
    return Claim(
        "An irreducible term makes the fit markedly better.",
        verdict,
        f"residuals {residuals[0]} with it and {residuals[1]} without, p = {p_value:.2g} by an F test "
        f"with {free} degrees of freedom, approximate as the fit minimises Huber's loss; only {ENOUGH} or more with p "
        "above 0.5 speak against it",
    )
