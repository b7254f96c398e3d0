"""Figures of runs and sweeps for a paper: pictures, exactly the data that they show, and a report of one page.

1. `sources`: what the given folders hold
2. a file a subject, each with `figures(runs)`: `training` (Figure 18 of Gao et al. 2024), `densities` (19 and 20),
   `frontier` (2 and 5), `laws`, `codes` (progressive recovery and refinement), `seeds`, `modality`
3. `canvas`: the one style, and panels that remember what is drawn on them; `figure`: what stands beside a picture
4. `report`: all of it as one HTML page

What the folders do not allow is left out, with a line that says what would supply it. Called by `topkapi figures`;
docs/figures.md says what lands where.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.figures import codes, densities, frontier, laws, modality, report, seeds, training
from topkapi.figures.canvas import styled
from topkapi.figures.figure import Figure, LeftOut, save
from topkapi.figures.sources import Run, read_folders
from topkapi.files import write_text_atomic
from topkapi.plotting import require_matplotlib

SUBJECTS = (training, densities, laws, frontier, codes, seeds, modality)


def draw(folders: Sequence[Path], out: Path, report_path: Path | None = None) -> tuple[list[Figure], list[LeftOut]]:
    """Draw what the runs and sweeps in these folders allow into `out`; what was drawn, and what was left out and why.

    `report_path`: where the page goes that shows all of it.

    Raises:
        TopkapiError: matplotlib is missing, a folder is neither a run nor a sweep, a file is damaged.
    """
    if not folders:
        raise TopkapiError("give at least one run or sweep folder.")
    runs = read_folders(folders)
    drawn, left_out, pictures = draw_runs(runs, out, SUBJECTS)
    if report_path is not None:
        write_text_atomic(report_path, report.html(runs, drawn, pictures, left_out, folders))
        say(f"report: {report_path}")
    return drawn, left_out


def draw_runs(
    runs: Sequence[Run], out: Path, subjects: Sequence[ModuleType]
) -> tuple[list[Figure], list[LeftOut], list[str]]:
    """`draw` of runs that are read already, and of these subjects; also the SVG text of each figure drawn."""
    require_matplotlib()
    drawn, left_out, pictures = [], [], []
    with styled():
        for subject in subjects:
            for found in subject.figures(runs):
                if isinstance(found, LeftOut):
                    left_out.append(found)
                    say(f"left out: {found.name}: {found.why.rstrip('.')}.")
                else:
                    drawn.append(found)
                    pictures.append(save(found, out))
                    say(f"drawn: {out / found.name}.png")
    return drawn, left_out, pictures
