"""Writes docs/results.md and its pictures from runs and sweeps: what the paper found, and whether these runs show it.

    python benchmarks/results.py runs/sweep runs/demo

Every number of the page is computed by `topkapi figures`; the rest of the text is in this file. For other runs, of
another size or on another machine, name their folders instead. Pictures are those of PICTURES, in 64 colours.
"""

import argparse
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from topkapi.figures import draw
from topkapi.figures.commands import commands
from topkapi.figures.figure import Figure, LeftOut, listed
from topkapi.figures.sources import FAMILIES, SEED, Run, alike, grouped, read_folders
from topkapi.files import write_text_atomic

PICTURES = ("decoder-norm", "densities", "laws", "error-l0", "progressive", "seeds")  # six at most, small ones
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
    parser.add_argument("--as", dest="named", nargs="*", default=[], help="names of the folders in the page's commands")
    arguments = parser.parse_args()
    pictures = arguments.page.with_suffix("")
    with tempfile.TemporaryDirectory() as temporary:
        figures, left_out = draw(arguments.folders, Path(temporary))
        shutil.rmtree(pictures, ignore_errors=True)
        pictures.mkdir(parents=True)
        for name in PICTURES:
            if (Path(temporary) / f"{name}.png").exists():
                shrink(Path(temporary) / f"{name}.png", pictures / f"{name}.png")
    runs = read_folders(arguments.folders)
    lines = commands(arguments.folders, runs)
    names = [*arguments.named, *map(str, arguments.folders[len(arguments.named) :])]
    for folder, name in zip(arguments.folders, names, strict=True):
        lines = [line.replace(str(folder), name) for line in lines]
    lines.append(f"python benchmarks/results.py {' '.join(names)}")
    write_text_atomic(arguments.page, page(runs, figures, left_out, lines, pictures.name))
    print(f"{arguments.page}: {len(figures)} figures, {len(left_out)} left out")


def shrink(source: Path, target: Path) -> None:
    """The picture in 64 colours, and smaller where it is still too large for the repository."""
    image = Image.open(source).convert("RGB")
    while True:
        image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size < LARGEST:
            return
        image = image.resize((int(0.9 * image.width), int(0.9 * image.height)), Image.Resampling.LANCZOS)


def page(
    runs: Sequence[Run], figures: Sequence[Figure], left_out: Sequence[LeftOut], lines: Sequence[str], pictures: str
) -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION, scale(runs), verdicts(figures)]
    parts += [section(figure, pictures) for figure in without_details(figures) if figure.source]
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(f"- {one.name}: {one.why.rstrip('.')}." for one in left_out))
    parts.append("## Commands\n\n```sh\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(map(wrapped, parts)) + "\n"


def wrapped(part: str) -> str:
    """Paragraphs in lines of 120 characters; tables, lists, headings, pictures and commands as they are."""
    if part.startswith("## Commands"):
        return part
    kept = ("|", "#", "- ", "!")
    fill = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(one if one.startswith(kept) else fill(one) for one in part.split("\n\n"))


def without_details(figures: Sequence[Figure]) -> list[Figure]:
    """Without the densities of single runs, where those of all are there."""
    whole = any(figure.name == "densities" for figure in figures)
    return [figure for figure in figures if not (whole and figure.name.startswith("densities-"))]


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


def verdicts(figures: Sequence[Figure]) -> str:
    """A row a claim."""
    rows = ["| the paper | where | here | by what |", "|---|---|---|---|"]
    for figure in without_details(figures):
        for claim in figure.claims:
            evidence = claim.evidence.replace("|", "\\|")
            rows.append(f"| {claim.text} | {figure.source} | **{claim.verdict}** | {figure.title}: {evidence} |")
    return "\n".join(rows)


def section(figure: Figure, pictures: str) -> str:
    """Heading, picture if it is among those, caption and statement."""
    lines = [f"## {figure.title}", f"*{figure.source}.* {figure.statement}"]
    if figure.name in PICTURES:
        lines.append(f"![{figure.title}]({pictures}/{figure.name}.png)")
    return "\n\n".join([*lines, figure.caption])


if __name__ == "__main__":
    main()
