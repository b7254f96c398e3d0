"""A grid of autoencoders on one stream of activations: trained, evaluated, and read back as points.

1. `grid`: the variants that a grid asks for, their names and configs
2. `running`: trains them side by side in groups that fit into memory, evaluates them, goes on where it was stopped
3. `read`, here: the points of a finished or unfinished sweep, for figures and fits

Called by `topkapi sweep`; docs/sweep.md says what lands where.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from topkapi.config import TrainConfig, from_file, is_of
from topkapi.errors import TopkapiError
from topkapi.files import read_file, read_json, require_shape
from topkapi.results import parsed

POINTS, SETTINGS = "sweep.jsonl", "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trained and evaluated autoencoder; metrics as `topkapi.evaluate.evaluate` defines them, None: undefined."""

    name: str
    """Of its run folder within the sweep's."""
    n_latents: int
    k: int | None
    """None for the ReLU baselines, whose sparsity is what l1_coefficient makes it."""
    sparsity: Literal["none", "l1", "l1_decoder_norm"]
    l1_coefficient: float
    lr: float
    """What it was trained with, where auto was asked for too."""
    decoder_norm: bool
    """Whether decoder rows were kept at unit norm."""
    seed: int
    d_model: int
    tokens: int
    """Trained on."""
    n_parameters: int
    """2 n_latents d_model + n_latents + d_model."""
    flops: float
    """Of training, see `topkapi.sweep.running.training_flops`."""
    normalized_mse: float | None
    l0: float | None
    dead_fraction: float | None
    n_tokens: int
    """Held-out tokens behind the three metrics before."""
    ce_clean: float | None
    ce_spliced: float | None
    ce_zero_ablation: float | None
    ce_mean_ablation: float | None
    kl: float | None
    loss_recovered: float | None


def read(folder: Path | str) -> list[Point]:
    """The points that a sweep has measured so far, sorted by n_latents, k and name; those that became non-finite are
    not among them.

    Raises:
        TopkapiError: the folder holds no sweep, or a line is not one that this version wrote.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).exists():
        raise TopkapiError(f"{folder} holds no sweep: no file {SETTINGS}. Give the --out folder of topkapi sweep.")
    path, found = folder / POINTS, []
    wanted = {field.name: field.type for field in fields(Point)}
    lines = read_file(path).decode("utf-8", "replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        values = parsed(line)
        is_point = isinstance(values, dict) and values.keys() == wanted.keys()
        if not is_point or not all(is_of(value, wanted[name]) for name, value in values.items()):
            raise TopkapiError(
                f"{path}, line {number}: damaged, or of another version. Delete the line and run topkapi sweep again: "
                "it evaluates that point anew."
            )
        found.append(Point(**values))
    return ordered(found)


def read_settings(folder: Path) -> dict[str, Any]:
    """sweep.json: shared settings, identity of language model and text, variants. Raises TopkapiError if damaged."""
    remedy = "Restore it from a copy, or sweep in another --out."
    settings = read_json(folder / SETTINGS, "Sweep", remedy)
    shape = {"shared": dict, "identity": dict, "variants": {"*": dict}}
    require_shape(settings, shape, folder / SETTINGS, "Sweep", remedy)
    return settings


def shared_config(folder: Path) -> TrainConfig:
    """The settings that a sweep's points share. Raises TopkapiError if sweep.json is damaged, or of another version."""
    return from_file(TrainConfig, read_settings(folder)["shared"], folder / SETTINGS)


def ordered(points: list[Point]) -> list[Point]:
    """Sorted by n_latents, k (the baselines, without one, last) and name."""
    return sorted(points, key=lambda point: (point.n_latents, point.k is None, point.k or 0, point.name))
