"""The commands that make the data of figures again, from the settings that runs and sweeps have saved.

Each starts from the recipe that needs the fewest other settings. A sweep's variants are gathered into as few grids as
merging one option after the other gives; their products are exactly those variants.
"""

import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from topkapi.config import EvalConfig, TrainConfig, from_file
from topkapi.evaluate.measures import MEASURES
from topkapi.figures.sources import Run
from topkapi.published import CONFIG, read_config
from topkapi.recipes import RECIPES
from topkapi.sweep import SETTINGS, read_settings, shared_config
from topkapi.sweep.grid import shared

AXES = ("seeds", "k", "l1_coefficient", "n_latents", "decoder_norm", "lr", "sparsity")


def commands(folders: Sequence[Path], runs: Sequence[Run]) -> list[str]:
    """A line for each run and each grid of the given folders, and for each study and further evaluation of a run."""
    lines = []
    for folder in folders:
        if (folder / SETTINGS).exists():
            lines += _sweep(folder, shared_config(folder), list(read_settings(folder)["variants"].values()))
        else:
            lines.append(_train(folder, from_file(TrainConfig, read_config(folder)["training"], folder / CONFIG)))
    for run in runs:
        if run.study is not None:
            lines.append(shlex.join(["topkapi", "study", str(run.folder), *_study(run)]))
        if metrics := [name for name in MEASURES if run.evaluation.get(name) is not None]:
            lines.append(shlex.join(["topkapi", "eval", str(run.folder), "--metrics", *metrics, *_lengths(run)]))
    return lines


def _study(run: Run) -> list[str]:
    arrays, identity = run.study.arrays, run.study.identity
    split, reservoir = identity["split"], identity["reservoir"]
    flags = ["--tokens", str(len(arrays["tokens"]))]
    return flags + ["--split", split] * (split != "held_out") + ["--reservoir", str(reservoir)] * (reservoir > 0)


def _lengths(run: Run) -> list[str]:
    """Numbers of tokens that a run was evaluated on, where they are not those of its training config."""
    own = EvalConfig(**{field.name: run.settings[f"eval.{field.name}"] for field in fields(EvalConfig)})
    used = run.evaluation.get("settings", {})
    return _flags(replace(own, **{name: used[name] for name in vars(own) if name in used}), own)


def _train(folder: Path, config: TrainConfig) -> str:
    name, flags = min(((name, _flags(config, make())) for name, make in RECIPES.items()), key=lambda one: len(one[1]))
    return shlex.join(["topkapi", "train", name, "--run", str(folder), *flags])


def _sweep(folder: Path, config: TrainConfig, variants: list[dict[str, Any]]) -> list[str]:
    def base(make: Any) -> TrainConfig:
        recipe = make()
        return shared(replace(recipe, eval=replace(recipe.eval, downstream_tokens=0)))

    name, flags = min(((n, _flags(config, base(make))) for n, make in RECIPES.items()), key=lambda one: len(one[1]))
    start = ["topkapi", "sweep", name, "--out", str(folder), *flags]
    return [shlex.join([*start, *_options(grid)]) for grid in grids(variants)]


def grids(variants: Sequence[dict[str, Any]]) -> list[dict[str, tuple]]:
    """Values of each option of `topkapi sweep`, () where it is not given; their products are exactly the variants."""
    found = [_single(variant) for variant in variants]
    for axis in AXES:
        merged: dict[tuple, dict[str, tuple]] = {}
        for grid in found:
            others = tuple(value for name, value in grid.items() if name != axis)
            if others not in merged:
                merged[others] = grid
            elif bool(grid[axis]) == bool(merged[others][axis]) and not _kinds_mix(grid, merged[others]):
                values = dict.fromkeys((*merged[others][axis], *grid[axis]))
                merged[others] = merged[others] | {axis: tuple(values)}
            else:
                merged[(*others, grid[axis])] = grid
        found = list(merged.values())
    return found


def _kinds_mix(a: dict[str, tuple], b: dict[str, tuple]) -> bool:
    """Whether one is of TopK and the other of a baseline: they have options of their own."""
    return ("none" in a["sparsity"]) != ("none" in b["sparsity"])


def _single(variant: dict[str, Any]) -> dict[str, tuple]:
    is_topk = variant["sparsity"] == "none"
    return {
        "n_latents": (variant["n_latents"],),
        "k": (variant["k"],) if is_topk else (),
        "seeds": (variant["seed"],),
        "lr": (variant["lr"],),
        "decoder_norm": ("on" if variant["decoder_norm"] else "off",) if is_topk else (),
        "sparsity": (variant["sparsity"],),
        "l1_coefficient": () if is_topk else (variant["l1_coefficient"],),
    }


def _options(grid: dict[str, tuple]) -> list[str]:
    usual = {"lr": ("auto",), "decoder_norm": ("on",), "sparsity": ("none",)}
    words = []
    for name, values in grid.items():
        if values and values != usual.get(name):
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def _flags(config: Any, recipe: Any, prefix: str = "") -> list[str]:
    """Options that make `config` of the recipe."""
    words = []
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(recipe, field.name)
        name = field.name.replace("_", "-")
        if is_dataclass(ours):
            words += _flags(ours, theirs, f"{prefix}{name}.")
        elif isinstance(ours, bool) and ours != theirs:
            words.append(f"--{prefix}{name}" if ours else f"--{prefix}no-{name}")
        elif ours != theirs:
            words += [f"--{prefix}{name}", *map(str, ours if isinstance(ours, tuple) else [ours])]
    return words
