"""Writes docs/results.md and its pictures from runs and sweeps: what the paper found, and whether these runs show it.

    python benchmarks/results.py runs/layer-10 runs/baselines runs/layer-20

Every number of the page is computed by `topkapi figures`; the rest of the text is in this file. For other runs, of
another size or on another machine, name their folders instead. Runs are taken site by site, as figures compare what was
trained on the same activations. Pictures are those of PICTURES, in 64 colours.

Figures that need weights or studies which were not kept with the runs: `--kept FOLDER`, the --out folder of an earlier
`topkapi figures` of the same folders.
"""

import argparse
import json
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from topkapi.errors import TopkapiError, command_line
from topkapi.figures import SUBJECTS, draw_runs, modality
from topkapi.figures.commands import commands
from topkapi.figures.figure import Figure, listed
from topkapi.figures.sources import FAMILIES, SEED, Run, alike, grouped, read_folders, told_apart
from topkapi.files import write_text_atomic

Drawn = dict[str, Any]
"""A figure as `NAME.json` has it, and where it was drawn: "folder" and "site"."""

PICTURES = ("decoder-norm", "densities", "dense", "laws", "error-l0", "progressive", "seeds")  # small ones
LARGEST = 100_000  # bytes
INTRODUCTION = """# Results

What Gao et al. 2024, *Scaling and evaluating sparse autoencoders*, found on GPT-2 small and GPT-4, and whether runs of
this project show the same. `benchmarks/results.py` writes this page from the runs' files with `topkapi figures`
([how](figures.md)): no number is typed by hand. A verdict follows from the rule that stands beside it; *undecided*
says that these runs are too few, too small or too short for it. Agreement at this scale is no evidence for the paper's
own scale, and disagreement none against it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="runs and sweeps")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--kept", type=Path, help="folder of figures that were drawn where weights and studies are")
    parser.add_argument(
        "--as", dest="named", nargs="*", default=[], help="OLD=NEW in the page's commands, such as paths"
    )
    arguments = parser.parse_args()
    try:
        write(arguments)
    except TopkapiError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def write(arguments: argparse.Namespace) -> None:
    """Write the page and its pictures. Raises TopkapiError for folders, or kept figures, of which there is no page."""
    pictures, runs = arguments.page.with_suffix(""), read_folders(arguments.folders)
    require_runs(arguments.folders, runs)
    kept = kept_figures(arguments, runs) if arguments.kept else []
    lines = [*commands(arguments.folders, runs), *made_by(arguments)]
    for number, corpora in enumerate(sorted({" ".join(run.settings["data.corpora"]) for run in runs}), 1):
        if sum(corpora in line for line in lines) > 1:  # the list of files, once
            lines = [f'TEXT{number}="{corpora}"', *(line.replace(corpora, f"$TEXT{number}") for line in lines)]
    for old, _, new in (pair.partition("=") for pair in arguments.named):
        lines = [line.replace(old, new) for line in lines]
    with tempfile.TemporaryDirectory() as temporary:
        drawn, left_out = drawn_by_site(runs, Path(temporary), kept)
        made = Path(temporary) / "page"
        made.mkdir()
        for figure in drawn:
            if figure["name"] in PICTURES:
                shrink(figure["folder"] / f"{figure['name']}.png", made / picture_of(figure))
        text = page(runs, drawn, left_out, lines, pictures.name)
        shutil.rmtree(pictures, ignore_errors=True)  # the page before keeps its pictures until all of these are made
        shutil.copytree(made, pictures)
        write_text_atomic(arguments.page, text)
    print(f"{arguments.page}: {len(drawn)} figures, {len(left_out)} left out")


def made_by(arguments: argparse.Namespace) -> list[str]:
    """The commands that make this page."""
    folders = " ".join(map(str, arguments.folders))
    if arguments.kept is None:
        return [f"python benchmarks/results.py {folders}"]
    return [f"topkapi figures {folders} --out figures", f"python benchmarks/results.py {folders} --kept figures"]


def require_runs(folders: Sequence[Path], runs: Sequence[Run]) -> None:
    """Raise TopkapiError for a folder that has none of the runs, as a sweep before its first point."""
    have = {path.resolve() for run in runs for path in (run.folder, run.folder.parent)}
    if empty := [str(folder) for folder in folders if folder.resolve() not in have]:
        raise TopkapiError(
            f"no run has begun in {listed(empty)}: run that topkapi sweep again, it goes on, or leave the folder out."
        )


def kept_figures(arguments: argparse.Namespace, runs: Sequence[Run]) -> list[Drawn]:
    """The figures in --kept, but those of single runs, each with the site of its runs; "" for those of several."""
    kept, sites = arguments.kept, {run.name: site_of(run) for run in runs}
    draw = command_line("figures", *arguments.folders, "--out", "NEW")
    advice = f"Give all folders that the figures were drawn of, or draw these where their weights are: {draw}."
    paths = [path for path in sorted(kept.glob("*.json")) if not path.stem.startswith("densities-")]
    if not paths:
        raise TopkapiError(f"--kept {kept} has no figures, which topkapi figures writes as NAME.json. {advice}")
    found = []
    for path in paths:
        try:
            figure = load(path, "")
            others = [name for name in figure["runs"] if name not in sites]
        except (ValueError, TypeError, KeyError):
            raise TopkapiError(f"--kept: {path} is no figure, or damaged. {advice}") from None
        if others:
            raise TopkapiError(f"--kept: {path} is of runs that the folders have not: {listed(others, 3)}. {advice}")
        picture = path.with_suffix(".png")
        if figure["name"] in PICTURES and not picture.is_file():
            raise TopkapiError(f"--kept: {path} is without its picture, {picture.name}. {advice}")
        its_sites = {sites[name] for name in figure["runs"]}
        found.append(figure | {"site": its_sites.pop() if len(its_sites) == 1 else ""})
    return found


def drawn_by_site(runs: Sequence[Run], out: Path, kept: Sequence[Drawn]) -> tuple[list[Drawn], list[str]]:
    """Figures of each site's runs, those that compare sites, and kept ones of other names; what is left out, and why.

    Runs are named within their site, but where sites are compared.
    """
    drawn, left_out = [], []
    one_site = [subject for subject in SUBJECTS if subject is not modality]
    parts = [(site, told_apart(mine), one_site) for site, mine in grouped(runs, site_of).items()]
    for site, mine, subjects in [*parts, ("", runs, [modality])]:
        figures, without, _ = draw_runs(mine, out / site, subjects)
        own = [figure for figure in figures if not is_detail(figure, figures)]
        drawn += [load(out / site / f"{figure.name}.json", site) for figure in own]
        left_out += [(site, one) for one in without]
    have = {figure["name"] for figure in drawn}
    drawn += [figure for figure in kept if figure["name"] not in have]
    there = {(figure["site"], figure["name"]) for figure in drawn}
    lines = [
        f"{site}, {one.name}: {one.why.rstrip('.')}.".removeprefix(", ")
        for site, one in left_out
        if not {(site, one.figure), ("", one.figure)} & there
    ]
    return drawn, lines


def site_of(run: Run) -> str:
    """Stream and layer of the language model."""
    return run.settings["language_model.site"]


def is_detail(figure: Figure, figures: Sequence[Figure]) -> bool:
    """Whether it shows the densities of a single run, where there are those of all."""
    return figure.name.startswith("densities-") and any(other.name == "densities" for other in figures)


def load(path: Path, site: str) -> Drawn:
    """A figure that was saved."""
    return json.loads(path.read_text(encoding="utf-8")) | {"folder": path.parent, "site": site}


def picture_of(figure: Drawn) -> str:
    """The name of its picture, which several sites may have."""
    return f"{figure['site']}-{figure['name']}.png" if figure["site"] else f"{figure['name']}.png"


def shrink(source: Path, target: Path) -> None:
    """The picture in 64 colours, and smaller where it is still too large for the repository."""
    image = Image.open(source).convert("RGB")
    while True:
        image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size < LARGEST:
            return
        image = image.resize((int(0.9 * image.width), int(0.9 * image.height)), Image.Resampling.LANCZOS)


def page(
    runs: Sequence[Run], drawn: Sequence[Drawn], left_out: Sequence[str], lines: Sequence[str], pictures: str
) -> str:
    """The page in Markdown."""
    by_name: dict[str, list[Drawn]] = {}
    for figure in drawn:
        by_name.setdefault(figure["name"], []).append(figure)
    parts = [INTRODUCTION, scale(runs), verdicts(by_name)]
    parts += [section(figures, pictures) for figures in by_name.values() if figures[0]["source"]]
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(f"- {line}" for line in left_out))
    text = "Files of text are those that `python benchmarks/text.py runs/text` writes.\n\n"
    text *= any("runs/text/" in line for line in lines)
    parts.append(f"## Commands\n\n{text}```sh\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(map(wrapped, parts)) + "\n"


def wrapped(part: str) -> str:
    """Paragraphs in lines of 120 characters; tables, lists, headings, pictures and commands as they are."""
    if part.startswith("## Commands"):
        return part
    kept = ("|", "#", "- ", "!")
    fill = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(one if one.startswith(kept) else fill(one) for one in part.split("\n\n"))


def scale(runs: Sequence[Run]) -> str:
    """How much was trained and measured, in a sentence or two."""
    models = sorted({f"{run.settings['language_model.name']}, {run.settings['language_model.site']}" for run in runs})
    distinct = sorted({run.settings["data.max_tokens"] for run in runs})
    tokens = sorted({run.tokens for run in runs})
    held_out = sorted({int(run.metrics["n_tokens"]) for run in runs if run.metrics.get("n_tokens")})
    families = [name for key, name in FAMILIES.items() if any(run.family == key for run in runs)]
    ks = sorted({run.k for run in runs if run.k})
    unmeasured = [run.name for run in runs if not run.metrics]
    seeds = max(map(len, grouped(runs, lambda run: alike(run, SEED)).values()))
    sizes = listed(sorted({run.n_latents for run in runs}))
    text = (
        f"**Scale.** {len(runs)} runs ({', '.join(families)}) on {'; '.join(models)} (d_model "
        f"{listed(sorted({run.d_model for run in runs if run.d_model}))}): {listed(tokens)} training "
        "tokens each, of at most "
        f"{listed(distinct)} distinct ones; n_latents {sizes}, k {listed(ks)}, at most {seeds} seeds. Measured on "
        f"{listed(held_out)} held-out tokens. "
    )
    return text + (f"Not measured yet: {listed(unmeasured)}." if unmeasured else "")


def verdicts(by_name: dict[str, list[Drawn]]) -> str:
    """A row a claim, a column a site; what the verdicts rest on is in the sections."""
    sites = list(dict.fromkeys(figure["site"] for figures in by_name.values() for figure in figures if figure["site"]))
    lines = [f"| the paper | where | {' | '.join(sites)} |", "|---" * (2 + len(sites)) + "|"]
    for figures in by_name.values():
        for claim in dict.fromkeys(claim["text"] for figure in figures for claim in figure["claims"]):
            said = {f["site"]: c["verdict"] for f in figures for c in f["claims"] if c["text"] == claim}
            cells = " | ".join(f"**{said.get(site, said.get('', ''))}**".replace("****", "") for site in sites)
            lines.append(f"| {claim} | {figures[0]['source']} | {cells} |")
    return "\n".join(lines)


def section(figures: Sequence[Drawn], pictures: str) -> str:
    """Of each site what the figure says, what its verdicts rest on, and the picture; the caption below."""
    parts = [f"## {figures[0]['title']}", f"*{figures[0]['source']}.*"]
    for figure in figures:
        parts.append(f"**{figure['site'] or 'All sites'}.** {figure['statement']}")
        for claim in figure["claims"]:
            parts.append(
                f"- **{claim['verdict']}**: {claim['text']} {claim['evidence'][:1].upper()}{claim['evidence'][1:]}."
            )
        if figure["name"] in PICTURES:
            parts.append(f"![{figure['title']}, {figure['site']}]({pictures}/{picture_of(figure)})")
        if figure["caption"] != figures[-1]["caption"] or figure is figures[-1]:
            parts.append(figure["caption"])
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
