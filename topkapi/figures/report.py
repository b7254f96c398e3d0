"""All figures as one HTML page without scripts: pictures inline, light and dark, to be read on a phone and printed."""

import platform
import re
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

import topkapi
from topkapi.figures.canvas import FAINT, GRID, INK, PALETTE, PAPER
from topkapi.figures.commands import commands
from topkapi.figures.figure import Figure, LeftOut, counted
from topkapi.figures.sources import FAMILIES, Run
from topkapi.published import commit

DARK = ("#4aa8e0", "#f08a4b", "#3cc79a", "#e3a3c7", "#f0b429", "#8ccdf2", "#b4b8c0")  # in place of PALETTE
METRICS = {
    "normalized_mse": ("normalized MSE", ".4f"),
    "l0": ("L0", ".1f"),
    "dead_fraction": ("silent", ".2%"),
    "ce_clean": ("CE clean", ".3f"),
    "ce_spliced": ("CE spliced", ".3f"),
    "kl": ("KL", ".3f"),
    "loss_recovered": ("recovered", ".1%"),
    "n_tokens": ("held-out tokens", ",.0f"),
}
PACKAGES = ("torch", "numpy", "scipy", "matplotlib")
MIXED = "color-mix(in oklab,%s,white var(--lift))"  # of many series: dark ones are lifted off a dark page
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CSS = """
:root{--ink:%(ink)s;--faint:#5f636b;--grid:%(grid)s;--paper:#ffffff;--line:#d4d7dd;--soft:#f5f6f8;--lift:0%%;%(light)s}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e8e9ec;--faint:#a5a9b2;--grid:#34373f;--paper:#17191e;
--line:#3b3f48;--soft:#20232a;--lift:40%%;%(dark)s}}
*{box-sizing:border-box}html{color-scheme:light dark}
body{margin:0 auto;padding:1.2rem;max-width:64rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p,li{max-width:46rem}.faint,figcaption,small{color:var(--faint)}
figure{margin:.4rem 0}figcaption{font-size:.9rem;max-width:50rem}svg{width:100%%;height:auto;display:block}
@media screen{.picture{overflow-x:auto}svg{min-width:36rem}}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .55rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
@media screen and (max-width:40rem){td:first-child{min-width:7.5rem;white-space:normal;overflow-wrap:anywhere}}
pre{background:var(--soft);padding:.7rem;overflow-x:auto;font-size:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
ul.claims{padding-left:0;list-style:none}
ul.claims li{margin:.3rem 0;padding-left:.7rem;border-left:3px solid var(--line)}
b.agrees{color:var(--c2)}b.disagrees{color:var(--c1)}a{color:inherit}
@media print{body{max-width:none;font-size:10pt}section{break-inside:avoid}.scroll{overflow:visible}pre{font-size:7pt}}
"""


def html(
    runs: Sequence[Run],
    drawn: Sequence[Figure],
    pictures: Sequence[str],
    left_out: Sequence[LeftOut],
    folders: Sequence[Path],
) -> str:
    """The page; `pictures` are the SVG texts of the figures drawn."""
    parts = [_head(), f"<h1>Topkapi: {escape(counted(len(runs), 'run'))}</h1>", _contents(drawn), _table(runs)]
    parts += [_section(figure, picture) for figure, picture in zip(drawn, pictures, strict=True)]
    if left_out:
        rows = "".join(f"<li><b>{escape(one.name)}</b>: {escape(one.why.rstrip('.'))}.</li>" for one in left_out)
        parts.append(f'<h2 id="left-out">Left out</h2><ul>{rows}</ul>')
    lines = "\n".join(commands(folders, runs))
    parts.append(f'<h2 id="commands">Commands that make the data again</h2><pre>{escape(lines)}</pre>')
    parts.append(f'<h2 id="versions">Versions</h2><p>{escape(_versions(runs))}</p></body></html>\n')
    return "\n".join(parts)


def _head() -> str:
    colours = {
        "ink": INK,
        "grid": GRID,
        "light": "".join(f"--c{i}:{colour};" for i, colour in enumerate(PALETTE)),
        "dark": "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK)),
    }
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Topkapi: figures</title><style>{CSS % colours}</style></head><body>"
    )


def _contents(drawn: Sequence[Figure]) -> str:
    links = " · ".join(f'<a href="#{escape(figure.name)}">{escape(figure.title)}</a>' for figure in drawn)
    return f'<p>{links} · <a href="#commands">commands</a></p>'


def _table(runs: Sequence[Run]) -> str:
    """A row a run; metrics that no run has have no column."""
    metrics = {name: how for name, how in METRICS.items() if any(run.metric(name) is not None for run in runs)}
    names = [
        "run",
        "kind",
        "n_latents",
        "k",
        "L1 weight",
        "lr",
        "seed",
        "training tokens",
        *(t for t, _ in metrics.values()),
    ]
    rows = []
    for run in runs:
        weight = run.settings["loss.l1_coefficient"]
        cells = [run.name, FAMILIES[run.family], f"{run.n_latents:,}", "" if run.k is None else str(run.k)]
        cells += [f"{weight:g}" if weight else "", _rate(run.settings["optim.lr"]), str(run.seed), f"{run.tokens:,}"]
        values = [(run.metric(name), form) for name, (_, form) in metrics.items()]
        cells += ["" if value is None else f"{value:{form}}" for value, form in values]
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    unmeasured = sum(not run.metrics for run in runs)
    note = f"<p class=faint>{escape(counted(unmeasured, 'run'))} not measured yet.</p>" if unmeasured else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2 id="runs">Runs</h2><div class="scroll" tabindex="0">{table}</div>{note}'


def _rate(lr: float | str) -> str:
    return lr if isinstance(lr, str) else f"{lr:.3g}"


def _section(figure: Figure, picture: str) -> str:
    source = f" <small>({escape(figure.source)})</small>" if figure.source else ""
    claims = "".join(
        f'<li><b class="{claim.verdict}">{claim.verdict}</b>: {escape(claim.text)} '
        f"<span class=faint>{escape(claim.evidence)}.</span></li>"
        for claim in figure.claims
    )
    claims = f'<ul class="claims">{claims}</ul>' if claims else ""
    files = f"{figure.name}.png, .svg, .csv (what is plotted), .json (numbers)"
    return (
        f'<section id="{escape(figure.name)}"><h2>{escape(figure.title)}{source}</h2>'
        f'<figure><div class="picture" tabindex="0">{inline(picture, figure.name, figure.title)}</div><figcaption>'
        f"{escape(figure.caption)} "
        f"<small>{escape(files)}</small></figcaption></figure><p>{escape(figure.statement)}</p>{claims}</section>"
    )


def inline(svg: str, name: str, title: str) -> str:
    """An SVG for a page that holds several: no header, ids of its own, colours from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", svg))
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)([\w.-]+)", rf"\1{prefix}-\2", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    named = {INK: "--ink", FAINT: "--faint", GRID: "--grid", PAPER: "--paper"}
    named |= {colour: f"--c{i}" for i, colour in enumerate(PALETTE)}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({named[m[0]]})" if m[0] in named else MIXED % m[0], svg)
    svg = re.sub(r"\n\s*", "\n", svg).strip()
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _versions(runs: Sequence[Run]) -> str:
    made = sorted(
        {f"{run.facts.get('topkapi_version')} ({(run.facts.get('commit') or 'no commit')[:12]})" for run in runs}
    )
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"Figures: Topkapi {topkapi.__version__} ({(commit() or 'no commit')[:12]}), Python "
        f"{platform.python_version()}, "
        f"{packages}. Runs: Topkapi {', '.join(made)}."
    )
