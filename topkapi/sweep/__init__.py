"""A grid of autoencoders on one stream of activations: trained, evaluated, and read back as points.

1. `grid`: the variants that a grid asks for, their names and configs
2. `running`: trains them side by side in groups that fit into memory, evaluates them, goes on where it was stopped
3. `read`, here: the points of a finished or unfinished sweep, for figures and fits

Called by `topkapi sweep`; docs/sweep.md says what lands where.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from topkapi.errors import TopkapiError
from topkapi.files import read_json

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
    names = {field.name for field in fields(Point)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict) or set(values) != names:
            raise TopkapiError(
                f"{path}, line {number}: damaged, or of another version. Delete the line and run topkapi sweep again: "
                "it evaluates that point anew."
            )
        found.append(Point(**values))
    return ordered(found)


def read_settings(folder: Path) -> dict[str, Any]:
    """sweep.json: shared settings, identity of language model and text, variants. Raises TopkapiError if damaged."""
    return read_json(folder / SETTINGS, "Sweep", "Restore it from a copy, or sweep in another --out.")


def ordered(points: list[Point]) -> list[Point]:
    """Sorted by n_latents, k (the baselines, without one, last) and name."""
    return sorted(points, key=lambda point: (point.n_latents, point.k is None, point.k or 0, point.name))
