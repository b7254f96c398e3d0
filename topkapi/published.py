"""The published form of an autoencoder: model.safetensors and config.json, each with a checksum, and a model card."""

import platform
from pathlib import Path
from typing import Any

from torch import Tensor

import topkapi
from topkapi.errors import TopkapiError, command_line
from topkapi.files import read_json, require_shape, sha256, write_atomic, write_json
from topkapi.tensor_files import load_tensors, save_tensors

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SHAPE = {
    "autoencoder": {"d_model": int, "n_latents": int, "k": int},
    "language_model": str | None,  # left out by others, as those below
    "site": str | None,
    "files": dict | None,  # of a finished one
    "summary": dict | None,
    "training": dict | None,
}
NORMALISATION = "per_token_mean_and_norm"  # subtract the mean over d_model, scale to unit norm; undone on output


def write_config(folder: Path, description: dict[str, Any]) -> None:
    """Write config.json: the description plus what made it."""
    made_by = {"topkapi_version": topkapi.__version__, "commit": commit(), "python": platform.python_version()}
    write_json(folder / CONFIG, {"normalisation": NORMALISATION, **description, **made_by})


def write_published(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write the weights, then config.json, which holds their checksum."""
    write_atomic(folder / WEIGHTS, lambda path: save_tensors(tensors, path))
    write_config(folder, {**description, "files": {WEIGHTS: sha256(folder / WEIGHTS)}})


def require_run(folder: Path) -> None:
    """Raise TopkapiError where there is no such folder, or nothing of a run is in it."""
    if not folder.is_dir():
        raise TopkapiError(f"no run {folder}: give the folder that topkapi train wrote, as in topkapi eval runs/demo.")
    if not any((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        advice = f"one of those in it, such as {inside[0]}" if inside else "the folder that topkapi train wrote"
        raise TopkapiError(f"no run in the folder {folder}, which has no {CONFIG}: give {advice}.")


def read_config(folder: Path) -> dict[str, Any]:
    """The description that `write_config` wrote. Raises TopkapiError if it is missing, damaged or not ours."""
    remedy = "Restore it from a copy, or train again in another folder."
    config = read_json(folder / CONFIG, "Autoencoder", remedy)
    if config.get("normalisation") != NORMALISATION:
        raise TopkapiError(
            f"{folder / CONFIG} says normalisation {config.get('normalisation')!r}; this version of Topkapi knows "
            f"{NORMALISATION!r}."
        )
    require_shape(config, SHAPE, folder / CONFIG, "Autoencoder", remedy)
    return config


def checksum_of(folder: Path) -> str | None:
    """SHA-256 of the weights, by which a finished autoencoder is known; None before. Raises as `read_config`."""
    return (read_config(folder).get("files") or {}).get(WEIGHTS)


def read_published(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description. Raises TopkapiError if a file is missing, damaged, or the two do not belong together."""
    config, path = read_config(folder), folder / WEIGHTS
    wanted = (config.get("files") or {}).get(WEIGHTS)
    if wanted is None or not path.exists():
        raise TopkapiError(
            f"{folder} holds no finished autoencoder: {WEIGHTS} is written when training ends. "
            f"If training was interrupted, continue it: {command_line('train', folder, '--resume')}."
        )
    remedy = f"Restore it from a copy; in a run folder, {command_line('train', folder, '--resume')} writes it again."
    return load_tensors(path, wanted, "Autoencoder", remedy), config


def commit() -> str:
    """Commit of the checkout that the package runs from, or "" for an installed release."""
    head = Path(topkapi.__file__).parents[1] / ".git" / "HEAD"
    try:
        text = head.read_text().strip()
        return text if not text.startswith("ref: ") else (head.parent / text[5:]).read_text().strip()
    except OSError:
        return ""
