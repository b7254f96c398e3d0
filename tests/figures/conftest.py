"""One synthetic sweep and its figures, for the whole session."""

from types import SimpleNamespace

import pytest

from tests.figures.synthetic import error, rotated_seeds, write_evaluation, write_sweep
from topkapi.figures import canvas, draw, laws
from topkapi.statistics.laws import GPT4
from topkapi.sweep.grid import Grid

GRIDS = [
    Grid(n_latents=(128, 512, 2048), k=(4, 16, 64)),
    Grid(n_latents=(2048,), k=(16,), seeds=(0, 1)),
    Grid(n_latents=(2048,), k=(16,), decoder_norm=("on", "off")),
    Grid(n_latents=(2048,), k=(16,), sparsity=("l1", "l1_decoder_norm"), l1_coefficient=(0.01, 0.03, 0.1)),
]
SEEDS, SHARED_ROWS = ["n2048-k16-seed0", "n2048-k16-seed1"], 500


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Small pictures, and few draws of the bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 50)
        patch.setattr(laws, "DRAWS", 30)
        yield


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """A sweep that follows GPT-4's law exactly; the folder. Its last point is not measured."""
    folder = tmp_path_factory.mktemp("figures") / "sweep"
    variants = write_sweep(folder, GRIDS, weights=True, unmeasured=1)
    for variant in variants[:-1]:
        write_evaluation(folder / variant.name, variant, error(variant, GPT4, 0.0))
    rotated_seeds(folder, SEEDS, SHARED_ROWS)
    return folder


@pytest.fixture(scope="session")
def drawn(sweep, tmp_path_factory):
    """What `draw` makes of it: `figures` by name, `left_out` by name, the folder `out` and the page `report`."""
    out = tmp_path_factory.mktemp("drawn")
    figures, left_out = draw([sweep], out, out / "report.html")
    return SimpleNamespace(
        figures={figure.name: figure for figure in figures},
        left_out={one.name: one.why for one in left_out},
        out=out,
        report=(out / "report.html").read_text(encoding="utf-8"),
    )
